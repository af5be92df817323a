//! When written batches are flushed. Pure: time is an argument.
//!
//! Owns the choice between few flushes and early ones. While batches come, one flush for many of them is enough; once none comes any more,
//! somebody may be waiting to hear that the last one is durable: the end of a round, the proof of a copy. Leaves flushing itself to the
//! parent. Promises that no batch waits longer than the configured time.

use std::time::{Duration, Instant};

/// No batch came for so long: what was written is all there is for now.
const QUIET: Duration = Duration::from_millis(50);

/// What was seen of the writers.
pub(super) struct FlushDue {
    /// Longest time that a batch may wait.
    every: Duration,
    /// Batches written when a flush was called for last, and when this was last looked at.
    flushed: u64,
    seen: u64,
    /// When the first unflushed batch was seen, and the last one.
    first: Instant,
    last: Instant,
}

/// What the flusher is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Now,
    /// Unless something is written or asked for.
    In(Duration),
}

impl FlushDue {
    pub(super) fn new(every: Duration, now: Instant) -> Self {
        Self {
            every,
            flushed: 0,
            seen: 0,
            first: now,
            last: now,
        }
    }

    /// `written`: batches so far; `asked`: somebody needs a flush at once.
    pub(super) fn look(&mut self, now: Instant, written: u64, asked: bool) -> Due {
        if written != self.seen {
            if self.seen == self.flushed {
                self.first = now;
            }
            (self.seen, self.last) = (written, now);
        }
        if self.seen == self.flushed && !asked {
            return Due::In(self.every);
        }
        let at = (self.last + QUIET.min(self.every)).min(self.first + self.every);
        let left = at.saturating_duration_since(now);
        if left.is_zero() || asked {
            self.flushed = self.seen;
            return Due::Now;
        }
        Due::In(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_millis(500);

    /// When a flush is called for, in ms, if a batch is written at each of these times (in ms).
    fn flushes(writes: &[u64]) -> Vec<u64> {
        let start = Instant::now();
        let mut due = FlushDue::new(EVERY, start);
        (0..3000)
            .filter(|at| {
                let written = writes.iter().filter(|write| *write <= at).count() as u64;
                due.look(start + Duration::from_millis(*at), written, false) == Due::Now
            })
            .collect()
    }

    #[test]
    fn the_last_of_many_is_flushed_soon_and_many_are_flushed_together() {
        assert!(flushes(&[]).is_empty());
        assert_eq!(flushes(&[100]), [150]);
        let steady: Vec<u64> = (0..=102).map(|n| n * 10).collect();
        assert_eq!(flushes(&steady), [500, 1010, 1070]);
    }

    #[test]
    fn a_wish_is_heeded_at_once_and_the_wait_is_never_longer_than_set() {
        let start = Instant::now();
        let mut due = FlushDue::new(EVERY, start);
        assert_eq!(
            due.look(start, 0, true),
            Due::Now,
            "a stop flushes what there may be"
        );
        assert_eq!(due.look(start, 1, true), Due::Now);
        assert_eq!(due.look(start, 1, false), Due::In(EVERY));
        assert_eq!(due.look(start, 2, false), Due::In(QUIET));
        let mut hasty = FlushDue::new(Duration::from_millis(5), start);
        assert_eq!(hasty.look(start, 1, false), Due::In(Duration::from_millis(5)));
    }
}
