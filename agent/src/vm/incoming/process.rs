//! The process of the target's QEMU: started so that it survives the agent, found again, ended.
//!
//! Owns the process and its log. It gets a process group of its own (a service manager that kills by cgroup needs the
//! template to begin with `systemd-run --scope`, which replaces itself by QEMU). Promises: no other process than the one
//! that was started is ever signalled (by pidfd, checked after it was opened).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::error::IncomingError;
use crate::vm::qmp::wire::printable;

/// How much of the end of a log is told.
const SAID_MAX: u64 = 2000;
/// How often an end is looked for.
const LOOK: Duration = Duration::from_millis(5);
/// How long a QEMU that was asked to quit may take before it is killed, and a killed one to go.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Where a QEMU of ours keeps what it needs to be found again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Written by QEMU (`-pidfile {pidfile}`).
    pub pid: PathBuf,
    /// Its standard output and error.
    pub log: PathBuf,
}

/// A QEMU that this agent, or its predecessor, started.
#[derive(Debug)]
pub(super) struct Process {
    id: u32,
    log: PathBuf,
    /// Until the agent's restart: it has to be reaped.
    child: Option<Child>,
    handle: Option<OwnedFd>,
}

impl Process {
    pub(super) fn start(command: &[String], files: &Files) -> Result<Self, IncomingError> {
        let log = open_log(&files.log).map_err(IncomingError::io("open the log", &files.log))?;
        let also = log
            .try_clone()
            .map_err(IncomingError::io("open the log", &files.log))?;
        // A stale one would name somebody else's process by now.
        let _ = fs::remove_file(&files.pid);
        let program = command.first().map(String::as_str).unwrap_or_default();
        let child = Command::new(program)
            .args(command.iter().skip(1))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(also)
            .process_group(0)
            .spawn()
            .map_err(IncomingError::io("start", Path::new(program)))?;
        let id = child.id();
        Ok(Self {
            id,
            log: files.log.clone(),
            child: Some(child),
            handle: open(id),
        })
    }

    /// The living process that the pid file names. The caller makes sure that it is the one behind the monitor.
    pub(super) fn find(files: &Files) -> Option<Self> {
        let text = fs::read_to_string(&files.pid).ok()?;
        let id: u32 = text.trim().parse().ok()?;
        let handle = open(id)?;
        Some(Self {
            id,
            log: files.log.clone(),
            child: None,
            handle: Some(handle),
        })
    }

    pub(super) const fn id(&self) -> u32 {
        self.id
    }

    /// Waits for its end; None where it lives on after `limit`.
    pub(super) async fn wait(&mut self, limit: Duration) -> Option<String> {
        let until = tokio::time::Instant::now() + limit;
        loop {
            if let Some(how) = self.ended() {
                return Some(how);
            }
            if tokio::time::Instant::now() >= until {
                return None;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn ended(&mut self) -> Option<String> {
        match &mut self.child {
            Some(child) => child.try_wait().ok().flatten().map(|status| status.to_string()),
            None => {
                let alive = self.handle.is_some() && is_alive(self.id);
                (!alive).then(|| "its process is gone".to_owned())
            }
        }
    }

    /// Waits for a QEMU that was asked to quit, kills one that does not.
    pub(super) async fn kill(&mut self) {
        if self.wait(Duration::from_millis(500)).await.is_some() {
            return;
        }
        match (&mut self.child, &self.handle) {
            (_, Some(handle)) => drop(pidfd_send_signal(handle, Signal::KILL)), // Gone already: fine.
            (Some(child), None) => drop(child.kill()),
            (None, None) => {}
        }
        self.wait(END_LIMIT).await;
    }

    /// The end of its log, on one line.
    pub(super) fn last_words(&self) -> String {
        tail(&self.log).unwrap_or_default()
    }
}

/// A process that ended and was not reaped yet (whose parent lives) does not count.
fn is_alive(id: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

fn open(id: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(id).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

fn open_log(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(SAID_MAX)))?;
    let mut bytes = Vec::new();
    file.take(SAID_MAX).read_to_end(&mut bytes)?;
    Ok(printable(&String::from_utf8_lossy(&bytes)))
}
