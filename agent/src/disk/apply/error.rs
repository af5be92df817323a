//! Why a copy cannot be written, each as one sentence with its remedy.
//!
//! Owns the error type of `apply` and the sorting of system errors into "no space" and the rest, because the session waits on the
//! first and gives up on the others.

use std::io;
use std::path::{Path, PathBuf};

use longhaul_common::digest::{Digest, DigestError};
use longhaul_common::ids::{Attempt, Round};

/// What went wrong with a target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("{} exists already: remove it, choose another path, or allow overwriting", .path.display())]
    Exists { path: PathBuf },
    #[error("{} is in use ({by}): release it first", .path.display())]
    InUse { path: PathBuf, by: String },
    #[error("{} is refused as a target: {reason}", .path.display())]
    Refused { path: PathBuf, reason: String },
    #[error("{} holds {have} bytes, but the disk needs {need}: enlarge it or choose another", .path.display())]
    TooSmall { path: PathBuf, have: u64, need: u64 },
    /// Wait until somebody made room, then go on.
    #[error("no space to {action} {}: make room, and the job goes on", .path.display())]
    NoSpace {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: Option<io::Error>,
    },
    #[error("{} has {free} bytes free, but {needed} are needed: make room or choose another place", .path.display())]
    TooLittleSpace { path: PathBuf, needed: u64, free: u64 },
    #[error("cannot {action} {}", .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Every leaf of the batch holds something newer already: nothing was written, nothing is lost.
    #[error("attempt {attempt} round {round} is older than what the disk holds there already")]
    Stale { attempt: Attempt, round: Round },
    #[error("the batch is malformed: {0}")]
    Malformed(String),
    /// A flush failed before, so nobody knows what of the unflushed writes reached the disk.
    #[error("{} cannot be written on after a failed flush: open it again, and the job goes on", .path.display())]
    Failed { path: PathBuf },
    #[error("leaf {leaf} (1 MiB at {}) was never written", leaf << 20)]
    Incomplete { leaf: u64 },
    #[error("leaf {leaf} (1 MiB at {}) was written as {written} but reads as {read}: check the storage", leaf << 20)]
    Differs {
        leaf: u64,
        written: Digest,
        read: Digest,
    },
    #[error("the reading back of {} was given up before its end; it begins again with the next attempt", .path.display())]
    Stopped { path: PathBuf },
    /// The copy was finished before; only its log was left, which is removed now.
    #[error("{} was completed by this job already", .path.display())]
    AlreadyPromoted { path: PathBuf },
    #[error("the digest of the copy cannot be stated")]
    Digest(#[from] DigestError),
    #[error("{tool} failed: {message}")]
    Tool { tool: String, message: String },
}

impl TargetError {
    /// Turns a system error into this, with what was tried on which path; a full disk or quota becomes `NoSpace`.
    pub(crate) fn during<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |source| {
            let (path, source) = (path.to_owned(), source.into());
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace {
                    action,
                    path,
                    source: Some(source),
                },
                _ => Self::Io { action, path, source },
            }
        }
    }

    pub(crate) fn refused(path: &Path, reason: impl Into<String>) -> Self {
        Self::Refused {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn in_use(path: &Path, by: impl Into<String>) -> Self {
        Self::InUse {
            path: path.to_owned(),
            by: by.into(),
        }
    }
}
