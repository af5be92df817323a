//! The numbers and names by which the programs speak of the same thing.
//!
//! Owns their types, so that a disk number is never mistaken for a round. Leaves alone who hands them out (the source gateway).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A job, unique over all sites: 128 random bits, written as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId(u128);

impl JobId {
    /// A new job's name.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// The first eight hex digits: enough for people, in file names and tables.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job {self}")
    }
}

/// Text that is not 32 hex digits.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a job name: 32 hex digits were expected")]
pub struct NotAJobId(String);

impl FromStr for JobId {
    type Err = NotAJobId;

    fn from_str(text: &str) -> Result<Self, NotAJobId> {
        let valid = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = valid.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        number.map(Self).ok_or_else(|| NotAJobId(text.to_owned()))
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// The n-th try of a job to connect both agents, from 1. A higher attempt ends every lower one.
    Attempt(u32)
}
number! {
    /// The n-th disk of the VM, from 0, in the order of the job's config.
    DiskIndex(u16)
}
number! {
    /// One pass over a disk: 0 is the first copy, n is the n-th dirty bitmap.
    Round(u32)
}
number! {
    /// The n-th batch of an attempt, from 0, counted over all disks.
    Sequence(u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_name_survives_text() {
        let job = JobId::random();
        assert_eq!(job.to_string().parse(), Ok(job));
        assert!("".parse::<JobId>().is_err());
        assert!("+0000000000000000000000000000000".parse::<JobId>().is_err());
    }
}
