//! Why a handover was given up, and by whose word a VM changed hands.
//!
//! Owns the words for people. The list is closed: what crosses the wire or lies in a journal is a number of ours, never text.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a generation was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// The operator cancelled the job.
    Cancelled,
    /// An agent was restarted while QEMU migrated.
    Restarted,
    /// QEMU reached its pre-switchover state unasked, with too much left to send.
    TooEarly,
    /// It would not have converged.
    NoConvergence,
    /// The other side was out of reach for too long.
    LinkLost,
    /// A watchdog's limit passed before the handover.
    TooSlow,
    /// The source handed over and heard no answer in time.
    NoAnswer,
    /// The source's QEMU said failed or cancelled, or refused a command.
    MigrationFailed,
    /// The source's QEMU ended.
    SourceQemuDied,
    /// Somebody else drove the source's QEMU on.
    Meddled,
    /// The old copy could not be made unrunnable.
    NotBarred,
    /// The journal of this host cannot be written.
    JournalFailed,
    /// The target's QEMU did not start, did not load the stream, or ended.
    LoadFailed,
    /// Length or hash of the stream differ.
    StreamDiffers,
    /// The target counts other disk batches than the source.
    DisksDiffer,
    /// A disk of the target could not be read or written.
    DiskFailed,
    /// The target's agent restarted before it had noted what it loaded.
    ProofLost,
    /// The target's QEMU ran the VM without being told to.
    RanUnasked,
    /// The source said two different things about the same generation.
    Contradicted,
    /// A newer generation replaced it.
    Replaced,
    /// The operator's `resolve`.
    Operator,
    /// The operator's program that runs at the handover.
    HookFailed,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancelled => "the job was cancelled",
            Self::Restarted => "an agent was restarted during the migration",
            Self::TooEarly => "QEMU stopped the VM before little enough was left to send",
            Self::NoConvergence => "the VM changes faster than the link carries",
            Self::LinkLost => "the other site was out of reach for too long",
            Self::TooSlow => "a step of the handover took longer than its limit",
            Self::NoAnswer => "the target did not answer the commit in time",
            Self::MigrationFailed => "the source's QEMU gave the migration up",
            Self::SourceQemuDied => "the source's QEMU ended",
            Self::Meddled => "somebody else drove the source's QEMU",
            Self::NotBarred => "the old copy could not be made unrunnable",
            Self::JournalFailed => "the handover journal could not be written",
            Self::LoadFailed => "the target's QEMU did not load the VM",
            Self::StreamDiffers => "the target received another stream than the source sent",
            Self::DisksDiffer => "the target counts other disk batches than the source",
            Self::DiskFailed => "a disk of the target failed",
            Self::ProofLost => "the target's agent was restarted before it had noted what it loaded",
            Self::RanUnasked => "the target's QEMU ran the VM without being told to",
            Self::Contradicted => "the source contradicted itself",
            Self::Replaced => "a newer attempt replaced it",
            Self::Operator => "the operator resolved it",
            Self::HookFailed => "the hook at the handover failed",
        })
    }
}

/// By whose word the VM changed hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum By {
    /// The two agents agreed.
    Protocol,
    /// `longhaul resolve`.
    Operator,
}

/// The operator's word on who owns a VM that is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Resolve {
    /// The source is to run it.
    Source,
    /// The target is to run it.
    Target,
}

impl Resolve {
    /// What it risks, for the question that has to be answered with yes.
    pub fn risk(self) -> &'static str {
        match self {
            Self::Source => {
                "The source will run the VM as it was when it was handed over. If the target runs it or ever did, there are two \
                 copies of it, and what the target wrote is lost. Make sure that the target host is off, or that its QEMU is gone \
                 and its agent answers `aborted`."
            }
            Self::Target => {
                "The target will run the VM without the source's word that everything arrived. If the source runs it, there are \
                 two copies of it; the last writes may be missing; where its memory was not loaded it boots as after a power \
                 failure. Make sure that the source host is off, or that its QEMU is stopped and its agent says `handed over`."
            }
        }
    }
}
