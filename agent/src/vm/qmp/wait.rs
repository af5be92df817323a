//! Waiting for a state: woken by events, asking anyway now and then, never for ever.
//!
//! QEMU itself has no deadlines: a migration in `pre-switchover` waits for good. Every wait of ours has a watchdog.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::client::Qmp;
use super::error::QmpError;
use super::event::{Events, Heard};

/// How long a state is believed without an event.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A watchdog over one wait.
///
/// Made before the command whose effect is awaited; then in a loop: ask for the state, and [`Watch::again`] where it is not
/// there yet.
#[derive(Debug)]
pub struct Watch {
    events: Events,
    started: Instant,
    limit: Duration,
}

impl Watch {
    /// Starts the clock, and listens from now on.
    pub fn start(qmp: &Qmp, limit: Duration) -> Self {
        Self {
            events: qmp.events(),
            started: Instant::now(),
            limit,
        }
    }

    /// Waits for any event or a tenth of a second.
    ///
    /// # Errors
    /// [`QmpError::NotReached`] once the limit has passed; `what` names the state that was awaited.
    pub async fn again(&mut self, what: &str) -> Result<(), QmpError> {
        let now = Instant::now();
        if now.duration_since(self.started) >= self.limit {
            return Err(QmpError::NotReached {
                what: what.to_owned(),
                limit: self.limit,
            });
        }
        let heard = timeout_at(now + ASK_AGAIN, self.events.next()).await;
        if heard == Ok(Heard::Lost) {
            // The next question says why; this keeps the loop from spinning until then.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// How long it has been waited.
    pub fn waited(&self) -> Duration {
        self.started.elapsed()
    }
}
