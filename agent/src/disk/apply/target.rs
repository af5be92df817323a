//! One disk's copy while it is written: batches in, durable tickets out.
//!
//! Owns the order of things that makes the promises of this module true. A leaf is entered (nobody else writes it), what the log says of it
//! is made void first where it says anything, then it is written, then recorded as pending. A flush takes what is pending, syncs the
//! data, and only then logs it. Leaves opening to `open`, reading back to `verify`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use longhaul_common::digest::{LEAF, leaf_extent};
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, Round};

use super::batch;
use super::board::{Board, Entered};
use super::compact;
use super::pending::{self, Pending, Taken};
use super::place::Place;
use super::progress_log::ProgressLog;
use super::read_back::ReadBack;
use super::record::{ENTRY, HEAD, Kind, Record, Version};
use super::store::{Store, ZEROS};
use super::{LeafRecord, Piece, TargetError, TargetOptions, open};

/// So many records wait at most before `apply` flushes by itself: bounds memory where nobody flushes.
const PENDING_MAX: usize = 1 << 16;

/// The n-th batch that was applied, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// A batch was written; it is not durable yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    pub ticket: Ticket,
    /// Leaves that were left as they are, because they hold something newer.
    pub stale_leaves: u64,
    /// `flush_bytes` or more wait for a flush.
    pub flush_due: bool,
}

/// Everything up to this ticket is durable. Tickets from before a failed flush are not: they ended with their target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flushed {
    pub through: Ticket,
}

/// What becomes of the store in the end.
pub(crate) enum Outcome {
    File(Place),
    Device(PathBuf),
}

/// A copy in the making. Every method blocks; `apply` and `flush` may be called by many threads at once.
pub struct Target {
    pub(crate) options: TargetOptions,
    pub(crate) size: u64,
    pub(crate) store: Box<dyn Store>,
    pub(crate) outcome: Outcome,
    pub(crate) board: Board,
    pub(crate) pending: Mutex<Pending>,
    /// Held through a whole flush. Taken before `pending`, never while the board is locked.
    pub(crate) log: Mutex<ProgressLog>,
    /// A flush or the log failed: nothing unflushed can be believed any more.
    pub(crate) failed: AtomicBool,
    pub(crate) notes: Vec<String>,
    /// Leaves that are whole, but whose digest no log states: a later round wrote parts of them.
    pub(crate) patched: Mutex<BTreeSet<u64>>,
    /// Which leaves read as they were written.
    pub(crate) read_back: ReadBack,
    /// In this life it was a shadow until it was opened.
    pub(crate) begun_with_shadow: bool,
}

/// Neither the pending list nor the log is left half changed by a panic: both change in one step each.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Target {
    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the copy will be once it is promoted.
    pub fn path(&self) -> &Path {
        &self.options.path
    }

    /// Whether the copy was a shadow until it was opened.
    pub fn began_with_shadow(&self) -> bool {
        self.begun_with_shadow
    }

    /// Something more that the operator should know.
    pub fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// What the operator should know, one sentence each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Writes a batch whose `pieces` tile `leaves` exactly; zeros become holes.
    ///
    /// Leaves that hold something newer are left alone, and so are those of a batch that came twice. Errors: `Stale` where all of them do, `Malformed`, `NoSpace` (apply the
    /// same batch again once there is room), `Failed` after a failed flush, `Io`.
    pub fn apply(
        &self,
        attempt: Attempt,
        round: Round,
        leaves: &LeafRecord,
        pieces: &[Piece<'_>],
    ) -> Result<Applied, TargetError> {
        self.require_sound()?;
        let range = batch::check(leaves, pieces, self.size)?;
        let version = Version::new(attempt, round).ok_or_else(|| {
            TargetError::Malformed(format!("attempt {attempt} round {round} is out of range"))
        })?;
        let mut entered = self.board.enter(range.clone(), version);
        if entered.admitted.is_empty() {
            return Err(TargetError::Stale { attempt, round });
        }
        let admitted: u64 = entered.admitted.iter().map(|run| run.end - run.start).sum();
        if !entered.repeated.is_empty() && self.holds(pieces, &entered) {
            entered.leave_repeated();
        }
        if !entered.claimed.is_empty() {
            self.make_void(&entered, version)?;
        }
        let data = || {
            leaves
                .digests
                .iter()
                .map(|(leaf, _)| *leaf)
                .filter(|leaf| is_in(&entered.admitted, *leaf))
        };
        entered.begin(version, data());
        self.write(pieces, &entered)
            .map_err(TargetError::during("write to", &self.options.path))?;
        let record = Record {
            kind: Kind::Written,
            version,
            leaves: range,
            digests: leaves.digests.clone(),
        };
        let records = entered
            .admitted
            .iter()
            .map(|run| pending::part(&record, run.clone()));
        let (ticket, waiting) = {
            let mut pending = lock(&self.pending);
            let ticket = pending.push(records, data_bytes(pieces));
            entered.finish(version, data());
            (Ticket(ticket), pending.waiting())
        };
        drop(entered);
        if waiting.1 > PENDING_MAX {
            self.flush()?;
        }
        let flush_due = waiting.0 >= self.options.flush_bytes;
        Ok(Applied {
            ticket,
            stale_leaves: leaves.count - admitted,
            flush_due,
        })
    }

    /// Leaves that the log speaks of, or will, are about to change: first the log must say so.
    fn make_void(&self, entered: &Entered<'_>, version: Version) -> Result<(), TargetError> {
        self.make_void_all(&entered.claimed, version)
    }

    pub(crate) fn make_void_all(&self, claimed: &[Range<u64>], version: Version) -> Result<(), TargetError> {
        let mut log = lock(&self.log);
        self.require_sound()?;
        let void = |leaves: &Range<u64>| Record {
            kind: Kind::Void,
            version,
            leaves: leaves.clone(),
            digests: Vec::new(),
        };
        let records: Vec<_> = claimed.iter().map(void).collect();
        self.append(&mut log, &records)?;
        let leaves: u64 = claimed.iter().map(|run| run.end - run.start).sum();
        let dead = leaves
            .saturating_mul(ENTRY as u64)
            .saturating_add((records.len() * (HEAD + 4)) as u64);
        log.dead = log.dead.saturating_add(dead).min(log.len);
        lock(&self.pending).strip(claimed);
        Ok(())
    }

    pub(crate) fn require_sound(&self) -> Result<(), TargetError> {
        match self.failed.load(Ordering::Acquire) {
            true => Err(TargetError::Failed {
                path: self.options.path.clone(),
            }),
            false => Ok(()),
        }
    }

    /// Logs `records`; an error that leaves the log in doubt ends this target.
    fn append(&self, log: &mut ProgressLog, records: &[Record]) -> Result<(), TargetError> {
        let appended = log.append(records);
        if log.is_broken() {
            self.failed.store(true, Ordering::Release);
        }
        appended
    }

    /// A log that cannot be shortened for want of space is still a good log.
    fn compact(&self, log: &mut ProgressLog) -> Result<(), TargetError> {
        match compact::rewrite(log, |_| true) {
            Err(TargetError::NoSpace { .. }) => {
                log.dead = 0;
                Ok(())
            }
            compacted => {
                self.failed.fetch_or(compacted.is_err(), Ordering::AcqRel);
                compacted
            }
        }
    }

    /// Whether the leaves that this version was written to before really hold this content: what is durable already need not be made
    /// void for a batch that came twice. In doubt, no.
    fn holds(&self, pieces: &[Piece<'_>], entered: &Entered<'_>) -> bool {
        pieces.iter().all(|piece| match *piece {
            Piece::Data { offset, bytes } => self.within(&entered.repeated, piece.extent()).all(|part| {
                let from = (part.offset() - offset) as usize;
                self.reads_as(&bytes[from..from + part.len() as usize], part.offset())
            }),
            Piece::Zero(extent) => self.within(&entered.repeated, extent).all(|part| {
                let mut touched = self.within(&entered.touched, part);
                touched.all(|part| self.reads_as_zeros(part))
            }),
        })
    }

    fn reads_as(&self, bytes: &[u8], offset: u64) -> bool {
        let mut found = vec![0; bytes.len()];
        self.store.read_at(&mut found, offset).is_ok() && found == bytes
    }

    fn reads_as_zeros(&self, extent: Extent) -> bool {
        let steps = (extent.offset()..extent.end()).step_by(ZEROS.len());
        let mut parts = steps.map(|at| Extent::between(at, extent.end().min(at + ZEROS.len() as u64)));
        extent.len() <= 2 * LEAF
            && parts.all(|part| self.reads_as(&ZEROS[..part.len() as usize], part.offset()))
    }

    /// Writes the pieces where they were admitted; no leaf of them counts as read back any more.
    pub(crate) fn write(&self, pieces: &[Piece<'_>], entered: &Entered<'_>) -> io::Result<()> {
        self.read_back.forget(&entered.admitted);
        let written = self.write_admitted(pieces, entered);
        // Again: one may have been read in between.
        self.read_back.forget(&entered.admitted);
        written
    }

    fn write_admitted(&self, pieces: &[Piece<'_>], entered: &Entered<'_>) -> io::Result<()> {
        let mut run = WriteRun {
            store: &*self.store,
            parts: Vec::new(),
            start: 0,
            end: 0,
        };
        for piece in pieces {
            match *piece {
                Piece::Data { offset, bytes } => {
                    for part in self.within(&entered.admitted, piece.extent()) {
                        let from = (part.offset() - offset) as usize;
                        run.put(&bytes[from..from + part.len() as usize], part.offset())?;
                    }
                }
                Piece::Zero(extent) => {
                    for part in self.within(&entered.touched, extent) {
                        match ZEROS.get(..part.len() as usize) {
                            Some(zeros) => run.put(zeros, part.offset())?,
                            None => self.store.zero(part)?,
                        }
                    }
                }
            }
        }
        run.write()?;
        let data = || {
            pieces
                .iter()
                .filter(|piece| matches!(piece, Piece::Data { .. }))
                .map(Piece::extent)
        };
        if let (Some(first), Some(last)) = (data().next(), data().next_back()) {
            self.store
                .start_writeback(Extent::between(first.offset(), last.end()));
        }
        Ok(())
    }

    /// The parts of `extent` that lie in the leaves of `runs`.
    fn within<'a>(&'a self, runs: &'a [Range<u64>], extent: Extent) -> impl Iterator<Item = Extent> + 'a {
        let bytes = |run: &Range<u64>| {
            let last = leaf_extent(run.end - 1, self.size);
            Extent::between(leaf_extent(run.start, self.size).offset(), last.end())
        };
        let first = runs.partition_point(move |run| bytes(run).end() <= extent.offset());
        runs[first..]
            .iter()
            .map(bytes)
            .map_while(move |run| run.intersect(&extent))
    }

    /// Makes durable what was completely applied before the call.
    ///
    /// After an error but `NoSpace` this target takes no more: drop it and open it again. After `NoSpace` that is advised, too.
    pub fn flush(&self) -> Result<Flushed, TargetError> {
        let mut log = lock(&self.log);
        self.require_sound()?;
        let Taken {
            records,
            through,
            unsynced,
        } = lock(&self.pending).take();
        let flushed = Flushed {
            through: Ticket(through),
        };
        if !unsynced {
            return Ok(flushed);
        }
        if let Err(error) = self.store.flush() {
            // The system tells of a failed write once and forgets the data: nothing unflushed can be believed from now on.
            self.failed.store(true, Ordering::Release);
            return Err(TargetError::during("sync", &self.options.path)(error));
        }
        // Only a hint. What the page cache still has of a running VM's disk, its QEMU drops when it starts the VM, in the blackout: 64 ms for
        // each GiB (measured; `raw_co_invalidate_cache`, QEMU 7.2 and 10.0).
        let _ = self.store.drop_cache();
        if records.is_empty() {
            return Ok(flushed);
        }
        let records = pending::joined(records);
        if let Err(error) = self.append(&mut log, &records) {
            lock(&self.pending).put_back(records);
            return Err(error);
        }
        self.read_back.offer(&records);
        if compact::is_due(&log) {
            self.compact(&mut log)?;
        }
        Ok(flushed)
    }

    /// Whether every leaf was written and is durable.
    pub(crate) fn require_complete(&self) -> Result<(), TargetError> {
        self.flush()?;
        match self.board.first_unclaimed() {
            Some(leaf) => Err(TargetError::Incomplete { leaf }),
            None => Ok(()),
        }
    }

    /// Completes the copy: owner, mode, label, sync, final name; its log is removed. A device stays where it is.
    ///
    /// Errors: `Incomplete` where a leaf was never written, `Exists` where the final name was taken meanwhile. After an error the
    /// partial copy and its log are there as before.
    pub fn promote(self) -> Result<PathBuf, TargetError> {
        self.require_complete()?;
        let closed = self.store.close();
        closed.map_err(TargetError::during("close", &self.options.path))?;
        let path = match &self.outcome {
            Outcome::Device(path) => path.clone(),
            Outcome::File(place) => {
                let file = place.partial_file()?.ok_or_else(|| {
                    TargetError::refused(&place.partial_path(), "it vanished while it was written")
                })?;
                self.require_same(&file, &place.partial_path())?;
                place.promote(&file, &self.options)?
            }
        };
        self.remove_log()?;
        Ok(path)
    }

    /// The file under the temporary name must be the one that was written, at its full size.
    pub(crate) fn require_same(&self, file: &File, path: &Path) -> Result<(), TargetError> {
        if open::header_for(&self.options, self.size, file, path)? != lock(&self.log).header {
            return Err(TargetError::refused(
                path,
                "another file took its name while it was written",
            ));
        }
        if !open::has_size(&self.options, file, self.size) {
            return Err(TargetError::refused(
                path,
                "its size is not what it was made with: somebody changed it",
            ));
        }
        Ok(())
    }

    /// Gives the copy up: its partial file and log are removed. A device keeps what was written.
    pub fn discard(self) -> Result<(), TargetError> {
        if let Outcome::File(place) = &self.outcome {
            place.dir.remove(&place.partial_name)?;
        }
        self.remove_log()
    }

    pub(crate) fn remove_log(&self) -> Result<(), TargetError> {
        let log = lock(&self.log);
        log.dir.remove(log.name.as_ref())?;
        log.dir.sync()
    }
}

fn is_in(runs: &[Range<u64>], leaf: u64) -> bool {
    let at = runs.partition_point(|run| run.end <= leaf);
    runs.get(at).is_some_and(|run| run.start <= leaf)
}

pub(crate) fn data_bytes(pieces: &[Piece<'_>]) -> u64 {
    let data = pieces.iter().filter(|piece| matches!(piece, Piece::Data { .. }));
    data.map(|piece| piece.extent().len()).sum()
}

/// Neighbouring parts on their way into one write.
struct WriteRun<'a> {
    store: &'a dyn Store,
    parts: Vec<&'a [u8]>,
    start: u64,
    end: u64,
}

impl<'a> WriteRun<'a> {
    fn put(&mut self, part: &'a [u8], offset: u64) -> io::Result<()> {
        if offset != self.end || self.parts.is_empty() {
            self.write()?;
            (self.start, self.end) = (offset, offset);
        }
        self.parts.push(part);
        self.end += part.len() as u64;
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let parts = std::mem::take(&mut self.parts);
        if parts.is_empty() {
            Ok(())
        } else {
            self.store.write_at(&parts, self.start)
        }
    }
}
