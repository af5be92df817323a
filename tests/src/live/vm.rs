//! A QEMU that the lab itself has started.
//!
//! Owns its process, its log and its end. Leaves alone what it is told over QMP (`monitor`). Promises that it
//! leads a process group of its own, so that it does not hear the terminal's interrupt, and that it is gone when the handle is dropped.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::machine::Machine;
use super::monitor::Monitor;
use crate::usage::{Usage, usage, wait_until};

/// How long QEMU may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A running QEMU.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    monitor: Monitor,
    log: PathBuf,
    used: Usage,
}

impl Vm {
    /// Starts the machine with `command`, which makes a command for a program (inside a namespace, perhaps);
    /// waits for its QMP greeting.
    ///
    /// # Errors
    /// When QEMU cannot be started or ends at once, with its own words.
    pub fn start(
        machine: &Machine,
        monitor: &Monitor,
        command: impl FnOnce(&Path) -> Command,
        log: &Path,
    ) -> io::Result<Self> {
        let words = machine.words();
        let output = File::create(log)?;
        let mut command = command(Path::new(&words[0]));
        let child = command
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("cannot run {}: {error}", words[0])))?;
        let mut vm = Self {
            child,
            monitor: monitor.clone(),
            log: log.to_owned(),
            used: Usage::default(),
        };
        let started = wait_until(START_LIMIT, || {
            vm.monitor.is_connected().then_some(true).or_else(|| {
                let ended = vm.child.try_wait().is_ok_and(|status| status.is_some());
                ended.then_some(false)
            })
        });
        if started == Some(true) {
            return Ok(vm);
        }
        let words = std::fs::read_to_string(&vm.log).unwrap_or_default();
        Err(io::Error::other(format!("QEMU did not start: {}", words.trim())))
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The lab's QMP connection to it.
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// What it has used so far; call it now and then, a process that has ended says nothing.
    pub fn usage(&mut self) -> Usage {
        if let Some(used) = usage(self.child.id()) {
            self.used = self.used.max(used);
        }
        self.used
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it has ended by itself.
    pub fn wait_ended(&mut self, limit: Duration) -> bool {
        wait_until(limit, || (!self.is_running()).then_some(())).is_some()
    }

    /// Kills it, as a power loss would.
    pub fn kill(&mut self) {
        let _ = self.usage();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}
