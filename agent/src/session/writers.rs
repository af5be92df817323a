//! The threads that write a job's batches, and the one that flushes.
//!
//! Owns checking a batch end to end, handing it to its disk, giving credit back, and saying what is durable. Leaves the disk's own
//! order to `disk::apply`. Promises that credit is given once for each batch taken, that a sequence is called durable only after the
//! flush behind its write, and that a full disk holds the job up instead of ending it.

mod due;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use longhaul_common::ids::{Attempt, DiskIndex, Round, Sequence};
use longhaul_common::wire::batch::{BatchHeader, Content};
use longhaul_common::wire::sequences::Sequences;
use longhaul_common::wire::session::{FromTarget, Refusal, RefusalKind};
use tokio::sync::{mpsc, watch};

use self::due::{Due, FlushDue};
use super::arrivals::Arrived;
use super::outcome;
use crate::disk::apply::{self, Applied, LeafRecord, Piece, Target, TargetError, Ticket};
use crate::metrics::{TARGET_BATCHES, TARGET_DURABLE, TARGET_RAW};
use crate::settings::LimitsSection;

/// A copy whose flush failed for want of space is opened again when there is so much, in bytes.
const SPACE_AGAIN: u64 = 16 << 20;
/// Between two looks whether another thread has written its batch.
const WRITING: Duration = Duration::from_millis(1);
/// Between two looks whether there is something to read back, and time for it.
const READ_AGAIN: Duration = Duration::from_millis(10);
/// Between two tries on a full disk.
const SPACE_RETRY: Duration = Duration::from_secs(1);

/// One disk being written, and which batch each unflushed write was.
pub(super) struct Written {
    pub target: Target,
    /// The batch, and its bytes of data.
    tickets: Mutex<BTreeMap<Ticket, (Sequence, u64)>>,
    /// Bytes that are written or about to be, and not known to be durable.
    unflushed: Mutex<u64>,
    /// Of urgent batches that are not durable yet: the attempt and round, and where on the disk each begins.
    urgent: Mutex<BTreeMap<Ticket, (RoundOf, u64)>>,
}

/// A round, and the attempt that it came on.
type RoundOf = (Attempt, Round);

/// What of a last round is durable: distinct batches, by disk and where they begin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LastRound {
    /// A new attempt sends all of it once more, and may be of another life of the source, which counts rounds anew.
    pub of: RoundOf,
    pub batches: BTreeSet<(DiskIndex, u64)>,
}

impl Written {
    pub(super) fn new(target: Target) -> Self {
        Self {
            target,
            tickets: Mutex::default(),
            unflushed: Mutex::default(),
            urgent: Mutex::default(),
        }
    }
}

/// What the threads share.
struct Shared {
    disks: Vec<Written>,
    say: mpsc::Sender<FromTarget>,
    last_round: watch::Sender<LastRound>,
    stop: AtomicBool,
    /// Batches that are being written.
    writing: AtomicUsize,
    /// Batches written so far.
    written: AtomicU64,
    /// A flush is wanted at once.
    flush_now: AtomicBool,
    /// Has the flusher look at both.
    wake: Sender<()>,
    /// A disk's writers never have more bytes than this on it that a crash could take: they flush first.
    unflushed_max: u64,
    /// How many threads find a disk full right now.
    full: Mutex<usize>,
}

/// The running threads.
pub(super) struct Writers {
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<()>>,
    flusher: JoinHandle<()>,
    /// Reads back what is durable, where a proof is to follow.
    reader: Option<JoinHandle<()>>,
}

impl Writers {
    /// Starts them; `say` takes what the gateway is to hear.
    pub(super) fn start(
        disks: Vec<Written>,
        inbox: mpsc::Receiver<Arrived>,
        limits: &LimitsSection,
        say: mpsc::Sender<FromTarget>,
        last_round: watch::Sender<LastRound>,
    ) -> std::io::Result<Self> {
        let (wake, woken) = crossbeam_channel::bounded(1);
        let shared = Arc::new(Shared {
            disks,
            say,
            last_round,
            stop: AtomicBool::new(false),
            written: AtomicU64::new(0),
            flush_now: AtomicBool::new(false),
            writing: AtomicUsize::new(0),
            wake,
            unflushed_max: limits.flush_bytes.0.saturating_mul(2),
            full: Mutex::default(),
        });
        let inbox = Arc::new(Mutex::new(inbox));
        let mut writers = Vec::new();
        for n in 0..limits.write_threads.max(1) {
            let (shared, inbox) = (Arc::clone(&shared), Arc::clone(&inbox));
            let thread = std::thread::Builder::new().name(format!("write-{n}"));
            writers.push(thread.spawn(move || shared.write_all(&inbox))?);
        }
        let flush_time = limits.flush_time.0;
        let flushing = Arc::clone(&shared);
        let flusher = std::thread::Builder::new().name("flush".to_owned());
        let flusher = flusher.spawn(move || flushing.flush_all(&woken, flush_time))?;
        Ok(Self {
            shared,
            writers,
            flusher,
            reader: None,
        })
    }

    /// Has what is durable read back while nothing is there to be written: the proof that follows has less to read.
    pub(super) fn reading_back(mut self) -> std::io::Result<Self> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("read-back".to_owned());
        let started = thread.spawn(move || shared.read_back_all());
        // Nobody stops the others where this one is not there.
        self.shared.stop.fetch_or(started.is_err(), Ordering::Relaxed);
        self.reader = Some(started?);
        Ok(self)
    }

    /// Writes what is in the inbox (which must be closed), flushes, and gives the disks back. Blocks. `hurry`: batches that are not
    /// written yet are dropped.
    pub(super) fn stop(self, hurry: bool) -> Result<Vec<Target>, Refusal> {
        self.shared.stop.fetch_or(hurry, Ordering::Relaxed);
        let died = |_| {
            Refusal::new(
                RefusalKind::Protocol,
                "a writer thread died; the agent's log says why",
            )
        };
        for writer in self.writers {
            writer.join().map_err(died)?;
        }
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.ask_for_flush();
        self.flusher.join().map_err(died)?;
        if let Some(reader) = self.reader {
            reader.join().map_err(died)?;
        }
        let shared = Arc::into_inner(self.shared);
        let shared = shared.ok_or_else(|| Refusal::new(RefusalKind::Protocol, "a writer thread lives on"))?;
        Ok(shared.disks.into_iter().map(|disk| disk.target).collect())
    }
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// A session that is gone hears nothing; its threads are about to be stopped.
    fn tell(&self, message: FromTarget) {
        let _ = self.say.blocking_send(message);
    }

    /// The gateway hears of the first thread that finds a disk full, and of the last one that goes on.
    fn set_full(&self, was_full: &mut bool, found: Option<Refusal>) {
        if *was_full == found.is_some() {
            return;
        }
        *was_full = found.is_some();
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        match found {
            Some(refusal) => {
                *full += 1;
                if *full == 1 {
                    self.tell(FromTarget::Waiting(refusal));
                }
            }
            None => {
                *full -= 1;
                if *full == 0 {
                    self.tell(FromTarget::Resumed);
                }
            }
        }
    }

    fn is_full(&self) -> bool {
        *self.full.lock().unwrap_or_else(PoisonError::into_inner) > 0
    }

    fn write_all(&self, inbox: &Mutex<mpsc::Receiver<Arrived>>) {
        loop {
            let next = inbox
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .blocking_recv();
            let Some(arrived) = next else { return };
            if self.stopping() {
                continue;
            }
            let credit = arrived.header.credit();
            self.writing.fetch_add(1, Ordering::Relaxed);
            let written = self.write(&arrived);
            self.writing.fetch_sub(1, Ordering::Relaxed);
            // Its room must be free before the credit for it is given.
            drop(arrived);
            match written {
                Ok(()) => self.tell(FromTarget::Credit(credit)),
                Err(refusal) => {
                    self.stop.store(true, Ordering::Relaxed);
                    self.tell(FromTarget::Failed(refusal));
                }
            }
        }
    }

    fn write(&self, Arrived { header, data, .. }: &Arrived) -> Result<(), Refusal> {
        let disk = self.disks.get(usize::from(header.disk.0));
        let disk =
            disk.ok_or_else(|| Refusal::new(RefusalKind::Protocol, "a batch is for a disk there is not"))?;
        let broken = |error| Refusal::because(RefusalKind::Protocol, &error);
        header.check(disk.target.size()).map_err(broken)?;
        header.verify(data).map_err(broken)?;
        self.make_room(header.disk, disk, data.len() as u64);
        let Some(applied) = self.apply(disk, header, data)? else {
            return Ok(());
        };
        metrics::counter!(TARGET_BATCHES).increment(1);
        metrics::counter!(TARGET_RAW).increment(data.len() as u64);
        let mut tickets = disk.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.insert(applied.ticket, (header.sequence, data.len() as u64));
        drop(tickets);
        if header.urgent {
            let begins = header.pieces.first().map_or(0, |piece| piece.extent.offset());
            let mut urgent = disk.urgent.lock().unwrap_or_else(PoisonError::into_inner);
            urgent.insert(applied.ticket, ((header.attempt, header.round), begins));
            drop(urgent);
        }
        self.written.fetch_add(1, Ordering::Release);
        // For an urgent one a VM stands and waits.
        if header.urgent || applied.flush_due {
            self.ask_for_flush();
        } else {
            let _ = self.wake.try_send(());
        }
        Ok(())
    }

    fn ask_for_flush(&self) {
        self.flush_now.store(true, Ordering::Release);
        // Where it is full the flusher is about to look, and finds this.
        let _ = self.wake.try_send(());
    }

    /// Waits until `bytes` more may be written to a disk, and counts them. Whoever waits here keeps the credit for its batch.
    fn make_room(&self, index: DiskIndex, disk: &Written, bytes: u64) {
        let mut latest = u64::MAX;
        loop {
            let mut unflushed = disk.unflushed.lock().unwrap_or_else(PoisonError::into_inner);
            if *unflushed == 0 || unflushed.saturating_add(bytes) <= self.unflushed_max {
                *unflushed += bytes;
                return;
            }
            let previous = std::mem::replace(&mut latest, *unflushed);
            drop(unflushed);
            if previous <= latest {
                // What is counted is still being written by another thread.
                std::thread::sleep(WRITING);
            }
            // An error stays: the flusher meets it, too, and knows what to do; and so does who writes next.
            if self.stopping() || self.flush(index, disk).is_err() {
                let mut unflushed = disk.unflushed.lock().unwrap_or_else(PoisonError::into_inner);
                *unflushed = unflushed.saturating_add(bytes);
                return;
            }
        }
    }

    /// Applies a batch, waiting out a full disk. `None` where the session ends meanwhile.
    fn apply(&self, disk: &Written, header: &BatchHeader, data: &[u8]) -> Result<Option<Applied>, Refusal> {
        let leaves = LeafRecord {
            first: header.leaves.first,
            count: header.leaves.count,
            digests: header.leaves.digests.clone(),
        };
        let pieces = pieces(header, data);
        let mut full = false;
        loop {
            let applied = if leaves.count == 0 {
                disk.target.patch(header.attempt, header.round, &pieces)
            } else {
                disk.target.apply(header.attempt, header.round, &leaves, &pieces)
            };
            match applied {
                Ok(applied) => {
                    self.set_full(&mut full, None);
                    return Ok(Some(applied));
                }
                Err(error @ TargetError::NoSpace { .. }) => {
                    self.set_full(&mut full, Some(outcome::target(&error)));
                }
                // A flush failed for want of space; the flusher ends the attempt when there is room again.
                Err(TargetError::Failed { .. }) if self.is_full() => {}
                Err(error) => return Err(outcome::target(&error)),
            }
            if self.stopping() {
                return Ok(None);
            }
            std::thread::sleep(SPACE_RETRY);
        }
    }

    /// What comes from the link goes first: a leaf is read while no batch is being written.
    fn read_back_all(&self) {
        while !self.stopping() {
            let is_idle = self.writing.load(Ordering::Relaxed) == 0;
            let read = is_idle && self.disks.iter().any(|disk| disk.target.read_back());
            if !read {
                std::thread::sleep(READ_AGAIN);
            }
        }
    }

    fn flush_all(&self, woken: &Receiver<()>, every: Duration) {
        let mut full = vec![false; self.disks.len()];
        let mut times = FlushDue::new(every, Instant::now());
        let mut wait = every;
        loop {
            let _ = woken.recv_timeout(wait);
            let stopping = self.stopping();
            // A disk that was full is tried again, whatever was written meanwhile.
            let asked = self.flush_now.swap(false, Ordering::AcqRel) || stopping || full.contains(&true);
            let due = times.look(Instant::now(), self.written.load(Ordering::Acquire), asked);
            wait = match due {
                Due::Now => every,
                Due::In(wait) => wait,
            };
            if due != Due::Now {
                continue;
            }
            for (index, disk) in (0..).map(DiskIndex).zip(&self.disks) {
                let was_full = &mut full[usize::from(index.0)];
                match self.flush(index, disk) {
                    Ok(()) => self.set_full(was_full, None),
                    Err(refusal) if refusal.kind == RefusalKind::NoSpace => {
                        self.set_full(was_full, Some(refusal));
                    }
                    // What could not be flushed is lost: the attempt ends, but not before there is room for another.
                    Err(refusal)
                        if refusal.kind == RefusalKind::Lost
                            && *was_full
                            && !stopping
                            && !has_room(&disk.target) => {}
                    Err(refusal) => {
                        self.stop.store(true, Ordering::Relaxed);
                        return self.tell(FromTarget::Failed(refusal));
                    }
                }
            }
            if stopping {
                return;
            }
        }
    }

    fn flush(&self, index: DiskIndex, disk: &Written) -> Result<(), Refusal> {
        let flushed = disk.target.flush().map_err(|error| outcome::target(&error))?;
        let mut tickets = disk.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        let later = tickets.split_off(&Ticket(flushed.through.0.saturating_add(1)));
        let durable = std::mem::replace(&mut *tickets, later);
        drop(tickets);
        let bytes: u64 = durable.values().map(|(_, bytes)| bytes).sum();
        let mut unflushed = disk.unflushed.lock().unwrap_or_else(PoisonError::into_inner);
        *unflushed = unflushed.saturating_sub(bytes);
        drop(unflushed);
        let durable: Sequences = durable.into_values().map(|(sequence, _)| sequence).collect();
        self.note_last_round(index, disk, flushed.through);
        if !durable.is_empty() {
            tracing::trace!(disk = %index, batches = durable.len(), "durable");
            metrics::counter!(TARGET_DURABLE).increment(durable.len());
            self.tell(FromTarget::Durable(durable));
        }
        Ok(())
    }
}

impl Shared {
    /// Urgent batches up to this ticket are durable.
    fn note_last_round(&self, index: DiskIndex, disk: &Written, through: Ticket) {
        let mut urgent = disk.urgent.lock().unwrap_or_else(PoisonError::into_inner);
        let later = urgent.split_off(&Ticket(through.0.saturating_add(1)));
        let durable = std::mem::replace(&mut *urgent, later);
        drop(urgent);
        if durable.is_empty() {
            return;
        }
        self.last_round.send_modify(|last| {
            for (of, begins) in durable.into_values() {
                if of > last.of {
                    let batches = BTreeSet::new();
                    *last = LastRound { of, batches };
                }
                if of == last.of {
                    last.batches.insert((index, begins));
                }
            }
        });
    }
}

fn has_room(target: &Target) -> bool {
    let folder = target.path().parent().unwrap_or_else(|| Path::new("/"));
    apply::check_space(folder, SPACE_AGAIN).is_ok()
}

/// The batch's pieces with their bytes. The header was checked and the data is as long as it says.
fn pieces<'a>(header: &BatchHeader, data: &'a [u8]) -> Vec<Piece<'a>> {
    let mut rest = data;
    let piece = |piece: &longhaul_common::wire::batch::Piece| match piece.content {
        Content::Data => {
            let (bytes, behind) = rest.split_at(piece.extent.len() as usize);
            rest = behind;
            Piece::Data {
                offset: piece.extent.offset(),
                bytes,
            }
        }
        Content::Hole | Content::Zero | Content::Free => Piece::Zero(piece.extent),
    };
    header.pieces.iter().map(piece).collect()
}
