//! A rate out of samples of a counter.
//!
//! Owns the smoothing: an exponential mean over time, not over samples, so that it does not matter how often one looks.

use std::time::Duration;

/// Bytes per second, smoothed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    memory: f64,
    last: Option<(Duration, u64)>,
    /// Mean, and how much of it is evidence (1 after some multiples of the memory).
    mean: f64,
    weight: f64,
}

impl Rate {
    /// `memory`: after which an old sample counts for 37 %.
    pub fn new(memory: Duration) -> Self {
        Self {
            memory: memory.as_secs_f64().max(1e-3),
            last: None,
            mean: 0.0,
            weight: 0.0,
        }
    }

    /// The counter at a time; one that fell has begun anew.
    pub fn sample(&mut self, now: Duration, counter: u64) {
        let Some((before, old)) = self.last.replace((now, counter)) else {
            return;
        };
        let elapsed = now.saturating_sub(before).as_secs_f64();
        if elapsed <= 0.0 {
            self.last = Some((before, old));
            return;
        }
        let grown = counter.checked_sub(old).unwrap_or(counter);
        let kept = (-elapsed / self.memory).exp();
        self.mean = self.mean * kept + grown as f64 / elapsed * (1.0 - kept);
        self.weight = self.weight * kept + (1.0 - kept);
    }

    /// Takes a rate that somebody else measured over `elapsed`.
    pub fn measured(&mut self, elapsed: Duration, rate: f64) {
        if !rate.is_finite() || rate < 0.0 {
            return;
        }
        let kept = (-elapsed.as_secs_f64() / self.memory).exp();
        self.mean = self.mean * kept + rate * (1.0 - kept);
        self.weight = self.weight * kept + (1.0 - kept);
    }

    /// `None` before there are two samples.
    pub fn per_second(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.mean / self.weight)
    }
}
