//! What the two agents say to each other about a handover.
//!
//! Owns the words. Leaves alone how they cross: they may be lost, doubled, late, reordered, or of an older generation.
//! No word holds text of the other side, so none needs a bound.

use std::fmt;

use longhaul_common::digest::Digest;
use serde::{Deserialize, Serialize};

use super::Reason;

/// The n-th try of a job to hand its VM over, from 1. A higher one exists only after every lower one was given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// All bytes of QEMU's migration stream, from its magic to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stream {
    /// Bytes.
    pub len: u64,
    /// BLAKE3 of the bytes.
    pub hash: Digest,
}

/// How much of a VM's last round is durable at the target. What is of a later round is more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRound {
    pub round: u32,
    /// Distinct batches of all disks.
    pub batches: u32,
}

impl DiskRound {
    /// Whether whoever holds this much lacks nothing of `all`; a round of nothing is not noticed at the target.
    pub(super) fn covers(self, all: Self) -> bool {
        self >= all || all.batches == 0
    }
}

/// What the target must hold before it may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// The last round, read while the VM stood.
    pub disks: DiskRound,
    pub stream: Stream,
}

/// One word. `Commit` and `Abort` go to the target, `Ack` and `Aborted` to the source, the others both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Word {
    /// The source will not run the VM again unless it hears `Aborted`.
    Commit { generation: Generation, facts: Facts },
    /// Give it up if RUNNING is not written; answered by `Aborted` or `Ack`.
    Abort { generation: Generation, reason: Reason },
    /// RUNNING is durable at the target.
    Ack { generation: Generation },
    /// ABORTED is durable at the target: it will never run this generation.
    Aborted { generation: Generation, reason: Reason },
    /// What became of it?
    Ask { generation: Generation },
    /// Neither: the answer to `Ask` before anything was decided.
    Undecided { generation: Generation },
    /// No record of that generation. After `Commit` this means a lost journal, and somebody has to look.
    Unknown { generation: Generation },
}

impl Word {
    pub fn generation(&self) -> Generation {
        match *self {
            Self::Commit { generation, .. }
            | Self::Abort { generation, .. }
            | Self::Ack { generation }
            | Self::Aborted { generation, .. }
            | Self::Ask { generation }
            | Self::Undecided { generation }
            | Self::Unknown { generation } => generation,
        }
    }
}
