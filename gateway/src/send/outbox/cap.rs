//! What one job may send at most: a bucket of bytes that fills by time. Pure.
//!
//! Owns how full it is. A payload goes while there is anything in it and may take more than there is, so that one is never too large; what it
//! owes is paid before the next. Promises that over any time no more is sent than the rate allows, but for a short burst and one payload.

use std::time::{Duration, Instant};

/// What was not used is kept for so long: a sender that looks every 20 ms loses nothing.
const BURST: Duration = Duration::from_millis(50);
/// What waits for longer than this waits for the cap, not for the link.
const SOON: Duration = Duration::from_millis(500);

/// One job's bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cap {
    /// Bytes per second.
    rate: f64,
    /// Bytes that may go, at `at`; below zero, what is owed.
    level: f64,
    at: Instant,
}

impl Cap {
    /// Full.
    pub(super) fn new(bytes_per_second: u64, now: Instant) -> Self {
        let rate = bytes_per_second.max(1) as f64;
        Self {
            rate,
            level: rate * BURST.as_secs_f64(),
            at: now,
        }
    }

    fn level(&self, now: Instant) -> f64 {
        let past = now.saturating_duration_since(self.at).as_secs_f64();
        (self.level + past * self.rate).min(self.rate * BURST.as_secs_f64())
    }

    /// Whether a payload may go now.
    pub(super) fn allows(&self, now: Instant) -> bool {
        self.level(now) > 0.0
    }

    /// One went.
    pub(super) fn sent(&mut self, bytes: u64, now: Instant) {
        self.level = self.level(now) - bytes as f64;
        self.at = self.at.max(now);
    }

    /// Bytes that may go within a short time.
    pub(super) fn soon(&self) -> u64 {
        (self.rate * SOON.as_secs_f64()) as u64
    }
}
