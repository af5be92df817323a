//! The lab's own QMP connection to a QEMU, beside Longhaul's.
//!
//! Owns a listening socket to which QEMU connects when it starts, QEMU's events with their times, and
//! commands with a limit. Leaves alone what the events mean. Promises that every event is kept from QEMU's
//! first moment on, and that a QEMU that says nothing is given up after the limit.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest line that is read.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// Events that are kept.
const EVENTS_MAX: usize = 100_000;
/// A command's time, if nothing else is said.
pub const LIMIT: Duration = Duration::from_secs(20);

/// An event.
#[derive(Clone, Debug)]
pub struct Event {
    pub name: String,
    pub data: Value,
    /// When QEMU says it happened, in seconds of the host's clock since 1970.
    pub time: f64,
    /// Which of the QEMUs that connected, from 0.
    pub life: u32,
}

#[derive(Debug, Default)]
struct State {
    stream: Option<UnixStream>,
    /// Lives so far; process of the last.
    lives: u32,
    pid: Option<u32>,
    events: Vec<Event>,
    answers: Vec<Value>,
    next: u64,
}

/// The lab's end of it.
#[derive(Clone, Debug)]
pub struct Monitor {
    socket: PathBuf,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Monitor {
    /// Listens at `socket` for QEMU.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(socket: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let monitor = Self {
            socket: socket.to_owned(),
            state: Arc::default(),
        };
        let here = monitor.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                here.welcome(stream);
            }
        });
        Ok(monitor)
    }

    fn welcome(&self, stream: UnixStream) {
        let Ok(reader) = stream.try_clone() else { return };
        let mut greeting = stream.try_clone();
        let pid = rustix::net::sockopt::socket_peercred(&stream);
        let life = {
            let mut state = self.lock();
            state.pid = pid
                .ok()
                .map(|peer| peer.pid.as_raw_nonzero().get().cast_unsigned());
            state.stream = Some(stream);
            state.lives += 1;
            state.lives - 1
        };
        if let Ok(greeting) = &mut greeting {
            let _ = greeting.write_all(b"{\"execute\":\"qmp_capabilities\",\"id\":\"hello\"}\n");
        }
        let here = self.clone();
        std::thread::spawn(move || here.read(reader, life));
    }

    fn read(&self, stream: UnixStream, life: u32) {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while let Ok(1..) = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            if let Ok(value) = serde_json::from_slice::<Value>(&line) {
                self.note(value, life);
            }
            line.clear();
        }
        let mut state = self.lock();
        // Not if another QEMU has connected meanwhile.
        if state.lives == life + 1 {
            state.stream = None;
        }
        self.state.1.notify_all();
    }

    fn note(&self, value: Value, life: u32) {
        let mut state = self.lock();
        if let Some(name) = value["event"].as_str() {
            let stamp = &value["timestamp"];
            let part = |name: &str| stamp[name].as_f64().unwrap_or_default();
            if state.events.len() < EVENTS_MAX {
                let event = Event {
                    name: name.to_owned(),
                    data: value["data"].clone(),
                    time: part("seconds") + part("microseconds") / 1e6,
                    life,
                };
                state.events.push(event);
            }
        } else if value["id"].is_u64() {
            state.answers.push(value);
        }
        self.state.1.notify_all();
    }

    /// The socket to which QEMU must connect.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether a QEMU is connected.
    pub fn is_connected(&self) -> bool {
        self.lock().stream.is_some()
    }

    /// The process of the last QEMU that connected.
    pub fn pid(&self) -> Option<u32> {
        self.lock().pid
    }

    /// Every event so far.
    pub fn events(&self) -> Vec<Event> {
        self.lock().events.clone()
    }

    /// Executes a command and gives what it returns.
    ///
    /// # Errors
    /// QEMU's own words, or that it is gone or silent.
    pub fn execute(&self, command: &str, arguments: Value) -> io::Result<Value> {
        let id = {
            let mut state = self.lock();
            state.next += 1;
            let id = state.next;
            let mut words = json!({"execute": command, "id": id});
            if !arguments.is_null() {
                words["arguments"] = arguments;
            }
            let stream = state.stream.as_mut().ok_or_else(|| gone(command))?;
            stream.write_all(format!("{words}\n").as_bytes())?;
            id
        };
        let until = Instant::now() + LIMIT;
        let mut state = self.lock();
        loop {
            if let Some(at) = state.answers.iter().position(|answer| answer["id"] == id) {
                let answer = state.answers.swap_remove(at);
                return match answer["error"]["desc"].as_str() {
                    Some(cause) => Err(io::Error::other(format!("{command}: {cause}"))),
                    None => Ok(answer["return"].clone()),
                };
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.stream.is_none() || left.is_zero() {
                return Err(gone(command));
            }
            let (next, _) = self
                .state
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
    }

    /// QEMU's run state ("running", "paused", "postmigrate", ...), if it answers.
    pub fn run_state(&self) -> Option<String> {
        let status = self.execute("query-status", Value::Null).ok()?;
        Some(status["status"].as_str()?.to_owned())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gone(command: &str) -> io::Error {
    io::Error::other(format!("{command}: QEMU is gone or says nothing"))
}
