//! What a process has used, read from /proc.
//!
//! Owns the parsing of `/proc/PID/stat` and `/proc/PID/status`. Promises nothing for a process that has
//! ended: its figures must be read before.

use std::collections::BTreeMap;
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

/// What the processes of one group have used, those that ended included as far as they were seen.
#[derive(Clone, Debug, Default)]
pub struct GroupUsage {
    group: u32,
    seen: BTreeMap<u32, Usage>,
}

impl GroupUsage {
    /// Of the group that this process leads.
    pub fn of(group: u32) -> Self {
        Self {
            group,
            ..Self::default()
        }
    }

    /// Takes a look at what they have used so far.
    pub fn look(&mut self) {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let group = self.group.to_string();
        for pid in pids.filter(|pid| stat_fields(*pid).is_some_and(|fields| fields.get(2) == Some(&group))) {
            if let Some(used) = usage(pid) {
                let seen = self.seen.entry(pid).or_default();
                *seen = seen.max(used);
            }
        }
    }

    /// All of them together: the sum of the times, and the sum of the peaks, for they run side by side.
    pub fn sum(&self) -> Usage {
        self.seen.values().fold(Usage::default(), |all, one| Usage {
            peak_rss_bytes: all.peak_rss_bytes + one.peak_rss_bytes,
            cpu_seconds: all.cpu_seconds + one.cpu_seconds,
        })
    }
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
    fn a_group_is_its_leader_and_whatever_it_starts() {
        use std::os::unix::process::CommandExt;
        let mut shell = std::process::Command::new("sh");
        let mut shell = shell
            .args(["-c", "sleep 30 & wait"])
            .process_group(0)
            .spawn()
            .unwrap();
        let mut used = GroupUsage::of(shell.id());
        let both = wait_until(Duration::from_secs(10), || {
            used.look();
            (used.seen.len() == 2).then_some(())
        });
        let pid = rustix::process::Pid::from_raw(shell.id().cast_signed()).unwrap();
        rustix::process::kill_process_group(pid, rustix::process::Signal::KILL).unwrap();
        shell.wait().unwrap();
        assert!(both.is_some(), "{used:?}");
        let parts: u64 = used.seen.values().map(|used| used.peak_rss_bytes).sum();
        used.look();
        assert_eq!(
            used.sum().peak_rss_bytes,
            parts,
            "what has ended is still counted"
        );
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
