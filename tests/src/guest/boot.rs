//! Boots a disk under QEMU and listens to its serial console.
//!
//! Owns the QEMU command line and the words that a guest says. Leaves the disk as it was: QEMU writes to a
//! throw-away overlay. Promises to end QEMU when the guest has said its last word, when the time is over, and
//! with the lab.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Kernel;
use crate::janitor::Janitor;

/// Lines of the console that are kept.
const LINES_MAX: usize = 2000;
/// Longest line of the console.
const LINE_BYTES_MAX: u64 = 4096;

/// What a booted guest said.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Booted {
    /// The guest proved its own files.
    pub ok: bool,
    /// How many files it proved.
    pub files: u64,
    /// From QEMU's start to its last word.
    pub seconds: f64,
    /// The last lines of the console, for a reader who wants to know why not.
    pub console: Vec<String>,
}

/// Boots `disk` of the given format and waits for the guest's word, at most `limit`.
///
/// # Errors
/// When QEMU cannot be started.
pub fn boot(disk: &Path, format: &str, root: &str, kernel: &Kernel, limit: Duration) -> io::Result<Booted> {
    let mut janitor = Janitor::start()?;
    let start = Instant::now();
    let mut child = command(disk, format, root, kernel).spawn().map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot run qemu-system-x86_64 (Debian package qemu-system-x86): {error}"),
        )
    })?;
    janitor.process(child.id())?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| io::Error::other("QEMU has no output"))?;
    let lines = listen(stdout);
    let mut booted = Booted::default();
    while let Ok(line) = lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
        let last = booted.hear(line);
        if last {
            break;
        }
    }
    booted.seconds = start.elapsed().as_secs_f64();
    let _ = child.kill();
    child.wait()?;
    Ok(booted)
}

impl Booted {
    /// Takes one line of the console; gives whether it was the guest's last word.
    fn hear(&mut self, line: String) -> bool {
        let word = line
            .find("LONGHAUL-GUEST-")
            .map(|at| line[at..].to_owned())
            .unwrap_or_default();
        if self.console.len() >= LINES_MAX {
            self.console.remove(0);
        }
        self.console.push(line);
        if let Some(files) = word.strip_prefix("LONGHAUL-GUEST-OK ") {
            self.files = files
                .split_whitespace()
                .next()
                .and_then(|files| files.parse().ok())
                .unwrap_or(0);
            self.ok = self.files > 0;
            return true;
        }
        word.starts_with("LONGHAUL-GUEST-FAILED")
    }
}

/// What QEMU runs the lab's guests with: `LONGHAUL_ACCEL`, or software emulation.
pub fn accelerator() -> String {
    std::env::var("LONGHAUL_ACCEL").unwrap_or_else(|_| "tcg".to_owned())
}

fn command(disk: &Path, format: &str, root: &str, kernel: &Kernel) -> Command {
    // A comma separates QEMU's options; doubled, it is part of the file's name.
    let file = disk.display().to_string().replace(',', ",,");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-machine",
            "q35",
            "-accel",
            &accelerator(),
            "-cpu",
            "max",
            "-m",
            "512",
        ])
        .args(["-display", "none", "-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(&kernel.vmlinuz)
        .arg("-initrd")
        .arg(&kernel.initrd)
        .args([
            "-append",
            &format!("console=ttyS0 quiet panic=-1 longhaul.root={root}"),
        ])
        .args([
            "-drive",
            &format!("file={file},format={format},if=virtio,snapshot=on"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0);
    command
}

/// Reads lines on a thread, so that a silent guest can be given up.
fn listen(output: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::sync_channel(64);
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        loop {
            let mut line = Vec::new();
            match output.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(length) if length > 0 => {
                    let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                    if sender.send(line).is_err() {
                        return;
                    }
                }
                _ => return,
            }
        }
    });
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_words_are_understood_between_other_output() {
        let mut booted = Booted::default();
        assert!(!booted.hear("[    0.1] LONGHAUL-GUEST-UP 6.1".into()));
        assert!(!booted.hear("noise".into()));
        assert!(booted.hear("LONGHAUL-GUEST-OK 4766 files".into()));
        assert!(booted.ok && booted.files == 4766);
    }

    #[test]
    fn a_guest_that_proved_nothing_is_not_ok() {
        for line in [
            "LONGHAUL-GUEST-FAILED 3 files differ",
            "LONGHAUL-GUEST-OK 0 files",
            "LONGHAUL-GUEST-OK",
        ] {
            let mut booted = Booted::default();
            booted.hear(line.into());
            assert!(!booted.ok, "{line}");
        }
    }
}
