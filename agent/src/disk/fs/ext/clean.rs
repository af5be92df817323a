//! Whether the file system was cleanly unmounted: only then do its bitmaps say all there is to say.
//!
//! Owns every sign of the contrary: the state bits, a journal to replay (told twice, by a flag and by the journal itself), recorded
//! errors, an orphan file in use, another host's claim (multiple mount protection), an old snapshot. An orphan list alone is no such
//! sign: blocks of orphans are still marked as in use, and replaying what freed them is the journal's business.

use super::checksum::crc32c;
use super::descriptor::Descriptors;
use super::features::{HAS_JOURNAL, METADATA_CHECKSUM, MMP, NEEDS_RECOVERY, ORPHAN_PRESENT};
use super::inode::Inode;
use super::mapping::Maps;
use super::metadata::le32;
use super::{Ext, Unproven};

/// `EXT4_VALID_FS`; all other bits of `s_state` mean errors or an interrupted recovery.
const STATE_CLEAN: u16 = 1;
/// `s_flags` of a snapshot (next3), or of a file system repaired around one.
const SNAPSHOT_FLAGS: u32 = 0x70;
/// `EXT4_MMP_MAGIC`
const MMP_MAGIC: u32 = 0x004D_4D50;
/// `EXT4_MMP_SEQ_CLEAN`
const MMP_CLEAN: u32 = 0xFF4D_4D50;
/// `JBD2_MAGIC_NUMBER`
const JOURNAL_MAGIC: u32 = 0xC03B_3998;
/// Block types of the journal's superblock, version 1 and 2.
const JOURNAL_SUPERBLOCKS: [u32; 2] = [3, 4];
/// `JBD2_FEATURE_INCOMPAT_CSUM_V2` and `_V3`
const JOURNAL_CHECKSUMS: u32 = 0x8 | 0x10;

/// An error where anything says that the file system is in use, has a journal to replay, or needs a check.
pub(super) fn check(ext: &Ext<'_>) -> Result<(), Unproven> {
    let superblock = &ext.superblock;
    let signs = [
        (
            superblock.features.has(NEEDS_RECOVERY),
            "its journal has to be replayed",
        ),
        (
            superblock.state & STATE_CLEAN == 0,
            "it is mounted or was cut off",
        ),
        (superblock.state & !STATE_CLEAN != 0, "it needs a check"),
        (superblock.error_count != 0, "errors were recorded"),
        (
            superblock.features.has(ORPHAN_PRESENT),
            "its orphan file is in use",
        ),
    ];
    if let Some((_, what)) = signs.iter().find(|(found, _)| *found) {
        return Err(superblock.kind.not_clean(*what));
    }
    if superblock.flags & SNAPSHOT_FLAGS != 0 {
        return Err(superblock.kind.unknown("snapshots"));
    }
    if superblock.features.has(HAS_JOURNAL) {
        check_journal(ext)?;
    }
    if superblock.features.has(MMP) {
        check_multiple_mount(ext)?;
    }
    Ok(())
}

fn check_journal(ext: &Ext<'_>) -> Result<(), Unproven> {
    let superblock = &ext.superblock;
    match (superblock.journal_inode, superblock.journal_device) {
        (0, 0) => Err(superblock.kind.inconsistent("a journal that is nowhere")),
        // The flag is all there is to go by; without a checksum that is too little.
        (0, _) if superblock.features.has(METADATA_CHECKSUM) => Ok(()),
        (0, _) => Err(superblock
            .kind
            .not_clean("its journal is on another device and cannot be looked at")),
        (inode, _) => check_journal_inode(ext, inode),
    }
}

fn check_journal_inode(ext: &Ext<'_>, number: u32) -> Result<(), Unproven> {
    let superblock = &ext.superblock;
    let inode = Inode::read(ext, &mut Descriptors::new(ext), number)?;
    if !inode.is_regular {
        return Err(superblock.kind.inconsistent("the journal is not a file"));
    }
    let mut block = vec![0; superblock.block_size as usize];
    ext.read_block(Maps::new(ext).first_block(&inode)?, &mut block)?;
    let be32 = |at: usize| le32(&block, at).swap_bytes();
    if be32(0x0) != JOURNAL_MAGIC || !JOURNAL_SUPERBLOCKS.contains(&be32(0x4)) {
        return Err(superblock.kind.inconsistent("the journal has no superblock"));
    }
    if be32(0xC) != superblock.block_size {
        return Err(superblock.kind.inconsistent("the journal has another block size"));
    }
    if be32(0x28) & JOURNAL_CHECKSUMS != 0 && be32(0x4) == JOURNAL_SUPERBLOCKS[1] {
        let sum = crc32c(crc32c(u32::MAX, &block[..0xFC]), &[0; 4]);
        if crc32c(sum, &block[0x100..0x400]) != be32(0xFC) {
            return Err(superblock.kind.checksum("superblock of the journal"));
        }
    }
    if be32(0x1C) != 0 {
        return Err(superblock.kind.not_clean("its journal is not empty"));
    }
    if be32(0x20) != 0 {
        return Err(superblock.kind.not_clean("its journal was aborted"));
    }
    Ok(())
}

fn check_multiple_mount(ext: &Ext<'_>) -> Result<(), Unproven> {
    let superblock = &ext.superblock;
    let mut block = vec![0; superblock.block_size as usize];
    ext.read_block(superblock.mmp_block, &mut block)?;
    if le32(&block, 0) != MMP_MAGIC {
        let what = "the block of multiple mount protection has no signature";
        return Err(superblock.kind.inconsistent(what));
    }
    if superblock.features.has(METADATA_CHECKSUM)
        && crc32c(superblock.checksum_seed, &block[..0x3FC]) != le32(&block, 0x3FC)
    {
        return Err(superblock.kind.checksum("multiple mount protection"));
    }
    match le32(&block, 4) {
        MMP_CLEAN => Ok(()),
        _ => Err(superblock
            .kind
            .not_clean("multiple mount protection says it is in use")),
    }
}
