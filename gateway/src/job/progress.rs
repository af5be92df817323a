//! How far a job is: what the API shows while it runs.
//!
//! Owns the sums and the rate behind "n % done, 12 s left". Pure but for the caller's clock. Leaves drawing to the operator program.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a job is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits for its turn.
    #[default]
    Queued,
    Running,
    /// Something is missing that may come back by itself: a link, an agent, room at the target.
    Waiting,
    /// Until somebody says `resume`.
    Paused,
    Completed,
    /// Until somebody mends the cause and says `resume`.
    Failed,
    Cancelled,
}

impl JobState {
    /// Whether nothing will happen any more by itself or by `resume`.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled)
    }

    /// Whether a watcher has nothing to wait for.
    pub fn is_at_rest(self) -> bool {
        self.is_final() || self == Self::Failed
    }
}

/// Where an attempt is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    #[default]
    Connect,
    Scan,
    Transfer,
    /// A running VM: passes over what it wrote meanwhile.
    Rounds,
    /// A running VM: its RAM, and more passes beside it.
    Ram,
    /// A running VM: it is stopped and changes sides.
    Handover,
    /// A running VM: handed over, and nothing heard from the target since.
    InDoubt,
    Verify,
    Commit,
    Done,
}

/// A job's progress at one moment. Sizes in bytes, over all disks and attempts unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Progress {
    pub phase: Phase,
    pub attempt: u32,
    pub raw_bytes: u64,
    /// To be read: neither hole nor free.
    pub used_bytes: u64,
    pub skipped_free_bytes: u64,
    pub hole_bytes: u64,
    /// Of `used_bytes`, so much is settled: durable at the target, or zeros.
    pub done_bytes: u64,
    pub zero_bytes: u64,
    pub sent_raw_bytes: u64,
    pub wan_bytes: u64,
    pub resent_bytes: u64,
    /// Of `raw_bytes`, so much was read back at the target.
    pub verified_bytes: u64,
    /// Over the last seconds.
    pub wan_bit_per_s: u64,
    pub done_bit_per_s: u64,
    pub eta_seconds: Option<u64>,
    /// Why it waits or failed.
    pub message: Option<String>,
    /// Of a VM that is moved while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<LiveProgress>,
}

/// How far a running VM's move is. Sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LiveProgress {
    /// The newest pass over the dirty bitmaps.
    pub round: u32,
    /// Written by the guest and yet to be sent.
    pub disk_left_bytes: u64,
    /// RAM yet to be sent, as QEMU counts it.
    pub ram_left_bytes: u64,
    pub ram_stream_bytes: u64,
    pub ram_wan_bytes: u64,
    /// What was decided last, and why.
    pub decision: String,
}

/// Rates over a sliding span of time.
#[derive(Debug, Default)]
pub struct Pace {
    samples: VecDeque<(Instant, u64, u64)>,
}

/// How far back rates look.
const SPAN: Duration = Duration::from_secs(8);
/// How often a sample is kept.
const STEP: Duration = Duration::from_millis(250);

impl Pace {
    /// Takes the sums at `now`, and enters rates and the time that is left into `progress`.
    pub fn update(&mut self, now: Instant, progress: &mut Progress) {
        let due = self
            .samples
            .back()
            .is_none_or(|(at, ..)| now.saturating_duration_since(*at) >= STEP);
        if due {
            self.samples
                .push_back((now, progress.done_bytes, progress.wan_bytes));
        }
        while self.samples.len() > 2 && now.saturating_duration_since(self.samples[0].0) > SPAN {
            self.samples.pop_front();
        }
        let Some((then, done, wan)) = self.samples.front().copied() else {
            return;
        };
        let seconds = now.saturating_duration_since(then).as_secs_f64();
        if seconds < 0.2 {
            return;
        }
        let per_second = |bytes: u64| (bytes as f64 * 8.0 / seconds) as u64;
        // A new attempt may begin with less done than the last one ended with.
        progress.done_bit_per_s = per_second(progress.done_bytes.saturating_sub(done));
        progress.wan_bit_per_s = per_second(progress.wan_bytes.saturating_sub(wan));
        let left = progress.used_bytes.saturating_sub(progress.done_bytes);
        progress.eta_seconds =
            (progress.done_bit_per_s > 0).then(|| left.saturating_mul(8) / progress.done_bit_per_s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_rest_follow_the_last_seconds() {
        let start = Instant::now();
        let mut pace = Pace::default();
        let mut progress = Progress {
            used_bytes: 100_000_000,
            ..Progress::default()
        };
        for tick in 0..40u64 {
            progress.done_bytes = tick * 250_000;
            progress.wan_bytes = tick * 125_000;
            pace.update(start + Duration::from_millis(250 * tick), &mut progress);
        }
        assert!(
            progress.done_bit_per_s.abs_diff(8_000_000) < 300_000,
            "{progress:?}"
        );
        assert!(
            progress.wan_bit_per_s.abs_diff(4_000_000) < 150_000,
            "{progress:?}"
        );
        assert!(progress.eta_seconds.unwrap().abs_diff(90) < 5, "{progress:?}");
    }
}
