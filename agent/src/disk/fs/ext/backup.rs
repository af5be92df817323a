//! The superblock's copies: witnesses for its geometry.
//!
//! Owns the comparison. Only numbers that are written to the copies by everything that may change them count: neither the kernel nor
//! e2fsprogs refreshes the rest. Copies beyond the end of the volume are not looked at, so that a truncated image is told as
//! such, while a superblock that merely claims too much size is not.

use super::metadata::{Metadata, le16, le32};
use super::superblock::{MAGIC, SUPERBLOCK_LEN, Superblock};
use crate::disk::fs::Unproven;

/// An error where a copy of the superblock is missing or tells of another geometry.
pub(super) fn check(superblock: &Superblock, metadata: &Metadata<'_>) -> Result<(), Unproven> {
    for group in superblock.nearest_copies() {
        let offset = superblock.super_block(group) * u64::from(superblock.block_size);
        if offset + SUPERBLOCK_LEN as u64 > metadata.size() {
            continue;
        }
        let mut raw = [0; SUPERBLOCK_LEN];
        metadata.read(superblock.kind, offset, &mut raw)?;
        if !agrees(superblock, &raw) {
            let what = format!("the superblock and its copy in group {group} disagree");
            return Err(superblock.kind.inconsistent(what));
        }
    }
    Ok(())
}

fn agrees(superblock: &Superblock, raw: &[u8; SUPERBLOCK_LEN]) -> bool {
    let cluster_size = u64::from(superblock.block_size) * u64::from(superblock.cluster_blocks);
    // The high half counts only where the primary says so, and is zero in practice where it does not.
    let blocks = u64::from(le32(raw, 0x4)) | u64::from(le32(raw, 0x150)) << 32;
    le16(raw, 0x38) == MAGIC
        && 1024u64.checked_shl(le32(raw, 0x18)) == Some(superblock.block_size.into())
        && 1024u64.checked_shl(le32(raw, 0x1C)) == Some(cluster_size)
        && blocks == superblock.blocks
        && u64::from(le32(raw, 0x14)) == superblock.first_data_block
        && le32(raw, 0x20) == superblock.blocks_per_group
        && le32(raw, 0x24) == superblock.clusters_per_group
        && le32(raw, 0x28) == superblock.inodes_per_group
}
