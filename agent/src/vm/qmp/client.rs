//! A connection to a monitor, as its users see it.
//!
//! Owns ids and time limits. Leaves alone the socket (`tasks`). Cheap to clone; the connection ends with its last clone.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::error::QmpError;
use super::event::Events;
use super::tasks::{self, Command, Reply, Shared};
use super::wire::{Greeting, Version};

/// How long a monitor may take to greet.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long a command may take unless its caller says otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// From when on an answer's time is worth a line in a log of level `debug`.
const SLOW: Duration = Duration::from_millis(100);
/// How many commands may wait for the socket.
const OUTBOX: usize = 16;
/// How many events a slow listener may lag behind.
const EVENTS: usize = 256;

/// A connection to one QMP monitor.
#[derive(Clone)]
pub struct Qmp(Arc<Inner>);

struct Inner {
    socket: PathBuf,
    version: Version,
    shared: Arc<Shared>,
    outbox: mpsc::Sender<Command>,
    next: AtomicU64,
    tasks: [JoinHandle<()>; 2],
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Qmp({})", self.0.socket.display())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Takes a command off the list when its caller leaves, however it leaves.
struct Expected<'a>(&'a Shared, u64);

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.0.forget(self.1);
    }
}

impl Qmp {
    /// Connects to the monitor at `socket` and negotiates.
    ///
    /// # Errors
    /// [`QmpError::Connect`] where nobody listens, [`QmpError::NoGreeting`] where another program holds the monitor.
    pub async fn connect(socket: &Path) -> Result<Self, QmpError> {
        let connecting = tokio::time::timeout(GREETING_LIMIT, UnixStream::connect(socket));
        let no_greeting = || QmpError::NoGreeting {
            socket: socket.to_owned(),
            limit: GREETING_LIMIT,
        };
        let stream = connecting.await.map_err(|_| no_greeting())?;
        let stream = stream.map_err(|source| QmpError::Connect {
            socket: socket.to_owned(),
            source: Arc::new(source),
        })?;
        Self::over(stream, socket).await
    }

    /// Speaks over a socket that is connected already; `socket` is its name in errors.
    pub async fn over(stream: UnixStream, socket: &Path) -> Result<Self, QmpError> {
        let (from, to) = stream.into_split();
        let shared = Arc::new(Shared::new(EVENTS));
        let (outbox, commands) = mpsc::channel(OUTBOX);
        let tasks = [
            tokio::spawn(tasks::read(from, shared.clone())),
            tokio::spawn(tasks::write(to, commands, shared.clone())),
        ];
        let mut inner = Inner {
            socket: socket.to_owned(),
            version: Version::default(),
            shared,
            outbox,
            next: AtomicU64::new(1),
            tasks,
        };
        inner.version = inner.greeted().await?.version;
        let qmp = Self(Arc::new(inner));
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// The connection to a QEMU that is no more: everything it is asked is answered with [`QmpError::Lost`].
    pub async fn gone(socket: &Path) -> Self {
        let shared = Arc::new(Shared::new(EVENTS));
        let (outbox, commands) = mpsc::channel(OUTBOX);
        // Both ends of the pair but one are dropped: the tasks find the connection lost, as they do when QEMU ends.
        let (from, to) = match UnixStream::pair() {
            Ok((ours, _)) => ours.into_split(),
            Err(_) => return Box::pin(Self::gone(socket)).await,
        };
        tasks::read(from, shared.clone()).await;
        let tasks = [
            tokio::spawn(async {}),
            tokio::spawn(tasks::write(to, commands, shared.clone())),
        ];
        Self(Arc::new(Inner {
            socket: socket.to_owned(),
            version: Version::default(),
            shared,
            outbox,
            next: AtomicU64::new(1),
            tasks,
        }))
    }

    /// QEMU's version, as it greeted.
    pub fn version(&self) -> &Version {
        &self.0.version
    }

    /// The socket it was connected by.
    pub fn socket(&self) -> &Path {
        &self.0.socket
    }

    /// Runs a command with the usual time limit of 10 s, and gives what it returned.
    ///
    /// # Errors
    /// [`QmpError::Refused`] where QEMU said no, [`QmpError::Timeout`], [`QmpError::Lost`]. After a timeout the command may
    /// still be carried out.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.run(command, arguments, None, COMMAND_LIMIT).await
    }

    /// As [`Self::execute`], with a time limit of its own.
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.run(command, arguments, None, limit).await
    }

    /// Runs a command without arguments and reads its answer as a `T`.
    pub async fn query<T: DeserializeOwned>(&self, command: &str) -> Result<T, QmpError> {
        self.query_with(command, json!({})).await
    }

    /// Runs a command and reads its answer as a `T`.
    pub async fn query_with<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let value = self.execute(command, arguments).await?;
        serde_json::from_value(value).map_err(|error| QmpError::answer(command, error.to_string()))
    }

    /// Runs a command of the human monitor, and gives its text.
    pub async fn human(&self, line: &str) -> Result<String, QmpError> {
        self.query_with("human-monitor-command", json!({ "command-line": line }))
            .await
    }

    /// Gives QEMU a file descriptor under `name`; one that had this name is closed there.
    pub async fn send_fd(&self, name: &str, fd: OwnedFd) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        self.run("getfd", arguments, Some(fd), COMMAND_LIMIT).await?;
        Ok(())
    }

    /// The events from now on. Call it before the command whose events are awaited.
    pub fn events(&self) -> Events {
        Events(self.0.shared.listen())
    }

    /// Waits until the connection is lost, and says why.
    pub async fn lost(&self) -> QmpError {
        let mut lost = self.0.shared.lost();
        let _ = lost.wait_for(Option::is_some).await; // The sender lives as long as `self`.
        self.0.lost_error()
    }

    /// Whether the connection is lost.
    pub fn is_lost(&self) -> bool {
        self.0.shared.lost().borrow().is_some()
    }

    async fn run(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let asked = Instant::now();
        let answer = tokio::time::timeout(limit, self.exchange(command, arguments, fd)).await;
        let took = asked.elapsed();
        if took > SLOW {
            tracing::debug!(command, ms = took.as_millis(), "QEMU was slow to answer");
        }
        answer.unwrap_or_else(|_| {
            let command = command.to_owned();
            Err(QmpError::Timeout { command, limit })
        })
    }

    async fn exchange(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let inner = &self.0;
        let id = inner.next.fetch_add(1, Ordering::Relaxed);
        let reply = inner.shared.expect(id).ok_or_else(|| inner.lost_error())?;
        let _expected = Expected(&inner.shared, id);
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let line = line.into_bytes();
        let sent = inner.outbox.send(Command { line, fd }).await;
        sent.map_err(|_| inner.lost_error())?;
        match reply.await.map_err(|_| inner.lost_error())? {
            Reply::Return(value) => Ok(value),
            Reply::Error { class, desc } => Err(QmpError::Refused {
                command: command.to_owned(),
                class,
                desc,
            }),
        }
    }
}

impl Inner {
    async fn greeted(&self) -> Result<Greeting, QmpError> {
        let mut greeting = self.shared.greeting();
        let mut lost = self.shared.lost();
        let answer = tokio::time::timeout(GREETING_LIMIT, async {
            tokio::select! {
                greeted = greeting.wait_for(Option::is_some) => greeted.ok().and_then(|greeting| greeting.clone()),
                _ = lost.wait_for(Option::is_some) => None,
            }
        });
        match answer.await {
            Ok(Some(greeting)) => Ok(greeting),
            Ok(None) => Err(self.lost_error()),
            Err(_) => Err(QmpError::NoGreeting {
                socket: self.socket.clone(),
                limit: GREETING_LIMIT,
            }),
        }
    }

    fn lost_error(&self) -> QmpError {
        let lost = self.shared.lost();
        let reason = lost.borrow().as_deref().unwrap_or("it was closed").to_owned();
        QmpError::Lost {
            socket: self.socket.clone(),
            reason,
        }
    }
}
