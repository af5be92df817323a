//! Reading a disk of a running VM through its own QEMU: an NBD export that somebody else added.
//!
//! Owns the connections to one export. Leaves alone exports, bitmaps and rounds (`vm::rounds`) and the protocol (`nbd`).
//! All calls block; any number of threads may read at once. Promises: read-only; the peer is not trusted; what is told of
//! dirty and stored extents is bounded, and covers exactly what was asked for; no goodbye is said. Versions of QEMU abort, and
//! the VM with them, where a client leaves an export whose disk runs in an I/O thread (7.2.14 and later of 7.2: seen): the
//! sockets are QEMU's as well (`vm::rounds`), so that closing ours, even by our death, is not noticed, and it is QEMU that
//! ends the connections with the export.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use longhaul_common::extent::Extent;

use super::nbd::{BASE_ALLOCATION, ConnectOptions, Connection, NbdError, Pool, STATE_DIRTY, StatusRun};
use super::{Run, Runs, served};
use crate::disk::ReadAt;

/// How much is asked for at once. The answer must fit into QEMU's socket: to an agent that has died it is then written all the
/// same, and its request over. QEMU drains its disks before it changes bitmaps or stops the VM, and stands for ever, the VM with
/// it, while an answer waits for a reader: the socket's other end is held open by QEMU itself. Linux gives a socket 208 KiB.
pub const READ_MAX: usize = 64 << 10;
/// How much is asked about at once, so that the answer, 8 bytes for each run, is not larger either: of what is stored, where runs have
/// 16 KiB on average;
const STORED_STEP: u64 = READ_MAX as u64 / 8 * (16 << 10);
/// and of what is dirty, in bits of the bitmap: each may be a run,
const DIRTY_STEP: u64 = READ_MAX as u64 / 8;
/// unless so few bits are set that the answer is short however much is asked about. Each question costs the VM's pause one round trip to
/// its QEMU, which for a disk of a TiB would be thousands.
const FAR_STEP: u64 = 64 << 30;

/// A dirty bitmap that an export shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownBitmap {
    pub name: String,
    /// Bytes per bit.
    pub granularity: u32,
    /// Dirty bytes that it holds; it records no more.
    pub dirty: u64,
}

impl ShownBitmap {
    /// How many bytes may be asked about at once, while so many dirty ones are not told yet.
    fn step(&self, left: u64) -> u64 {
        let granularity = u64::from(self.granularity.max(1));
        // Each run of dirty bits comes with one of clean ones.
        if left / granularity < DIRTY_STEP / 2 {
            FAR_STEP
        } else {
            DIRTY_STEP * granularity
        }
    }
}

/// A disk of a running VM, as one export shows it: always its current content.
#[derive(Debug)]
pub struct LiveImage {
    pool: Pool,
    /// Those not used yet.
    sockets: Mutex<Vec<OwnedFd>>,
    socket: PathBuf,
    export: String,
    options: ConnectOptions,
    size: u64,
    has_allocation: bool,
    /// The bitmap and its metadata context, where one was asked for.
    dirty: Option<(ShownBitmap, String)>,
}

impl LiveImage {
    /// Connects to `export` of the NBD server at `socket`, with as many connections at a time as there are `sockets` (at
    /// least 1; see `vm::rounds::Rounds::sockets`). With `bitmap`, [`Self::dirty`] tells what it holds.
    ///
    /// # Errors
    /// What the server refused, or [`NbdError::Unusable`] where it does not give the bitmap.
    pub fn connect(
        socket: &Path,
        export: &str,
        bitmap: Option<&ShownBitmap>,
        mut sockets: Vec<OwnedFd>,
    ) -> Result<Self, NbdError> {
        let connections = sockets.len();
        let dirty = bitmap.map(|shown| (shown.clone(), format!("qemu:dirty-bitmap:{}", shown.name)));
        let context = dirty.as_ref().map(|(_, context)| context.clone());
        let mut options = ConnectOptions::default();
        options.contexts.extend(context.clone());
        let first = Connection::connect_on(next(&mut sockets)?, socket, export, &options)?;
        let told = first.export();
        let has = |name: &str| told.contexts.iter().any(|context| context.name == name);
        if let Some(missing) = context.filter(|name| !has(name)) {
            return Err(NbdError::Unusable(format!(
                "the export {export:?} does not give {missing:?}; was it added with its bitmap?"
            )));
        }
        let image = Self {
            has_allocation: has(BASE_ALLOCATION),
            size: told.size,
            pool: Pool::new(connections),
            sockets: Mutex::new(sockets),
            socket: socket.to_owned(),
            export: export.to_owned(),
            options,
            dirty,
        };
        image.pool.with(|| Ok(first), |_| Ok(()))?;
        Ok(image)
    }

    /// Size of the disk in bytes, as its guest sees it.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The export it reads.
    pub fn export(&self) -> &str {
        &self.export
    }

    /// What is stored of `range` now: runs in order that cover it exactly, neighbours in different states.
    ///
    /// Best asked for in ranges of some GiB: after 1 Mi runs, the rest is given as data.
    ///
    /// # Errors
    /// `UnexpectedEof` where the range reaches beyond the disk; else what the server said.
    pub fn allocation(&self, range: Extent) -> io::Result<Vec<Run>> {
        self.check_range(range.offset(), range.len())?;
        let mut runs = Runs::new(range);
        while !runs.is_complete() {
            let step = step(runs.end(), range.end(), STORED_STEP);
            if !self.has_allocation {
                runs.push_until(step.end(), super::Allocation::Data);
                continue;
            }
            for run in self.ask(BASE_ALLOCATION, step)? {
                runs.push_until(run.extent.end(), served::state(run.flags));
            }
        }
        Ok(runs.finish())
    }

    /// The extents of `range` that the bitmap holds, in order, apart from each other, cut to `range`.
    ///
    /// Asked for in ranges of at most 64 GiB the answer is bounded by what one range can hold: with bits for 4 KiB at worst
    /// 8 Mi extents. Best asked for in ranges of a GiB.
    ///
    /// # Errors
    /// `InvalidInput` where it was connected without a bitmap; else as [`Self::allocation`].
    pub fn dirty(&self, range: Extent) -> io::Result<Vec<Extent>> {
        // Of a part nobody knows how much of what is dirty it has.
        let most = self.shown()?.0.step(u64::MAX);
        self.dirty_by(range, most)
    }

    fn shown(&self) -> io::Result<&(ShownBitmap, String)> {
        self.dirty.as_ref().ok_or_else(|| {
            let what = "this export was opened without a dirty bitmap";
            io::Error::new(io::ErrorKind::InvalidInput, what)
        })
    }

    fn dirty_by(&self, range: Extent, most: u64) -> io::Result<Vec<Extent>> {
        let (_, context) = self.shown()?;
        self.check_range(range.offset(), range.len())?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.offset();
        while at < range.end() {
            let step = step(at, range.end(), most);
            let told = self.ask(context, step)?;
            for run in told.iter().filter(|run| run.flags & STATE_DIRTY != 0) {
                push(&mut extents, run.extent);
            }
            at = step.end();
        }
        Ok(extents)
    }

    /// Calls `take` with the dirty extents of the whole disk, piece by piece, so that little of them is in memory at a time.
    ///
    /// # Errors
    /// As [`Self::dirty`].
    pub fn each_dirty(&self, mut take: impl FnMut(Vec<Extent>)) -> io::Result<()> {
        let (shown, _) = self.shown()?;
        let (mut at, mut left) = (0, shown.dirty);
        while at < self.size {
            let most = shown.step(left);
            let step = step(at, self.size, most);
            let extents = self.dirty_by(step, most)?;
            left = left.saturating_sub(extents.iter().map(Extent::len).sum());
            if !extents.is_empty() {
                take(extents);
            }
            at = step.end();
        }
        Ok(())
    }

    fn ask(&self, context: &str, range: Extent) -> io::Result<Vec<StatusRun>> {
        self.with_connection(|connection| connection.block_status(context, range))
    }

    fn with_connection<R>(&self, ask: impl FnOnce(&mut Connection) -> Result<R, NbdError>) -> io::Result<R> {
        let connect = || {
            let fd = next(&mut self.sockets.lock().unwrap_or_else(PoisonError::into_inner))?;
            let connection = Connection::connect_on(fd, &self.socket, &self.export, &self.options)?;
            if connection.export().size == self.size {
                return Ok(connection);
            }
            let now = connection.export().size;
            Err(NbdError::Unusable(format!(
                "the disk's size changed from {} to {now} bytes while it was read",
                self.size
            )))
        };
        self.pool.with(connect, ask).map_err(|error| {
            let what = format!("{error}; the VM's QEMU serves it as {:?}", self.export);
            io::Error::new(error.kind(), what)
        })
    }

    fn check_range(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        let what = format!(
            "the disk ends at {} bytes, before the end of {len} bytes at {offset}",
            self.size
        );
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, what))
    }
}

impl ReadAt for LiveImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        self.with_connection(|connection| {
            let mut pieces = (offset..).step_by(READ_MAX).zip(buf.chunks_mut(READ_MAX));
            pieces.try_for_each(|(at, piece)| connection.read(piece, at))
        })
    }
}

fn next(sockets: &mut Vec<OwnedFd>) -> Result<OwnedFd, NbdError> {
    let none = || NbdError::Unusable("all connections to this export failed; open the round again".into());
    sockets.pop().ok_or_else(none)
}

fn step(at: u64, end: u64, most: u64) -> Extent {
    Extent::between(at, at.saturating_add(most).min(end))
}

fn push(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        Some(last) if last.end() == next.offset() => *last = Extent::between(last.offset(), next.end()),
        _ => extents.push(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_dirty_bits_are_asked_for_at_once_and_an_answer_never_outgrows_the_socket() {
        let shown = |granularity, dirty| ShownBitmap {
            name: "b".to_owned(),
            granularity,
            dirty,
        };
        for granularity in [4 << 10, 16 << 10, 64 << 10] {
            let bits = |bits: u64| shown(granularity, bits * u64::from(granularity));
            assert_eq!(bits(0).step(0), FAR_STEP);
            let few = bits(DIRTY_STEP / 2 - 1);
            assert_eq!(few.step(few.dirty), FAR_STEP);
            // At worst each dirty bit has a clean run behind it, and one is before them all.
            assert!((2 * (DIRTY_STEP / 2 - 1) + 1) * 8 <= READ_MAX as u64);
            let many = bits(DIRTY_STEP / 2);
            let step = many.step(many.dirty);
            assert!(step / u64::from(granularity) * 8 <= READ_MAX as u64, "{step}");
            // What is told is not counted again.
            assert_eq!(many.step(many.dirty / 2), FAR_STEP);
        }
    }
}
