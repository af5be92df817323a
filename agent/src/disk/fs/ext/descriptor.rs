//! Group descriptors: where a group's bitmaps and inode table lie, and how much of it is free.
//!
//! Owns where the descriptors lie (one table behind the superblock, or scattered with `meta_bg`), their two widths and their two
//! checksums. Keeps one block of them in memory. Leaves alone whether what they point to makes sense (`layout`).

use super::checksum::{crc16, crc32c};
use super::features::{GDT_CHECKSUM, META_BG, METADATA_CHECKSUM};
use super::metadata::{le16, le32};
use super::{Ext, Unproven};

/// `EXT4_BG_INODE_UNINIT`
const INODE_UNINIT: u16 = 0x1;
/// `EXT4_BG_BLOCK_UNINIT`
const BLOCK_UNINIT: u16 = 0x2;
/// Where `bg_checksum` lies.
const CHECKSUM: usize = 0x1E;

/// What one group says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_clusters: u32,
    pub(super) free_inodes: u32,
    /// The block bitmap was never written: only what the file system itself keeps in the group is in use.
    pub(super) blocks_uninitialised: bool,
    /// The inode bitmap was never written: no inode is in use.
    pub(super) inodes_uninitialised: bool,
    pub(super) block_bitmap_checksum: u32,
    pub(super) inode_bitmap_checksum: u32,
}

/// All group descriptors of a file system, read block by block.
pub(super) struct Descriptors<'a> {
    ext: &'a Ext<'a>,
    block: Vec<u8>,
    /// Which block of descriptors is in `block`.
    loaded: Option<u32>,
}

impl<'a> Descriptors<'a> {
    pub(super) fn new(ext: &'a Ext<'a>) -> Self {
        Self {
            ext,
            block: vec![0; ext.superblock.block_size as usize],
            loaded: None,
        }
    }

    /// The descriptor of `group`, its checksum verified where it has one.
    pub(super) fn read(&mut self, group: u32) -> Result<Descriptor, Unproven> {
        let superblock = &self.ext.superblock;
        let index = group / superblock.descriptors_per_block();
        if self.loaded != Some(index) {
            self.loaded = None;
            self.ext.read_block(location(self.ext, index), &mut self.block)?;
            self.loaded = Some(index);
        }
        let size = usize::from(superblock.descriptor_size);
        let at = (group % superblock.descriptors_per_block()) as usize * size;
        let raw = &self.block[at..at + size];
        self.check_checksum(group, raw)?;
        Ok(decode(raw, superblock.descriptors_have_checksums()))
    }

    fn check_checksum(&self, group: u32, raw: &[u8]) -> Result<(), Unproven> {
        let superblock = &self.ext.superblock;
        let (before, after) = (&raw[..CHECKSUM], &raw[CHECKSUM + 2..]);
        let number = group.to_le_bytes();
        let expected = if superblock.features.has(METADATA_CHECKSUM) {
            let sum = crc32c(crc32c(superblock.checksum_seed, &number), before);
            (crc32c(crc32c(sum, &[0, 0]), after) & 0xFFFF) as u16
        } else if superblock.features.has(GDT_CHECKSUM) {
            let sum = crc16(crc16(u16::MAX, &superblock.uuid), &number);
            crc16(crc16(sum, before), after)
        } else {
            return Ok(());
        };
        if expected == le16(raw, CHECKSUM) {
            Ok(())
        } else {
            Err(superblock.kind.checksum(format!("descriptor of group {group}")))
        }
    }
}

/// The block that holds block `index` of the descriptors.
pub(super) fn location(ext: &Ext<'_>, index: u32) -> u64 {
    let superblock = &ext.superblock;
    if !superblock.features.has(META_BG) || index < superblock.first_meta_bg {
        return superblock.super_block(0) + 1 + u64::from(index);
    }
    // Such a group number is at most that of the group whose descriptor is wanted.
    let group = index * superblock.descriptors_per_block();
    match superblock.has_super(group) {
        true => superblock.super_block(group) + 1,
        false => superblock.group_blocks(group).start,
    }
}

fn decode(raw: &[u8], flags_count: bool) -> Descriptor {
    let wide = raw.len() >= 64;
    let pair32 = |low: usize, high: usize| {
        let high = if wide { u64::from(le32(raw, high)) } else { 0 };
        u64::from(le32(raw, low)) | high << 32
    };
    let pair16 = |low: usize, high: usize| {
        let high = if wide { u32::from(le16(raw, high)) } else { 0 };
        u32::from(le16(raw, low)) | high << 16
    };
    let flags = if flags_count { le16(raw, 0x12) } else { 0 };
    Descriptor {
        block_bitmap: pair32(0x0, 0x20),
        inode_bitmap: pair32(0x4, 0x24),
        inode_table: pair32(0x8, 0x28),
        free_clusters: pair16(0xC, 0x2C),
        free_inodes: pair16(0xE, 0x2E),
        blocks_uninitialised: flags & BLOCK_UNINIT != 0,
        inodes_uninitialised: flags & INODE_UNINIT != 0,
        block_bitmap_checksum: pair16(0x18, 0x38),
        inode_bitmap_checksum: pair16(0x1A, 0x3A),
    }
}
