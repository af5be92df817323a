//! Reading a copy back from the device, to state its digest.
//!
//! Owns the parallel reading and hashing of leaves; holes are zeros without being read. Leaves the tree to `common::digest`. Used for
//! the proof at the end, and to check what a damaged log says.

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::{Mutex, PoisonError};

use longhaul_common::digest::{Digest, DiskDigest, LEAF, leaf_count, leaf_extent};
use longhaul_common::extent::Extent;

use super::TargetError;
use super::board::{LeafState, LeafStates};
use super::progress_log::ProgressLog;
use super::record::{ENTRIES_MAX, Kind, Record, Version};
use super::replay::{self, Said};
use super::store::Store;
use super::target::{Target, lock};

/// More threads than this only make a disk seek.
const THREADS_MAX: usize = 32;

/// What was read.
enum Read {
    Leaf(u64, Digest),
    /// One that need not be read: it was, and reads as the log says.
    Proven(u64),
    Zeros(Range<u64>),
}

/// The digests of zero leaves, whole and last.
struct ZeroLeaves {
    whole: Digest,
    last: Digest,
    leaves: u64,
}

impl ZeroLeaves {
    fn of(size: u64) -> Self {
        let leaves = leaf_count(size);
        let last = leaf_extent(leaves.saturating_sub(1), size).len();
        let zeros = vec![0; LEAF as usize];
        Self {
            whole: Digest::of(&zeros),
            last: Digest::of(&zeros[..last as usize]),
            leaves,
        }
    }

    fn digest(&self, leaf: u64) -> Digest {
        if leaf + 1 == self.leaves {
            self.last
        } else {
            self.whole
        }
    }

    /// The digest that a statement in the log means.
    fn expected(&self, leaf: u64, said: Said) -> Option<Digest> {
        match said {
            // Nobody has stated what the leaves of a shadow hold.
            Said::Nothing | Said::Shadow(_) => None,
            Said::Zero(_) => Some(self.digest(leaf)),
            Said::Data(_, digest) => Some(digest),
        }
    }
}

impl Target {
    /// Flushes, drops what memory holds of the copy, reads back with `threads` threads what was not read back since it was written, and
    /// states the disk's digest.
    ///
    /// `progress` is told the bytes done so far after each leaf, on the calling thread, and may end it. Nothing may be applied
    /// meanwhile. Errors: `Incomplete` where a leaf was never written, `Differs` with a leaf that does not read as it was written,
    /// `Stopped` where `progress` ended it, `Io`.
    pub fn verify(
        &self,
        threads: usize,
        progress: &dyn Fn(u64) -> ControlFlow<()>,
    ) -> Result<Digest, TargetError> {
        self.require_complete()?;
        let path = &self.options.path;
        self.store
            .drop_cache()
            .map_err(TargetError::during("drop the cache of", path))?;
        let (log, zeros) = (lock(&self.log), ZeroLeaves::of(self.size));
        let mut digest = DiskDigest::new(self.size);
        let mut done = 0;
        for range in replay::windows(leaf_count(self.size)) {
            let said =
                replay::window(log.records(), &range).map_err(TargetError::during("read", &log.path()))?;
            let expected = |leaf: u64| zeros.expected(leaf, said[(leaf - range.start) as usize]);
            let differs = |leaf: u64, read: Digest| match expected(leaf) {
                Some(written) if written != read => Err(TargetError::Differs { leaf, written, read }),
                Some(_) => Ok(()),
                None => Err(TargetError::Incomplete { leaf }),
            };
            let proven = |leaf| self.read_back.is_proven(leaf);
            read_back(
                &*self.store,
                self.size,
                range.clone(),
                threads,
                &proven,
                &mut |read| {
                    match read.map_err(TargetError::during("read", path))? {
                        Read::Proven(leaf) => {
                            let found = expected(leaf).ok_or(TargetError::Incomplete { leaf })?;
                            digest.leaf(leaf, found)?;
                            done += leaf_extent(leaf, self.size).len();
                        }
                        Read::Leaf(leaf, found) => {
                            differs(leaf, found)?;
                            digest.leaf(leaf, found)?;
                            done += leaf_extent(leaf, self.size).len();
                        }
                        Read::Zeros(leaves) => {
                            leaves
                                .clone()
                                .try_for_each(|leaf| differs(leaf, zeros.digest(leaf)))?;
                            digest.zeros(leaves.start, leaves.end - leaves.start)?;
                            done += leaf_extent(leaves.end - 1, self.size).end()
                                - leaf_extent(leaves.start, self.size).offset();
                        }
                    }
                    match progress(done) {
                        ControlFlow::Continue(()) => Ok(()),
                        ControlFlow::Break(()) => Err(TargetError::Stopped { path: path.clone() }),
                    }
                },
            )?;
        }
        Ok(digest.finish()?)
    }
}

/// Compares every claimed leaf with what `log` says, and takes the claim from those that differ.
pub(crate) fn recheck(
    store: &dyn Store,
    size: u64,
    log: &ProgressLog,
    states: &mut LeafStates,
) -> Result<(), TargetError> {
    let path = log.path();
    let zeros = ZeroLeaves::of(size);
    store
        .drop_cache()
        .map_err(TargetError::during("drop the cache of the copy of", &path))?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    for range in replay::windows(leaf_count(size)) {
        let said = replay::window(log.records(), &range).map_err(TargetError::during("read", &path))?;
        let claimed: Vec<_> = states
            .runs(range.clone())
            .filter(|(_, leaf)| leaf.claimed())
            .map(|(run, _)| run)
            .collect();
        for run in claimed {
            let mut check = |leaf: u64, found: Digest| {
                if zeros.expected(leaf, said[(leaf - range.start) as usize]) != Some(found) {
                    let state = LeafState::new(states.get(leaf).version(), false, true);
                    states.set(leaf..leaf + 1, state);
                }
            };
            read_back(store, size, run, threads, &|_| false, &mut |read| {
                match read.map_err(TargetError::during("read the copy of", &path))? {
                    Read::Leaf(leaf, found) => check(leaf, found),
                    Read::Proven(_) => {}
                    Read::Zeros(leaves) => leaves.for_each(|leaf| check(leaf, zeros.digest(leaf))),
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Reads everything that is there and states it in `log`, as if it had been written in `version`.
pub(crate) fn state_all(
    store: &dyn Store,
    size: u64,
    log: &mut ProgressLog,
    states: &mut LeafStates,
    version: Version,
) -> Result<(), TargetError> {
    let path = log.path();
    let zeros = ZeroLeaves::of(size);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    for range in replay::windows(leaf_count(size)) {
        let mut digests = Vec::new();
        read_back(store, size, range.clone(), threads, &|_| false, &mut |read| {
            if let Read::Leaf(leaf, found) = read.map_err(TargetError::during("read the copy of", &path))?
                && found != zeros.digest(leaf)
            {
                digests.push((leaf, found));
            }
            Ok(())
        })?;
        digests.sort_unstable_by_key(|(leaf, _)| *leaf);
        let written = |leaves: Range<u64>, digests: &[(u64, Digest)]| Record {
            kind: Kind::Written,
            version,
            leaves,
            digests: digests.to_vec(),
        };
        let mut records = Vec::new();
        let mut first = range.start;
        for digests in digests.chunks(ENTRIES_MAX) {
            let end = digests.last().map_or(first, |(leaf, _)| leaf + 1);
            records.push(written(first..end, digests));
            first = end;
        }
        if first < range.end {
            records.push(written(first..range.end, &[]));
        }
        log.append(&records)?;
        states.set(range, LeafState::new(version, true, true));
    }
    Ok(())
}

/// Hands the leaves of `range` to `sink`, nearly in order, read and hashed by `threads` threads, but for those that are `proven`. The sink's
/// first error ends it.
fn read_back(
    store: &dyn Store,
    size: u64,
    range: Range<u64>,
    threads: usize,
    proven: &(dyn Fn(u64) -> bool + Sync),
    sink: &mut dyn FnMut(io::Result<Read>) -> Result<(), TargetError>,
) -> Result<(), TargetError> {
    let threads = threads.clamp(1, THREADS_MAX);
    let walk = Mutex::new(Walk {
        store,
        size,
        next: range.start,
        end: range.end,
        data: None,
    });
    let (results, received) = crossbeam_channel::bounded(threads * 2);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (walk, results) = (&walk, results.clone());
            scope.spawn(move || {
                let mut buf = vec![0; LEAF as usize];
                // The receiver is gone once the sink had enough.
                while let Some(read) = next_read(walk, proven, &mut buf)
                    && results.send(read).is_ok()
                {}
            });
        }
        drop(results);
        // Moved, so that an error closes the channel before the threads are waited for.
        let received = received;
        received.iter().try_for_each(sink)
    })
}

fn next_read(
    walk: &Mutex<Walk<'_>>,
    proven: &(dyn Fn(u64) -> bool + Sync),
    buf: &mut [u8],
) -> Option<io::Result<Read>> {
    let step = walk.lock().unwrap_or_else(PoisonError::into_inner).step();
    let leaf = match step? {
        Ok(Step::Leaf(leaf)) if proven(leaf) => return Some(Ok(Read::Proven(leaf))),
        Ok(Step::Leaf(leaf)) => leaf,
        Ok(Step::Zeros(leaves)) => return Some(Ok(Read::Zeros(leaves))),
        Err(error) => return Some(Err(error)),
    };
    let walk = walk.lock().unwrap_or_else(PoisonError::into_inner);
    let (store, extent) = (walk.store, leaf_extent(leaf, walk.size));
    drop(walk);
    let buf = &mut buf[..extent.len() as usize];
    Some(
        store
            .read_at(buf, extent.offset())
            .map(|()| Read::Leaf(leaf, Digest::of(buf))),
    )
}

enum Step {
    Leaf(u64),
    Zeros(Range<u64>),
}

/// Goes through the leaves of a range, past the holes.
struct Walk<'a> {
    store: &'a dyn Store,
    size: u64,
    next: u64,
    end: u64,
    /// The data that comes next; behind the disk where none does.
    data: Option<Extent>,
}

impl Walk<'_> {
    fn step(&mut self) -> Option<io::Result<Step>> {
        if self.next >= self.end {
            return None;
        }
        let leaf = leaf_extent(self.next, self.size);
        let data = match self.data.filter(|data| data.end() > leaf.offset()) {
            Some(data) => data,
            None => match self.store.next_data(leaf.offset()) {
                Ok(data) => data.unwrap_or(Extent::between(u64::MAX - 1, u64::MAX)),
                Err(error) => {
                    self.next = self.end;
                    return Some(Err(error));
                }
            },
        };
        self.data = Some(data);
        let start = self.next;
        if data.offset() < leaf.end() {
            self.next += 1;
            return Some(Ok(Step::Leaf(start)));
        }
        self.next = self.end.min(data.offset() / LEAF);
        Some(Ok(Step::Zeros(start..self.next)))
    }
}
