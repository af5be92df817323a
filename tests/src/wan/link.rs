//! The lab's handle on a running emulator process.
//!
//! Owns starting it, speaking its line protocol, and its last count. Leaves alone namespaces and programs.
//! Promises that the process is gone when the handle is dropped.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::control::{Event, Stats};
use super::spec::{CutWindow, LinkSpec};
use crate::namespace::Site;

/// A running emulator.
#[derive(Debug)]
pub struct Link {
    child: Child,
    control: Option<ChildStdin>,
    events: BufReader<ChildStdout>,
}

impl Link {
    /// Starts the emulator between two sites and waits until both devices are up.
    pub fn start(spec: &LinkSpec, source: &Site, target: &Site) -> io::Result<Self> {
        let mut child = Command::new(crate::own_program()?)
            .arg("wan")
            .args(["--source", &source.namespace, "--target", &target.namespace])
            .args(spec.to_args())
            // Not in the terminal's group: Ctrl-C ends the lab, and with it the emulator's input.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (control, stdout) = (child.stdin.take(), child.stdout.take());
        let stdout = stdout.ok_or_else(|| io::Error::other("the emulator has no output"))?;
        let mut link = Self {
            child,
            control,
            events: BufReader::new(stdout),
        };
        match link.next_event()? {
            Event::Ready => Ok(link),
            other => Err(io::Error::other(format!("the emulator began with {other:?}"))),
        }
    }

    /// Cuts the link in a window counted from now.
    pub fn cut_between(&mut self, window: CutWindow) -> io::Result<()> {
        self.tell(&format!(
            "cut {}us..{}us",
            window.from.as_micros(),
            window.until.as_micros()
        ))
    }

    /// Cuts the link until told otherwise, or mends it.
    pub fn set_cut(&mut self, cut: bool) -> io::Result<()> {
        self.tell(if cut { "cut on" } else { "cut off" })
    }

    /// What was counted so far.
    pub fn stats(&mut self) -> io::Result<Stats> {
        self.tell("stats")?;
        self.next_stats()
    }

    /// Ends the emulator and gives its last count.
    pub fn stop(mut self) -> io::Result<Stats> {
        self.control = None;
        let stats = self.next_stats();
        self.child.wait()?;
        stats
    }

    fn tell(&mut self, line: &str) -> io::Result<()> {
        let control = self
            .control
            .as_mut()
            .ok_or_else(|| io::Error::other("the emulator was stopped"))?;
        writeln!(control, "{line}")
    }

    fn next_stats(&mut self) -> io::Result<Stats> {
        match self.next_event()? {
            Event::Stats(stats) => Ok(stats),
            other => Err(io::Error::other(format!("the emulator answered {other:?}"))),
        }
    }

    fn next_event(&mut self) -> io::Result<Event> {
        let mut line = String::new();
        if self.events.read_line(&mut line)? == 0 {
            return Err(io::Error::other(
                "the WAN emulator ended; its reason is on standard error",
            ));
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.control = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
