//! How fast the link is for what the guest writes to its disks, from what the gateway counts of reduced bytes.
//!
//! Owns this figure of one job. Pure: time is an argument. Leaves raw bytes to `pace`. Promises that memory which the peer knows does not
//! make the link fast for blocks, that a round which repeats what the peer has does not make them small, and that a link with little
//! to carry is not called slow.

use std::collections::VecDeque;
use std::time::Duration;

use longhaul_common::wire::session::Carried;

use crate::vm::converge::Rate;

/// Over how long rates are smoothed.
const MEMORY: Duration = Duration::from_secs(2);
/// Rounds that are remembered: one that only repeats what the peer has is not what the next one will be.
const ROUNDS: usize = 3;
/// Less data than this tells nothing.
const TELLING: u64 = 64 << 10;

/// The figures so far.
pub(super) struct Reduced {
    restored: Rate,
    /// Reduced bytes per second, when there were enough for the link.
    goodput: Option<f64>,
    /// Since when more waits than the link has room for, without a break.
    limited: Option<Duration>,
    /// Of the last rounds.
    rounds: VecDeque<f64>,
    /// What was counted when the running round began.
    began: (u64, u64),
    last: Carried,
}

impl Default for Reduced {
    fn default() -> Self {
        Self {
            restored: Rate::new(MEMORY),
            goodput: None,
            limited: None,
            rounds: VecDeque::new(),
            began: (0, 0),
            last: Carried::default(),
        }
    }
}

impl Reduced {
    /// Takes what the gateway said last.
    pub(super) fn sample(&mut self, now: Duration, carried: Carried) {
        if carried.restored < self.last.restored {
            // Another attempt counts anew.
            (self.restored, self.began) = (Rate::new(MEMORY), (0, 0));
        }
        self.last = carried;
        self.restored.sample(now, carried.restored);
        self.limited = carried.limited.then(|| self.limited.unwrap_or(now));
        if let Some(rate) = self.restored.per_second().filter(|rate| *rate > 1.0) {
            let known = self.goodput.unwrap_or(0.0);
            // A round is a burst with pauses for what is to become durable, and tells less than the link can.
            let steady = self
                .limited
                .is_some_and(|since| now.saturating_sub(since) >= 2 * MEMORY);
            self.goodput = Some(if steady { rate } else { rate.max(known) });
        }
    }

    /// A round of the disks begins: what was counted until now belongs to those before.
    pub(super) fn round_begins(&mut self) {
        self.rounds.extend(self.running());
        while self.rounds.len() > ROUNDS {
            self.rounds.pop_front();
        }
        self.began = self.last.dirty;
    }

    /// Of the round that began last.
    fn running(&self) -> Option<f64> {
        let raw = self.last.dirty.0.saturating_sub(self.began.0);
        let reduced = self.last.dirty.1.saturating_sub(self.began.1);
        (raw >= TELLING).then(|| (reduced as f64 / raw as f64).clamp(0.0, 1.0))
    }

    /// Bytes of dirty blocks per second, as they are on the disk. `None` before anything is known.
    pub(super) fn blocks(&self) -> Option<f64> {
        let rounds = self.rounds.iter().copied().chain(self.running());
        let ratio = rounds.reduce(f64::max)?;
        Some(self.goodput? / ratio.max(0.01))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// So many seconds at these rates, told every 250 ms.
    fn flow(
        reduced: &mut Reduced,
        from: f64,
        seconds: f64,
        limited: bool,
        dirty: (u64, u64),
        ram: (u64, u64),
    ) {
        let start = reduced.last;
        let steps = (seconds * 4.0) as u64;
        for step in 1..=steps {
            let grown = |base: u64, rate: u64| base + rate * step / 4;
            let carried = Carried {
                dirty: (grown(start.dirty.0, dirty.0), grown(start.dirty.1, dirty.1)),
                ram: (grown(start.ram.0, ram.0), grown(start.ram.1, ram.1)),
                restored: grown(start.restored, dirty.1 + ram.1),
                limited,
            };
            reduced.sample(at(from + step as f64 / 4.0), carried);
        }
    }

    #[test]
    fn known_memory_makes_the_link_neither_fast_nor_slow_for_blocks() {
        let mut reduced = Reduced::default();
        assert_eq!(reduced.blocks(), None);
        reduced.sample(at(0.0), Carried::default());
        flow(&mut reduced, 0.0, 10.0, true, (10_000_000, 6_000_000), (0, 0));
        reduced.round_begins();
        // 300 MB/s of pages become 1 MB/s: the link has room.
        flow(&mut reduced, 10.0, 10.0, false, (0, 0), (300_000_000, 1_000_000));
        let blocks = reduced.blocks().unwrap();
        assert!((9.9e6..10.1e6).contains(&blocks), "{blocks}");
    }

    #[test]
    fn a_link_that_falls_is_noticed_while_there_is_more_than_it_carries() {
        let mut reduced = Reduced::default();
        reduced.sample(at(0.0), Carried::default());
        flow(&mut reduced, 0.0, 10.0, true, (12_000_000, 12_000_000), (0, 0));
        flow(&mut reduced, 10.0, 15.0, true, (3_000_000, 3_000_000), (0, 0));
        let goodput = reduced.goodput.unwrap();
        assert!((2.9e6..3.2e6).contains(&goodput), "{goodput}");
    }

    #[test]
    fn rounds_with_pauses_do_not_make_the_link_slow() {
        let mut reduced = Reduced::default();
        reduced.sample(at(0.0), Carried::default());
        flow(&mut reduced, 0.0, 10.0, true, (6_000_000, 6_000_000), (0, 0));
        for round in 0..10 {
            let from = 10.0 + 2.0 * f64::from(round);
            flow(&mut reduced, from, 1.0, true, (6_000_000, 6_000_000), (0, 0));
            flow(&mut reduced, from + 1.0, 1.0, false, (0, 0), (0, 0));
        }
        let goodput = reduced.goodput.unwrap();
        assert!((5.9e6..6.1e6).contains(&goodput), "{goodput}");
    }

    #[test]
    fn a_round_that_repeats_what_is_known_is_not_what_the_next_will_be() {
        let mut reduced = Reduced::default();
        reduced.sample(at(0.0), Carried::default());
        reduced.round_begins();
        flow(&mut reduced, 0.0, 2.0, true, (10_000_000, 5_000_000), (0, 0));
        reduced.round_begins();
        flow(&mut reduced, 2.0, 2.0, false, (10_000_000, 100_000), (0, 0));
        reduced.round_begins();
        assert!((9.9e6..10.1e6).contains(&reduced.blocks().unwrap()));
        for round in 0..2 {
            flow(
                &mut reduced,
                4.0 + 2.0 * f64::from(round),
                2.0,
                true,
                (10_000_000, 2_000_000),
                (0, 0),
            );
            reduced.round_begins();
        }
        assert!((24.9e6..25.1e6).contains(&reduced.blocks().unwrap()));
    }

    #[test]
    fn another_attempt_counts_anew() {
        let mut reduced = Reduced::default();
        reduced.sample(at(0.0), Carried::default());
        flow(&mut reduced, 0.0, 4.0, true, (10_000_000, 5_000_000), (0, 0));
        reduced.round_begins();
        reduced.last = Carried {
            restored: u64::MAX,
            ..reduced.last
        };
        reduced.sample(at(5.0), Carried::default());
        flow(&mut reduced, 5.0, 4.0, true, (10_000_000, 5_000_000), (0, 0));
        let blocks = reduced.blocks().unwrap();
        assert!((9.9e6..10.1e6).contains(&blocks), "{blocks}");
    }
}
