//! The journal of jobs: SQLite on a thread of its own.
//!
//! Owns the file, its schema and its upgrades. Everybody else sees [`JobRecord`]s; nobody sees SQL. Promises that `save` returns only
//! when the record is on the disk (synchronous = FULL), and that a journal of a newer version is refused instead of damaged.
//! Several gateways of one site will share a server behind this same interface.

use std::path::{Path, PathBuf};

use longhaul_common::ids::{JobId, NotAJobId};
use rusqlite::{Connection, Row, params};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::job::ledger::Sent;
use crate::job::progress::{JobState, Progress};
use crate::job::report::Report;
use crate::job::spec::JobSpec;

/// Version of the schema below.
const VERSION: i64 = 1;
/// Requests that may wait for the thread.
const QUEUE: usize = 64;

const SCHEMA: &str = "
CREATE TABLE job (
    id TEXT PRIMARY KEY,
    created INTEGER NOT NULL,
    state TEXT NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE INDEX job_by_age ON job (created);
PRAGMA user_version = 1;
";

/// Everything the journal keeps of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JobRecord {
    /// 32 hex digits.
    pub id: String,
    pub spec: JobSpec,
    pub state: JobState,
    /// Seconds since 1970.
    pub created: i64,
    pub started: Option<i64>,
    pub finished: Option<i64>,
    pub progress: Progress,
    /// Each disk's size and the bytes its content takes at most, once the source was opened.
    #[serde(default)]
    pub sizes: Vec<(u64, u64)>,
    /// A commit was asked for with these digests: the target may have arrived.
    pub committing: Option<Vec<String>>,
    /// Of each disk, what was sent in all attempts.
    #[serde(default)]
    pub sent: Vec<Sent>,
    /// The operator cancelled it; its partial copy is being removed.
    #[serde(default)]
    pub cancelling: bool,
    /// The cause of the last failure.
    pub message: Option<String>,
    pub report: Option<Report>,
}

impl JobRecord {
    /// The job's number.
    pub fn job(&self) -> Result<JobId, NotAJobId> {
        self.id.parse()
    }
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot open the journal {path}; see that its folder exists and may be written")]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error("the journal {path} has version {found}, this program knows {VERSION}; use the newer program")]
    Newer { path: PathBuf, found: i64 },
    #[error("the journal cannot be read or written")]
    Sql(#[from] rusqlite::Error),
    #[error("a record of the journal is damaged")]
    Record(#[from] serde_json::Error),
    #[error("the journal's thread has ended")]
    Gone,
}

type Request = Box<dyn FnOnce(&mut Connection) + Send>;

/// A handle to the journal.
#[derive(Clone)]
pub struct Store {
    requests: mpsc::Sender<Request>,
}

impl Store {
    /// Opens or makes the journal.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Open {
            path: path.to_owned(),
            source,
        };
        let mut connection = Connection::open(path).map_err(failed)?;
        connection
            .pragma_update(None, "journal_mode", "WAL")
            .map_err(failed)?;
        connection
            .pragma_update(None, "synchronous", "FULL")
            .map_err(failed)?;
        connection
            .busy_timeout(std::time::Duration::from_secs(10))
            .map_err(failed)?;
        let found: i64 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(failed)?;
        match found {
            0 => connection.execute_batch(SCHEMA).map_err(failed)?,
            VERSION => {}
            found => {
                return Err(StoreError::Newer {
                    path: path.to_owned(),
                    found,
                });
            }
        }
        let (requests, mut waiting) = mpsc::channel::<Request>(QUEUE);
        let body = move || {
            while let Some(request) = waiting.blocking_recv() {
                request(&mut connection);
            }
        };
        std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(body)
            .map_err(|_| StoreError::Gone)?;
        Ok(Self { requests })
    }

    async fn on_thread<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let request: Request = Box::new(move |connection| drop(answer.send(ask(connection))));
        self.requests.send(request).await.map_err(|_| StoreError::Gone)?;
        answered.await.map_err(|_| StoreError::Gone)?
    }

    /// Writes a record, new or known, durably.
    pub async fn save(&self, record: &JobRecord) -> Result<(), StoreError> {
        let record = record.clone();
        self.on_thread(move |connection| {
            let state = serde_json::to_string(&record.state)?;
            let text = serde_json::to_string(&record)?;
            connection.execute(
                "INSERT INTO job (id, created, state, record) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (id) DO UPDATE SET state = ?3, record = ?4",
                params![record.id, record.created, state, text],
            )?;
            Ok(())
        })
        .await
    }

    /// Notes how far a job is, and leaves everything else of its record as it is.
    pub async fn note(&self, id: &str, progress: Progress, sent: Vec<Sent>) -> Result<(), StoreError> {
        let id = id.to_owned();
        self.on_thread(move |connection| {
            let text = |row: &Row<'_>| row.get::<_, String>(0);
            let found = connection.query_row("SELECT record FROM job WHERE id = ?1", [&id], text);
            let mut record: JobRecord = serde_json::from_str(&found?)?;
            (record.progress, record.sent) = (progress, sent);
            let text = serde_json::to_string(&record)?;
            connection.execute("UPDATE job SET record = ?2 WHERE id = ?1", params![id, text])?;
            Ok(())
        })
        .await
    }

    /// The newest `limit` jobs, newest first.
    pub async fn newest(&self, limit: u32) -> Result<Vec<JobRecord>, StoreError> {
        self.on_thread(move |connection| {
            let mut query =
                connection.prepare("SELECT record FROM job ORDER BY created DESC, rowid DESC LIMIT ?1")?;
            let rows = query.query_map([limit], |row| row.get::<_, String>(0))?;
            rows.map(|text| Ok(serde_json::from_str(&text?)?)).collect()
        })
        .await
    }

    /// Jobs whose number starts with `start`, which holds nothing but lower hex digits; two at most.
    pub async fn starting_with(&self, start: &str) -> Result<Vec<JobRecord>, StoreError> {
        // 'g' is behind every hex digit.
        let (start, end) = (start.to_owned(), format!("{start}g"));
        self.on_thread(move |connection| {
            let mut query =
                connection.prepare("SELECT record FROM job WHERE id >= ?1 AND id < ?2 LIMIT 2")?;
            let rows = query.query_map([start, end], |row| row.get::<_, String>(0))?;
            rows.map(|text| Ok(serde_json::from_str(&text?)?)).collect()
        })
        .await
    }

    /// How many jobs there are in each state.
    pub async fn count(&self) -> Result<Vec<(JobState, u64)>, StoreError> {
        self.on_thread(|connection| {
            let mut query = connection.prepare("SELECT state, count(*) FROM job GROUP BY state")?;
            let rows = query.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)))?;
            rows.map(|row| {
                let (state, count) = row?;
                Ok((serde_json::from_str(&state)?, count.unsigned_abs()))
            })
            .collect()
        })
        .await
    }

    /// Jobs that have not come to their end, oldest first.
    pub async fn unfinished(&self) -> Result<Vec<JobRecord>, StoreError> {
        self.on_thread(|connection| {
            let mut query = connection.prepare(
                "SELECT record FROM job WHERE state NOT IN ('\"completed\"', '\"cancelled\"') ORDER BY created, rowid",
            )?;
            let rows = query.query_map([], |row| row.get::<_, String>(0))?;
            rows.map(|text| Ok(serde_json::from_str(&text?)?)).collect()
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::spec::tests::parsed_good;

    fn record(created: i64, state: JobState) -> JobRecord {
        JobRecord {
            id: JobId::random().to_string(),
            spec: parsed_good(),
            state,
            created,
            started: None,
            finished: None,
            progress: Progress::default(),
            sizes: Vec::new(),
            committing: None,
            sent: Vec::new(),
            cancelling: false,
            message: None,
            report: None,
        }
    }

    #[tokio::test]
    async fn a_note_leaves_the_wish_to_commit_alone() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("journal.sqlite")).unwrap();
        let mut job = record(1, JobState::Running);
        job.committing = Some(vec!["digest".to_owned()]);
        store.save(&job).await.unwrap();
        job.progress.done_bytes = 7;
        job.sent = vec![Sent {
            below: 9,
            ..Sent::default()
        }];
        let (progress, sent) = (job.progress.clone(), job.sent.clone());
        store.note(&job.id, progress, sent).await.unwrap();
        assert_eq!(store.starting_with(&job.id).await.unwrap(), [job]);
    }

    #[tokio::test]
    async fn records_survive_reopening_and_the_finished_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.sqlite");
        let store = Store::open(&path).unwrap();
        let (mut running, done) = (record(1, JobState::Running), record(2, JobState::Completed));
        store.save(&running).await.unwrap();
        store.save(&done).await.unwrap();
        running.message = Some("changed".to_owned());
        store.save(&running).await.unwrap();
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.unfinished().await.unwrap(), [running.clone()]);
        assert_eq!(store.newest(10).await.unwrap(), [done, running.clone()]);
        let count = store.count().await.unwrap();
        assert!(
            count.len() == 2 && count.contains(&(JobState::Completed, 1)),
            "{count:?}"
        );
        assert_eq!(
            store.starting_with(&running.id[..9]).await.unwrap(),
            [running.clone()]
        );
        assert_eq!(store.starting_with("").await.unwrap().len(), 2);
        let other = if running.id.starts_with('f') { "e" } else { "f" };
        assert!(!store.starting_with(other).await.unwrap().contains(&running));
    }

    #[test]
    fn a_newer_journal_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.sqlite");
        Connection::open(&path)
            .unwrap()
            .pragma_update(None, "user_version", 2)
            .unwrap();
        assert!(matches!(
            Store::open(&path),
            Err(StoreError::Newer { found: 2, .. })
        ));
    }
}
