//! When `shared` takes part in a contest and when `background` gives way: the parts of the controller that look at others.
//!
//! Owns those two decisions and what is known of the whole path's rate. The contest's window itself is `rivalry`'s.

use std::time::{Duration, Instant};

use super::control::{Control, LOSS_GUARD, LOSS_REST, Phase};
use super::epoch::{Mode, Verdict};

/// `shared` contends for a queue that did not yield for so long, and asks so often whether anybody is still there.
const CROWDED: Duration = Duration::from_millis(500);
const CHECK: Duration = Duration::from_secs(5);
/// A rate is falling that lost so much of itself in each of so many intervals.
const FALL: Duration = Duration::from_secs(1);
const FALLEN: f64 = 0.95;
const FALLS: u32 = 2;
/// Part of a fair part below which somebody else must be there.
const SQUEEZED: f64 = 0.8;
/// So long nobody may have been there until what arrives counts as all that the path carries.
const CALM: Duration = Duration::from_secs(3);
/// Least and most part of the whole that `shared` takes in a contest.
const FAIR: (f64, f64) = (0.50, 0.58);

/// What a path showed of others.
#[derive(Clone, Debug, Default)]
pub(super) struct Others {
    /// Since when the queue has been longer than we would let it be.
    crowded_since: Option<Instant>,
    /// Since when it has not been.
    calm_since: Option<Instant>,
    /// Most bytes/s that arrived over a longer time while the path was ours.
    most_rate: Option<f64>,
    /// Bytes/s that arrived before the last check of a contest.
    contested: f64,
    fall: Fall,
}

/// Whether what arrives becomes less and less.
#[derive(Clone, Copy, Debug, Default)]
struct Fall {
    /// The interval that is being counted, and its bytes.
    since: Option<Instant>,
    bytes: f64,
    /// Bytes/s of the one before.
    before: f64,
    /// Intervals in a row that brought less than the one before.
    falls: u32,
}

impl Fall {
    fn count(&mut self, now: Instant, bytes: f64) {
        self.bytes += bytes;
        let span = now.saturating_duration_since(*self.since.get_or_insert(now));
        if span >= FALL {
            let rate = self.bytes / span.as_secs_f64();
            let fallen = rate < FALLEN * self.before;
            self.falls = if fallen { self.falls + 1 } else { 0 };
            (self.since, self.bytes, self.before) = (Some(now), 0.0, rate);
        }
    }
}

impl Control {
    /// Takes in what arrived per second. The whole is known once the path was filled for a while without anybody else's queue.
    pub(super) fn learn_most(&mut self, now: Instant, rate: f64) {
        // The path carries less than it did.
        let left = if self.loss() > LOSS_GUARD { 0.998 } else { 1.0 };
        let contends = self.rivalry.window().is_some();
        let others = &mut self.others;
        let for_long = |since: Instant| now.saturating_duration_since(since) >= CALM;
        others.most_rate = match others.most_rate {
            Some(most) if contends && rate <= most => Some(left * most),
            Some(most) if contends || others.calm_since.is_some_and(for_long) => Some(rate.max(0.998 * most)),
            None if !contends && others.calm_since.is_some_and(for_long) => Some(rate),
            as_before => as_before,
        };
    }

    /// Cubic's window, kept to a fair part of what the path was seen to carry: a rival that minds no loss would get all otherwise, and one
    /// that minds each would get little. Who never was alone does not know the whole, and does as Cubic does.
    pub(super) fn contest_window(&self) -> Option<f64> {
        let window = self.rivalry.window()?;
        let part = self.fair_part();
        Some(part.map_or(window, |(least, most)| window.clamp(least, most)))
    }

    /// Bytes in flight that are a fair part, least and most.
    pub(super) fn fair_part(&self) -> Option<(f64, f64)> {
        let whole = self.others.most_rate? * self.residence;
        Some((FAIR.0 * whole, FAIR.1 * whole))
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
    pub(super) fn contend(&mut self, now: Instant, trough: f64, limited: bool) -> Option<Verdict> {
        if self.config.mode != Mode::Shared {
            return None;
        }
        if self.rivalry.window().is_some() {
            let every = CHECK.max(Duration::from_secs_f64(20.0 * self.base.min(1.0)));
            if !self.rivalry.is_check_due(now, every) {
                return Some(Verdict::Stay);
            }
            self.others.contested = self.rate;
            self.others.fall = Fall::default();
            self.phase = Phase::Dip { deep: true };
            return Some(Verdict::Listen);
        }
        if trough <= 1.5 * self.target() && !(limited && self.is_squeezed(trough)) {
            self.others.crowded_since = None;
            self.others.calm_since.get_or_insert(now);
            return None;
        }
        self.others.calm_since = None;
        let since = *self.others.crowded_since.get_or_insert(now);
        let patience = CROWDED.max(Duration::from_secs_f64(5.0 * self.base.min(2.0)));
        if now.saturating_duration_since(since) < patience {
            return None;
        }
        self.others.crowded_since = None;
        self.others.calm_since = None;
        self.rivalry
            .begin(now, self.window.max(10.0 * self.config.packet as f64));
        Some(Verdict::Stay)
    }

    /// `bytes` arrived.
    pub(super) fn count_arrived(&mut self, now: Instant, bytes: u64) {
        self.others.fall.count(now, bytes as f64);
    }

    /// Whether others took so much that less than a fair part is left: their queue may be short, because we make room for it. A path
    /// that shrinks does so at once; others that grow take their time.
    fn is_squeezed(&self, trough: f64) -> bool {
        let fair = self
            .others
            .most_rate
            .map_or(self.others.contested, |whole| FAIR.0 * whole);
        self.others.fall.falls >= FALLS && trough > 0.5 * self.target() && self.rate < SQUEEZED * fair
    }
}
