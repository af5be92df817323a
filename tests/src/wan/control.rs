//! The line protocol of the emulator process.
//!
//! Owns the commands read from standard input and the JSON lines written to standard output. Leaves alone who
//! sends them. Promises that an unknown or overlong line is answered with an error and otherwise ignored.
//!
//! | line | effect |
//! |---|---|
//! | `cut 10s..25s` | nothing passes from 10 s to 25 s after this line |
//! | `cut on`, `cut off` | nothing passes until told otherwise |
//! | `loss 2%` | from now on this part of the packets is lost, both ways |
//! | `stats` | one line of [`Stats`] |
//! | end of input | a last line of [`Stats`], then the process ends |

use longhaul_common::units::Share;
use serde::{Deserialize, Serialize};

use super::direction::Counters;
use super::spec::CutWindow;

/// Longest command line, in bytes.
const LINE_MAX: usize = 256;

/// One command to the emulator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Command {
    CutBetween(CutWindow),
    Cut(bool),
    Loss(f64),
    Stats,
}

/// One line from the emulator.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Both devices are up.
    Ready,
    Stats(Stats),
    Error {
        message: String,
    },
}

/// Everything the emulator counted.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Since the emulator's start.
    pub seconds: f64,
    /// Source to target.
    pub forth: Counters,
    /// Target to source.
    pub back: Counters,
    /// CPU time of the emulator process.
    pub cpu_seconds: f64,
    /// Longest time a packet was released after its deadline, in milliseconds.
    pub late_max_ms: f64,
    /// Bytes delivered in each second since the start.
    pub forth_per_second: Vec<u64>,
    pub back_per_second: Vec<u64>,
}

/// Understands one line.
pub fn parse(line: &str) -> Result<Command, String> {
    let refused = |cause: &str| Err(format!("'{line}' is no command: {cause}"));
    match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["cut", "on"] => Ok(Command::Cut(true)),
        ["cut", "off"] => Ok(Command::Cut(false)),
        ["cut", window] => window
            .parse()
            .map(Command::CutBetween)
            .or_else(|error: String| refused(&error)),
        ["loss", share] => match share.parse::<Share>() {
            Ok(share) => Ok(Command::Loss(share.fraction())),
            Err(error) => refused(&error.to_string()),
        },
        ["stats"] => Ok(Command::Stats),
        _ => refused("known are cut, loss and stats"),
    }
}

/// Cuts a byte stream into lines.
#[derive(Debug, Default)]
pub struct Lines {
    held: Vec<u8>,
}

impl Lines {
    /// Takes bytes and gives the lines that they complete; a line longer than 256 bytes is given in pieces.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for byte in bytes {
            if *byte == b'\n' || self.held.len() >= LINE_MAX {
                lines.push(String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned());
            }
            if *byte != b'\n' {
                self.held.push(*byte);
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_understood_and_nonsense_is_refused() {
        assert_eq!(parse("cut on"), Ok(Command::Cut(true)));
        assert_eq!(parse("loss 2%"), Ok(Command::Loss(0.02)));
        assert!(matches!(parse("cut 1s..2s"), Ok(Command::CutBetween(_))));
        for line in ["", "cut", "cut 2s..1s", "loss all", "quit now", "stats stats"] {
            assert!(parse(line).unwrap_err().contains("no command"), "{line}");
        }
    }

    #[test]
    fn lines_survive_any_split_and_never_grow_without_bound() {
        let mut lines = Lines::default();
        assert!(lines.take(b"cut o").is_empty());
        assert_eq!(lines.take(b"n\nstats\n"), ["cut on", "stats"]);
        for _ in 0..1000 {
            lines.take(&[b'x'; 100]);
            assert!(lines.held.len() <= LINE_MAX);
        }
    }
}
