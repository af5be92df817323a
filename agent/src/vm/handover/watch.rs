//! Watchdogs: QEMU waits for ever in most of its states, so somebody has to count.
//!
//! Owns the limits and what a wait that went on too long turns into: an event for the machine. Leaves clocks to the session. No
//! limit ever makes a loaded target give up by itself, and none makes a source run that has handed over.

use std::fmt;
use std::time::{Duration, Instant};

use super::{
    Generation, Reason, SourceEvent, SourceOwner, SourceState, TargetEvent, TargetOwner, TargetState,
};

/// How long each wait may last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The guest runs and not a byte of its memory moves: a cut link is held out that long.
    pub stalled: Duration,
    /// The guest stands while the last disk round is read.
    pub pre_switchover: Duration,
    /// The guest stands while QEMU writes the rest of its memory.
    pub device: Duration,
    /// Handed over without an answer: then it is called back.
    pub answer: Duration,
    /// The same where the source's agent was restarted since: what the target still lacks died with it and will never come.
    pub answer_again: Duration,
    /// Between two tries of a command that QEMU did not obey.
    pub settle: Duration,
    /// The target's QEMU has all of its stream, or COMMIT came, and it is not ready.
    pub load: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stalled: Duration::from_secs(600),
            pre_switchover: Duration::from_secs(10),
            device: Duration::from_secs(10),
            answer: Duration::from_secs(30),
            answer_again: Duration::from_secs(1),
            settle: Duration::from_secs(1),
            load: Duration::from_secs(30),
        }
    }
}

/// What was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wait {
    /// QEMU active, nothing moves.
    Stream,
    /// QEMU in pre-switchover.
    LastRound,
    /// QEMU in device, after `migrate-continue`.
    Tail,
    /// COMMIT unanswered.
    Answer,
    /// QEMU to be out of its migration, to run, or to end.
    Qemu,
    /// The target to be complete.
    Load,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stream => "memory that moves",
            Self::LastRound => "the last disk blocks",
            Self::Tail => "the rest of the memory",
            Self::Answer => "the target's answer",
            Self::Qemu => "QEMU to obey",
            Self::Load => "the target to have everything",
        })
    }
}

/// A wait beyond its limit, and the event that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue<Event> {
    pub wait: Wait,
    pub waited: Duration,
    pub limit: Duration,
    pub event: Event,
}

impl<Event> fmt::Display for Overdue<Event> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (waited, limit) = (self.waited.as_secs_f64(), self.limit.as_secs_f64());
        write!(
            f,
            "waited {waited:.1} s for {}, the limit is {limit:.1} s",
            self.wait
        )
    }
}

fn overdue<Event>(wait: Wait, waited: Duration, limit: Duration, event: Event) -> Option<Overdue<Event>> {
    (waited >= limit).then_some(Overdue {
        wait,
        waited,
        limit,
        event,
    })
}

impl SourceOwner {
    /// Whether something went on too long. `in_state`: since `state()` last changed, or since this last gave something;
    /// `still`: since the last byte of QEMU's stream was taken or credited, or since the migration began.
    pub fn overdue(
        &self,
        in_state: Duration,
        still: Duration,
        limits: &Limits,
    ) -> Option<Overdue<SourceEvent>> {
        let stop = SourceEvent::Stop;
        match self.state() {
            SourceState::Iterating => overdue(Wait::Stream, still, limits.stalled, stop(Reason::LinkLost)),
            SourceState::PreSwitchover => overdue(
                Wait::LastRound,
                in_state,
                limits.pre_switchover,
                stop(Reason::TooSlow),
            ),
            SourceState::Continuing { .. } | SourceState::Barring { .. } => {
                overdue(Wait::Tail, in_state, limits.device, stop(Reason::TooSlow))
            }
            SourceState::HandedOver { recalled: None, .. } => {
                overdue(Wait::Answer, in_state, limits.answer, stop(Reason::NoAnswer))
            }
            SourceState::Fresh | SourceState::HandedOver { .. } => None,
            _ if self.is_closed() => None,
            _ => overdue(Wait::Qemu, in_state, limits.settle, SourceEvent::Remind),
        }
    }

    /// Whether a target that says nothing has to be called back by a source whose agent was restarted after it had handed over.
    /// `reached`: since COMMIT could be said again.
    pub fn overdue_again(&self, reached: Duration, limits: &Limits) -> Option<Overdue<SourceEvent>> {
        match self.state() {
            SourceState::HandedOver { recalled: None, .. } => overdue(
                Wait::Answer,
                reached,
                limits.answer_again,
                SourceEvent::Stop(Reason::Restarted),
            ),
            _ => None,
        }
    }
}

impl TargetOwner {
    /// Whether something went on too long. `in_state`: see [`TargetWatch`].
    pub fn overdue(&self, in_state: Duration, limits: &Limits) -> Option<Overdue<TargetEvent>> {
        match self.state() {
            TargetState::Waiting if self.commit().is_some() => overdue(
                Wait::Load,
                in_state,
                limits.load,
                TargetEvent::Stop(Reason::TooSlow),
            ),
            TargetState::Waiting if self.has_stream() && !self.is_loaded() => overdue(
                Wait::Load,
                in_state,
                limits.load,
                TargetEvent::Stop(Reason::LoadFailed),
            ),
            TargetState::Running { started: false, .. } => {
                overdue(Wait::Qemu, in_state, limits.settle, TargetEvent::Remind)
            }
            _ => None,
        }
    }

    fn awaits(&self) -> Awaits {
        Awaits {
            generation: self.generation(),
            state: *self.state(),
            stream: self.has_stream(),
            commit: self.commit().is_some(),
        }
    }
}

/// What a target waits in: a state may last for hours before its end comes into sight, and only from then on is there a limit.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Awaits {
    generation: Generation,
    state: TargetState,
    stream: bool,
    commit: bool,
}

/// The clock of one target's waits. It begins anew when the state changes, when the stream was written to its end, when COMMIT is
/// heard, and when a wait was found to be overdue.
pub struct TargetWatch {
    awaits: Awaits,
    since: Instant,
}

impl TargetWatch {
    pub fn new(owner: &TargetOwner, now: Instant) -> Self {
        Self {
            awaits: owner.awaits(),
            since: now,
        }
    }

    /// Takes note of what `owner` waits for now.
    pub fn note(&mut self, owner: &TargetOwner, now: Instant) {
        if owner.awaits() != self.awaits {
            *self = Self::new(owner, now);
        }
    }

    /// Whether `owner` has waited too long for what it waits for now.
    pub fn overdue(
        &mut self,
        owner: &TargetOwner,
        now: Instant,
        limits: &Limits,
    ) -> Option<Overdue<TargetEvent>> {
        self.note(owner, now);
        let overdue = owner.overdue(now.saturating_duration_since(self.since), limits)?;
        self.since = now;
        Some(overdue)
    }
}

#[cfg(test)]
mod tests {
    use longhaul_common::digest::Digest;

    use super::*;
    use crate::vm::handover::{DiskRound, Facts, Stream, TargetQemu, Word};

    /// A target whose source's memory has flowed for an hour, what it is handed over with, and the time.
    fn after_an_hour() -> (TargetOwner, TargetWatch, Facts, Instant) {
        let mut owner = TargetOwner::new();
        let start = Instant::now();
        owner.on(TargetEvent::Prepare(Generation(1)));
        let mut watch = TargetWatch::new(&owner, start);
        let now = start + Duration::from_secs(3600);
        assert_eq!(watch.overdue(&owner, now, &Limits::default()), None);
        let facts = Facts {
            disks: DiskRound { round: 3, batches: 2 },
            stream: Stream {
                len: 9,
                hash: Digest([7; 32]),
            },
        };
        (owner, watch, facts, now)
    }

    #[test]
    fn the_time_to_load_counts_from_the_end_of_the_stream() {
        let (mut owner, mut watch, facts, now) = after_an_hour();
        owner.on(TargetEvent::StreamWritten(facts.stream));
        let limits = Limits::default();
        let load = limits.load;
        assert_eq!(watch.overdue(&owner, now, &limits), None);
        assert_eq!(watch.overdue(&owner, now + load / 2, &limits), None);
        let late = watch.overdue(&owner, now + load, &limits).expect("overdue");
        assert_eq!(
            (late.event, late.waited),
            (TargetEvent::Stop(Reason::LoadFailed), load)
        );
        assert_eq!(watch.overdue(&owner, now + load, &limits), None);
    }

    #[test]
    fn the_time_for_the_last_disk_blocks_counts_from_commit() {
        let (mut owner, mut watch, facts, now) = after_an_hour();
        owner.on(TargetEvent::StreamWritten(facts.stream));
        owner.on(TargetEvent::Qemu(TargetQemu::Loaded));
        let limits = Limits::default();
        let (heard, load) = (now + Duration::from_secs(100), limits.load);
        assert_eq!(watch.overdue(&owner, heard, &limits), None);
        let generation = Generation(1);
        owner.on(TargetEvent::Heard(Word::Commit { generation, facts }));
        assert!(!owner.owns());
        assert_eq!(watch.overdue(&owner, heard, &limits), None);
        assert_eq!(watch.overdue(&owner, heard + load - limits.settle, &limits), None);
        let late = watch.overdue(&owner, heard + load, &limits).expect("overdue");
        assert_eq!(late.event, TargetEvent::Stop(Reason::TooSlow));
    }
}
