//! QEMU's stream of one generation, out of its socket and on its way.
//!
//! Owns the thread that reads and takes the stream apart, the window that holds it back, and sending what the target has not been given
//! yet, again after a lost link. Leaves the stream's grammar to `vm::ram` and when to go into the tail to `source`. Promises that while
//! QEMU iterates no more than the window is read ahead of the target's QEMU; that in the tail everything is taken at full speed, or the
//! socket closed so that the VM runs on; and that nothing is forgotten before the target's QEMU has it.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::digest::Digest;
use longhaul_common::ids::{Attempt, DiskIndex, Round};
use longhaul_common::wire::batch::{BatchHeader, Leaves};
use tokio::sync::{mpsc, watch};

use super::uplink::Uplink;
use crate::vm::handover::{Generation, Stream};
use crate::vm::ram::{Counts, Part, ReadWindow, Retained, Tokenizer, TokenizerOptions, WindowError};

/// What one read takes at most.
const READ: usize = 256 << 10;
/// Parts that wait for the sender.
const PARTS: usize = 1024;
/// After so long without a byte what there is goes out, however little.
const QUIET: Duration = Duration::from_millis(4);
/// Where the window begins before anything is known of the link, in bytes of stream.
pub(super) const WINDOW_START: u64 = 4 << 20;

/// What the thread, the sender and the driver share.
struct Tap {
    window: ReadWindow,
    /// While a round of the disks is on: how much may still be read before it is over.
    allowance: Option<u64>,
    retained: Retained,
    tail: bool,
    counts: Counts,
    /// Bytes of data handed to the sender.
    data: u64,
    last_ack: Instant,
}

impl Tap {
    /// How much may be read now.
    fn may_read(&self) -> Result<u64, WindowError> {
        let room = self.window.may_read()?;
        Ok(room.min(self.allowance.unwrap_or(u64::MAX)))
    }

    fn took(&mut self, bytes: u64) {
        self.window.read(bytes);
        self.allowance = self.allowance.map(|left| left.saturating_sub(bytes));
    }
}

/// One generation's stream.
pub(super) struct RamOut {
    pub generation: Generation,
    tap: Mutex<Tap>,
    moved: Condvar,
    /// The end, once QEMU closed its socket, or why it cannot be reached.
    ended: watch::Sender<Option<Result<Stream, String>>>,
    /// Where the target's QEMU is, as heard on which attempt.
    heard: watch::Sender<Option<(Attempt, u64)>>,
    socket: UnixStream,
    closed: watch::Sender<bool>,
    memory: u64,
}

/// Where a stream stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct RamView {
    pub acked: u64,
    pub buffered: u64,
    pub counts: Counts,
    pub still: Duration,
}

impl RamOut {
    /// Begins to read `socket`; what is on its way never takes more than `memory` bytes.
    pub(super) fn start(
        generation: Generation,
        socket: UnixStream,
        memory: u64,
        uplink: watch::Receiver<Option<Arc<Uplink>>>,
    ) -> std::io::Result<Arc<Self>> {
        let reading = socket.try_clone()?;
        reading.set_read_timeout(Some(QUIET))?;
        let out = Arc::new(Self {
            generation,
            tap: Mutex::new(Tap {
                window: ReadWindow::new(WINDOW_START.min(memory)),
                allowance: None,
                // Zero pages and the tail are read in steps: a little beyond the window.
                retained: Retained::new(memory.saturating_mul(2)),
                tail: false,
                counts: Counts::default(),
                data: 0,
                last_ack: Instant::now(),
            }),
            moved: Condvar::new(),
            ended: watch::Sender::new(None),
            // A stream that begins has nothing at its target.
            heard: watch::Sender::new(uplink.borrow().as_ref().map(|uplink| (uplink.attempt, 0))),
            socket,
            closed: watch::Sender::new(false),
            memory,
        });
        let (parts, waiting) = mpsc::channel(PARTS);
        let reader = Arc::clone(&out);
        std::thread::Builder::new()
            .name("ram-tap".to_owned())
            .spawn(move || reader.read_all(reading, &parts))?;
        tokio::spawn(Arc::clone(&out).send_all(waiting, uplink));
        Ok(out)
    }

    fn tap(&self) -> MutexGuard<'_, Tap> {
        self.tap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_all(&self, mut socket: UnixStream, parts: &mpsc::Sender<(Part, bool)>) {
        let end = self.read_stream(&mut socket, parts);
        if let Err(reason) = &end {
            tracing::warn!(generation = %self.generation, "the RAM stream cannot be read on: {reason}");
            // Frees QEMU from a write that nobody takes, and fails its migration: the VM runs on.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.ended.send_replace(Some(end));
    }

    fn read_stream(
        &self,
        socket: &mut UnixStream,
        parts: &mpsc::Sender<(Part, bool)>,
    ) -> Result<Stream, String> {
        let mut tokenizer = Tokenizer::new(&TokenizerOptions {
            generation: self.generation.0,
            ..TokenizerOptions::default()
        });
        let mut buffer = vec![0; READ];
        loop {
            let room = self.wait_room()?;
            let want = buffer.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            match socket.read(&mut buffer[..want]) {
                Ok(0) => break,
                Ok(bytes) => {
                    tokenizer.push(&buffer[..bytes]);
                    self.tap().took(bytes as u64);
                    while let Some(part) = tokenizer.next_part() {
                        self.hand_over(part, parts)?;
                    }
                    // In the tail the VM stands: nothing waits for company.
                    if self.tap().tail && bytes < want {
                        self.cut(&mut tokenizer, parts)?;
                    }
                }
                Err(error) if is_quiet(&error) => self.cut(&mut tokenizer, parts)?,
                Err(error) => return Err(error.to_string()),
            }
        }
        tokenizer.finish();
        self.cut(&mut tokenizer, parts)?;
        Ok(Stream {
            len: tokenizer.position(),
            hash: tokenizer.digest(),
        })
    }

    /// Waits until the window lets something through; how many bytes it does.
    fn wait_room(&self) -> Result<u64, String> {
        let mut tap = self.tap();
        loop {
            match tap.may_read() {
                Err(error) => return Err(error.to_string()),
                Ok(0) if *self.closed.borrow() => return Err("the session ended".to_owned()),
                Ok(0) => {
                    let waited = self.moved.wait_timeout(tap, Duration::from_secs(1));
                    tap = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Ok(room) => return Ok(room),
            }
        }
    }

    fn cut(&self, tokenizer: &mut Tokenizer, parts: &mpsc::Sender<(Part, bool)>) -> Result<(), String> {
        while let Some(part) = tokenizer.cut() {
            self.hand_over(part, parts)?;
        }
        Ok(())
    }

    fn hand_over(&self, part: Part, parts: &mpsc::Sender<(Part, bool)>) -> Result<(), String> {
        let urgent = {
            let mut tap = self.tap();
            tap.counts.add(&part.counts);
            tap.data += part.data.len() as u64;
            tap.retained
                .push(part.clone())
                .map_err(|error| error.to_string())?;
            tap.tail
        };
        parts
            .blocking_send((part, urgent))
            .map_err(|_| "the session ended".to_owned())
    }

    async fn send_all(
        self: Arc<Self>,
        mut parts: mpsc::Receiver<(Part, bool)>,
        mut uplinks: watch::Receiver<Option<Arc<Uplink>>>,
    ) {
        // What was sent on the current uplink, by stream position.
        let mut sent = 0;
        let mut current: Option<Arc<Uplink>> = None;
        let mut heard = self.heard.subscribe();
        let mut read_all = false;
        // The end of the stream is not the end of sending: what is on its way may be lost with its link.
        while !(read_all && self.is_taken()) {
            let found = uplinks.borrow_and_update().clone();
            let same = current.as_ref().map(|up| up.attempt) == found.as_ref().map(|up| up.attempt);
            if !same {
                current = found;
                if let Some(uplink) = current.clone() {
                    match self.send_again(&uplink, &mut uplinks).await {
                        Some(end) => sent = end,
                        None => {
                            current = None;
                            continue;
                        }
                    }
                }
            }
            tokio::select! {
                part = parts.recv(), if !read_all => match part {
                    // What came while there was no link is in `retained`, and goes with the next one.
                    Some((part, urgent)) => if let Some(uplink) = &current && part.header.offset >= sent {
                        let _ = self.send(uplink, &part, urgent).await;
                    },
                    None => read_all = true,
                },
                changed = uplinks.changed() => if changed.is_err() { return },
                _ = heard.changed(), if read_all => {}
                () = self.closed() => return,
            }
        }
    }

    async fn closed(&self) {
        let mut closed = self.closed.subscribe();
        // The sender lives as long as this.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Whether the target's QEMU was given all that was read.
    fn is_taken(&self) -> bool {
        let tap = self.tap();
        tap.retained.acked() >= tap.retained.end()
    }

    /// Sends everything that the target's QEMU was not given yet on a new uplink. Gives the position behind it; `None` where that
    /// uplink is gone, too.
    async fn send_again(
        &self,
        uplink: &Arc<Uplink>,
        uplinks: &mut watch::Receiver<Option<Arc<Uplink>>>,
    ) -> Option<u64> {
        let mut heard = self.heard.subscribe();
        let attempt = uplink.attempt;
        let position = tokio::select! {
            heard = heard.wait_for(|heard| heard.is_some_and(|(on, _)| on == attempt)) => heard.ok().and_then(|heard| *heard)?.1,
            _ = uplinks.changed() => return None,
            () = uplink.ended() => return None,
        };
        let (parts, end, urgent) = {
            let tap = self.tap();
            let parts: Vec<Part> = tap.retained.from(position).cloned().collect();
            (parts, tap.retained.end(), tap.tail)
        };
        for part in &parts {
            self.send(uplink, part, urgent).await?;
        }
        Some(end)
    }

    async fn send(&self, uplink: &Uplink, part: &Part, urgent: bool) -> Option<()> {
        let mut header = BatchHeader {
            job: uplink.job,
            attempt: uplink.attempt,
            disk: DiskIndex(0),
            round: Round(0),
            sequence: uplink.next_sequence(),
            pieces: Vec::new(),
            leaves: Leaves::default(),
            ram: Some(part.header.clone()),
            urgent,
            digest: Digest([0; 32]),
        };
        // A part is at most 1 MiB, and hashing it takes less than a millisecond.
        header.digest = header.digest_of(&part.data).ok()?;
        uplink.send(&header, part.data.clone()).await.ok()
    }

    /// The target's QEMU has everything before `position`.
    pub(super) fn written(&self, attempt: Attempt, position: u64) {
        let mut tap = self.tap();
        let acked = tap.window.ack(position).is_ok() && tap.retained.ack(position).is_ok();
        if !acked {
            return tracing::warn!("the target acknowledged RAM that was never sent; ignored");
        }
        tap.last_ack = Instant::now();
        drop(tap);
        self.moved.notify_all();
        self.heard.send_replace(Some((attempt, position)));
    }

    /// How far the tap may read ahead, in bytes of stream.
    pub(super) fn set_window(&self, bytes: u64) {
        self.tap().window.set_size(bytes.clamp(1 << 20, self.memory));
        self.moved.notify_all();
    }

    /// A round of the disks begins: until `let_flow` no more than this is read. A QEMU that has sent everything stops the VM by itself, and
    /// that is of no use while the disks are not ready.
    pub(super) fn allow(&self, bytes: u64) {
        self.tap().allowance = Some(bytes);
    }

    /// The round is over.
    pub(super) fn let_flow(&self) {
        self.tap().allowance = None;
        self.moved.notify_all();
    }

    /// QEMU goes on to its end: everything is taken at full speed from now on.
    pub(super) fn begin_tail(&self) {
        let mut tap = self.tap();
        tap.window.begin_tail(self.memory);
        tap.tail = true;
        tap.allowance = None;
        drop(tap);
        self.moved.notify_all();
    }

    /// Closes our end: QEMU is freed from a write that blocks, and its migration fails if it was not over.
    pub(super) fn close(&self) {
        self.closed.send_replace(true);
        // One that is closed already is as good.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.moved.notify_all();
    }

    /// Waits for the stream's end.
    pub(super) async fn ended(&self) -> Result<Stream, String> {
        let mut ended = self.ended.subscribe();
        let end = ended.wait_for(Option::is_some).await;
        let end = end.ok().and_then(|end| end.clone());
        end.unwrap_or_else(|| Err("the session ended".to_owned()))
    }

    pub(super) fn view(&self) -> RamView {
        let tap = self.tap();
        RamView {
            acked: tap.retained.acked(),
            buffered: tap.window.in_flight(),
            counts: tap.counts,
            still: tap.last_ack.elapsed(),
        }
    }
}

fn is_quiet(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut | std::io::ErrorKind::Interrupted
    )
}
