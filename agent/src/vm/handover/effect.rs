//! What a machine wants done, what it wants written, and what it wants people to know.
//!
//! Owns the three lists. Leaves doing to the session. Effects of both roles share one type, so that one runner does them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{By, Facts, Generation, Reason, Stream, Word};

/// One line of a handover journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Record {
    // source
    /// QEMU is about to migrate; until more is written, a restarted agent cancels it and the source runs on.
    Began { generation: Generation },
    /// Given up before the handover: the source runs on. `gone`: its QEMU ended, the VM needs a boot.
    Kept {
        generation: Generation,
        reason: Reason,
        gone: bool,
    },
    /// The point of no return: the source runs it again only after `TakenBack`.
    HandedOver { generation: Generation, facts: Facts },
    TakenBack {
        generation: Generation,
        by: By,
        reason: Reason,
    },
    /// The target owns the VM.
    Released { generation: Generation, by: By },
    /// Nothing is left to do at the source's QEMU.
    Closed { generation: Generation },
    // target
    /// A QEMU is about to be started; every lower generation is barred.
    Prepared { generation: Generation },
    /// QEMU loaded this stream, and this many disk batches were durable then.
    Loaded {
        generation: Generation,
        stream: Stream,
        disk_batches: u64,
    },
    /// The target owns the VM. `boot`: not from memory but from its disks.
    Running {
        generation: Generation,
        by: By,
        boot: bool,
    },
    /// The VM was seen running: what becomes of its QEMU is no longer a matter of the handover.
    Started { generation: Generation },
    /// RUNNING is barred for ever.
    Aborted { generation: Generation, reason: Reason },
}

/// Something for the session to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Append and sync; nothing behind it in the list may begin before.
    Journal(Record),
    /// Hand to the gateway; may be lost.
    Send(Word),
    /// Tell people and the log.
    Report(Note),
    /// Ask QEMU how it is, and put the answer in as an event. No answer at all is no event.
    Look,
    // source
    /// Start QEMU's migration into the agent's socket.
    Migrate,
    /// `migrate-continue`: from now on QEMU's lock may be held until its stream is taken.
    MigrateContinue,
    /// Close the agent's end of QEMU's stream: frees a QEMU that is stuck writing, and fails its migration.
    CloseStream,
    /// `migrate_cancel`.
    Cancel,
    /// At both roles. At the source QEMU's answer may be an error before the migration is over: report it as `Failed`. At the
    /// target: assert that no writable export is left, add the bitmap for the way back, then `cont`.
    Cont,
    /// Lock and rename the images so that nobody can start the old copy. Fails where somebody else has them open.
    MakeUnrunnable,
    /// Undo it.
    MakeRunnable,
    /// End the source's QEMU, and no other than the one that was migrated.
    Quit,
    // target
    StartIncoming,
    /// End the QEMU that this agent started for this job, if any is left.
    KillIncoming,
    /// The VM has no QEMU but belongs here: start it from its disks (or tell people to).
    BootFromDisks,
}

/// What people must hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Note {
    /// The source runs on.
    Kept(Reason),
    /// The source does not run it any more.
    HandedOver,
    /// Nobody runs it until the other side answers.
    InDoubt,
    /// The other side has no record of it.
    Forgotten,
    /// The source took it back.
    TakenBack(Reason),
    Released,
    Running,
    Aborted(Reason),
    /// Its memory is lost; the disks are whole as after a power failure.
    Boot,
    /// The operator's word was refused.
    Refused(&'static str),
    /// Both sides may have run it: the worst case, only possible after an operator's word.
    TwoOwners,
    /// Nobody owns it: the operator gave it to a target that had given it up.
    NoOwner,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept(reason) => write!(f, "the VM runs on at the source: {reason}"),
            Self::HandedOver => f.write_str("the VM is handed over; the target is about to start it"),
            Self::InDoubt => f.write_str(
                "the VM is handed over and stopped here; the target has not answered yet. It starts there, or comes back, as \
                 soon as the target can be reached; `longhaul resolve` decides without it",
            ),
            Self::Forgotten => f.write_str(
                "the other side has no record of this handover, so its journal is lost: look whether the VM runs there, then \
                 use `longhaul resolve`",
            ),
            Self::TakenBack(reason) => write!(f, "the source took the VM back and runs it: {reason}"),
            Self::Released => f.write_str("the target runs the VM; the source's copy is a shadow"),
            Self::Running => f.write_str("the VM belongs to the target and runs there"),
            Self::Aborted(reason) => write!(f, "the target gave the VM up and will not run it: {reason}"),
            Self::Boot => f.write_str("the VM's memory is lost: it has to boot from its disks on this host"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::TwoOwners => f.write_str(
                "DANGER: both sides may have run this VM. Stop one of them at once, and keep its disks until it is clear which \
                 writes are missing",
            ),
            Self::NoOwner => f.write_str(
                "no side owns this VM: the operator gave it to the target, which had given it up. `longhaul resolve --run-at source` \
                 starts it at the source",
            ),
        }
    }
}
