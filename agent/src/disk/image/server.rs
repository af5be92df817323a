//! A QEMU program that serves one image read-only on a unix socket, for as long as we want it.
//!
//! Owns the server's process, socket and pid file. Leaves alone what is said over the socket (`nbd`).
//!
//! Promises: the server ends with us. It is killed when dropped. Where this process is killed instead,
//! `qemu-nbd` ends by itself, since it runs without `--persistent` and its last client is gone;
//! `qemu-storage-daemon`, the stand-in where `qemu-nbd` is missing, does not, and neither does a server whose
//! first client never came: both are found by their pid files and ended by [`end_stale_servers`] at the next
//! start.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::error::ImageError;
use super::nbd::{ConnectOptions, Connection, NbdError};
use super::program::{self, Heard};

/// The name under which an image is exported.
pub(super) const EXPORT: &str = "disk";
/// How long a server may take from its start to its first answer; large images are slow to open on busy
/// disks.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Longest path of a unix socket.
const SOCKET_PATH_MAX: usize = 107;

/// A running server.
#[derive(Debug)]
pub(super) struct Server {
    program: String,
    process: Heard,
    socket: PathBuf,
    pid_file: PathBuf,
}

/// Which programs may serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Programs<'a> {
    pub(super) qemu_nbd: &'a Path,
    pub(super) storage_daemon: &'a Path,
}

impl Server {
    /// Starts a server for up to `clients` clients of the image that `options` describes, and connects a
    /// first one.
    ///
    /// That connection has to be kept until the end: the server leaves with its last client.
    pub(super) fn start(
        programs: Programs<'_>,
        options: &Value,
        clients: usize,
        run_dir: &Path,
        connect: &ConnectOptions,
    ) -> Result<(Self, Connection), ImageError> {
        let (socket, pid_file) = places(run_dir)?;
        let mut program = programs.qemu_nbd;
        let mut command = qemu_nbd(program, options, clients, &socket, &pid_file);
        let process = match Heard::start(&mut command) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                program = programs.storage_daemon;
                command = storage_daemon(program, options, clients, &socket, &pid_file);
                // If there is neither, name the one that should be there.
                Heard::start(&mut command).map_err(|_| program::not_started(programs.qemu_nbd, &error))?
            }
            other => other.map_err(|error| program::not_started(program, &error))?,
        };
        let mut server = Self {
            program: program::name(program),
            process,
            socket,
            pid_file,
        };
        let first = server.first_client(connect)?;
        Ok((server, first))
    }

    fn first_client(&mut self, connect: &ConnectOptions) -> Result<Connection, ImageError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let failed = match self.connect(connect) {
                Ok(connection) => return Ok(connection),
                Err(NbdError::Io {
                    during: "connect",
                    source,
                }) => source,
                Err(source) => return Err(self.failed(source)),
            };
            let ended = self.process.process.0.try_wait().ok().flatten();
            if let Some(status) = ended {
                self.process.last_words();
                return Err(self.failed_start(format!("ended before it served the image ({status})")));
            }
            let not_yet = matches!(
                failed.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            );
            if !not_yet || Instant::now() >= deadline {
                return Err(self.failed_start(format!("cannot be reached: {failed}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn failed_start(&self, what: String) -> ImageError {
        ImageError::Program {
            program: self.program.clone(),
            what,
            said: self.process.said.last_line(),
        }
    }

    fn failed(&self, source: NbdError) -> ImageError {
        let (program, said) = (self.program.clone(), self.process.said.last_line());
        ImageError::Served {
            program,
            source: Box::new(source),
            said,
        }
    }

    /// Connects one more client.
    pub(super) fn connect(&self, options: &ConnectOptions) -> Result<Connection, NbdError> {
        Connection::connect_with(&self.socket, EXPORT, options)
    }

    /// Who it is and what it said last, for the error of a request that failed.
    pub(super) fn last_words(&self) -> String {
        match self.process.said.last_line() {
            said if said.is_empty() => {
                format!(
                    "{} (process {}) said nothing",
                    self.program,
                    self.process.process.0.id()
                )
            }
            said => format!(
                "{} (process {}) said: {said}",
                self.program,
                self.process.process.0.id()
            ),
        }
    }

    /// Gives a server whose last client has left a moment to end by itself; what remains is killed.
    pub(super) fn finish(mut self) {
        let _ = self
            .process
            .process
            .wait_until(Instant::now() + Duration::from_secs(2)); // Dropping kills and reaps.
    }

    #[cfg(test)]
    pub(super) fn kill(&mut self) {
        self.process.process.0.kill().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // QEMU removes them itself unless it was killed.
        let _ = fs::remove_file(&self.socket);
        let _ = fs::remove_file(&self.pid_file);
    }
}

fn qemu_nbd(program: &Path, options: &Value, clients: usize, socket: &Path, pid_file: &Path) -> Command {
    let mut command = serving(program);
    command.args(["--read-only", "--export-name", EXPORT]);
    command.arg(format!("--shared={clients}"));
    command
        .arg("--socket")
        .arg(socket)
        .arg("--pid-file")
        .arg(pid_file);
    command.arg(format!("json:{options}"));
    command
}

fn storage_daemon(
    program: &Path,
    options: &Value,
    clients: usize,
    socket: &Path,
    pid_file: &Path,
) -> Command {
    let mut command = serving(program);
    let mut node = options.clone();
    node["node-name"] = Value::from(EXPORT);
    let listen = serde_json::json!({
        "addr": { "type": "unix", "path": socket.to_string_lossy() }, "max-connections": clients,
    });
    command
        .arg("--blockdev")
        .arg(node.to_string())
        .arg("--nbd-server")
        .arg(listen.to_string());
    command.arg("--export").arg(format!(
        "type=nbd,id={EXPORT},node-name={EXPORT},name={EXPORT},writable=off"
    ));
    command.arg("--pidfile").arg(pid_file);
    command
}

/// A command in a process group of its own: an interrupt at the terminal must end the agent first, in its own
/// order.
fn serving(program: &Path) -> Command {
    let mut command = program::command(program);
    command.stdout(Stdio::null()).process_group(0);
    command
}

/// Paths of a socket and a pid file that nobody uses yet.
fn places(run_dir: &Path) -> Result<(PathBuf, PathBuf), ImageError> {
    static STARTED: AtomicU32 = AtomicU32::new(0);
    let run_dir = std::path::absolute(run_dir).map_err(ImageError::io("find", run_dir))?;
    // What is served there is the content of disks.
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&run_dir);
    made.map_err(ImageError::io("create", &run_dir))?;
    let count = STARTED.fetch_add(1, Ordering::Relaxed);
    let moment = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    let stem = format!("nbd-{}-{count}-{moment:x}", std::process::id());
    let socket = run_dir.join(format!("{stem}.sock"));
    if socket.as_os_str().len() > SOCKET_PATH_MAX || socket.to_str().is_none() {
        let what = format!(
            "the socket's path is longer than {SOCKET_PATH_MAX} bytes or not UTF-8; choose a shorter run_dir"
        );
        return Err(ImageError::Io {
            action: "use",
            path: run_dir,
            source: io::Error::other(what),
        });
    }
    Ok((socket, run_dir.join(format!("{stem}.pid"))))
}

/// Ends the servers that an agent which was killed left behind in `run_dir`, and removes their files; gives
/// their number.
///
/// To be called once at an agent's start, before it opens images. A process is ended only if its command line
/// names the very pid file that named it, so a process that merely got the same number is safe.
pub fn end_stale_servers(run_dir: &Path) -> usize {
    let Ok(folder) = fs::read_dir(run_dir) else {
        return 0;
    };
    let files = folder.flatten().map(|entry| entry.path());
    let pid_files = files.filter(|path| {
        let name = path.file_name().map(|name| name.as_bytes()).unwrap_or_default();
        name.starts_with(b"nbd-") && name.ends_with(b".pid")
    });
    let mut ended = 0;
    for pid_file in pid_files {
        ended += usize::from(end_stale_server(&pid_file).is_some());
        let _ = fs::remove_file(pid_file.with_extension("sock"));
        let _ = fs::remove_file(&pid_file);
    }
    ended
}

fn end_stale_server(pid_file: &Path) -> Option<()> {
    let pid = fs::read_to_string(pid_file).ok()?.trim().parse::<i32>().ok()?;
    // Held by descriptor first, so that the number cannot pass to another process between the check and the
    // signal.
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let command_line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let wanted = std::path::absolute(pid_file).ok()?;
    command_line
        .split(|byte| *byte == 0)
        .find(|argument| *argument == wanted.as_os_str().as_bytes())?;
    pidfd_send_signal(process, Signal::KILL).ok()
}
