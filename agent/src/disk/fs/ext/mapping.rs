//! From an inode to the blocks it refers to: extent trees and indirect blocks.
//!
//! Owns both kinds of maps, read node by node; in memory is one block for each level. Leaves alone what the blocks hold and whether
//! they may be referred to. Promises to go no deeper than the format allows; the caller bounds the breadth by refusing.

use std::ops::Range;

use super::inode::{Inode, Map};
use super::metadata::{le16, le32};
use super::{Ext, Unproven};

/// `EXT4_EXT_MAGIC`
const NODE_MAGIC: u16 = 0xF30A;
/// Most levels below the root of an extent tree.
const DEPTH_MAX: u16 = 5;
/// Bytes of a node's header and of each of its entries.
const ENTRY: usize = 12;
/// Extents longer than this are written as this much more than their length: allocated, but not written.
const EXTENT_LEN_MAX: u16 = 32768;

/// What is done with each run of blocks that an inode refers to.
pub(super) type Refer<'r> = dyn FnMut(Range<u64>) -> Result<(), Unproven> + 'r;

/// Reads maps; keeps the buffers.
pub(super) struct Maps<'a> {
    ext: &'a Ext<'a>,
    levels: [Vec<u8>; DEPTH_MAX as usize],
}

impl<'a> Maps<'a> {
    pub(super) fn new(ext: &'a Ext<'a>) -> Self {
        Self {
            ext,
            levels: Default::default(),
        }
    }

    /// Gives every block that `inode` refers to, those of the map itself included; of the room kept for group descriptors only
    /// the map.
    pub(super) fn visit(&mut self, inode: &Inode, refer: &mut Refer<'_>) -> Result<(), Unproven> {
        match inode.map {
            Map::None => Ok(()),
            Map::Reserved => self.pointers(&inode.root, 0, refer),
            Map::Extents => {
                let depth = le16(&inode.root, 6);
                if depth > DEPTH_MAX {
                    return Err(self.wrong(inode, "an extent tree deeper than possible"));
                }
                self.node(inode, &inode.root, depth, refer)
            }
            Map::Indirect => {
                self.pointers(&inode.root[..48], 0, refer)?;
                (1..=3).try_for_each(|depth| {
                    let at = 44 + usize::from(depth) * 4;
                    self.pointers(&inode.root[at..at + 4], depth, refer)
                })
            }
        }
    }

    /// Goes through the node `raw` of an extent tree, `depth` levels above its leaves.
    fn node(&mut self, inode: &Inode, raw: &[u8], depth: u16, refer: &mut Refer<'_>) -> Result<(), Unproven> {
        let (entries, room) = (usize::from(le16(raw, 2)), usize::from(le16(raw, 4)));
        if le16(raw, 0) != NODE_MAGIC
            || le16(raw, 6) != depth
            || entries > room
            || (room + 1) * ENTRY > raw.len()
        {
            return Err(self.wrong(inode, "a bad node in its extent tree"));
        }
        for entry in raw[ENTRY..(entries + 1) * ENTRY].chunks_exact(ENTRY) {
            if depth == 0 {
                refer(self.extent(inode, entry)?)?;
            } else {
                let child = u64::from(le32(entry, 4)) | u64::from(le16(entry, 8)) << 32;
                self.descend(depth, child, refer, |maps, raw, refer| {
                    maps.node(inode, raw, depth - 1, refer)
                })?;
            }
        }
        Ok(())
    }

    /// The blocks of a leaf's entry.
    fn extent(&self, inode: &Inode, entry: &[u8]) -> Result<Range<u64>, Unproven> {
        let len = match le16(entry, 4) {
            0 => return Err(self.wrong(inode, "an empty extent")),
            len if len > EXTENT_LEN_MAX => len - EXTENT_LEN_MAX,
            len => len,
        };
        let start = u64::from(le32(entry, 8)) | u64::from(le16(entry, 6)) << 32;
        Ok(start..start + u64::from(len))
    }

    /// Goes through block numbers, 0 being a hole, of blocks that are `depth` levels above the content.
    fn pointers(&mut self, raw: &[u8], depth: u16, refer: &mut Refer<'_>) -> Result<(), Unproven> {
        let blocks = raw.chunks_exact(4).map(|pointer| u64::from(le32(pointer, 0)));
        if depth == 0 {
            return refer_merged(blocks, refer);
        }
        for block in blocks.filter(|block| *block != 0) {
            self.descend(depth, block, refer, |maps, raw, refer| {
                maps.pointers(raw, depth - 1, refer)
            })?;
        }
        Ok(())
    }

    /// Refers to `block` of the map, reads it, and goes on in it.
    fn descend(
        &mut self,
        depth: u16,
        block: u64,
        refer: &mut Refer<'_>,
        go_on: impl FnOnce(&mut Self, &[u8], &mut Refer<'_>) -> Result<(), Unproven>,
    ) -> Result<(), Unproven> {
        refer(block..block.saturating_add(1))?;
        // Each depth has a buffer of its own, which nothing deeper takes.
        let level = usize::from(depth - 1);
        let mut raw = std::mem::take(&mut self.levels[level]);
        raw.resize(self.ext.superblock.block_size as usize, 0);
        self.ext.read_block(block, &mut raw)?;
        let result = go_on(self, &raw, refer);
        self.levels[level] = raw;
        result
    }

    /// The first block of the file's content.
    pub(super) fn first_block(&mut self, inode: &Inode) -> Result<u64, Unproven> {
        let missing = || self.wrong(inode, "no first block");
        match inode.map {
            Map::None | Map::Reserved => Err(missing()),
            Map::Indirect => match le32(&inode.root, 0) {
                0 => Err(missing()),
                block => Ok(block.into()),
            },
            Map::Extents => self.leftmost(inode),
        }
    }

    fn leftmost(&self, inode: &Inode) -> Result<u64, Unproven> {
        let mut raw = inode.root.to_vec();
        for _ in 0..=DEPTH_MAX {
            if le16(&raw, 0) != NODE_MAGIC || le16(&raw, 2) == 0 || le32(&raw, ENTRY) != 0 {
                break;
            }
            let entry = &raw[ENTRY..2 * ENTRY];
            if le16(&raw, 6) == 0 {
                return Ok(self.extent(inode, entry)?.start);
            }
            let child = u64::from(le32(entry, 4)) | u64::from(le16(entry, 8)) << 32;
            raw.resize(self.ext.superblock.block_size as usize, 0);
            self.ext.read_block(child, &mut raw)?;
        }
        Err(self.wrong(inode, "no first block"))
    }

    fn wrong(&self, inode: &Inode, what: &str) -> Unproven {
        let number = inode.number;
        self.ext
            .superblock
            .kind
            .inconsistent(format!("inode {number} has {what}"))
    }
}

/// Refers to `blocks`, consecutive ones at once.
fn refer_merged(blocks: impl Iterator<Item = u64>, refer: &mut Refer<'_>) -> Result<(), Unproven> {
    let mut run = 0..0;
    for block in blocks {
        if block == run.end && block != 0 {
            run.end += 1;
            continue;
        }
        if !run.is_empty() {
            refer(run)?;
        }
        run = block..block + u64::from(block != 0);
    }
    if run.is_empty() { Ok(()) } else { refer(run) }
}
