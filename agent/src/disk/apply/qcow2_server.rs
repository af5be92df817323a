//! The QEMU programs behind a qcow2 target: `qemu-img` makes the image, `qemu-nbd` serves it for writing.
//!
//! Owns their processes, the socket and the pid file. Leaves alone what is said over the socket (`qcow2_store`).
//!
//! Promises: a program that hangs is killed; the server ends with its last client, so also when this process is killed, and is waited
//! for or killed when dropped. Its pid file lies where `image::end_stale_servers` looks.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::{TargetError, TargetOptions};
use crate::disk::image::nbd::{Connection, NbdError};
use crate::disk::image::program::{self, Heard};

const EXPORT: &str = "disk";
/// Preallocating writes nothing, but may wait long on a busy disk.
const CREATE_LIMIT: Duration = Duration::from_secs(600);
/// Repairing reads all metadata of the image.
const CHECK_LIMIT: Duration = Duration::from_secs(3600);
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a server may write back what it holds when its clients are gone.
const END_LIMIT: Duration = Duration::from_secs(60);
/// The same where the copy is dropped without being closed.
const DROP_LIMIT: Duration = Duration::from_secs(3);
/// How long a server whose agent died may take to end.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
/// Longest path of a unix socket.
const SOCKET_PATH_MAX: usize = 107;

/// Makes an empty image in the existing file `path`.
pub(crate) fn create(options: &TargetOptions, path: &Path, size: u64) -> Result<(), TargetError> {
    let preallocation = if options.preallocate { "falloc" } else { "off" };
    let mut command = quiet(&options.qemu_img);
    command.args(["create", "-q", "-f", "qcow2", "-o"]);
    command
        .arg(format!("preallocation={preallocation},lazy_refcounts=off"))
        .arg("--")
        .arg(path)
        .arg(size.to_string());
    run(&mut command, CREATE_LIMIT, path)
}

/// Gives back clusters that a crash left without an owner; an error where the image is damaged.
pub(crate) fn repair_leaks(options: &TargetOptions, path: &Path) -> Result<(), TargetError> {
    let mut command = quiet(&options.qemu_img);
    command
        .args(["check", "-q", "-f", "qcow2", "-r", "leaks", "--"])
        .arg(path);
    run(&mut command, CHECK_LIMIT, path)
}

/// Waits until no other program holds the image: a server whose agent was killed needs a moment to end.
pub(crate) fn wait_released(file: &std::fs::File, path: &Path) -> Result<(), TargetError> {
    let deadline = Instant::now() + RELEASE_LIMIT;
    while super::image_lock::is_held(file).map_err(TargetError::during("examine", path))? {
        if Instant::now() > deadline {
            return Err(TargetError::in_use(path, "a QEMU process holds its image lock"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A command in a process group of its own: an interrupt at the terminal must end the agent first, in its own order.
fn quiet(program: &Path) -> Command {
    let mut command = program::command(program);
    command.stdout(Stdio::null()).process_group(0);
    command
}

fn name(command: &Command) -> String {
    program::name(Path::new(command.get_program()))
}

fn spawn(command: &mut Command) -> Result<Heard, TargetError> {
    Heard::start(command).map_err(|error| TargetError::Tool {
        tool: name(command),
        message: match error.kind() {
            io::ErrorKind::NotFound => "it is not installed; it comes with the package qemu-utils".into(),
            _ => format!("it could not be started: {error}"),
        },
    })
}

/// What a program that has ended said last.
fn last_words(child: &Heard) -> String {
    match child.last_words() {
        said if said.is_empty() => "it said nothing".to_owned(),
        said => said,
    }
}

fn run(command: &mut Command, limit: Duration, path: &Path) -> Result<(), TargetError> {
    let tool = name(command);
    let mut child = spawn(command)?;
    let message = match child.process.wait_until(Instant::now() + limit) {
        Ok(Some(status)) if status.success() => return Ok(()),
        Ok(Some(status)) => format!("{status}: {}", last_words(&child)),
        Ok(None) => format!("it did not finish within {} s", limit.as_secs()),
        Err(error) => format!("it cannot be waited for: {error}"),
    };
    if message.contains("No space left on device") || message.contains("Disk quota exceeded") {
        return Err(TargetError::NoSpace {
            action: "make the image",
            path: path.to_owned(),
            source: None,
        });
    }
    Err(TargetError::Tool { tool, message })
}

/// A `qemu-nbd` that serves one qcow2 image for writing.
pub(crate) struct Server {
    process: Heard,
    socket: PathBuf,
    pid_file: PathBuf,
}

impl Server {
    /// Starts a server for at most `clients` clients, and connects the first one.
    pub(crate) fn start(
        options: &TargetOptions,
        path: &Path,
        clients: usize,
    ) -> Result<(Self, Connection), TargetError> {
        let (socket, pid_file) = places(&options.run_dir)?;
        let image = serde_json::json!({
            "driver": "qcow2", "discard": "unmap",
            "file": { "driver": "file", "filename": path.to_string_lossy(), "discard": "unmap" },
        });
        let mut command = quiet(&options.qemu_nbd);
        command
            .args(["--export-name", EXPORT, "--cache=writeback"])
            .arg(format!("--shared={clients}"));
        command
            .arg("--socket")
            .arg(&socket)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(format!("json:{image}"));
        let process = spawn(&mut command)?;
        let mut server = Self {
            process,
            socket,
            pid_file,
        };
        let first = server.first_client(name(&command))?;
        Ok((server, first))
    }

    fn first_client(&mut self, tool: String) -> Result<Connection, TargetError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let error = match self.connect() {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            if let Ok(Some(status)) = self.process.process.0.try_wait() {
                let message = format!("{status}: {}", last_words(&self.process));
                return Err(TargetError::Tool { tool, message });
            }
            let starting = matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            );
            if !starting || Instant::now() > deadline {
                return Err(TargetError::Tool {
                    tool,
                    message: error.to_string(),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn connect(&self) -> Result<Connection, NbdError> {
        Connection::connect(&self.socket, EXPORT)
    }

    /// Waits for the end of a server whose clients are gone, so that everything is in the image.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        match self.process.process.wait_until(Instant::now() + END_LIMIT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(io::Error::other(format!(
                "qemu-nbd ended with {status}: {}",
                last_words(&self.process)
            ))),
            None => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "qemu-nbd did not end with its last client",
            )),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its clients are gone: it ends by itself, unless it hangs. Dropping the process then kills it.
        let _ = self.process.process.wait_until(Instant::now() + DROP_LIMIT);
        // QEMU removes them itself unless it is killed.
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(&self.pid_file);
    }
}

/// Paths of a socket and a pid file that nobody uses.
fn places(run_dir: &Path) -> Result<(PathBuf, PathBuf), TargetError> {
    static STARTED: AtomicU32 = AtomicU32::new(0);
    let count = STARTED.fetch_add(1, Ordering::Relaxed);
    let moment = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.subsec_nanos());
    let stem = format!("nbd-{}-w{count}-{moment:x}", std::process::id());
    let socket = run_dir.join(format!("{stem}.sock"));
    if socket.as_os_str().len() > SOCKET_PATH_MAX || !run_dir.is_absolute() {
        return Err(TargetError::refused(
            run_dir,
            "run_dir must be an absolute and shorter path: sockets lie there",
        ));
    }
    Ok((socket, run_dir.join(format!("{stem}.pid"))))
}
