//! Cleans up after a lab, however the lab ends.
//!
//! A child process of the lab, in a process group of its own, that waits for its standard input to end. When
//! the lab returns, panics, is interrupted or is killed with -9, the pipe closes, and the janitor ends the
//! programs, removes the namespaces and, unless told to keep it, the lab's directory. Owns nothing else.
//! Promises to end only processes that the lab named, checked by their start time, and those inside the lab's
//! own namespaces.
//!
//! Lines it understands: `process PID`, `namespace NAME`, `directory PATH`, `keep`.

use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::namespace;
use crate::usage::start_time;

/// The lab's handle; dropping it makes the janitor clean up, and waits until it has.
#[derive(Debug)]
pub struct Janitor {
    child: Child,
}

impl Janitor {
    /// Starts the janitor.
    pub fn start() -> io::Result<Self> {
        let child = Command::new(crate::own_program()?)
            .arg("janitor")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self { child })
    }

    /// Tells it of a process that leads its own group.
    pub fn process(&mut self, pid: u32) -> io::Result<()> {
        self.tell(&format!("process {pid}"))
    }

    /// Tells it of a namespace.
    pub fn namespace(&mut self, name: &str) -> io::Result<()> {
        self.tell(&format!("namespace {name}"))
    }

    /// Tells it of a directory.
    pub fn directory(&mut self, path: &std::path::Path) -> io::Result<()> {
        self.tell(&format!("directory {}", path.display()))
    }

    /// Leaves directories in place.
    pub fn keep(&mut self) -> io::Result<()> {
        self.tell("keep")
    }

    fn tell(&mut self, line: &str) -> io::Result<()> {
        let stdin = self
            .child
            .stdin
            .as_mut()
            .ok_or_else(|| io::Error::other("the janitor was dismissed"))?;
        writeln!(stdin, "{line}")
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// What there is to clean up.
#[derive(Debug, Default)]
struct Duties {
    /// Process and its start time, so that a reused number is never hit.
    processes: Vec<(u32, Option<u64>)>,
    namespaces: Vec<String>,
    directories: Vec<PathBuf>,
    keep: bool,
}

impl Duties {
    fn note(&mut self, line: &str) {
        match line.split_once(' ') {
            Some(("process", pid)) => self
                .processes
                .extend(pid.parse().ok().map(|pid| (pid, start_time(pid)))),
            Some(("namespace", name)) => self.namespaces.push(name.to_owned()),
            Some(("directory", path)) => self.directories.push(PathBuf::from(path)),
            _ => self.keep |= line == "keep",
        }
    }

    fn perform(self) {
        for (pid, started) in self.processes {
            let same = started.is_some() && start_time(pid) == started;
            if let Some(pid) = Pid::from_raw(pid.cast_signed()).filter(|_| same) {
                let _ = kill_process_group(pid, Signal::KILL);
            }
        }
        for name in &self.namespaces {
            namespace::end_processes(name);
            namespace::remove(name);
        }
        for path in self.directories.iter().filter(|_| !self.keep) {
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

/// The janitor process itself.
pub fn run() -> io::Result<()> {
    let mut duties = Duties::default();
    for line in io::stdin().lock().lines() {
        match line {
            Ok(line) => duties.note(&line),
            Err(_) => break,
        }
    }
    duties.perform();
    Ok(())
}
