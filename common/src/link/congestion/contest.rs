//! When `shared` takes part in a contest and when `background` gives way: the parts of the controller that look at others.
//!
//! Owns those two decisions and what is known of the whole path's rate. The contest's window itself is `rivalry`'s.

use std::time::{Duration, Instant};

use super::control::{Control, LOSS_GUARD, LOSS_REST, Phase};
use super::epoch::{Mode, Verdict};

/// `shared` contends for a queue that did not yield for so long, and asks so often whether anybody is still there.
const CROWDED: Duration = Duration::from_millis(500);
const CHECK: Duration = Duration::from_secs(5);
/// Least and most part of the whole that `shared` takes in a contest.
const FAIR: (f64, f64) = (0.50, 0.58);

impl Control {
    pub(super) fn learn_most(&mut self, rate: f64) {
        if self.rivalry.window().is_none() || rate > self.most_rate {
            self.most_rate = rate.max(0.998 * self.most_rate);
        } else if self.loss() > LOSS_GUARD {
            // The path carries less than it did.
            self.most_rate *= 0.998;
        }
    }

    /// Cubic's window, kept to a fair part of what the path was seen to carry: a rival that minds no loss would get all otherwise, and one
    /// that minds each would get little.
    pub(super) fn contest_window(&self) -> Option<f64> {
        let window = self.rivalry.window()?;
        let whole = self.most_rate * self.residence;
        Some(window.clamp(FAIR.0 * whole, FAIR.1 * whole))
    }

    /// In the background a loss beside a queue is somebody else's need.
    pub(super) fn yield_to_loss(&mut self, now: Instant, sent: Instant) {
        let asked = self.latest_queue > 0.001 && self.answered.is_none_or(|at| sent >= at);
        if self.config.mode == Mode::Background && self.phase != Phase::Startup && asked {
            self.window = (self.window * 0.5).max(self.floor());
            self.answer_losses(now);
            self.loss_rest_until = Some(now + LOSS_REST);
        }
    }

    /// `shared` takes part in a contest for the queue after it has tried to yield for a while.
    pub(super) fn contend(&mut self, now: Instant, trough: f64) -> Option<Verdict> {
        if self.config.mode != Mode::Shared {
            return None;
        }
        if self.rivalry.window().is_some() {
            let every = CHECK.max(Duration::from_secs_f64(20.0 * self.base.min(1.0)));
            if !self.rivalry.is_check_due(now, every) {
                return Some(Verdict::Stay);
            }
            self.phase = Phase::Dip { deep: true };
            return Some(Verdict::Listen);
        }
        if trough <= 1.5 * self.target() {
            self.crowded_since = None;
            return None;
        }
        let since = *self.crowded_since.get_or_insert(now);
        let patience = CROWDED.max(Duration::from_secs_f64(5.0 * self.base.min(2.0)));
        if now.saturating_duration_since(since) < patience {
            return None;
        }
        self.crowded_since = None;
        self.rivalry
            .begin(now, self.window.max(10.0 * self.config.packet as f64));
        Some(Verdict::Stay)
    }
}
