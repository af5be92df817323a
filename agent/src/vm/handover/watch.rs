//! Watchdogs: QEMU waits for ever in most of its states, so somebody has to count.
//!
//! Owns the limits and what a wait that went on too long turns into: an event for the machine. Leaves clocks to the session. No
//! limit ever makes a loaded target give up by itself, and none makes a source run that has handed over.

use std::fmt;
use std::time::Duration;

use super::{Reason, SourceEvent, SourceOwner, SourceState, TargetEvent, TargetOwner, TargetState};

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
    /// Whether something went on too long. `in_state`: since `state()` changed, the stream was written to its end, or COMMIT was
    /// heard, whichever was last; or since this last gave something.
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
}
