//! Who may run the VM: two state machines, one on each agent, for one handover of one job.
//!
//! Owns the decision. Leaves alone every socket, clock, file and QEMU: an event goes in, effects come out, and the session
//! does them. The model (`agent/tests/vm_model.rs`) explores this very code. Promises, for any loss, duplicate, delay or
//! crash: never two owners; never none that can be made to run; the target runs only what the source named in its COMMIT.
//!
//! ```text
//!        source                                              target
//! Iterating    (Began durable)                  Waiting      (Prepared durable)
//!    | QEMU stopped                                |
//! PreSwitchover                                    |  stream written, QEMU loaded, disks durable
//!    | last round read: migrate-continue           |
//! Continuing                                       |
//!    | completed, stream ended                     |
//! Barring      (old copy made unrunnable)          |
//!    | still completed                             |
//! HandedOver   (durable)  ----- Commit --------->  |--- all equal --> Running (durable) -> cont
//!    |------------------- <---- Ack ------------------------------------'
//! Released     (durable)                           |--- anything else, or Abort -> Aborted (durable)
//!    '- or TakenBack (durable) <-- Aborted ---------------------------------------'
//! before HandedOver: any failure -> Settling (runnable again; cancel, or `cont` after completed) -> Kept (durable)
//! ```
//!
//! What the session has to keep:
//! 1. Effects are done in order. `Journal` is durable before the next effect begins. Where one fails, the rest of its list is
//!    dropped and `Failed` goes in. Between two events all effects of the first were done or failed.
//! 2. What is said of a QEMU is the answer to a query that was asked after the last effect was done, never a queued event.
//!    From `Begin` until the source is kept or handed over, another process in the place of its QEMU is `Gone`.
//! 3. `Begin` goes in only after the target said that the same generation is prepared.
//! 4. All effects may be repeated: `Cont` on a running VM, `KillIncoming` of a dead one and so on succeed.
//! 5. `Remind` goes in about once a second and whenever the link came back: it repeats what may have been lost.
//! 6. After a crash `restore` comes first, and its effects are done before anything else.

mod effect;
mod reason;
mod source;
mod target;
mod watch;
mod word;

pub use effect::{Effect, Note, Record};
pub use reason::{By, Reason, Resolve};
pub use source::{SourceEvent, SourceOwner, SourceQemu, SourceState};
pub use target::{TargetEvent, TargetOwner, TargetQemu, TargetState};
pub use watch::{Limits, Overdue, TargetWatch, Wait};
pub use word::{DiskRound, Facts, Generation, Stream, Word};

/// A journal whose records contradict each other, or belong to the other role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the handover journal says {record:?} where that cannot be ({state}): find out on which side the VM last ran, \
     move the journal away, and start it there by hand"
)]
pub struct Contradiction {
    pub record: Record,
    pub state: &'static str,
}
