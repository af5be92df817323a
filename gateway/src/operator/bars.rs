//! A job's progress on a terminal.
//!
//! Owns the bar and the line under it. On anything but a terminal it prints a line now and then instead.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use longhaul_common::units::Rate;

use super::show;
use crate::job::progress::{JobState, Phase, Progress};

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Draws one job.
pub(super) struct Bars {
    bar: ProgressBar,
    terminal: bool,
    said: Option<(Instant, Phase, Option<String>)>,
}

impl Bars {
    pub(super) fn new(name: &str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal {
            ProgressDrawTarget::stderr_with_hz(5)
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        let template = "{prefix} [{bar:32}] {percent:>3} %  {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("#> "));
        }
        bar.set_prefix(name.to_owned());
        Self {
            bar,
            terminal,
            said: None,
        }
    }

    /// Shows where the job is.
    pub(super) fn show(&mut self, state: JobState, progress: &Progress, now: Instant) {
        let (done, whole) = match progress.phase {
            Phase::Verify => (progress.verified_bytes, progress.raw_bytes),
            Phase::Commit | Phase::Done => (1, 1),
            _ => (progress.done_bytes, progress.used_bytes),
        };
        self.bar.set_length(whole.max(1));
        self.bar.set_position(done);
        let words = words(state, progress);
        self.bar.set_message(words.clone());
        if !self.terminal {
            self.print_line(progress, &words, now);
        }
    }

    fn print_line(&mut self, progress: &Progress, words: &str, now: Instant) {
        let due = self.said.as_ref().is_none_or(|(at, phase, message)| {
            now.saturating_duration_since(*at) >= LINE_EVERY
                || *phase != progress.phase
                || *message != progress.message
        });
        if due {
            eprintln!("{} {words}", self.bar.prefix());
            self.said = Some((now, progress.phase, progress.message.clone()));
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// A running VM's move, past its first round.
fn live(what: &str, progress: &Progress) -> String {
    let live = progress.live.clone().unwrap_or_default();
    let (disk, ram) = (
        show::bytes(live.disk_left_bytes),
        show::bytes(live.ram_left_bytes),
    );
    let left = match live.ram_left_bytes {
        0 => format!("{disk} of disk left"),
        _ => format!("{disk} of disk and {ram} of RAM left"),
    };
    let rate = wan(progress);
    let why = match live.decision.as_str() {
        "" => String::new(),
        decision => format!("; {decision}"),
    };
    format!("{what}: round {}, {left}, {rate}{why}", live.round)
}

/// The line beside the bar.
fn words(state: JobState, progress: &Progress) -> String {
    if let Some(message) = &progress.message {
        return format!("{}: {message}", show::state(state));
    }
    let phase = match (state, progress.phase) {
        (JobState::Queued, _) => return "waits for its turn".to_owned(),
        (_, Phase::Connect) => return "connects both sides".to_owned(),
        (_, Phase::Scan) => return "scans the disks".to_owned(),
        (_, Phase::Transfer) => "moves",
        (_, Phase::Rounds) => return live("follows the guest's writes", progress),
        (_, Phase::Ram) => return live("moves RAM", progress),
        (_, Phase::Handover) => return "the VM changes sides".to_owned(),
        (_, Phase::InDoubt) => return "handed over, waits for the target's word".to_owned(),
        (_, Phase::Verify) => return format!("reads back {}", show::bytes(progress.verified_bytes)),
        (_, Phase::Commit) => return "commits".to_owned(),
        (_, Phase::Done) => return "done".to_owned(),
    };
    let left = progress
        .eta_seconds
        .map_or_else(String::new, |seconds| format!(", {} left", show::span(seconds)));
    let saved = match progress.sent_raw_bytes {
        0 => String::new(),
        raw => format!(
            ", reduction saves {} %",
            100 - (progress.wan_bytes * 100 / raw).min(100)
        ),
    };
    let free = match progress.skipped_free_bytes {
        0 => String::new(),
        free => format!("; {} free and skipped", show::bytes(free)),
    };
    let done = show::bytes(progress.done_bytes);
    let decided = progress.live.as_ref().map(|live| live.decision.as_str());
    let decided = decided.filter(|said| !said.is_empty());
    let decided = decided.map(|said| format!("; {said}")).unwrap_or_default();
    format!("{phase} {done}, {}{left}{free}{saved}{decided}", wan(progress))
}

/// What the WAN carries.
fn wan(progress: &Progress) -> String {
    match progress.wan_bit_per_s {
        // The last seconds belong to the target's disks.
        0 if progress.sent_raw_bytes + progress.zero_bytes >= progress.used_bytes => "all is sent".to_owned(),
        0 => "WAN idle".to_owned(),
        rate @ ..100_000 => format!("WAN {}", Rate(rate / 1000 * 1000)),
        rate => format!("WAN {}", Rate(rate / 100_000 * 100_000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_transfer_is_not_shown_as_a_standstill() {
        let mut progress = Progress {
            phase: Phase::Transfer,
            used_bytes: 64 << 20,
            done_bytes: 48 << 20,
            sent_raw_bytes: 64 << 20,
            wan_bytes: 32 << 20,
            ..Progress::default()
        };
        let line = words(JobState::Running, &progress);
        assert!(
            line.contains("all is sent") && line.contains("saves 50 %"),
            "{line}"
        );
        progress.sent_raw_bytes = 48 << 20;
        let line = words(JobState::Running, &progress);
        assert!(line.contains("WAN idle") && !line.contains('?'), "{line}");
        (progress.wan_bit_per_s, progress.eta_seconds) = (87_654_321, Some(3));
        let line = words(JobState::Running, &progress);
        assert!(line.contains("WAN 87.6 Mbit/s, 3 s left"), "{line}");
    }
}
