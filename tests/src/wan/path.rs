//! Both directions of the emulated link and the times at which it is cut.
//!
//! Owns cut windows (at times, or from a command until another) and the per-second record of what was
//! delivered. Leaves alone sockets and clocks. Promises that a cut holds in both directions at once.

use super::direction::{Counters, Direction, Nanos, Shape};

/// Seconds of delivery kept for the record; later ones are counted in the totals only.
const SECONDS_MAX: usize = 6 * 3600;
/// Cut windows that may wait.
const CUTS_MAX: usize = 1024;

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source site to the target site.
    Forth,
    /// From the target site to the source site.
    Back,
}

/// The link in both directions.
#[derive(Debug)]
pub struct Path {
    forth: Direction,
    back: Direction,
    /// Windows `[from, until)` in which nothing passes.
    cuts: Vec<(Nanos, Nanos)>,
    cut_now: bool,
    seconds: [Vec<u64>; 2],
}

impl Path {
    /// An idle, whole link.
    pub fn new(forth: Shape, back: Shape) -> Self {
        let (forth, back) = (Direction::new(forth), Direction::new(back));
        Self {
            forth,
            back,
            cuts: Vec::new(),
            cut_now: false,
            seconds: [Vec::new(), Vec::new()],
        }
    }

    /// Cuts the link during `[from, until)`. Past windows are forgotten when many wait.
    pub fn cut_between(&mut self, now: Nanos, from: Nanos, until: Nanos) {
        if self.cuts.len() >= CUTS_MAX {
            self.cuts.retain(|(_, until)| *until > now);
        }
        if self.cuts.len() < CUTS_MAX && from < until {
            self.cuts.push((from, until));
        }
    }

    /// Cuts the link until told otherwise, or mends it (windows hold nevertheless).
    pub fn set_cut(&mut self, cut: bool) {
        self.cut_now = cut;
    }

    /// Whether nothing passes at `now`.
    pub fn is_cut(&self, now: Nanos) -> bool {
        self.cut_now
            || self
                .cuts
                .iter()
                .any(|(from, until)| (*from..*until).contains(&now))
    }

    /// Takes a packet that arrives at one end.
    pub fn push(&mut self, now: Nanos, way: Way, packet: Vec<u8>) {
        let cut = self.is_cut(now);
        self.direction(way).push(now, packet, cut);
    }

    /// The next packet due at the other end.
    pub fn pop(&mut self, now: Nanos, way: Way) -> Option<Vec<u8>> {
        let cut = self.is_cut(now);
        let packet = self.direction(way).pop(now, cut)?;
        let (second, log) = ((now / 1_000_000_000) as usize, &mut self.seconds[way as usize]);
        if second < SECONDS_MAX {
            if log.len() <= second {
                log.resize(second + 1, 0);
            }
            log[second] += packet.len() as u64;
        }
        Some(packet)
    }

    /// When the next packet is due, either way.
    pub fn next_deadline(&self) -> Option<Nanos> {
        [self.forth.next_deadline(), self.back.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// What happened so far one way.
    pub fn counters(&self, way: Way) -> Counters {
        match way {
            Way::Forth => self.forth.counters(),
            Way::Back => self.back.counters(),
        }
    }

    /// Bytes delivered in each second since the start, one way.
    pub fn delivered_per_second(&self, way: Way) -> &[u64] {
        &self.seconds[way as usize]
    }

    /// Changes both directions for packets that come from now on.
    pub fn reshape(&mut self, change: impl Fn(&mut Shape)) {
        for direction in [&mut self.forth, &mut self.back] {
            let mut shape = direction.shape().clone();
            change(&mut shape);
            direction.reshape(shape);
        }
    }

    fn direction(&mut self, way: Way) -> &mut Direction {
        match way {
            Way::Forth => &mut self.forth,
            Way::Back => &mut self.back,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    fn path() -> Path {
        let shape = Shape {
            rate_bit_per_s: 0,
            delay: Duration::from_millis(10),
            jitter: Duration::ZERO,
            reorder: false,
            loss: 0.0,
            queue_bytes: 1 << 20,
            seed: 0,
        };
        Path::new(shape.clone(), shape)
    }

    fn passes(path: &mut Path, at: Nanos, way: Way) -> bool {
        path.push(at, way, vec![0; 100]);
        path.pop(at + SECOND / 100, way).is_some()
    }

    #[test]
    fn a_cut_window_holds_both_ways_and_ends() {
        let mut path = path();
        path.cut_between(0, 2 * SECOND, 3 * SECOND);
        for way in [Way::Forth, Way::Back] {
            assert!(passes(&mut path, SECOND, way));
            assert!(!passes(&mut path, 2 * SECOND, way));
            assert!(passes(&mut path, 3 * SECOND, way));
        }
        assert_eq!(path.counters(Way::Back).dropped_cut, 1);
        assert_eq!(path.delivered_per_second(Way::Forth), [0, 100, 0, 100]);
    }

    #[test]
    fn a_commanded_cut_holds_until_it_is_mended() {
        let mut path = path();
        path.set_cut(true);
        assert!(!passes(&mut path, 0, Way::Forth));
        path.set_cut(false);
        assert!(passes(&mut path, SECOND, Way::Forth));
    }
}
