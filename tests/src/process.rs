//! One program under the lab's supervision.
//!
//! Owns starting it with its log, killing it, starting it again after a second as a supervisor would, and
//! adding up what its lives used. Leaves alone what the program is. Promises to give up on a program that
//! keeps dying by itself, with the last words of its log.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::lab::{End, Lab};
use crate::usage::{Usage, usage};

/// How long a supervisor waits before it starts a dead program again.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// Unasked deaths after which a program is given up.
const DEATHS_MAX: u32 = 5;

/// How a program is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Its name in the report, the log's name and the faults: "source-agent".
    pub name: String,
    pub end: End,
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

/// A supervised program.
#[derive(Debug)]
pub struct Process {
    launch: Launch,
    log: PathBuf,
    child: Option<Child>,
    /// When to start it again.
    due: Option<Instant>,
    current: Usage,
    past: Usage,
    deaths: u32,
    kills: u32,
}

impl Process {
    /// Starts it.
    pub fn start(lab: &mut Lab, launch: Launch) -> io::Result<Self> {
        let log = lab.directory().join(format!("{}.log", launch.name));
        let (current, past) = (Usage::default(), Usage::default());
        let mut process = Self {
            launch,
            log,
            child: None,
            due: None,
            current,
            past,
            deaths: 0,
            kills: 0,
        };
        process.spawn(lab)?;
        Ok(process)
    }

    pub fn name(&self) -> &str {
        &self.launch.name
    }

    /// Whether it was started and has not been seen to end.
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Where it writes what it has to say.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What all its lives have used so far.
    pub fn usage(&self) -> Usage {
        self.past.join(self.current)
    }

    /// How often it was killed on command, and how often it died by itself.
    pub fn ends(&self) -> (u32, u32) {
        (self.kills, self.deaths)
    }

    /// Kills it with -9, with what it has started, as its systemd unit would; it is started again after a
    /// second.
    pub fn kill(&mut self, now: Instant) -> io::Result<()> {
        self.sample();
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        end_group(&mut child)?;
        self.kills += 1;
        self.past = self.usage();
        self.current = Usage::default();
        self.due = Some(now + RESTART_AFTER);
        Ok(())
    }

    /// Looks after it: notes what it uses, starts it again when that is due.
    ///
    /// # Errors
    /// When it keeps dying by itself.
    pub fn tend(&mut self, lab: &mut Lab, now: Instant) -> io::Result<()> {
        self.sample();
        if let Some(status) = self.child.as_mut().map(Child::try_wait).transpose()?.flatten() {
            self.child = None;
            self.past = self.usage();
            self.current = Usage::default();
            self.deaths += 1;
            if self.deaths >= DEATHS_MAX {
                return Err(self.dead(&format!("ended {DEATHS_MAX} times by itself ({status})")));
            }
            self.due = Some(now + RESTART_AFTER);
        }
        if self.due.is_some_and(|due| due <= now) {
            self.due = None;
            self.spawn(lab)?;
        }
        Ok(())
    }

    /// Ends it for good.
    pub fn stop(&mut self) -> io::Result<()> {
        self.sample();
        self.due = None;
        self.child
            .take()
            .map_or(Ok(()), |mut child| end_group(&mut child))
    }

    /// A sentence about its death with the end of its log.
    pub fn dead(&self, what: &str) -> io::Error {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<_> = log.lines().rev().take(8).collect();
        let last: Vec<_> = last.into_iter().rev().collect();
        io::Error::other(format!(
            "{} {what}; its log ends:\n  {}",
            self.launch.name,
            last.join("\n  ")
        ))
    }

    fn spawn(&mut self, lab: &mut Lab) -> io::Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command: Command = lab.command(self.launch.end, &self.launch.program);
        let child = command
            .args(&self.launch.arguments)
            .current_dir(lab.directory())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot start {}: {error}", self.launch.name),
                )
            })?;
        lab.adopt(child.id())?;
        self.child = Some(child);
        Ok(())
    }

    fn sample(&mut self) {
        if let Some(used) = self.child.as_ref().and_then(|child| usage(child.id())) {
            // A program that has just ended shows no memory any more.
            self.current = self.current.max(used);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// Kills a process that leads its own group, with the group, and waits for its end.
pub(crate) fn end_group(child: &mut Child) -> io::Result<()> {
    if let Some(pid) = Pid::from_raw(child.id().cast_signed()) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
    child.wait().map(|_| ())
}
