//! Every job of this gateway.
//!
//! Owns the running drivers and the operator's wishes to them. Leaves running to `driver` and keeping to `store`. Promises that a job is
//! journaled before it is acknowledged, that jobs start in their order, and that unfinished ones start again with the program.

use std::sync::Arc;

use dashmap::DashMap;
use longhaul_common::ids::JobId;
use longhaul_common::wire::operator::OperatorWord;
use longhaul_common::wire::session::Refusal;
use longhaul_common::wire::words::cleaned;
use tokio::sync::{Semaphore, watch};

use super::attempt::Context;
use super::board::Board;
use super::driver::{Driver, Wish, now};
use super::order::{self, ForgetOrder, OrderDone, ResolveOrder, Side};
use super::progress::{JobState, Progress};
use super::spec::{JobSpec, SpecError};
use crate::agents::Agents;
use crate::send::ingest::Ingest;
use crate::send::transmit::Peer;
use crate::store::{JobRecord, Store, StoreError};

/// So many jobs are looked at for what a link carries.
const MEASURED_BY: u32 = 50;

/// What the operator asked for and cannot have.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("the job cannot be run")]
    Spec(#[from] SpecError),
    #[error("there is no [[peer]] for site '{site}'; known sites: {known}")]
    NoSuchPeer { site: String, known: String },
    #[error(
        "this gateway has no windows for tenant '{tenant}'; add it to reduction.tenants, at the target's gateway too; known: {known}"
    )]
    NoSuchTenant { tenant: String, known: String },
    #[error("there is no job '{0}'")]
    NoSuchJob(String),
    #[error("'{0}' names several jobs; write more of its digits")]
    Ambiguous(String),
    #[error("the job is {state:?} and cannot be {wish}")]
    WrongState { state: JobState, wish: &'static str },
    #[error(
        "the job moves no running VM: nothing of it can be in doubt or left behind; or name the agent with --agent"
    )]
    NotLive,
    #[error(transparent)]
    Agent(#[from] Refusal),
    #[error("too many clients watch jobs; close some, or ask for /v1/jobs/ID now and then")]
    TooManyWatchers,
    #[error("the journal failed")]
    Store(#[from] StoreError),
}

struct Running {
    board: Arc<Board>,
    wish: watch::Sender<Wish>,
}

/// Jobs under way, and where to find the others.
pub struct Jobs {
    agents: Arc<Agents>,
    ingest: Arc<Ingest>,
    peers: Vec<Arc<Peer>>,
    store: Store,
    running: DashMap<String, Running>,
    turns: Arc<Semaphore>,
}

impl Jobs {
    /// With at most `at_once` jobs running.
    pub fn new(
        agents: Arc<Agents>,
        ingest: Arc<Ingest>,
        peers: Vec<Arc<Peer>>,
        store: Store,
        at_once: usize,
    ) -> Arc<Self> {
        let turns = Arc::new(Semaphore::new(at_once.clamp(1, 1000)));
        Arc::new(Self {
            agents,
            ingest,
            peers,
            store,
            running: DashMap::new(),
            turns,
        })
    }

    /// The gateways this one sends to.
    pub fn peers(&self) -> &[Arc<Peer>] {
        &self.peers
    }

    /// The agents linked right now.
    pub fn agents(&self) -> &Arc<Agents> {
        &self.agents
    }

    /// Starts what the journal says is unfinished.
    pub async fn resume_unfinished(self: &Arc<Self>) -> Result<usize, StoreError> {
        let unfinished = self.store.unfinished().await?;
        let mut started = 0;
        for record in unfinished {
            let wish = match record.state {
                JobState::Failed => continue,
                _ if record.cancelling => Wish::Cancel,
                JobState::Paused => Wish::Pause,
                _ => Wish::Run,
            };
            match self.start(record, wish) {
                Ok(()) => started += 1,
                Err(error) => tracing::error!("a job of the journal cannot go on: {error}"),
            }
        }
        Ok(started)
    }

    /// Takes a new job.
    pub async fn submit(self: &Arc<Self>, spec: JobSpec) -> Result<JobRecord, JobError> {
        spec.check()?;
        // Before it is kept: what is refused now is nobody's job.
        self.context(&spec)?;
        let record = JobRecord {
            id: JobId::random().to_string(),
            spec,
            state: JobState::Queued,
            created: now(),
            started: None,
            finished: None,
            progress: Progress::default(),
            sizes: Vec::new(),
            committing: None,
            sent: Vec::new(),
            cancelling: false,
            message: None,
            report: None,
        };
        self.store.save(&record).await?;
        self.start(record.clone(), Wish::Run)?;
        Ok(record)
    }

    fn peer(&self, site: &str) -> Result<Arc<Peer>, JobError> {
        let found = self.peers.iter().find(|peer| peer.settings.site == site);
        found.cloned().ok_or_else(|| {
            let known: Vec<_> = self
                .peers
                .iter()
                .map(|peer| peer.settings.site.as_str())
                .collect();
            JobError::NoSuchPeer {
                site: site.to_owned(),
                known: known.join(", "),
            }
        })
    }

    /// How many jobs there are in each state.
    pub async fn count(&self) -> Result<Vec<(JobState, u64)>, StoreError> {
        self.store.count().await
    }

    /// What a job of this spec works with.
    pub fn context(&self, spec: &JobSpec) -> Result<Context, JobError> {
        let peer = self.peer(&spec.target.site)?;
        if !spec.tenant.is_empty() && !peer.tenants().any(|tenant| tenant == spec.tenant) {
            let known: Vec<_> = peer.tenants().collect();
            return Err(JobError::NoSuchTenant {
                tenant: spec.tenant.clone(),
                known: if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                },
            });
        }
        Ok(Context {
            agents: Arc::clone(&self.agents),
            ingest: Arc::clone(&self.ingest),
            peer,
        })
    }

    /// What earlier jobs got on the WAN to a site, in bits per second: the best of the newest, since none could get more than there is.
    pub async fn measured(&self, site: &str) -> Option<u64> {
        let newest = self.store.newest(MEASURED_BY).await.ok()?;
        let rate = |record: &JobRecord| {
            let report = record.report.as_ref()?;
            let ms = *report.stages_ms.get("transfer")?;
            // Shorter ones say more of round trips than of the link.
            (ms >= 1000).then(|| report.wan_bytes.saturating_mul(8000) / ms)
        };
        let there = newest.iter().filter(|record| record.spec.target.site == site);
        there.filter_map(rate).max()
    }

    fn start(self: &Arc<Self>, record: JobRecord, wish: Wish) -> Result<(), JobError> {
        let context = self.context(&record.spec)?;
        let job = record
            .job()
            .map_err(|error| JobError::NoSuchJob(error.to_string()))?;
        let board = Arc::new(Board::new(
            record.state,
            record.progress.clone(),
            record.sent.clone(),
        ));
        let (wish, wished) = watch::channel(wish);
        let id = record.id.clone();
        self.running.insert(
            id.clone(),
            Running {
                board: Arc::clone(&board),
                wish,
            },
        );
        let driver = Driver::new(record, job, context, self.store.clone(), board, wished);
        let jobs = Arc::clone(self);
        tokio::spawn(async move {
            let mut wish = driver.wish.clone();
            let turn = tokio::select! {
                turn = Arc::clone(&jobs.turns).acquire_owned() => turn.ok(),
                // A job that is not to run need not wait for its turn.
                _ = wish.wait_for(|wish| *wish != Wish::Run) => None,
            };
            let heard = driver.run().await;
            drop(turn);
            let ended = jobs.running.remove(&id);
            // What was wished while the driver wrote its last words was not heard by it.
            if let Some((_, running)) = ended
                && heard.has_changed().unwrap_or(false)
            {
                let wish = *running.wish.borrow();
                if let Err(error) = jobs.wish(&id, wish).await {
                    tracing::warn!(job = %id, "a late wish was not done: {error}");
                }
            }
        });
        Ok(())
    }

    /// A job by its number, or by the start of it.
    pub async fn find(&self, id: &str) -> Result<JobRecord, JobError> {
        let is_start = (1..=32).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let unknown = || JobError::NoSuchJob(cleaned(id));
        if !is_start {
            return Err(unknown());
        }
        let mut matching = self
            .store
            .starting_with(&id.to_ascii_lowercase())
            .await?
            .into_iter();
        match (matching.next(), matching.next()) {
            (Some(record), None) => Ok(self.current(record)),
            (Some(_), Some(_)) => Err(JobError::Ambiguous(id.to_owned())),
            (None, _) => Err(unknown()),
        }
    }

    /// The newest jobs, newest first.
    pub async fn newest(&self, limit: u32) -> Result<Vec<JobRecord>, JobError> {
        let newest = self.store.newest(limit).await?;
        Ok(newest.into_iter().map(|record| self.current(record)).collect())
    }

    /// The record with what its driver knows right now.
    fn current(&self, mut record: JobRecord) -> JobRecord {
        let board = self
            .running
            .get(&record.id)
            .map(|running| Arc::clone(&running.board));
        if let Some(board) = board.filter(|_| !record.state.is_at_rest()) {
            (record.state, record.progress) = board.read();
        }
        record
    }

    /// The job, if it is known here; `named`: an agent was named, which may know it though this gateway does not.
    async fn known(&self, id: &str, named: bool) -> Result<Option<JobRecord>, JobError> {
        match self.find(id).await {
            Ok(record) => Ok(Some(record)),
            Err(JobError::NoSuchJob(_)) if named => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has an agent decide a handover in doubt. A job whose VM goes back to its source ends as failed.
    pub async fn resolve(self: &Arc<Self>, id: &str, order: ResolveOrder) -> Result<OrderDone, JobError> {
        let record = self.known(id, order.agent.is_some()).await?;
        let word = order.word();
        let agent = order::agent_for(record.as_ref(), order.agent)?;
        let number = record.as_ref().map_or(id, |record| record.id.as_str());
        tracing::warn!(job = %cleaned(number), %agent, run_at = ?order.run_at, "the operator decides a handover");
        let done = order::ask(&self.agents, &agent, number, word).await?;
        let ends = |record: &&JobRecord| record.spec.source.agent == agent && !record.state.is_at_rest();
        if let (Side::Source, true, Some(record)) = (order.run_at, done.changed, record.as_ref().filter(ends))
        {
            self.wish(&record.id, Wish::Resolved).await?;
        }
        Ok(done)
    }

    /// Has the source's agent remove what a completed move left there.
    pub async fn forget(self: &Arc<Self>, id: &str, order: ForgetOrder) -> Result<OrderDone, JobError> {
        let record = self.known(id, order.agent.is_some()).await?;
        let agent = order::agent_for(record.as_ref(), order.agent)?;
        if let Some(record) = record
            .as_ref()
            .filter(|record| record.state != JobState::Completed)
        {
            return Err(JobError::WrongState {
                state: record.state,
                wish: "forgotten",
            });
        }
        let number = record.as_ref().map_or(id, |record| record.id.as_str());
        Ok(order::ask(&self.agents, &agent, number, OperatorWord::Forget).await?)
    }

    /// Tells a job's driver what is wished; a failed job is started again.
    pub async fn wish(self: &Arc<Self>, id: &str, wish: Wish) -> Result<JobRecord, JobError> {
        let record = self.find(id).await?;
        let words = match wish {
            Wish::Run => "resumed",
            Wish::Pause => "paused",
            Wish::Cancel => "cancelled",
            Wish::Resolved => "resolved",
        };
        if record.state.is_final() {
            return Err(JobError::WrongState {
                state: record.state,
                wish: words,
            });
        }
        let told = self.running.get(&record.id).is_some_and(|running| {
            running.wish.send_replace(wish);
            true
        });
        if !told {
            self.start(record.clone(), wish)?;
        }
        tracing::info!(job = %record.id, "the operator wants it {words}");
        Ok(record)
    }
}
