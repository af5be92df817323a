//! The directory tree as a witness: does it fit a geometry and its table?
//!
//! Owns the walk from the root directory over every chain. Leaves alone what the files hold. A tree fits if every directory entry
//! decodes, every chain stays in the volume, ends, and has the length its file's size needs, no cluster has two owners, every
//! subdirectory's `.` and `..` name itself and its parent, and, where the table has no second copy, no entry in use is left over.
//! Promises to end on any bytes: a cluster is visited once, at most [`PENDING_MAX`] directories wait, and no more bytes are read
//! than the caller's [`Budget`] holds.

use super::Bits;
use super::boot::{Geometry, Width, inconsistent};
use super::fields::{u16_at, u32_at};
use super::table::{Entry, Table};
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

/// 4 MiB of bits.
const CLUSTERS_MAX: u32 = 32 << 20;
/// 2 MiB of directories that wait for their turn.
const PENDING_MAX: usize = 256 << 10;
/// Bytes of an entry.
const ENTRY: usize = 32;

/// Bytes of a directory read at once, at most.
const PIECE: u64 = 4096;

const LONG_NAME: u8 = 0x0f;
const LABEL: u8 = 0x08;
const DIRECTORY: u8 = 0x10;

/// Bytes that walks may still read.
pub(super) struct Budget(u64);

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    pub(super) fn is_spent(&self) -> bool {
        self.0 == 0
    }
}

/// A directory that waits: its first cluster, and its parent's (0 for the root).
type Pending = (u32, u32);

struct Walk<'a, 'b> {
    reader: Reader<'a>,
    geometry: &'a Geometry,
    table: &'b mut Table<'a>,
    seen: Bits,
    seen_count: u32,
    pending: Vec<Pending>,
    budget: &'b mut Budget,
}

/// Checks the tree of `geometry` against `table`.
pub(super) fn fits<'a>(
    reader: &Reader<'a>,
    geometry: &'a Geometry,
    table: &mut Table<'a>,
    budget: &mut Budget,
) -> Result<(), Unproven> {
    if geometry.clusters > CLUSTERS_MAX {
        return Err(inconsistent(
            geometry.width,
            "too many clusters for a single table",
        ));
    }
    let mut walk = Walk {
        reader: *reader,
        geometry,
        table,
        seen: Bits::new(geometry.end().into()),
        seen_count: 0,
        pending: Vec::new(),
        budget,
    };
    walk.root()?;
    while let Some((first, parent)) = walk.pending.pop() {
        walk.directory(first, Some(parent))?;
    }
    walk.nothing_left()
}

impl Walk<'_, '_> {
    fn broken(&self, what: &str) -> Unproven {
        inconsistent(self.geometry.width, what)
    }

    fn root(&mut self) -> Result<(), Unproven> {
        if self.geometry.width == Width::Fat32 {
            return self.directory(self.geometry.root_cluster, None);
        }
        let mut bytes = vec![0; self.geometry.root_len as usize];
        self.reader.read(&mut bytes, self.geometry.root)?;
        let entries = bytes.len() / ENTRY;
        let ended = self.entries(&bytes, 0, None)?;
        let tail = &bytes[ended.unwrap_or(entries) * ENTRY..];
        match tail.iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(self.broken("something follows the end of its root directory")),
        }
    }

    /// Reads a directory in clusters; `parent` is its parent's first cluster, `None` for the root.
    fn directory(&mut self, first: u32, parent: Option<u32>) -> Result<(), Unproven> {
        let piece = self.geometry.cluster.min(PIECE);
        let mut bytes = vec![0; piece as usize];
        let (mut cluster, mut head, mut ended) = (Some(first), parent, false);
        let own = if parent.is_some() { first } else { 0 };
        while let Some(now) = cluster {
            cluster = self.step(now)?;
            let start = self.geometry.offset(now);
            let mut pieces = (start..start + self.geometry.cluster).step_by(piece as usize);
            while let Some(place) = pieces.next().filter(|_| !ended) {
                self.spend(piece)?;
                self.reader.read(&mut bytes, place)?;
                ended = self.entries(&bytes, own, head.take())?.is_some();
            }
        }
        Ok(())
    }

    fn spend(&mut self, bytes: u64) -> Result<(), Unproven> {
        self.budget.0 = self.budget.0.saturating_sub(bytes);
        match self.budget.is_spent() {
            true => {
                Err(self
                    .broken("too many directories, or too much scattered, to confirm its metadata by them"))
            }
            false => Ok(()),
        }
    }

    /// Visits one cluster of a chain; returns the next.
    fn step(&mut self, cluster: u32) -> Result<Option<u32>, Unproven> {
        if !(2..self.geometry.end()).contains(&cluster) {
            return Err(self.broken("a chain leaves the volume"));
        }
        if self.seen.has(cluster.into()) {
            return Err(self.broken("a cluster has two owners"));
        }
        self.seen.set(cluster.into());
        self.seen_count += 1;
        let before = self.table.loaded;
        let entry = self.table.entry(cluster)?;
        self.spend(self.table.loaded - before)?;
        match entry {
            Entry::Next(next) => Ok(Some(next)),
            Entry::Last => Ok(None),
            Entry::Free | Entry::Bad => Err(self.broken("a chain runs into a free or bad cluster")),
        }
    }

    /// Reads the entries of one piece of directory `own` (its first cluster, 0 for the root); `head` is the parent where the piece
    /// must begin with `.` and `..`. Returns where the directory ended, if it did.
    fn entries(&mut self, bytes: &[u8], own: u32, head: Option<u32>) -> Result<Option<usize>, Unproven> {
        for (number, entry) in bytes.chunks_exact(ENTRY).enumerate() {
            match (number, head) {
                (0, Some(_)) => self.dot(entry, b".          ", own)?,
                (1, Some(parent)) => self.dot(entry, b"..         ", parent)?,
                _ if entry[0] == 0 => return Ok(Some(number)),
                _ if entry[0] != 0xe5 => self.entry(entry, own)?,
                _ => {}
            }
        }
        Ok(None)
    }

    fn dot(&self, entry: &[u8], name: &[u8; 11], cluster: u32) -> Result<(), Unproven> {
        let leads = self.first_cluster(entry);
        let root = cluster == 0 && self.geometry.width == Width::Fat32 && leads == self.geometry.root_cluster;
        if &entry[..11] != name || entry[11] & DIRECTORY == 0 || leads != cluster && !root {
            return Err(self.broken("a directory does not name itself and its parent"));
        }
        Ok(())
    }

    fn first_cluster(&self, entry: &[u8]) -> u32 {
        let high = match self.geometry.width {
            Width::Fat32 => u32::from(u16_at(entry, 20)) << 16,
            // Other systems keep something else there.
            Width::Fat12 | Width::Fat16 => 0,
        };
        high | u32::from(u16_at(entry, 26))
    }

    fn entry(&mut self, entry: &[u8], own: u32) -> Result<(), Unproven> {
        let attributes = entry[11];
        if attributes & 0x3f == LONG_NAME {
            return Ok(());
        }
        let (&initial, rest) = entry[..11].split_first().unwrap_or((&0, &[]));
        let readable = (initial > 0x20 || initial == 5) && rest.iter().all(|byte| *byte >= 0x20);
        if attributes & 0xc0 != 0 || !readable {
            return Err(self.broken("a directory entry does not decode"));
        }
        let (first, size) = (self.first_cluster(entry), u32_at(entry, 28));
        if attributes & LABEL != 0 {
            return Ok(());
        }
        if attributes & DIRECTORY != 0 {
            if size != 0 || self.pending.len() >= PENDING_MAX {
                return Err(self.broken("a directory has a size, or there are too many of them"));
            }
            self.pending.push((first, own));
            return Ok(());
        }
        self.file(first, size)
    }

    fn file(&mut self, first: u32, size: u32) -> Result<(), Unproven> {
        let (mut cluster, mut len) = ((first != 0).then_some(first), 0);
        while let Some(now) = cluster {
            cluster = self.step(now)?;
            len += 1;
        }
        if size != 0 && len != u64::from(size).div_ceil(self.geometry.cluster) {
            return Err(self.broken("a file's chain does not have the length of the file"));
        }
        Ok(())
    }

    /// With one table only, an entry that nobody owns may be a chain whose head a damaged byte cut off.
    fn nothing_left(&mut self) -> Result<(), Unproven> {
        if self.geometry.fats > 1 {
            return Ok(());
        }
        let mut used = 0;
        for cluster in 2..self.geometry.end() {
            used += u32::from(!matches!(self.table.entry(cluster)?, Entry::Free | Entry::Bad));
        }
        match used == self.seen_count {
            true => Ok(()),
            false => Err(self.broken("its only table has entries that no file owns")),
        }
    }
}
