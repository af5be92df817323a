//! The authority's directory: which files it has, who changes them, and what was issued.
//!
//! Owns the lock that lets one command work at a time, the list of issued certificates (`issued.jsonl`, one JSON object per
//! line), and how a file is written: to a temporary name, flushed, renamed, and the directory flushed, so that a crash leaves the
//! old file or the new one. Leaves alone what is in a certificate (`authority`).
//!
//! ```text
//! DIR/            0700
//!   ca.key        0600  the authority's private key: whoever has it can be anyone
//!   ca.pem              the authority's certificate: copied to every host
//!   crl.pem             the revocation list: copied to every host whenever it changes
//!   authority.json      trust domain and last day
//!   issued.jsonl        every certificate ever issued, and whether it is revoked
//!   issued/             certificates and keys, to be copied to their hosts
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use longhaul_common::link::Identity;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::PkiError;

/// What is known about the authority itself (`authority.json`).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct About {
    pub(super) trust_domain: String,
    pub(super) not_after: Timestamp,
}

/// One issued certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// 32 hex digits.
    pub(super) serial: String,
    pub(super) identity: Identity,
    pub(super) not_before: Timestamp,
    pub(super) not_after: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) revoked: Option<Timestamp>,
}

/// Whether a certificate is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    Valid,
    Expired,
    Revoked,
}

impl State {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

impl Record {
    pub(super) fn state(&self, now: Timestamp) -> State {
        match self.revoked {
            Some(_) => State::Revoked,
            None if self.not_after < now => State::Expired,
            None => State::Valid,
        }
    }
}

/// The directory, locked for as long as this lives.
pub(super) struct Directory {
    path: PathBuf,
    _lock: File,
}

impl Directory {
    /// Makes the directory if need be, and locks it.
    pub(super) fn create(path: &Path) -> Result<Self, PkiError> {
        make_private(path)?;
        Self::open(path)
    }

    /// Locks an existing directory.
    pub(super) fn open(path: &Path) -> Result<Self, PkiError> {
        let lock_path = path.join(".lock");
        let file_error = |source| PkiError::File {
            path: lock_path.clone(),
            source,
        };
        let mut options = fs::OpenOptions::new();
        let lock = options
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path);
        let lock = lock.map_err(file_error)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| file_error(error.into()))?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn read(&self, name: &str) -> Result<String, PkiError> {
        let path = self.file(name);
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(PkiError::NoAuthority {
                directory: self.path.clone(),
            }),
            other => other.map_err(|source| PkiError::File { path, source }),
        }
    }

    pub(super) fn about(&self) -> Result<About, PkiError> {
        let text = self.read("authority.json")?;
        serde_json::from_str(&text).map_err(|source| PkiError::Damaged {
            path: self.file("authority.json"),
            line: 1,
            source,
        })
    }

    pub(super) fn records(&self) -> Result<Vec<Record>, PkiError> {
        let text = self.read("issued.jsonl")?;
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty());
        lines
            .map(|(number, line)| {
                serde_json::from_str(line).map_err(|source| PkiError::Damaged {
                    path: self.file("issued.jsonl"),
                    line: number + 1,
                    source,
                })
            })
            .collect()
    }

    pub(super) fn store_records(&self, records: &[Record]) -> Result<(), PkiError> {
        let mut text = String::new();
        for record in records {
            text.push_str(&serde_json::to_string(record).map_err(PkiError::Output)?);
            text.push('\n');
        }
        write(&self.file("issued.jsonl"), &text, 0o600)
    }
}

/// Makes a directory for its owner only, with the directories above it.
pub(super) fn make_private(path: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| PkiError::File {
            path: path.to_owned(),
            source,
        })
}

/// Replaces a file whole: after a crash the old or the new content is there.
pub(super) fn write(path: &Path, content: &str, mode: u32) -> Result<(), PkiError> {
    write_whole(path, content, mode).map_err(|source| PkiError::File {
        path: path.to_owned(),
        source,
    })
}

fn write_whole(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = parent.join(name);
    // A left-over of a killed run may have another mode: it is never reused.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(mode)
        .open(&temporary)?;
    let written = file
        .write_all(content.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    File::open(parent)?.sync_all()
}
