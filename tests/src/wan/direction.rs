//! One direction of the emulated link, as a pure machine under an explicit clock.
//!
//! Owns what happens to a packet between two sites: the drop-tail queue before the bottleneck, the
//! bottleneck's rate, random loss, delay, jitter and cuts. Leaves alone sockets, clocks and threads: `now` is
//! always an argument, in nanoseconds since any fixed start, and never runs backwards. Promises that the
//! bottleneck neither loses nor gains time (remainders are carried over), that packets leave in the order
//! they came unless jitter was told to reorder, and that the same seed and the same calls give the same
//! result.
//!
//! ```text
//!   push --> [cut?] --> [queue, drop-tail] --> [rate] --> [loss] --> [delay + jitter] --> [cut?] --> pop
//! ```

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// Nanoseconds since the emulator's start.
pub type Nanos = u64;

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// What one direction does to packets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Bottleneck rate in bits of IP packet per second; 0 means unlimited.
    pub rate_bit_per_s: u64,
    /// Time from the bottleneck to the other end.
    pub delay: Duration,
    /// Largest extra delay; each packet draws evenly from zero up to it.
    pub jitter: Duration,
    /// Whether jitter may let a packet overtake an earlier one, as parallel paths do.
    pub reorder: bool,
    /// Part of the packets lost behind the bottleneck, 0 to 1, independently of each other.
    pub loss: f64,
    /// Bytes that may wait before the bottleneck; a packet that does not fit is dropped.
    pub queue_bytes: u64,
    /// Seed of loss and jitter.
    pub seed: u64,
}

/// What has happened in one direction so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets and bytes of IP that came in.
    pub offered_packets: u64,
    pub offered_bytes: u64,
    /// Packets and bytes of IP that reached the other end.
    pub delivered_packets: u64,
    pub delivered_bytes: u64,
    /// Packets dropped because the queue was full.
    pub dropped_queue: u64,
    /// Packets lost at random.
    pub dropped_loss: u64,
    /// Packets lost because the link was cut.
    pub dropped_cut: u64,
    /// Most bytes that waited before the bottleneck.
    pub queue_peak_bytes: u64,
}

/// A packet on its way, ordered by release time and then by arrival.
#[derive(Debug)]
struct Flying {
    release: Nanos,
    order: u64,
    packet: Vec<u8>,
}

impl Flying {
    fn key(&self) -> (Nanos, u64) {
        (self.release, self.order)
    }
}

impl PartialEq for Flying {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Flying {}

impl PartialOrd for Flying {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Flying {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// One direction of the link.
#[derive(Debug)]
pub struct Direction {
    shape: Shape,
    random: StdRng,
    flying: BinaryHeap<Reverse<Flying>>,
    order: u64,
    /// When the bottleneck has sent everything it took, and the part of a nanosecond that it owes on top.
    busy_until: Nanos,
    busy_remainder: u64,
    last_release: Nanos,
    counters: Counters,
}

impl Direction {
    /// An idle direction.
    pub fn new(shape: Shape) -> Self {
        let random = StdRng::seed_from_u64(shape.seed);
        Self {
            shape,
            random,
            flying: BinaryHeap::new(),
            order: 0,
            busy_until: 0,
            busy_remainder: 0,
            last_release: 0,
            counters: Counters::default(),
        }
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Changes rate, delay, loss or queue for packets that come from now on; what is under way keeps its
    /// time.
    pub fn reshape(&mut self, shape: Shape) {
        self.shape = shape;
    }

    /// What this direction does to packets.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Takes a packet that arrives at `now`; `cut` says whether the link is cut at this moment.
    pub fn push(&mut self, now: Nanos, packet: Vec<u8>, cut: bool) {
        let length = packet.len() as u64;
        self.counters.offered_packets += 1;
        self.counters.offered_bytes += length;
        if cut {
            self.counters.dropped_cut += 1;
            return;
        }
        let waiting = self.backlog_bytes(now) + length;
        if waiting > self.shape.queue_bytes.max(length) {
            self.counters.dropped_queue += 1;
            return;
        }
        self.counters.queue_peak_bytes = self.counters.queue_peak_bytes.max(waiting);
        let sent = self.serialise(now, length);
        if self.shape.loss > 0.0 && self.random.random::<f64>() < self.shape.loss {
            self.counters.dropped_loss += 1;
            return;
        }
        let release = self.release_time(sent);
        self.order += 1;
        self.flying.push(Reverse(Flying {
            release,
            order: self.order,
            packet,
        }));
    }

    /// The next packet that is due at `now`, or none. Call it until it gives none: packets that became due in
    /// between are all released, however late the call comes.
    pub fn pop(&mut self, now: Nanos, cut: bool) -> Option<Vec<u8>> {
        while self.next_deadline()? <= now {
            let Reverse(flying) = self.flying.pop()?;
            if cut {
                self.counters.dropped_cut += 1;
                continue;
            }
            self.counters.delivered_packets += 1;
            self.counters.delivered_bytes += flying.packet.len() as u64;
            return Some(flying.packet);
        }
        None
    }

    /// When the next packet is due, if any is under way.
    pub fn next_deadline(&self) -> Option<Nanos> {
        self.flying.peek().map(|Reverse(flying)| flying.release)
    }

    /// Bytes that wait before the bottleneck at `now`.
    pub fn backlog_bytes(&self, now: Nanos) -> u64 {
        let waiting = u128::from(self.busy_until.saturating_sub(now));
        (waiting * u128::from(self.shape.rate_bit_per_s) / 8 / u128::from(NANOS_PER_SECOND)) as u64
    }

    /// Keeps the bottleneck busy for one packet; gives the time at which its last bit has left.
    fn serialise(&mut self, now: Nanos, length: u64) -> Nanos {
        if self.shape.rate_bit_per_s == 0 {
            return now;
        }
        if self.busy_until < now {
            self.busy_until = now;
            self.busy_remainder = 0;
        }
        let work = length * 8 * NANOS_PER_SECOND + self.busy_remainder;
        self.busy_until += work / self.shape.rate_bit_per_s;
        self.busy_remainder = work % self.shape.rate_bit_per_s;
        self.busy_until
    }

    fn release_time(&mut self, sent: Nanos) -> Nanos {
        let jitter = nanos(self.shape.jitter);
        let extra = if jitter == 0 {
            0
        } else {
            self.random.random_range(0..=jitter)
        };
        let release = sent + nanos(self.shape.delay) + extra;
        if self.shape.reorder {
            return release;
        }
        self.last_release = self.last_release.max(release);
        self.last_release
    }
}

fn nanos(span: Duration) -> Nanos {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Nanos = 1_000_000;

    fn shape(rate: u64) -> Shape {
        Shape {
            rate_bit_per_s: rate,
            delay: Duration::from_millis(40),
            jitter: Duration::ZERO,
            reorder: false,
            loss: 0.0,
            queue_bytes: 1_250_000,
            seed: 1,
        }
    }

    /// Offers numbered packets of `length` at the given times and collects (time, number) at the other end;
    /// time runs in steps from deadline to deadline.
    fn through(direction: &mut Direction, arrivals: &[(Nanos, usize)]) -> Vec<(Nanos, u64)> {
        let mut out = Vec::new();
        let mut drain = |direction: &mut Direction, until: Nanos| {
            while let Some(due) = direction.next_deadline().filter(|due| *due <= until) {
                while let Some(packet) = direction.pop(due, false) {
                    out.push((due, u64::from_le_bytes(packet[..8].try_into().unwrap())));
                }
            }
        };
        for (number, (at, length)) in arrivals.iter().enumerate() {
            drain(direction, *at);
            let mut packet = vec![0; (*length).max(8)];
            packet[..8].copy_from_slice(&(number as u64).to_le_bytes());
            direction.push(*at, packet, false);
        }
        drain(direction, Nanos::MAX);
        out
    }

    #[test]
    fn a_lone_packet_takes_its_own_length_and_the_delay() {
        let mut direction = Direction::new(shape(100_000_000));
        assert_eq!(
            through(&mut direction, &[(5 * MS, 1500)]),
            [(5 * MS + 120_000 + 40 * MS, 0)]
        );
    }

    #[test]
    fn the_bottleneck_keeps_its_rate_to_the_packet() {
        let mut direction = Direction::new(shape(100_000_000));
        // 200 Mbit/s offered for 10 s against 100 Mbit/s.
        let arrivals: Vec<_> = (0..166_666u64).map(|n| (n * 60_000, 1500)).collect();
        let out = through(&mut direction, &arrivals);
        let (first, last) = (out[0].0, out[out.len() - 1].0);
        let rate = (out.len() as u64 - 1) * 1500 * 8 * NANOS_PER_SECOND / (last - first);
        assert!((99_990_000..=100_010_000).contains(&rate), "{rate}");
        assert!(direction.counters().queue_peak_bytes <= 1_250_000);
        assert!(direction.counters().dropped_queue > 80_000);
    }

    #[test]
    fn a_rate_that_does_not_divide_evenly_loses_no_time() {
        let mut direction = Direction::new(Shape {
            queue_bytes: u64::MAX,
            ..shape(7_777_777)
        });
        let out = through(&mut direction, &vec![(0, 999); 10_000]);
        let exact = 10_000 * 999 * 8 * NANOS_PER_SECOND / 7_777_777;
        assert_eq!(out[9_999].0 - 40 * MS, exact);
    }

    #[test]
    fn a_late_caller_catches_up_at_once() {
        let mut direction = Direction::new(shape(100_000_000));
        for _ in 0..100 {
            direction.push(0, vec![0; 1500], false);
        }
        let released = std::iter::from_fn(|| direction.pop(60 * MS, false)).count();
        assert_eq!(released, 100);
    }

    #[test]
    fn loss_is_random_seeded_and_of_the_right_size() {
        let run = |seed| {
            let mut direction = Direction::new(Shape {
                loss: 0.005,
                seed,
                ..shape(0)
            });
            through(&mut direction, &vec![(0, 100); 200_000]).len()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
        assert!((198_800..=199_200).contains(&run(7)), "{}", run(7));
    }

    #[test]
    fn a_cut_loses_what_comes_and_what_is_under_way() {
        let mut direction = Direction::new(shape(0));
        direction.push(0, vec![0; 100], false);
        direction.push(MS, vec![0; 100], true);
        assert_eq!(direction.pop(40 * MS, true), None);
        direction.push(50 * MS, vec![0; 100], false);
        assert!(direction.pop(90 * MS, false).is_some());
        assert_eq!(direction.counters().dropped_cut, 2);
    }

    proptest! {
        #[test]
        fn in_order_bounded_and_counted(
            rate in prop_oneof![Just(0u64), 64_000..1_000_000_000u64],
            queue in 1_500..200_000u64,
            jitter_us in 0..5_000u64,
            loss in 0.0..0.2f64,
            arrivals in prop::collection::vec((0..2_000_000u64, 20..1500usize), 1..300),
            seed: u64,
        ) {
            let jitter = Duration::from_micros(jitter_us);
            let mut direction = Direction::new(Shape { queue_bytes: queue, jitter, loss, seed, ..shape(rate) });
            let mut at = 0;
            let arrivals: Vec<_> = arrivals.iter().map(|(gap, length)| { at += gap; (at, *length) }).collect();
            let out = through(&mut direction, &arrivals);
            prop_assert!(out.windows(2).all(|pair| pair[0].1 < pair[1].1), "reordered");
            prop_assert!(out.iter().all(|(time, n)| *time >= arrivals[*n as usize].0 + 40 * MS), "too early");
            let counters = direction.counters();
            prop_assert!(counters.queue_peak_bytes <= queue);
            prop_assert_eq!(counters.delivered_packets + counters.dropped_queue + counters.dropped_loss,
                arrivals.len() as u64);
            prop_assert_eq!(counters.delivered_packets, out.len() as u64);
        }

        #[test]
        fn never_faster_than_the_rate(
            rate in 1_000_000..1_000_000_000u64,
            arrivals in prop::collection::vec((0..100_000u64, 20..9000usize), 2..300),
        ) {
            let mut direction = Direction::new(shape(rate));
            let mut at = 0;
            let arrivals: Vec<_> = arrivals.iter().map(|(gap, length)| { at += gap; (at, *length) }).collect();
            let out = through(&mut direction, &arrivals);
            // Any stretch of the output carries at most rate x time, but for the rounding of one nanosecond.
            for pair in out.windows(2) {
                let bits = arrivals[pair[1].1 as usize].1 as u64 * 8;
                prop_assert!((pair[1].0 - pair[0].0 + 1) * rate >= bits * NANOS_PER_SECOND);
            }
        }

        #[test]
        fn reordering_jitter_stays_within_its_bounds(jitter_us in 100..10_000u64, seed: u64) {
            let jitter = Duration::from_micros(jitter_us);
            let mut direction = Direction::new(Shape { jitter, reorder: true, seed, ..shape(0) });
            let arrivals: Vec<_> = (0..200).map(|n| (n * 10_000, 100)).collect();
            for (time, n) in through(&mut direction, &arrivals) {
                let taken = time - arrivals[n as usize].0;
                prop_assert!((40 * MS..=40 * MS + jitter_us * 1_000).contains(&taken));
            }
        }
    }
}
