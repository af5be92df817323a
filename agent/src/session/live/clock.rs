//! Since when a VM has run without a stop.
//!
//! Owns what is concluded from QEMU's events. A guest that stands commits nothing: time passes for the age proof only while it runs.
//! Promises that the answer is never earlier than the truth; where something was missed there is none.

use std::time::Instant;

use serde::Deserialize;
use serde_json::json;

use crate::vm::qmp::{Event, Events, Heard, Qmp, QmpError};

/// A look at one VM from some time on.
pub(super) struct RunClock {
    events: Option<Events>,
    since: Option<Instant>,
}

#[derive(Deserialize)]
struct Status {
    running: bool,
}

impl RunClock {
    /// Looks at it from now on.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub(super) async fn start(qmp: &Qmp) -> Result<Self, QmpError> {
        let events = qmp.events();
        let status: Status = qmp.query_with("query-status", json!({})).await?;
        Ok(Self {
            events: Some(events),
            since: status.running.then(Instant::now),
        })
    }

    /// One that never tells a time.
    pub(super) const fn stopped() -> Self {
        Self {
            events: None,
            since: None,
        }
    }

    /// The earliest time from which on the VM is known to have run all the time; `None` where it stands or something was missed.
    pub(super) fn since(&mut self) -> Option<Instant> {
        while let Some(heard) = self.events.as_mut().and_then(Events::try_next) {
            match heard {
                Heard::Event(Event::Stop) => self.since = None,
                Heard::Event(Event::Resume) => self.since = Some(Instant::now()),
                Heard::Event(_) => {}
                Heard::Missed | Heard::Lost => *self = Self::stopped(),
            }
        }
        self.since
    }

    /// Somebody else has looked at the VM for longer, and saw it run since then.
    pub(super) fn known_since(&mut self, earlier: Instant) {
        self.since = self.since.map(|since| since.min(earlier));
    }
}
