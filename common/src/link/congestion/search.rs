//! The search for a rate that nobody told: the window doubles per round trip until a queue stays.
//!
//! Owns when the search ends, and what is kept of its window. A window that has just doubled is sent in one bunch, faster than it will be
//! sent later, so a long path shows a queue before its window is full: half of what was in flight would be too little then, and what
//! is missing takes many round trips to find. While a queue stands the path is busy, so that what arrives meanwhile is its rate,
//! and rate times base delay is the window. Leaves everything after that to `control`.

use std::time::{Duration, Instant};

use super::control::{Control, Phase};
use super::epoch::{Acks, Epoch, Mode};

/// Fewer samples than this decide nothing.
pub(super) const SAMPLES_MIN: u32 = 8;
/// A rate is not told from less time: acknowledgements come in groups.
const SPAN_MIN: Duration = Duration::from_millis(5);
/// A path that seems to hold more than so many windows is not full.
const FULL: f64 = 1.1;

/// The acknowledgements in a row that showed a queue.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Queued {
    since: Option<Instant>,
    samples: u32,
    /// What they acknowledged, without the first of them: that arrived before.
    bytes: f64,
}

impl Queued {
    fn count(&mut self, now: Instant, bytes: u64) {
        if self.since.is_none() {
            self.since = Some(now);
        } else {
            self.bytes += bytes as f64;
        }
        self.samples += 1;
    }

    /// Bytes/s that arrived while the queue stood.
    fn rate(&self, now: Instant) -> Option<f64> {
        let span = now.saturating_duration_since(self.since?);
        (span >= SPAN_MIN).then(|| self.bytes / span.as_secs_f64())
    }
}

impl Control {
    /// A queue of this length ends the search.
    fn search_limit(&self) -> f64 {
        (self.base / 8.0).clamp(0.004, 0.016)
    }

    /// One of this length ends it whatever the rate seems to be: the path's room for it is not known.
    fn long_queue(&self) -> f64 {
        (self.base / 2.0).clamp(0.008, 0.050)
    }

    pub(super) fn search(&mut self, now: Instant, acks: &Acks) {
        if acks.limited {
            self.window += acks.bytes as f64;
        }
        if acks.queue > self.search_limit() {
            self.queued.count(now, acks.bytes);
        } else {
            self.queued = Queued::default();
        }
        // The more acknowledgements a round trip has, the more of them must agree: some are late for other reasons.
        let enough = (self.window / (40.0 * self.config.packet as f64)) as u32;
        if self.queued.samples < enough.clamp(SAMPLES_MIN, 2 * SAMPLES_MIN) {
            return;
        }
        // The samples are a round trip old: half of the window was in flight then, which is what is kept at least. Beside others it is all:
        // the queue may be theirs, and what arrives in a bunch is not our part.
        let is_ours = self.config.mode == Mode::Dedicated;
        let rate = self.queued.rate(now).filter(|_| is_ours);
        let held = rate.map_or(0.0, |rate| rate * self.base);
        // A path that takes more than is in flight is not full: what queued was a bunch, or a busy machine heard of it late.
        if held > FULL * self.window && acks.queue < self.long_queue() {
            self.queued = Queued::default();
            return;
        }
        self.window = held.clamp(0.5 * self.window, self.window).max(self.floor());
        self.answer_losses(now);
        self.phase = Phase::Cruise;
        self.epoch = Epoch::new(now);
    }
}

#[cfg(test)]
mod tests {
    use super::super::epoch::ControlConfig;
    use super::*;

    /// The window with which a search ends that has found 2 MB, when acknowledgements of ten packets show a queue every `gap`.
    fn ended(mode: Mode, gap: Duration) -> u64 {
        let mut now = Instant::now();
        let config = ControlConfig {
            mode,
            initial_window: 1_000_000,
            packet: 1452,
        };
        let mut control = Control::new(config, now);
        let mut acks = Acks {
            sent: now,
            queue: 0.0,
            base: 0.3,
            bytes: 14_520,
            byte_seconds: 14_520.0 * 0.3,
            limited: true,
        };
        while control.window() < 2_000_000 {
            now += Duration::from_millis(3);
            acks.sent = now.checked_sub(Duration::from_millis(300)).unwrap_or(now);
            control.on_acks(now, &acks);
        }
        acks.queue = 0.030;
        for _ in 0..400 {
            now += gap;
            acks.sent = now.checked_sub(Duration::from_millis(330)).unwrap_or(now);
            control.on_acks(now, &acks);
            if !control.is_starting() {
                return control.window();
            }
        }
        panic!("it does not end: {control:?}");
    }

    #[test]
    fn what_arrives_while_a_queue_stands_says_how_much_the_path_holds() {
        // 4.4 MB/s over 300 ms are 1.3 MB; 14.5 MB/s would be 4.4 MB, of which all of the window is kept.
        let slow = ended(Mode::Dedicated, Duration::from_micros(3300));
        assert!((1_250_000..1_400_000).contains(&slow), "{slow}");
        let fast = ended(Mode::Dedicated, Duration::from_millis(1));
        assert!((3_800_000..4_600_000).contains(&fast), "{fast}");
        // Half of it at least.
        let least = ended(Mode::Dedicated, Duration::from_millis(15));
        assert!((1_050_000..1_150_000).contains(&least), "{least}");
    }

    #[test]
    fn beside_others_half_of_the_window_is_kept() {
        for mode in [Mode::Shared, Mode::Background] {
            let window = ended(mode, Duration::from_millis(1));
            assert!((1_050_000..1_150_000).contains(&window), "{mode:?}: {window}");
        }
    }
}
