//! Where the blocks of the journal's file lie on the volume.
//!
//! Owns the way from the inode to a table of runs, for extent trees and indirect blocks. Leaves alone what the blocks hold. The
//! place of a journal never changes while it is mounted, so what is at home is right. Promises a bounded number of nodes
//! read and runs kept, whatever the tree claims.

use super::super::inode::{Inode, Map};
use super::super::metadata::{le16, le32};
use super::super::{Ext, Unproven};

/// `EXT4_EXT_MAGIC`
const NODE_MAGIC: u16 = 0xF30A;
/// Bytes of a node's header and of each of its entries.
const ENTRY: usize = 12;
const DEPTH_MAX: u16 = 5;
/// Longer ones are allocated, but not written; no journal has such.
const EXTENT_LEN_MAX: u16 = 32768;
/// Runs kept, 24 bytes each.
const RUNS_MAX: usize = 1 << 16;
/// Nodes of the tree that are read: enough for a journal of 40 GiB in indirect blocks.
const NODES_MAX: u32 = 1 << 14;
/// Blocks of a journal: the most that mke2fs makes.
const BLOCKS_MAX: u64 = 10_240_000;

/// Blocks `[first, first + len)` of the file lie from block `at` of the volume on.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    at: u64,
    len: u64,
}

/// The blocks of a file without holes.
pub(super) struct Places {
    runs: Vec<Run>,
}

impl Places {
    /// Reads the map of `inode`.
    pub(super) fn read(ext: &Ext<'_>, inode: &Inode) -> Result<Self, Unproven> {
        let mut reader = Reader {
            ext,
            runs: Vec::new(),
            nodes: 0,
        };
        match inode.map {
            Map::Extents => reader.node(&inode.root, le16(&inode.root, 6).min(DEPTH_MAX + 1))?,
            Map::Indirect => reader.indirect(&inode.root)?,
            Map::Reserved | Map::None => return Err(reader.wrong("it has no blocks")),
        }
        Ok(Self { runs: reader.runs })
    }

    /// Blocks of the file, from its first without a hole.
    pub(super) fn blocks(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.first + run.len)
    }

    /// The place of `block` of the file, and how many blocks follow there without a break, itself among them.
    pub(super) fn find(&self, block: u32) -> Option<(u64, u64)> {
        let block = u64::from(block);
        let behind = self.runs.partition_point(|run| run.first <= block);
        let run = self.runs.get(behind.checked_sub(1)?)?;
        let skip = block - run.first;
        (skip < run.len).then(|| (run.at + skip, run.len - skip))
    }
}

struct Reader<'a> {
    ext: &'a Ext<'a>,
    runs: Vec<Run>,
    nodes: u32,
}

impl Reader<'_> {
    fn wrong(&self, what: &str) -> Unproven {
        self.ext.superblock.kind.inconsistent(format!("journal: {what}"))
    }

    /// Appends the run; it must follow the one before without a hole.
    fn push(&mut self, first: u64, at: u64, len: u64) -> Result<(), Unproven> {
        let end = self.runs.last().map_or(0, |run| run.first + run.len);
        if first != end {
            return Err(self.wrong("its file has a hole"));
        }
        let inside = at
            .checked_add(len)
            .is_some_and(|end| end <= self.ext.superblock.blocks);
        if !inside || at == 0 || first + len > BLOCKS_MAX {
            return Err(self.wrong("its blocks lie beyond the end"));
        }
        if let Some(last) = self.runs.last_mut().filter(|last| last.at + last.len == at) {
            last.len += len;
            return Ok(());
        }
        if self.runs.len() == RUNS_MAX {
            return Err(self.wrong("it lies in too many pieces"));
        }
        self.runs.push(Run { first, at, len });
        Ok(())
    }

    fn load(&mut self, block: u64) -> Result<Vec<u8>, Unproven> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(self.wrong("its map has too many blocks"));
        }
        let mut raw = vec![0; self.ext.superblock.block_size as usize];
        self.ext.read_block(block, &mut raw)?;
        Ok(raw)
    }

    /// Goes through a node of an extent tree, `depth` levels above its leaves.
    fn node(&mut self, raw: &[u8], depth: u16) -> Result<(), Unproven> {
        let (entries, room) = (usize::from(le16(raw, 2)), usize::from(le16(raw, 4)));
        let sane = le16(raw, 0) == NODE_MAGIC && le16(raw, 6) == depth && depth <= DEPTH_MAX;
        if !sane || entries > room || (room + 1) * ENTRY > raw.len() {
            return Err(self.wrong("a bad node in its extent tree"));
        }
        for entry in raw[ENTRY..(entries + 1) * ENTRY].chunks_exact(ENTRY) {
            if depth == 0 {
                let len = le16(entry, 4);
                if len == 0 || len > EXTENT_LEN_MAX {
                    return Err(self.wrong("an empty or unwritten extent"));
                }
                let at = u64::from(le32(entry, 8)) | u64::from(le16(entry, 6)) << 32;
                self.push(le32(entry, 0).into(), at, len.into())?;
            } else {
                let child = self.load(u64::from(le32(entry, 4)) | u64::from(le16(entry, 8)) << 32)?;
                self.node(&child, depth - 1)?;
            }
        }
        Ok(())
    }

    /// Twelve direct blocks, then three levels of indirection; the first missing pointer ends the file.
    fn indirect(&mut self, root: &[u8]) -> Result<(), Unproven> {
        let mut going = self.pointers(&root[..48], 0)?;
        for depth in 1..=3 {
            let at = 44 + 4 * usize::from(depth);
            going = going && self.pointers(&root[at..at + 4], depth)?;
        }
        Ok(())
    }

    /// Whether the file may go on behind these pointers.
    fn pointers(&mut self, raw: &[u8], depth: u16) -> Result<bool, Unproven> {
        for pointer in raw.chunks_exact(4) {
            let block = u64::from(le32(pointer, 0));
            if block == 0 {
                return Ok(false);
            }
            if depth == 0 {
                let first = self.runs.last().map_or(0, |run| run.first + run.len);
                self.push(first, block, 1)?;
            } else {
                let child = self.load(block)?;
                if !self.pointers(&child, depth - 1)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
