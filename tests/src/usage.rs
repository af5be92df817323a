//! What a process has used, read from /proc.
//!
//! Owns the parsing of `/proc/PID/stat` and `/proc/PID/status`. Promises nothing for a process that has
//! ended: its figures must be read before.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Memory and CPU of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Most resident memory so far (VmHWM), in bytes.
    pub peak_rss_bytes: u64,
    /// User and system time.
    pub cpu_seconds: f64,
}

impl Usage {
    /// The later of two looks at one life.
    pub fn max(self, other: Self) -> Self {
        Self {
            peak_rss_bytes: self.peak_rss_bytes.max(other.peak_rss_bytes),
            cpu_seconds: self.cpu_seconds.max(other.cpu_seconds),
        }
    }

    /// Joins two lives of one program: the larger peak, the sum of the times.
    pub fn join(self, other: Self) -> Self {
        Self {
            peak_rss_bytes: self.peak_rss_bytes.max(other.peak_rss_bytes),
            cpu_seconds: self.cpu_seconds + other.cpu_seconds,
        }
    }
}

/// What a running process has used so far.
pub fn usage(pid: u32) -> Option<Usage> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let fields = stat_fields(pid)?;
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let cpu_seconds = ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
    Some(Usage {
        peak_rss_bytes: peak(&status)?,
        cpu_seconds,
    })
}

/// When a process was started, in clock ticks since boot; with the number it names a process for ever.
pub fn start_time(pid: u32) -> Option<u64> {
    stat_fields(pid)?.get(19)?.parse().ok()
}

/// The fields of `/proc/PID/stat` from the state on (proc(5) field 3 is index 0): the name before may hold
/// anything.
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(
        stat.rsplit_once(')')?
            .1
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
    )
}

fn peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

/// Waits until `done` gives something or `limit` has passed.
pub fn wait_until<T>(limit: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let start = std::time::Instant::now();
    loop {
        if let Some(value) = done() {
            return Some(value);
        }
        if start.elapsed() >= limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_a_start() {
        let used = usage(std::process::id()).unwrap();
        assert!(used.peak_rss_bytes > 1 << 20, "{used:?}");
        assert!(start_time(std::process::id()).unwrap() > 0);
        assert_eq!(usage(u32::MAX), None);
    }

    #[test]
    fn two_lives_join() {
        let (one, two) = (
            Usage {
                peak_rss_bytes: 5,
                cpu_seconds: 1.0,
            },
            Usage {
                peak_rss_bytes: 3,
                cpu_seconds: 2.0,
            },
        );
        assert_eq!(
            one.join(two),
            Usage {
                peak_rss_bytes: 5,
                cpu_seconds: 3.0
            }
        );
    }
}
