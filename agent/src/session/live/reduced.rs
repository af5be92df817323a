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
/// More must have waited than the link had room for, for so long without a break, before anything is known of it: a job that goes on where
/// everything is at the target already has hardly anything to carry.
const FILLED: Duration = Duration::from_secs(1);
/// Less data than this tells nothing.
const TELLING: u64 = 64 << 10;

/// The figures so far.
pub(super) struct Reduced {
    restored: Rate,
    /// Reduced bytes per second: the most that was seen, or what a link that has long been filled carries now.
    goodput: Option<f64>,
    /// There were enough for the link once, so that this is what it carries.
    filled: bool,
    /// Since when more waits than the link has room for, without a break.
    limited: Option<Duration>,
    /// Since when it has room, without a break.
    room: Option<Duration>,
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
            filled: false,
            limited: None,
            room: None,
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
        self.room = (!carried.limited).then(|| self.room.unwrap_or(now));
        let for_long = |span: Duration| {
            self.limited
                .is_some_and(|since| now.saturating_sub(since) >= span)
        };
        let steady = for_long(2 * MEMORY);
        self.filled |= for_long(FILLED);
        if let Some(rate) = self.restored.per_second().filter(|rate| *rate > 1.0) {
            let known = self.goodput.unwrap_or(0.0);
            // A round is a burst with pauses for what is to become durable, and tells less than the link can.
            self.goodput = Some(if steady { rate } else { rate.max(known) });
        }
    }

    /// Whether the link has room for more than comes, and has had it for a while.
    pub(super) fn has_room(&self, now: Duration) -> bool {
        self.room.is_some_and(|since| now.saturating_sub(since) >= FILLED)
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
        if !self.filled {
            return None;
        }
        let rounds = self.rounds.iter().copied().chain(self.running());
        let ratio = rounds.reduce(f64::max)?;
        Some(self.goodput? / ratio.max(0.01))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A gateway that tells its counts every 250 ms.
    struct Told {
        reduced: Reduced,
        at: f64,
    }

    fn begin() -> Told {
        let mut told = Told {
            reduced: Reduced::default(),
            at: 0.0,
        };
        told.reduced.sample(Duration::ZERO, Carried::default());
        told
    }

    impl Told {
        /// So many seconds with these bytes of dirty blocks per second, what they are reduced to, and reduced bytes of memory.
        fn flow(&mut self, seconds: f64, limited: bool, dirty: (u64, u64), memory: u64) {
            for _ in 0..(seconds * 4.0) as u64 {
                self.at += 0.25;
                let last = self.reduced.last;
                let carried = Carried {
                    dirty: (last.dirty.0 + dirty.0 / 4, last.dirty.1 + dirty.1 / 4),
                    restored: last.restored + (dirty.1 + memory) / 4,
                    limited,
                };
                self.reduced.sample(Duration::from_secs_f64(self.at), carried);
            }
        }

        fn round(&mut self, dirty: (u64, u64)) {
            self.flow(2.0, true, dirty, 0);
            self.reduced.round_begins();
        }

        /// Megabytes per second, rounded.
        fn blocks(&self) -> f64 {
            (self.reduced.blocks().unwrap() / 1e6).round()
        }

        fn goodput(&self) -> f64 {
            (self.reduced.goodput.unwrap() / 1e6).round()
        }
    }

    #[test]
    fn known_memory_makes_the_link_neither_fast_nor_slow_for_blocks() {
        let mut told = begin();
        assert_eq!(told.reduced.blocks(), None);
        told.flow(10.0, true, (10_000_000, 6_000_000), 0);
        told.reduced.round_begins();
        // Pages that become 1 MB/s: the link has room.
        told.flow(10.0, false, (0, 0), 1_000_000);
        assert_eq!(told.blocks(), 10.0);
    }

    #[test]
    fn a_link_that_never_had_enough_to_carry_is_not_known() {
        let mut told = begin();
        told.flow(60.0, false, (200_000, 200_000), 0);
        assert_eq!(told.reduced.blocks(), None);
        // A burst fills it for a moment.
        told.flow(0.5, true, (1_000_000, 1_000_000), 0);
        told.flow(60.0, false, (200_000, 200_000), 0);
        assert_eq!(told.reduced.blocks(), None);
        told.flow(6.0, true, (8_000_000, 8_000_000), 0);
        assert_eq!(told.blocks(), 8.0);
    }

    #[test]
    fn a_link_has_room_once_nothing_waited_for_a_while() {
        let mut told = begin();
        told.flow(5.0, true, (8_000_000, 8_000_000), 0);
        let has_room = |told: &Told| told.reduced.has_room(Duration::from_secs_f64(told.at));
        assert!(!has_room(&told));
        told.flow(0.5, false, (0, 0), 1_000_000);
        assert!(!has_room(&told));
        told.flow(1.0, false, (0, 0), 1_000_000);
        assert!(has_room(&told));
        told.flow(0.25, true, (0, 0), 1_000_000);
        assert!(!has_room(&told));
    }

    #[test]
    fn a_link_that_falls_is_noticed_while_there_is_more_than_it_carries() {
        let mut told = begin();
        told.flow(10.0, true, (12_000_000, 12_000_000), 0);
        told.flow(15.0, true, (3_000_000, 3_000_000), 0);
        assert_eq!(told.goodput(), 3.0);
    }

    #[test]
    fn rounds_with_pauses_do_not_make_the_link_slow() {
        let mut told = begin();
        told.flow(10.0, true, (6_000_000, 6_000_000), 0);
        for _ in 0..10 {
            told.flow(1.0, true, (6_000_000, 6_000_000), 0);
            told.flow(1.0, false, (0, 0), 0);
        }
        assert_eq!(told.goodput(), 6.0);
    }

    #[test]
    fn a_round_that_repeats_what_is_known_is_not_what_the_next_will_be() {
        let mut told = begin();
        told.flow(10.0, true, (10_000_000, 5_000_000), 0);
        told.reduced.round_begins();
        told.flow(2.0, false, (10_000_000, 100_000), 0);
        told.reduced.round_begins();
        assert_eq!(told.blocks(), 10.0);
        // Three rounds later only these count.
        (0..3).for_each(|_| told.round((25_000_000, 5_000_000)));
        assert!(told.blocks() > 20.0, "{}", told.blocks());
    }

    #[test]
    fn another_attempt_counts_anew() {
        let mut told = begin();
        told.flow(4.0, true, (10_000_000, 5_000_000), 0);
        told.reduced.round_begins();
        told.at += 1.0;
        told.reduced
            .sample(Duration::from_secs_f64(told.at), Carried::default());
        told.flow(4.0, true, (10_000_000, 5_000_000), 0);
        assert_eq!((told.goodput(), told.blocks()), (5.0, 10.0));
    }
}
