//! Beside others: what `shared` does when a queue does not yield, and what `background` makes of losses. Pure.
//!
//! Owns a window that grows and shrinks as Cubic's would (RFC 9438), for all connections to the peer as if they were one. It is
//! begun when somebody else keeps the queue full, and ended when the path turns out to be ours again; both are judged by
//! `control`. A loss counts only while the queue is long: random losses are no message.

use std::time::{Duration, Instant};

/// Cubic's constants: growth in packets/s^3, what is left after a loss.
const GROWTH: f64 = 0.4;
const LEFT: f64 = 0.7;
/// A loss is taken for congestion when the queue has at least this part of its greatest length.
const LONG_QUEUE: f64 = 0.3;

/// The contest, while there is one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rivalry {
    state: Option<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    window: f64,
    most: f64,
    /// Doubling per round trip until something is lost, as a TCP connection begins.
    searching: bool,
    /// Since the last loss.
    since: Instant,
    /// Seconds until `most` is reached again.
    k: f64,
    reno: f64,
    answered: Instant,
    queue: f64,
    queue_most: f64,
    checked: Instant,
    /// Checks in a row that found nobody.
    alone: u32,
}

impl Rivalry {
    pub(crate) fn begin(&mut self, now: Instant, window: f64) {
        self.state = Some(State {
            window,
            most: window,
            searching: true,
            since: now,
            k: 0.0,
            reno: window,
            answered: now,
            queue: 0.0,
            queue_most: 0.0,
            checked: now,
            alone: 0,
        });
    }

    pub(crate) fn end(&mut self) {
        self.state = None;
    }

    /// Bytes in flight; `None` while the path is ours.
    pub(crate) fn window(&self) -> Option<f64> {
        self.state.map(|state| state.window)
    }

    /// Whether it is time to ask the path again whether others are there.
    pub(crate) fn is_check_due(&mut self, now: Instant, every: Duration) -> bool {
        let due = |state: &mut State| {
            let due = now.saturating_duration_since(state.checked) >= every;
            if due {
                state.checked = now;
            }
            due
        };
        self.state.as_mut().is_some_and(due)
    }

    /// Takes in what a check showed; two in a row that find nobody end the contest, since a rival's queue too is empty at times.
    pub(crate) fn is_still_there(&mut self, found: bool) -> bool {
        let Some(state) = &mut self.state else {
            return false;
        };
        state.alone = if found { 0 } else { state.alone + 1 };
        state.alone < 2
    }

    /// `bytes` arrived; `queue` and `base` in seconds.
    pub(crate) fn on_acks(&mut self, now: Instant, bytes: u64, queue: f64, base: f64, packet: f64) {
        let Some(state) = &mut self.state else { return };
        state.queue = queue;
        state.queue_most = state.queue_most.max(queue);
        if state.searching {
            state.window += bytes as f64;
            return;
        }
        let time = now.saturating_duration_since(state.since).as_secs_f64() + base;
        let cubic = GROWTH * (time - state.k).powi(3) * packet + state.most;
        let part = bytes as f64 / state.window.max(packet);
        state.reno += 3.0 * (1.0 - LEFT) / (1.0 + LEFT) * packet * part;
        let wanted = cubic.max(state.reno).min(1.5 * state.window);
        state.window += (wanted - state.window).max(0.0) * part.min(1.0);
    }

    /// What is kept from being used must not grow.
    pub(crate) fn keep_within(&mut self, most: f64) {
        if let Some(state) = self.state.as_mut().filter(|state| state.window > most) {
            state.window = most;
            state.searching = false;
        }
    }

    /// Something sent at `sent` was lost.
    pub(crate) fn on_lost(&mut self, now: Instant, sent: Instant, packet: f64) {
        let Some(state) = &mut self.state else { return };
        if sent < state.answered || state.queue < LONG_QUEUE * state.queue_most {
            return;
        }
        state.searching = false;
        // Who lost before regaining the last height leaves room for the newcomer.
        state.most = if state.window < state.most {
            state.window * (1.0 + LEFT) / 2.0
        } else {
            state.window
        };
        state.window = (state.window * LEFT).max(4.0 * packet);
        state.k = ((state.most - state.window).max(0.0) / packet / GROWTH).cbrt();
        (state.since, state.answered, state.reno) = (now, now, state.window);
        state.queue_most *= 0.95;
    }
}
