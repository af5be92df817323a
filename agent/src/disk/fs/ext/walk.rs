//! The second witness: every block that a file refers to is marked as in use.
//!
//! Owns the walk over all inodes in use, for file systems whose block bitmaps carry no full checksums. Memory is bounded: one
//! window of an inode table, one block for each level of a map, and a fixed cache of block bitmaps. So is time: no more blocks
//! may be referred to than are in use, since none belongs to two files.

use std::ops::Range;

use super::bitmap::{BlockBitmaps, check_bitmap_checksum};
use super::descriptor::Descriptor;
use super::inode::Inode;
use super::mapping::Maps;
use super::{Ext, Unproven, bits};

/// Bytes of block bitmaps kept in memory.
const CACHE_BYTES: usize = 2 << 20;
/// Bytes of an inode table read at once.
const WINDOW_BYTES: usize = 64 << 10;

/// Asks `bitmaps` for each block that an inode in use refers to; `used` blocks are in use.
pub(super) fn check<'a>(ext: &'a Ext<'a>, bitmaps: &mut BlockBitmaps<'a>, used: u64) -> Result<(), Unproven> {
    let mut maps = Maps::new(ext);
    let mut ledger = Ledger::new(ext, bitmaps, used);
    let mut inode_bitmap = vec![0; ext.superblock.block_size as usize];
    for group in 0..ext.superblock.groups {
        let descriptor = ledger.bitmaps.descriptor(group)?;
        load_inode_bitmap(ext, group, &descriptor, &mut inode_bitmap)?;
        let mut table = TableWindow::new(ext, &descriptor);
        let count = ext.superblock.inodes_per_group;
        let mut index = bits::find(&inode_bitmap, 0..count, true);
        while index < count {
            let inode = table.inode(group, index)?;
            ledger.check_attributes(&inode)?;
            maps.visit(&inode, &mut |run| ledger.refer(inode.number, run))?;
            index = bits::find(&inode_bitmap, index + 1..count, true);
        }
    }
    Ok(())
}

/// Puts the inode bitmap of `group` into `bitmap`; it has to fit the group's own count.
fn load_inode_bitmap(
    ext: &Ext<'_>,
    group: u32,
    descriptor: &Descriptor,
    bitmap: &mut [u8],
) -> Result<(), Unproven> {
    let superblock = &ext.superblock;
    let count = superblock.inodes_per_group;
    if descriptor.inodes_uninitialised {
        bitmap.fill(0);
    } else {
        ext.read_block(descriptor.inode_bitmap, bitmap)?;
        let covered = &bitmap[..count.div_ceil(8) as usize];
        if !check_bitmap_checksum(ext, covered, descriptor.inode_bitmap_checksum) {
            let what = format!("inode bitmap of group {group}");
            return Err(superblock.kind.checksum(what));
        }
    }
    let (said, free) = (descriptor.free_inodes, bits::zeros(bitmap, count));
    if said == free {
        return Ok(());
    }
    let what = format!("group {group} says {said} free inodes, its inode bitmap {free}");
    Err(superblock.kind.inconsistent(what))
}

/// A piece of one group's inode table.
struct TableWindow<'a> {
    ext: &'a Ext<'a>,
    /// First block of the table.
    table: u64,
    /// The blocks of the table that are in `raw`, counted from its first.
    blocks: Range<u64>,
    raw: Vec<u8>,
}

impl<'a> TableWindow<'a> {
    fn new(ext: &'a Ext<'a>, descriptor: &Descriptor) -> Self {
        Self {
            ext,
            table: descriptor.inode_table,
            blocks: 0..0,
            raw: Vec::new(),
        }
    }

    /// Inode `index` of `group`.
    fn inode(&mut self, group: u32, index: u32) -> Result<Inode, Unproven> {
        let superblock = &self.ext.superblock;
        let size = u64::from(superblock.block_size);
        let offset = u64::from(index) * u64::from(superblock.inode_size);
        if !self.blocks.contains(&(offset / size)) {
            self.load(offset / size)?;
        }
        let at = (offset - self.blocks.start * size) as usize;
        let number = group * superblock.inodes_per_group + index + 1;
        Inode::parse(superblock, number, &self.raw[at..])
    }

    fn load(&mut self, block: u64) -> Result<(), Unproven> {
        let superblock = &self.ext.superblock;
        let size = superblock.block_size as usize;
        let count = (WINDOW_BYTES / size) as u64;
        let end = (block + count).min(superblock.inode_table_blocks.into());
        self.blocks = 0..0;
        self.raw.resize((end - block) as usize * size, 0);
        self.ext.read_block(self.table + block, &mut self.raw)?;
        self.blocks = block..end;
        Ok(())
    }
}

/// What is in use, and how much of it has not been referred to yet.
struct Ledger<'l, 'a> {
    ext: &'a Ext<'a>,
    bitmaps: &'l mut BlockBitmaps<'a>,
    /// Bitmaps by group number modulo the number of places.
    cache: Vec<Option<(u32, Vec<u8>)>>,
    left: u64,
}

impl<'l, 'a> Ledger<'l, 'a> {
    fn new(ext: &'a Ext<'a>, bitmaps: &'l mut BlockBitmaps<'a>, used: u64) -> Self {
        let places = CACHE_BYTES / ext.superblock.block_size as usize;
        Self {
            ext,
            bitmaps,
            cache: vec![None; places],
            left: used,
        }
    }

    /// Extended attributes may be shared by many inodes: they are looked up, not counted.
    fn check_attributes(&mut self, inode: &Inode) -> Result<(), Unproven> {
        match inode.attributes {
            0 => Ok(()),
            block => self.check_used(inode.number, block..block + 1),
        }
    }

    fn refer(&mut self, inode: u32, run: Range<u64>) -> Result<(), Unproven> {
        match self.left.checked_sub(run.end - run.start) {
            Some(left) => self.left = left,
            None => {
                let what = "files refer to more blocks than are in use";
                return Err(self.ext.superblock.kind.inconsistent(what));
            }
        }
        self.check_used(inode, run)
    }

    fn check_used(&mut self, inode: u32, mut run: Range<u64>) -> Result<(), Unproven> {
        let superblock = &self.ext.superblock;
        while run.start < run.end {
            let Some((group, first)) = superblock.cluster_of(run.start) else {
                let what = format!("inode {inode} refers to block {}, beyond the end", run.start);
                return Err(superblock.kind.inconsistent(what));
            };
            let home = superblock.group_blocks(group);
            let end = run.end.min(home.end);
            // At most the number of clusters of the group.
            let last = ((end - 1 - home.start) / u64::from(superblock.cluster_blocks)) as u32;
            let bitmap = self.bitmap(group)?;
            if bits::find(bitmap, first..last + 1, false) != last + 1 {
                let what = format!("inode {inode} refers to free blocks at {}", run.start);
                return Err(superblock.kind.inconsistent(what));
            }
            run.start = end;
        }
        Ok(())
    }

    fn bitmap(&mut self, group: u32) -> Result<&[u8], Unproven> {
        let place = group as usize % self.cache.len();
        let slot = &mut self.cache[place];
        let hit = slot.as_ref().is_some_and(|(held, _)| *held == group);
        if !hit {
            let mut bitmap = slot.take().map_or_else(Vec::new, |(_, bitmap)| bitmap);
            bitmap.resize(self.ext.superblock.block_size as usize, 0);
            self.bitmaps.load(group, &mut bitmap)?;
            *slot = Some((group, bitmap));
        }
        Ok(slot.as_ref().map_or(&[], |(_, bitmap)| bitmap))
    }
}
