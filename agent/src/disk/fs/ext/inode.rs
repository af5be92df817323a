//! Inodes: what kind of file, and where its map of blocks begins.
//!
//! Owns the few fields that tell whether `i_block` holds a map, and finding an inode in its table. Leaves the map to `mapping`.

use super::descriptor::Descriptors;
use super::features::{RESIZE_INODE, SIXTY_FOUR_BIT};
use super::metadata::{le16, le32};
use super::superblock::Superblock;
use super::{Ext, Unproven};

/// `EXT4_EXTENTS_FL`
const EXTENTS: u32 = 0x8_0000;
/// `EXT4_INLINE_DATA_FL`
const INLINE_DATA: u32 = 0x1000_0000;
/// `EXT4_RESIZE_INO`
const RESIZE_NUMBER: u32 = 7;
/// Bytes of `i_block`.
pub(super) const MAP_LEN: usize = 60;

/// What `i_block` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Map {
    /// The root of an extent tree.
    Extents,
    /// Twelve direct blocks, and one each of three levels of indirection.
    Indirect,
    /// A block that lists the room kept for group descriptors. `layout` knows that room and sees to it; the list itself is not
    /// to be trusted: with clusters of 1 KiB blocks mke2fs lists one block too many.
    Reserved,
    /// No block numbers: a device number, the target of a short link, or the content itself.
    None,
}

/// One inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inode {
    pub(super) number: u32,
    pub(super) is_regular: bool,
    pub(super) map: Map,
    pub(super) root: [u8; MAP_LEN],
    /// The block of extended attributes; 0 where there is none.
    pub(super) attributes: u64,
}

impl Inode {
    /// Reads inode `number` from its table.
    pub(super) fn read(
        ext: &Ext<'_>,
        descriptors: &mut Descriptors<'_>,
        number: u32,
    ) -> Result<Self, Unproven> {
        let superblock = &ext.superblock;
        if number == 0 || number > superblock.inodes {
            let what = format!("inode {number} does not exist");
            return Err(superblock.kind.inconsistent(what));
        }
        let (group, index) = (
            (number - 1) / superblock.inodes_per_group,
            (number - 1) % superblock.inodes_per_group,
        );
        let offset = u64::from(index) * u64::from(superblock.inode_size);
        let size = u64::from(superblock.block_size);
        let table = descriptors.read(group)?.inode_table;
        let mut block = vec![0; superblock.block_size as usize];
        ext.read_block(table.saturating_add(offset / size), &mut block)?;
        let at = (offset % size) as usize;
        Self::parse(superblock, number, &block[at..])
    }

    /// Takes in the inode at the front of `raw`, which holds at least 128 bytes.
    pub(super) fn parse(superblock: &Superblock, number: u32, raw: &[u8]) -> Result<Self, Unproven> {
        let mut root = [0; MAP_LEN];
        root.copy_from_slice(&raw[0x28..0x28 + MAP_LEN]);
        let high = match superblock.features.has(SIXTY_FOUR_BIT) {
            true => u64::from(le16(raw, 0x76)) << 32,
            false => 0,
        };
        let flags = le32(raw, 0x20);
        let tree = match flags & EXTENTS {
            0 if number == RESIZE_NUMBER && superblock.features.has(RESIZE_INODE) => Map::Reserved,
            0 => Map::Indirect,
            _ => Map::Extents,
        };
        let map = match le16(raw, 0) & 0xF000 {
            _ if flags & INLINE_DATA != 0 => Map::None,
            // The inode of bad blocks has no type.
            0x8000 | 0x4000 | 0 => tree,
            // A link whose target fits in the map's place is kept there.
            0xA000 if flags & EXTENTS == 0 && le32(raw, 0x4) < MAP_LEN as u32 => Map::None,
            0xA000 => tree,
            0x1000 | 0x2000 | 0x6000 | 0xC000 => Map::None,
            other => {
                let what = format!("inode {number} has the unknown type {other:#x}");
                return Err(superblock.kind.inconsistent(what));
            }
        };
        Ok(Self {
            number,
            is_regular: le16(raw, 0) & 0xF000 == 0x8000,
            map,
            root,
            attributes: u64::from(le32(raw, 0x68)) | high,
        })
    }
}
