//! Rate caps by time of day, and a token bucket for what must keep to a rate of its own. Pure: time is an argument.
//!
//! Owns [`CapSchedule`], from which a peer's budget takes its cap, and [`TokenBucket`], for caps of single jobs. Leaves the clock,
//! the time zone and the config file to others.

use std::time::{Duration, Instant};

use jiff::civil::Time;

/// One window of a day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapWindow {
    /// First moment, local time.
    pub from: Time,
    /// First moment after; earlier than `from` where the window lies over midnight, the same for a whole day.
    pub to: Time,
    /// In bit/s with IP headers; 0 is taken as 8 kbit/s: a link that says nothing would be dead.
    pub rate: u64,
}

impl CapWindow {
    fn contains(&self, time: Time) -> bool {
        if self.from < self.to {
            self.from <= time && time < self.to
        } else {
            time >= self.from || time < self.to
        }
    }
}

/// All of a link's windows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CapSchedule {
    /// In any order; where several are open, the least rate holds.
    pub windows: Vec<CapWindow>,
}

impl CapSchedule {
    /// The cap at local time `time`, in bit/s, of a link whose `rate` is configured or not.
    pub fn at(&self, time: Time, rate: Option<u64>) -> Option<u64> {
        let open = self.windows.iter().filter(|window| window.contains(time));
        open.map(|window| window.rate.max(8000)).chain(rate).min()
    }
}

/// Lets through `rate` bytes/s with bursts of at most `burst`.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    rate: u64,
    burst: u64,
    tokens: f64,
    at: Instant,
}

impl TokenBucket {
    /// Full at `now`. `rate` is at least 1 byte/s.
    pub fn new(rate: u64, burst: u64, now: Instant) -> Self {
        let rate = rate.max(1);
        Self {
            rate,
            burst,
            tokens: burst as f64,
            at: now,
        }
    }

    /// Another rate from `now` on; what was saved up stays.
    pub fn set_rate(&mut self, rate: u64, now: Instant) {
        self.refill(now);
        self.rate = rate.max(1);
    }

    /// Takes `bytes` if any token is there (the rest is owed: a batch larger than the burst passes too); otherwise says how
    /// long to wait.
    ///
    /// # Errors
    /// The time after which to ask again.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        self.refill(now);
        if self.tokens <= 0.0 {
            let seconds = (1.0 - self.tokens) / self.rate as f64;
            return Err(Duration::from_secs_f64(seconds.clamp(0.001, 3600.0)));
        }
        self.tokens -= bytes as f64;
        Ok(())
    }

    fn refill(&mut self, now: Instant) {
        let span = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.tokens = (self.tokens + span * self.rate as f64).min(self.burst as f64);
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::time;
    use proptest::prelude::*;

    use super::*;

    fn window(from: i8, to: i8, rate: u64) -> CapWindow {
        let at = |hour| time(hour, 0, 0, 0);
        CapWindow {
            from: at(from),
            to: at(to),
            rate,
        }
    }

    #[test]
    fn the_least_of_what_is_open_holds() {
        let windows = vec![
            window(8, 18, 50_000_000),
            window(12, 13, 20_000_000),
            window(22, 6, 90_000_000),
        ];
        let schedule = CapSchedule { windows };
        let at = |hour, rate| schedule.at(time(hour, 30, 0, 0), rate);
        assert_eq!(at(9, None), Some(50_000_000));
        assert_eq!(at(12, None), Some(20_000_000));
        assert_eq!((at(20, None), at(20, Some(7_000_000))), (None, Some(7_000_000)));
        assert_eq!(
            (at(23, None), at(5, None)),
            (Some(90_000_000), Some(90_000_000)),
            "over midnight"
        );
        assert_eq!(
            at(9, Some(10_000_000)),
            Some(10_000_000),
            "the link's own rate is a cap too"
        );
        assert_eq!(schedule.at(time(18, 0, 0, 0), None), None, "the end is outside");
        let whole_day = CapSchedule {
            windows: vec![window(0, 0, 0)],
        };
        assert_eq!(whole_day.at(time(3, 0, 0, 0), None), Some(8000));
    }

    proptest! {
        #[test]
        fn a_bucket_keeps_to_its_rate(
            rate in 1u64..100_000_000, burst in 0u64..10_000_000,
            steps in prop::collection::vec((0u64..50_000, 1u64..2_000_000), 1..300),
        ) {
            let start = Instant::now();
            let mut bucket = TokenBucket::new(rate, burst.max(1), start);
            let (mut now, mut passed, mut last) = (start, 0u64, 0u64);
            for (micros, bytes) in steps {
                now += Duration::from_micros(micros);
                if bucket.take(bytes, now).is_ok() {
                    passed += bytes;
                    last = bytes;
                }
                let allowed = burst.max(1) as f64 + rate as f64 * (now - start).as_secs_f64();
                prop_assert!((passed - last) as f64 <= allowed + 1.0, "{passed} of {allowed}");
            }
        }

        #[test]
        fn who_waits_as_told_gets_through(rate in 1u64..1_000_000_000, debt in 1u64..1_000_000) {
            let start = Instant::now();
            let mut bucket = TokenBucket::new(rate, 1, start);
            bucket.take(debt, start).unwrap();
            let mut now = start;
            for _ in 0..400 {
                match bucket.take(1, now) {
                    Ok(()) => return Ok(()),
                    Err(wait) => now += wait,
                }
            }
            prop_assert!(false, "never");
        }
    }
}
