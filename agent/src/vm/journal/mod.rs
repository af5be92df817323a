//! The handover journal: one small file for each job and role, which decides after a crash who may run a VM.
//!
//! Owns the file. Leaves the bytes to `slot` and the meaning to `handover`. Blocks, so it is called from a thread. Promises: what
//! `append` returned for survives a power failure; space is taken when the file is made, so a full disk does not stop a
//! handover; a torn end is forgotten, any other damage refuses the whole file.

mod slot;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use longhaul_common::ids::JobId;
use serde::{Deserialize, Serialize};

use self::slot::{Check, Content, SLOT};
use super::handover::Record;

/// Slots in a new file: several handovers of some eight records each.
const SLOTS_NEW: usize = 64;
/// More than any job writes, since `rewrite` comes with every new generation.
const SLOTS_MAX: usize = 1024;
/// Records that `rewrite` takes: a snapshot has three at most.
const REWRITE_MAX: usize = 8;
/// How long a journal may be another's before that is an error.
const LOCK_TIME: Duration = Duration::from_secs(3);

/// Whose journal it is: a host may be both ends of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Source,
    Target,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// What is wrong with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("a record's checksum is wrong")]
    Slot,
    #[error("something stands behind its end")]
    BehindEnd,
    #[error("its length is impossible")]
    Length,
    #[error("its first record is missing or not of this job and role")]
    Header,
    #[error("a record is of a kind that this version does not know")]
    Body,
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("cannot {action} the handover journal {}: mend the disk, and it goes on", .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the handover journal {} is damaged ({damage}), so who may run the VM is unknown: find out on which side it last ran, \
         move the file away, and start it there by hand; a source's images may be named IMAGE.longhaul-JOB.moved", .path.display()
    )]
    Damaged { path: PathBuf, damage: Damage },
    #[error(
        "the handover journal {} is used by another program: does a second agent run with the same paths.state?",
        .0.display()
    )]
    Locked(PathBuf),
    #[error("the handover journal {} is full: that is a fault of the program, not of the disk", .path.display())]
    Full { path: PathBuf },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    job: String,
    role: Role,
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    header: Vec<u8>,
    file: File,
    /// What is durable, in order.
    records: Vec<Record>,
    last: Check,
    slots: usize,
    /// An append failed, so nobody knows what the file holds: the next one writes a new file.
    doubtful: bool,
}

/// The file's name in the state folder.
pub fn file_name(job: JobId, role: Role) -> String {
    format!("handover-{job}.{role}")
}

/// The jobs and roles whose journals lie in `state`: what a restarted agent settles first. Files of other names are left alone.
///
/// # Errors
/// The folder cannot be read.
pub fn list(state: &Path) -> Result<Vec<(JobId, Role)>, JournalError> {
    let failed = |source| JournalError::Io {
        action: "list",
        path: state.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(state).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        found.extend(name.to_str().and_then(parse_name));
    }
    found.sort_unstable_by_key(|(job, role)| (*job, *role as u8));
    Ok(found)
}

fn parse_name(name: &str) -> Option<(JobId, Role)> {
    let (job, role) = name.strip_prefix("handover-")?.split_once('.')?;
    let role = match role {
        "source" => Role::Source,
        "target" => Role::Target,
        _ => return None,
    };
    Some((job.parse().ok()?, role))
}

/// The records of a whole file's bytes.
fn parse(bytes: &[u8], header: &[u8]) -> Result<(Vec<Record>, Check), Damage> {
    let (slots, rest) = bytes.as_chunks::<SLOT>();
    if !rest.is_empty() || slots.is_empty() || slots.len() > SLOTS_MAX {
        return Err(Damage::Length);
    }
    let mut records = Vec::new();
    let mut last = Check::default();
    for (index, slot) in slots.iter().enumerate() {
        match slot::decode(&last, slot)? {
            Content::Body(body, check) if index == 0 => {
                last = check;
                if body != header {
                    return Err(Damage::Header);
                }
            }
            Content::Body(body, check) => {
                last = check;
                records.push(serde_json::from_slice(body).map_err(|_| Damage::Body)?);
            }
            Content::Empty | Content::Torn if index == 0 => return Err(Damage::Header),
            Content::Empty | Content::Torn => {
                let empty = slots[index + 1..].iter().flatten().all(|byte| *byte == 0);
                return if empty {
                    Ok((records, last))
                } else {
                    Err(Damage::BehindEnd)
                };
            }
        }
    }
    Ok((records, last))
}

impl Journal {
    /// Opens the journal of a job, or makes one that survives a power failure from now on.
    ///
    /// # Errors
    /// The file cannot be read or made, or is damaged.
    pub fn open(state: &Path, job: JobId, role: Role) -> Result<Self, JournalError> {
        let path = state.join(file_name(job, role));
        let header = Header {
            job: job.to_string(),
            role,
        };
        let header = serde_json::to_vec(&header).map_err(|error| during("name", &path)(error.into()))?;
        let mut file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Self::write_new(path, header, &[]);
            }
            Err(error) => return Err(during("open", &path)(error)),
        };
        lock(&file, &path)?;
        let mut bytes = Vec::new();
        let most = (SLOTS_MAX * SLOT + 1) as u64;
        file.by_ref()
            .take(most)
            .read_to_end(&mut bytes)
            .map_err(during("read", &path))?;
        let (records, last) = parse(&bytes, &header).map_err(|damage| JournalError::Damaged {
            path: path.clone(),
            damage,
        })?;
        let slots = bytes.len() / SLOT;
        // What a killed process wrote but did not sync is believed from now on, so it has to be durable first.
        file.sync_all().map_err(during("sync", &path))?;
        sync_folder(&path)?;
        Ok(Self {
            path,
            header,
            file,
            records,
            last,
            slots,
            doubtful: false,
        })
    }

    /// All durable records, in order: what `SourceOwner::restore` and `TargetOwner::restore` take.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a record and syncs it. After an error the record may or may not be there; the next call starts a new file with what
    /// is surely there.
    ///
    /// # Errors
    /// The disk failed.
    pub fn append(&mut self, record: Record) -> Result<(), JournalError> {
        let index = self.records.len() + 1;
        if self.doubtful || index >= self.slots {
            let mut records = self.records.clone();
            records.push(record);
            return self.replace(&records);
        }
        let body = encode(&record, &self.path)?;
        let full = || JournalError::Full {
            path: self.path.clone(),
        };
        let (bytes, check) = slot::encode(&self.last, &body).ok_or_else(full)?;
        let written = self.file.write_all_at(&bytes, (index * SLOT) as u64);
        if let Err(error) = written.and_then(|()| self.file.sync_data()) {
            self.doubtful = true;
            return Err(during("write", &self.path)(error));
        }
        self.last = check;
        self.records.push(record);
        Ok(())
    }

    /// Replaces all records by those few that say the same, in one step.
    ///
    /// # Errors
    /// The disk failed: then the old file holds.
    pub fn rewrite(&mut self, snapshot: &[Record]) -> Result<(), JournalError> {
        if snapshot.len() > REWRITE_MAX {
            return Err(JournalError::Full {
                path: self.path.clone(),
            });
        }
        self.replace(snapshot)
    }

    fn replace(&mut self, records: &[Record]) -> Result<(), JournalError> {
        match Self::write_new(self.path.clone(), self.header.clone(), records) {
            Ok(journal) => {
                *self = journal;
                Ok(())
            }
            Err(error) => {
                self.doubtful = true;
                Err(error)
            }
        }
    }

    fn write_new(path: PathBuf, header: Vec<u8>, records: &[Record]) -> Result<Self, JournalError> {
        let full = || JournalError::Full { path: path.clone() };
        let slots = (records.len() + 1).next_multiple_of(SLOTS_NEW);
        let slots = if slots - records.len() < SLOTS_NEW / 2 {
            slots + SLOTS_NEW
        } else {
            slots
        };
        if slots > SLOTS_MAX {
            return Err(full());
        }
        let mut bytes = Vec::with_capacity(slots * SLOT);
        let (first, mut last) = slot::encode(&Check::default(), &header).ok_or_else(full)?;
        bytes.extend_from_slice(&first);
        for record in records {
            let (slot, check) = slot::encode(&last, &encode(record, &path)?).ok_or_else(full)?;
            bytes.extend_from_slice(&slot);
            last = check;
        }
        bytes.resize(slots * SLOT, 0);
        let file = put(&path, &bytes)?;
        Ok(Self {
            path,
            header,
            file,
            records: records.to_vec(),
            last,
            slots,
            doubtful: false,
        })
    }

    /// Removes the file: only after `longhaul forget`, or where nothing was ever begun.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn remove(self) -> Result<(), JournalError> {
        fs::remove_file(&self.path).map_err(during("remove", &self.path))?;
        sync_folder(&self.path)
    }
}

fn during(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { action, path, source }
}

fn encode(record: &Record, path: &Path) -> Result<Vec<u8>, JournalError> {
    serde_json::to_vec(record).map_err(|error| during("write", path)(error.into()))
}

/// A whole new file under the final name, durable with its name.
fn put(path: &Path, bytes: &[u8]) -> Result<File, JournalError> {
    let temporary = path.with_added_extension("new");
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600);
    let file = options.open(&temporary).map_err(during("make", &temporary))?;
    lock(&file, &temporary)?;
    file.set_len(0).map_err(during("empty", &temporary))?;
    file.write_all_at(bytes, 0).map_err(during("write", &temporary))?;
    file.sync_all().map_err(during("sync", &temporary))?;
    fs::rename(&temporary, path).map_err(during("rename", &temporary))?;
    sync_folder(path)?;
    Ok(file)
}

/// Against a second agent with the same state folder. A session of this agent that has just ended is waited for.
fn lock(file: &File, path: &Path) -> Result<(), JournalError> {
    let limit = Instant::now() + LOCK_TIME;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < limit => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => return Err(JournalError::Locked(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(during("lock", path)(error)),
            Ok(()) => return Ok(()),
        }
    }
}

fn sync_folder(path: &Path) -> Result<(), JournalError> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(during("sync", folder))
}
