//! The RAM stream of one generation, put together and given to the target's QEMU.
//!
//! Owns the thread that checks parts end to end, orders them and writes the stream. Leaves QEMU's life to `target_vm`. Promises that QEMU
//! gets exactly the source's bytes, in order and once; a part that is damaged or does not fit ends the stream, and so the generation.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use longhaul_common::wire::ram::RamPart;
use tokio::sync::{mpsc, watch};

use crate::session::arrivals::Arrived;
use crate::vm::handover::{Generation, Stream};
use crate::vm::ram::Rebuilder;

/// Parts that wait for the thread; the session's room bounds their bytes.
const QUEUE: usize = 4096;

/// Where the stream is.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct RamState {
    /// QEMU was given everything before this.
    pub written: u64,
    /// All of it was, and this is what it was.
    pub stream: Option<Stream>,
    /// Why it ended early.
    pub failed: Option<String>,
}

/// For the thread.
enum In {
    Part(Box<Arrived>),
    /// Look whether this is the end.
    End,
}

/// One generation's stream on its way into QEMU.
pub(super) struct RamIn {
    pub generation: Generation,
    parts: mpsc::Sender<In>,
    state: watch::Sender<RamState>,
    /// The end as the source states it.
    end: Mutex<Option<Stream>>,
    socket: UnixStream,
}

impl RamIn {
    /// Connects to the socket at which QEMU waits, and begins; parts may be `window` bytes ahead of each other.
    pub(super) fn start(generation: Generation, socket: &Path, window: u64) -> std::io::Result<Arc<Self>> {
        let socket = UnixStream::connect(socket)?;
        let writing = socket.try_clone()?;
        let (parts, waiting) = mpsc::channel(QUEUE);
        let ram = Arc::new(Self {
            generation,
            parts,
            state: watch::Sender::default(),
            end: Mutex::default(),
            socket,
        });
        let (weak, state) = (Arc::downgrade(&ram), ram.state.clone());
        let body = move || {
            let mut feed = Feed {
                rebuilder: Rebuilder::new(generation.0, window),
                socket: writing,
                state,
            };
            feed.run(waiting, || weak.upgrade().and_then(|ram| ram.known_end()));
        };
        std::thread::Builder::new()
            .name("ram-feed".to_owned())
            .spawn(body)?;
        Ok(ram)
    }

    /// Takes a part; one of another generation is nobody's.
    pub(super) async fn take(&self, arrived: Arrived) {
        let of = arrived.header.ram.as_ref().map(|ram| ram.generation);
        if of == Some(self.generation.0) {
            // A thread that has ended says why in the state.
            let _ = self.parts.send(In::Part(Box::new(arrived))).await;
        }
    }

    /// The source says where its stream ends.
    pub(super) async fn set_end(&self, stream: Stream) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        // Wakes the thread, which may have everything already.
        let _ = self.parts.send(In::End).await;
    }

    fn known_end(&self) -> Option<Stream> {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> watch::Receiver<RamState> {
        self.state.subscribe()
    }

    /// Ends the stream where it is; a QEMU that still loads gives up.
    pub(super) fn close(&self) {
        // One that is closed already is as good.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Drop for RamIn {
    fn drop(&mut self) {
        self.close();
    }
}

/// Waits until a stream has ended, one way or the other, and then for so long where whoever asks has seen that before.
pub(super) async fn ended(
    state: Option<&mut watch::Receiver<RamState>>,
    again: Option<Duration>,
) -> RamState {
    let Some(state) = state else {
        return std::future::pending().await;
    };
    let ended = state
        .wait_for(|state| state.stream.is_some() || state.failed.is_some())
        .await;
    match ended.map(|state| state.clone()) {
        Ok(state) => {
            if let Some(wait) = again {
                tokio::time::sleep(wait).await;
            }
            state
        }
        Err(_) => std::future::pending().await,
    }
}

/// The thread's own things.
struct Feed {
    rebuilder: Rebuilder,
    socket: UnixStream,
    state: watch::Sender<RamState>,
}

impl Feed {
    fn run(&mut self, mut parts: mpsc::Receiver<In>, end: impl Fn() -> Option<Stream>) {
        while let Some(next) = parts.blocking_recv() {
            let fed = match next {
                In::Part(arrived) => self.feed(*arrived),
                In::End => Ok(()),
            };
            if let Err(why) = fed {
                tracing::warn!("the RAM stream ends here: {why}");
                let _ = self.socket.shutdown(Shutdown::Both);
                self.state.send_modify(|state| state.failed = Some(why));
                return;
            }
            if let Some(end) = end()
                && self.rebuilder.taken() >= end.len
            {
                // QEMU reads to the end of its socket.
                let _ = self.socket.shutdown(Shutdown::Write);
                let stream = Stream {
                    len: self.rebuilder.taken(),
                    hash: self.rebuilder.digest(),
                };
                self.state.send_modify(|state| state.stream = Some(stream));
                return;
            }
        }
    }

    fn feed(&mut self, arrived: Arrived) -> Result<(), String> {
        let Some(part) = &arrived.header.ram else {
            return Ok(());
        };
        let part: &RamPart = part;
        let verified = arrived.header.verify(&arrived.data);
        verified.map_err(|error| error.to_string())?;
        let accepted = self.rebuilder.accept(part, arrived.data.clone());
        accepted.map_err(|error| error.to_string())?;
        // Its room is needed by those behind it.
        drop(arrived);
        while let Some(chunk) = self.rebuilder.next_chunk() {
            self.socket
                .write_all(&chunk)
                .map_err(|error| format!("QEMU takes no more of it: {error}"))?;
            let written = self.rebuilder.taken();
            self.state.send_modify(|state| state.written = written);
        }
        Ok(())
    }
}
