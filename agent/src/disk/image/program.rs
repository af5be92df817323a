//! Running QEMU's tools: with a deadline, with bounded output, and never orphaned by us.
//!
//! Owns child processes that are asked one question. Leaves alone servers that stay (`server`). Promises: a
//! child that hangs is killed, one that talks without end is killed, and what it said last is kept for the
//! error.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::error::ImageError;

/// How much of a program's standard error is kept: its end.
const SAID_MAX: usize = 4096;

/// The end of what a program writes to its standard error.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said(Arc<Mutex<VecDeque<u8>>>);

impl Said {
    /// Starts a thread that reads until the program closes its end.
    pub(super) fn listen(mut from: impl Read + Send + 'static) -> io::Result<(Self, JoinHandle<()>)> {
        let said = Self::default();
        let ours = said.clone();
        let thread = std::thread::Builder::new()
            .name("program-stderr".into())
            .spawn(move || {
                let mut piece = [0; 1024];
                loop {
                    match from.read(&mut piece) {
                        Ok(0) => break,
                        Ok(count) => ours.append(&piece[..count]),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
            })?;
        Ok((said, thread))
    }

    fn append(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(SAID_MAX);
        kept.drain(..excess);
    }

    /// The last line that is not blank, without control characters.
    pub(crate) fn last_line(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let line = text
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or_default();
        line.trim()
            .chars()
            .filter(|c| !c.is_control())
            .take(500)
            .collect()
    }
}

/// A program's short name for sentences.
pub(crate) fn name(program: &Path) -> String {
    program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned()
}

/// The error for a program that could not be started.
pub(super) fn not_started(program: &Path, error: &io::Error) -> ImageError {
    let program = name(program);
    if error.kind() == io::ErrorKind::NotFound {
        return ImageError::ProgramMissing { program };
    }
    ImageError::Program {
        program,
        what: format!("could not be started: {error}"),
        said: String::new(),
    }
}

/// A command whose messages are in English and whose input is closed.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs `command` to its end and gives its standard output, at most `output_max` bytes, within `limit`.
pub(super) fn output(command: &mut Command, limit: Duration, output_max: u64) -> Result<Vec<u8>, ImageError> {
    let deadline = Instant::now() + limit;
    let program = Path::new(command.get_program()).to_owned();
    let failed = |what: String, said: &Said| ImageError::Program {
        program: name(&program),
        what,
        said: said.last_line(),
    };
    let started = Heard::start(command.stdout(Stdio::piped()));
    let mut child = started.map_err(|error| not_started(&program, &error))?;
    let said = child.said.clone();
    let Some(stdout) = child.process.0.stdout.take() else {
        return Err(failed("has no output".into(), &said));
    };
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let reader = move || {
        let mut bytes = Vec::new();
        let result = stdout.take(output_max + 1).read_to_end(&mut bytes).map(|_| bytes);
        let _ = sender.send(result); // Nobody listens any more once the deadline has passed.
    };
    std::thread::Builder::new()
        .name("program-stdout".into())
        .spawn(reader)
        .map_err(|error| failed(format!("cannot be heard: {error}"), &said))?;
    let bytes = match receiver.recv_deadline(deadline) {
        Ok(Ok(bytes)) if bytes.len() as u64 <= output_max => bytes,
        Ok(Ok(_)) => return Err(failed(format!("wrote more than {output_max} bytes"), &said)),
        Ok(Err(error)) => return Err(failed(format!("cannot be heard: {error}"), &said)),
        Err(_) => {
            return Err(failed(
                format!("did not finish within {} s", limit.as_secs_f32()),
                &said,
            ));
        }
    };
    match child.process.wait_until(deadline) {
        Ok(Some(status)) if status.success() => Ok(bytes),
        Ok(Some(status)) => {
            child.last_words();
            Err(failed(format!("failed ({status})"), &said))
        }
        Ok(None) => Err(failed(
            format!("did not finish within {} s", limit.as_secs_f32()),
            &said,
        )),
        Err(error) => Err(failed(format!("cannot be waited for: {error}"), &said)),
    }
}

/// A child whose standard error is read all the time, so that it never waits for a reader.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) process: Reaped,
    pub(crate) said: Said,
    listener: JoinHandle<()>,
}

impl Heard {
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        let mut process = Reaped(command.stderr(Stdio::piped()).spawn()?);
        let stderr = process.0.stderr.take();
        let stderr = stderr.ok_or_else(|| io::Error::other("it has no standard error"))?;
        let (said, listener) = Said::listen(stderr)?;
        Ok(Self {
            process,
            said,
            listener,
        })
    }

    /// What a child that has ended said last. Somebody it started might hold the pipe open: that one is not waited for.
    pub(crate) fn last_words(&self) -> String {
        let patience = Instant::now() + Duration::from_millis(500);
        while !self.listener.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.said.last_line()
    }
}

/// A child that is killed and reaped when it is dropped.
#[derive(Debug)]
pub(crate) struct Reaped(pub(crate) Child);

impl Reaped {
    /// Waits for the child's end until `deadline`; `None` where it still runs.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> io::Result<Option<std::process::ExitStatus>> {
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both fail only where the child is already reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = command(Path::new("sh"));
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_hanging_program_is_killed() {
        let begun = Instant::now();
        let error = output(
            &mut shell("echo waiting >&2; exec sleep 60"),
            Duration::from_millis(300),
            10,
        )
        .unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert_eq!(error.to_string(), "sh did not finish within 0.3 s: waiting");
    }

    #[test]
    fn an_endless_talker_is_killed() {
        let error = output(&mut shell("yes"), Duration::from_secs(20), 100_000).unwrap_err();
        assert_eq!(error.to_string(), "sh wrote more than 100000 bytes");
    }

    #[test]
    fn the_last_words_are_kept() {
        let error = output(
            &mut shell("echo first >&2; echo last >&2; exit 3"),
            Duration::from_secs(20),
            10,
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "sh failed (exit status: 3): last");
        assert_eq!(
            output(&mut shell("echo hello"), Duration::from_secs(20), 10).unwrap(),
            b"hello\n"
        );
    }

    #[test]
    fn a_missing_program_names_its_package() {
        let error = output(
            &mut command(Path::new("/none/qemu-img")),
            Duration::from_secs(1),
            1,
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "qemu-img is not installed; it comes with the package qemu-utils"
        );
    }
}
