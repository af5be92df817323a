//! The two tasks that hold a monitor's socket: one reads, one writes.
//!
//! Owns the socket, so that a caller that is dropped half-way never leaves half a command behind. Promises: a line goes out
//! whole or the connection ends; memory is bounded; the reason of an end is kept for whoever asks later.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::error::ErrorClass;
use super::event::Event;
use super::wire::{self, Greeting, Lines, Message};

/// How much is read at a time.
const PIECE: usize = 64 << 10;

/// What came back for one command.
pub(super) enum Reply {
    Return(Value),
    Error { class: ErrorClass, desc: String },
}

/// A command on its way out; a descriptor goes with its first byte.
pub(super) struct Command {
    pub(super) line: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

/// What the tasks and the callers share.
pub(super) struct Shared {
    pending: Mutex<HashMap<u64, oneshot::Sender<Reply>>>,
    /// None once the connection is lost, so that listeners hear the end.
    events: Mutex<Option<broadcast::Sender<Event>>>,
    greeting: watch::Sender<Option<Greeting>>,
    lost: watch::Sender<Option<Arc<str>>>,
}

impl Shared {
    pub(super) fn new(events: usize) -> Self {
        Self {
            pending: Mutex::default(),
            events: Mutex::new(Some(broadcast::channel(events).0)),
            greeting: watch::channel(None).0,
            lost: watch::channel(None).0,
        }
    }

    /// Registers a command before it is sent; none where the connection is lost already.
    pub(super) fn expect(&self, id: u64) -> Option<oneshot::Receiver<Reply>> {
        let mut pending = self.pending();
        if self.lost.borrow().is_some() {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        pending.insert(id, sender);
        Some(receiver)
    }

    /// Nobody waits for this answer any more.
    pub(super) fn forget(&self, id: u64) {
        self.pending().remove(&id);
    }

    pub(super) fn listen(&self) -> broadcast::Receiver<Event> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        // A receiver whose sender is gone says so at once.
        events
            .as_ref()
            .map_or_else(|| broadcast::channel(1).1, broadcast::Sender::subscribe)
    }

    pub(super) fn greeting(&self) -> watch::Receiver<Option<Greeting>> {
        self.greeting.subscribe()
    }

    pub(super) fn lost(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.lost.subscribe()
    }

    pub(super) fn lose(&self, reason: &str) {
        let mut pending = self.pending();
        self.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            lost.get_or_insert_with(|| reason.into());
            first
        });
        pending.clear();
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Reply>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, message: Message) {
        let (id, reply) = match message {
            Message::Greeting(greeting) => {
                self.greeting.send_replace(Some(greeting));
                return;
            }
            Message::Event(event) => {
                let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(events) = events.as_ref() {
                    let _ = events.send(event); // Nobody listens: fine.
                }
                return;
            }
            Message::Return { id, value } => (id, Reply::Return(value)),
            Message::Error { id, class, desc } => (id, Reply::Error { class, desc }),
        };
        match id.and_then(|id| self.pending().remove(&id)) {
            Some(waiter) => {
                let _ = waiter.send(reply); // The caller may have left.
            }
            None => tracing::debug!(?id, "QEMU answered a command that nobody waits for"),
        }
    }
}

/// Reads until the connection ends.
pub(super) async fn read(mut from: OwnedReadHalf, shared: Arc<Shared>) {
    let reason = loop_over_lines(&mut from, &shared).await;
    shared.lose(&reason);
}

async fn loop_over_lines(from: &mut OwnedReadHalf, shared: &Shared) -> String {
    let mut lines = Lines::default();
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece).await {
            Ok(0) => return "QEMU closed it (it ended, or another program took the monitor)".into(),
            Ok(count) => lines.push(&piece[..count]),
            Err(error) => return error.to_string(),
        }
        loop {
            match lines.next_line() {
                Ok(None) => break,
                Ok(Some(line)) if line.trim_ascii().is_empty() => {}
                Ok(Some(line)) => match wire::decode(line) {
                    Ok(message) => shared.take(message),
                    Err(error) => return error.to_string(),
                },
                Err(error) => return error.to_string(),
            }
        }
    }
}

/// Writes until the connection ends or all its users have left.
pub(super) async fn write(
    mut to: OwnedWriteHalf,
    mut commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
) {
    while let Some(command) = commands.recv().await {
        if let Err(error) = write_one(&mut to, command).await {
            shared.lose(&error.to_string());
            return;
        }
    }
}

async fn write_one(to: &mut OwnedWriteHalf, command: Command) -> io::Result<()> {
    let mut line = command.line.as_slice();
    if let Some(fd) = command.fd {
        let stream = to.as_ref();
        let sent = stream
            .async_io(Interest::WRITABLE, || send_with(stream, line, &fd))
            .await?;
        line = &line[sent..];
    }
    to.write_all(line).await
}

/// Sends the line's beginning, and the descriptor with it; never blocks.
fn send_with(stream: impl AsFd, line: &[u8], fd: &OwnedFd) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    if !rights.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("there is no room for a file descriptor"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(stream, &[IoSlice::new(line)], &mut rights, flags)?)
}
