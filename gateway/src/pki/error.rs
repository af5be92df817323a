//! Why a `pki` command did nothing, or not all: each reads as a sentence with its remedy.

use std::path::PathBuf;

use longhaul_common::link::NotAnIdentity;

use super::DAYS_MAX;

/// Why a `pki` command did nothing, or not all.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A name that breaks the rules.
    #[error(transparent)]
    Name(#[from] NotAnIdentity),
    /// A file cannot be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No authority there.
    #[error("there is no authority in {}: make one with `longhaul pki init`, or name its directory with --dir", directory.display())]
    NoAuthority {
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// An authority is there already.
    #[error("there is an authority in {} already: a new one would orphan every certificate it issued; name another --dir", directory.display())]
    AuthorityExists {
        /// Where.
        directory: PathBuf,
    },
    /// A record cannot be read.
    #[error("{} is damaged at line {line}: restore it from a backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The output files exist.
    #[error("{} exists: use --replace to write over it, or --out for another directory", path.display())]
    Exists {
        /// The first of them.
        path: PathBuf,
    },
    /// A validity of zero, or beyond reason.
    #[error("{0} days is not a usable time: use 1 to {DAYS_MAX}")]
    Days(u32),
    /// A certificate would outlive the authority.
    #[error(
        "the authority itself is valid until {until} only: use --days {days} or less, or make a new authority"
    )]
    OutlivesAuthority {
        /// The authority's last day.
        until: String,
        /// What is left, in days.
        days: i64,
    },
    /// Nothing of that name was issued.
    #[error("no certificate of '{0}' was issued here: see `longhaul pki list`")]
    Unknown(String),
    /// A name that several programs share.
    #[error("'{name}' is several programs: name one of {candidates}")]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// What it could be.
        candidates: String,
    },
    /// A serial in the records that is none.
    #[error("'{0}' is not a serial: 32 hex digits were expected")]
    Serial(String),
    /// A date before 1970 or out of range.
    #[error("the date cannot be written into a certificate: check the clock of this host")]
    Date,
    /// The certificate library failed.
    #[error("the certificate cannot be signed")]
    Sign(#[source] rcgen::Error),
    /// The result cannot be printed.
    #[error("the result cannot be printed")]
    Print(#[source] std::io::Error),
    /// The result cannot be written as JSON.
    #[error("the result cannot be written as JSON")]
    Output(#[source] serde_json::Error),
}
