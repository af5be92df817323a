//! The superblock: everything that is computed from it once.
//!
//! Owns its parsing, its checksum, and the sanity of every number that later code divides, multiplies or indexes by. Leaves alone
//! whether the file system is clean (`clean`) and whether its copies agree (`backup`). Promises that a `Superblock` that exists
//! has a sane geometry: no shift, product or group number computed from it overflows. Source: the kernel's
//! Documentation/filesystems/ext4 (super_block), whose names and offsets are used.

use std::ops::Range;

use super::checksum::crc32c;
use super::features::{
    BIGALLOC, CHECKSUM_SEED, Features, GDT_CHECKSUM, JOURNAL_DEVICE, META_BG, METADATA_CHECKSUM,
    SIXTY_FOUR_BIT, SPARSE_SUPER, SPARSE_SUPER2,
};
use super::metadata::{Kind, Metadata, le16, le32, le64};
use crate::disk::fs::Unproven;

/// Where the superblock lies, in bytes from the volume's start.
pub(super) const SUPERBLOCK_OFFSET: u64 = 1024;
/// Its length.
pub(super) const SUPERBLOCK_LEN: usize = 1024;
/// `s_magic`, at offset 0x38.
pub(super) const MAGIC: u16 = 0xEF53;

/// A superblock whose geometry is sane.
pub(super) struct Superblock {
    pub(super) kind: Kind,
    pub(super) features: Features,
    pub(super) label: String,
    pub(super) uuid: [u8; 16],
    /// What every CRC-32C but the superblock's own begins with.
    pub(super) checksum_seed: u32,

    /// Bytes of a block: 1 KiB to 64 KiB.
    pub(super) block_size: u32,
    /// Blocks of a cluster, the unit a bit of the block bitmap stands for: 1 without `bigalloc`.
    pub(super) cluster_blocks: u32,
    pub(super) blocks: u64,
    pub(super) free_blocks: u64,
    /// First block of group 0.
    pub(super) first_data_block: u64,
    pub(super) groups: u32,
    pub(super) blocks_per_group: u32,
    pub(super) clusters_per_group: u32,

    pub(super) inodes: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_size: u16,
    /// Blocks of one group's inode table.
    pub(super) inode_table_blocks: u32,

    /// Bytes of one group descriptor.
    pub(super) descriptor_size: u16,
    /// Blocks that all descriptors fill.
    pub(super) descriptor_blocks: u32,
    pub(super) first_meta_bg: u32,
    pub(super) reserved_descriptor_blocks: u16,
    /// The groups with copies under `sparse_super2`.
    backup_groups: [u32; 2],

    pub(super) state: u16,
    pub(super) flags: u32,
    pub(super) error_count: u32,
    pub(super) journal_inode: u32,
    pub(super) journal_device: u32,
    pub(super) mmp_block: u64,
}

impl Superblock {
    /// Reads and checks the superblock; `None` where the volume does not carry the magic number.
    pub(super) fn read(metadata: &Metadata<'_>) -> Result<Option<Self>, Unproven> {
        if metadata.size() < SUPERBLOCK_OFFSET + SUPERBLOCK_LEN as u64 {
            return Ok(None);
        }
        let mut raw = [0; SUPERBLOCK_LEN];
        metadata.read(Kind("ext"), SUPERBLOCK_OFFSET, &mut raw)?;
        if le16(&raw, 0x38) != MAGIC {
            return Ok(None);
        }
        Self::parse(&raw).map(Some)
    }

    fn parse(raw: &[u8; SUPERBLOCK_LEN]) -> Result<Self, Unproven> {
        let features = Features {
            compat: le32(raw, 0x5C),
            incompat: le32(raw, 0x60),
            ro_compat: le32(raw, 0x64),
        };
        check_checksum(&features, raw)?;
        check_dialect(&features, raw)?;
        let superblock = Self::decode(features, raw)?;
        superblock.check_blocks(raw)?;
        superblock.check_inodes()?;
        superblock.check_descriptors()?;
        Ok(superblock)
    }

    fn decode(features: Features, raw: &[u8; SUPERBLOCK_LEN]) -> Result<Self, Unproven> {
        let kind = features.kind();
        let wide = features.has(SIXTY_FOUR_BIT);
        let old = le32(raw, 0x4C) == 0;
        let (block_log, cluster_log) = (le32(raw, 0x18), le32(raw, 0x1C));
        // 64 KiB blocks are log 6; clusters reach 1 GiB, which is log 20.
        if block_log > 6 || cluster_log > 20 || cluster_log < block_log {
            return Err(kind.inconsistent("superblock: impossible block or cluster size"));
        }
        let block_size = 1024 << block_log;
        let (first_data_block, blocks_per_group) = (le32(raw, 0x14), le32(raw, 0x20));
        let blocks = wide_value(raw, 0x4, wide.then_some(0x150));
        let (inodes_per_group, inode_size) = (le32(raw, 0x28), if old { 128 } else { le16(raw, 0x58) });
        let groups = blocks
            .saturating_sub(first_data_block.into())
            .div_ceil(blocks_per_group.max(1).into());
        let groups = u32::try_from(groups).map_err(|_| kind.inconsistent("superblock: too many groups"))?;
        let descriptor_size = if wide { le16(raw, 0xFE) } else { 32 };
        let table_bytes = u64::from(inodes_per_group) * u64::from(inode_size);
        Ok(Self {
            kind,
            features,
            label: label(&raw[0x78..0x88]),
            uuid: std::array::from_fn(|i| raw[0x68 + i]),
            checksum_seed: match features.has(CHECKSUM_SEED) {
                true => le32(raw, 0x270),
                false => crc32c(u32::MAX, &raw[0x68..0x78]),
            },
            block_size,
            cluster_blocks: 1 << (cluster_log - block_log),
            blocks,
            free_blocks: wide_value(raw, 0xC, wide.then_some(0x158)),
            first_data_block: first_data_block.into(),
            groups,
            blocks_per_group,
            clusters_per_group: le32(raw, 0x24),
            inodes: le32(raw, 0x0),
            inodes_per_group,
            inode_size,
            inode_table_blocks: u32::try_from(table_bytes.div_ceil(block_size.into())).unwrap_or(u32::MAX),
            descriptor_size,
            descriptor_blocks: groups.div_ceil((block_size / u32::from(descriptor_size.max(1))).max(1)),
            first_meta_bg: le32(raw, 0x104),
            reserved_descriptor_blocks: if old { 0 } else { le16(raw, 0xCE) },
            backup_groups: [le32(raw, 0x24C), le32(raw, 0x250)],
            state: le16(raw, 0x3A),
            flags: le32(raw, 0x160),
            error_count: le32(raw, 0x194),
            journal_inode: le32(raw, 0xE0),
            journal_device: le32(raw, 0xE4),
            mmp_block: le64(raw, 0x168),
        })
    }

    fn check_blocks(&self, raw: &[u8; SUPERBLOCK_LEN]) -> Result<(), Unproven> {
        let wrong = |what: &str| Err(self.kind.inconsistent(format!("superblock: {what}")));
        let bits = self.block_size * 8;
        if !self.features.has(BIGALLOC) && self.cluster_blocks != 1 {
            return wrong("clusters larger than blocks without bigalloc");
        }
        if self.clusters_per_group == 0
            || !self.clusters_per_group.is_multiple_of(8)
            || self.clusters_per_group > bits
        {
            return wrong("impossible number of clusters in a group");
        }
        let per_group = u64::from(self.clusters_per_group) * u64::from(self.cluster_blocks);
        if u64::from(self.blocks_per_group) != per_group {
            return wrong("blocks and clusters of a group disagree");
        }
        // Byte 1024 is block 1 where blocks have 1 KiB; block 0 is then outside all groups unless a cluster holds both.
        let first = u64::from(self.block_size == 1024 && self.cluster_blocks == 1);
        if self.first_data_block != first || self.blocks <= first {
            return wrong("impossible first block or number of blocks");
        }
        if self.blocks.checked_mul(self.block_size.into()).is_none() {
            return wrong("more bytes than 64 bits can count");
        }
        if self.free_blocks > self.blocks || le32(raw, 0x10) > self.inodes {
            return wrong("more free than there is");
        }
        Ok(())
    }

    fn check_inodes(&self) -> Result<(), Unproven> {
        let wrong = |what: &str| Err(self.kind.inconsistent(format!("superblock: {what}")));
        let size = u32::from(self.inode_size);
        if size < 128 || !size.is_power_of_two() || size > self.block_size {
            return wrong("impossible inode size");
        }
        if self.inodes_per_group == 0 || self.inodes_per_group > self.block_size * 8 {
            return wrong("impossible number of inodes in a group");
        }
        if u64::from(self.inodes) != u64::from(self.groups) * u64::from(self.inodes_per_group) {
            return wrong("number of inodes does not fit the number of groups");
        }
        Ok(())
    }

    fn check_descriptors(&self) -> Result<(), Unproven> {
        let wrong = |what: &str| Err(self.kind.inconsistent(format!("superblock: {what}")));
        let size = u32::from(self.descriptor_size);
        let least = if self.features.has(SIXTY_FOUR_BIT) { 64 } else { 32 };
        if size < least || size > 1024 || !size.is_power_of_two() {
            return wrong("impossible group descriptor size");
        }
        if self.features.has(META_BG) {
            if self.first_meta_bg > self.descriptor_blocks || self.reserved_descriptor_blocks != 0 {
                return wrong("meta_bg beyond the group descriptors, or beside reserved ones");
            }
        } else if self.descriptor_blocks >= self.blocks_per_group {
            return wrong("group descriptors do not fit in a group");
        }
        if self.features.has(GDT_CHECKSUM) && self.features.has(METADATA_CHECKSUM) {
            return wrong("uninit_bg and metadata_csum at once");
        }
        Ok(())
    }

    /// Bytes the file system spans.
    pub(super) fn size(&self) -> u64 {
        // The product was checked when the superblock was read.
        self.blocks * u64::from(self.block_size)
    }

    /// The blocks of `group`, the last one's cut at the end of the file system.
    pub(super) fn group_blocks(&self, group: u32) -> Range<u64> {
        let start = self.first_data_block + u64::from(group) * u64::from(self.blocks_per_group);
        start.min(self.blocks)..(start + u64::from(self.blocks_per_group)).min(self.blocks)
    }

    /// How many clusters `group` has; the last one of the file system may be cut short.
    pub(super) fn group_clusters(&self, group: u32) -> u32 {
        let blocks = self.group_blocks(group);
        // At most `clusters_per_group`, a 32-bit number.
        (blocks.end - blocks.start).div_ceil(self.cluster_blocks.into()) as u32
    }

    /// The group of `block`, and its cluster there; `None` for a block outside all groups.
    pub(super) fn cluster_of(&self, block: u64) -> Option<(u32, u32)> {
        if block >= self.blocks {
            return None;
        }
        let rest = block.checked_sub(self.first_data_block)?;
        let per_group = u64::from(self.blocks_per_group);
        let cluster = rest % per_group / u64::from(self.cluster_blocks);
        Some((
            u32::try_from(rest / per_group).ok()?,
            u32::try_from(cluster).ok()?,
        ))
    }

    /// Whether `group` begins with a superblock.
    pub(super) fn has_super(&self, group: u32) -> bool {
        if group == 0 {
            true
        } else if self.features.has(SPARSE_SUPER2) {
            self.backup_groups.contains(&group)
        } else if !self.features.has(SPARSE_SUPER) || group == 1 {
            true
        } else {
            [3, 5, 7].iter().any(|root| is_power(group, *root))
        }
    }

    /// Groups with copies of the superblock: the first few, or those that `sparse_super2` names.
    pub(super) fn nearest_copies(&self) -> impl Iterator<Item = u32> {
        let named = self.backup_groups.iter().copied();
        [1, 2, 3, 4, 5, 7]
            .into_iter()
            .chain(named.filter(|_| self.features.has(SPARSE_SUPER2)))
            .filter(|group| *group > 0 && *group < self.groups && self.has_super(*group))
    }

    /// Where the superblock of `group` lies, which has one. Block 1 holds the first even where group 0 begins at block 0.
    pub(super) fn super_block(&self, group: u32) -> u64 {
        let start = self.group_blocks(group).start;
        if group == 0 && self.block_size == 1024 {
            1
        } else {
            start
        }
    }

    pub(super) fn descriptors_per_block(&self) -> u32 {
        self.block_size / u32::from(self.descriptor_size)
    }

    /// Whether group descriptors carry checksums, which is also what makes their "uninitialised" flags count.
    pub(super) fn descriptors_have_checksums(&self) -> bool {
        self.features.has(GDT_CHECKSUM) || self.features.has(METADATA_CHECKSUM)
    }

    /// Whether bitmaps carry full checksums. Narrow descriptors have room for half of one, which misses one damage in 65,536.
    pub(super) fn bitmaps_have_full_checksums(&self) -> bool {
        self.features.has(METADATA_CHECKSUM) && self.descriptor_size >= 64
    }
}

/// The number whose low half is at `low` and, where there is one, whose high half is at `high`.
fn wide_value(raw: &[u8], low: usize, high: Option<usize>) -> u64 {
    u64::from(le32(raw, low)) | high.map_or(0, |high| u64::from(le32(raw, high)) << 32)
}

fn label(raw: &[u8]) -> String {
    let end = raw.iter().position(|byte| *byte == 0).unwrap_or(raw.len());
    String::from_utf8_lossy(&raw[..end]).into_owned()
}

fn is_power(mut number: u32, root: u32) -> bool {
    while number > 1 && number.is_multiple_of(root) {
        number /= root;
    }
    number == 1
}

fn check_checksum(features: &Features, raw: &[u8; SUPERBLOCK_LEN]) -> Result<(), Unproven> {
    let kind = features.kind();
    if !features.has(METADATA_CHECKSUM) {
        return Ok(());
    }
    if raw[0x175] != 1 {
        return Err(kind.unknown("a checksum that is not CRC-32C"));
    }
    if crc32c(u32::MAX, &raw[..0x3FC]) != le32(raw, 0x3FC) {
        return Err(kind.checksum("superblock"));
    }
    Ok(())
}

/// Whether this is a dialect of ext that is understood here at all.
fn check_dialect(features: &Features, raw: &[u8; SUPERBLOCK_LEN]) -> Result<(), Unproven> {
    let kind = features.kind();
    features.check_known()?;
    if features.has(JOURNAL_DEVICE) {
        return Err(kind.unknown("this is another file system's external journal"));
    }
    match le32(raw, 0x4C) {
        0 if features.any() => return Err(kind.inconsistent("superblock: features in a revision without")),
        0 | 1 => {}
        revision => return Err(kind.unknown(format!("revision {revision}"))),
    }
    // Linux and FreeBSD; the Hurd keeps blocks in places of its own.
    match le32(raw, 0x48) {
        0 | 3 => Ok(()),
        creator => Err(kind.unknown(format!("made by operating system {creator}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_three_five_and_seven_carry_backups() {
        let odd: Vec<u32> = (2..200)
            .filter(|group| [3, 5, 7].iter().any(|root| is_power(*group, *root)))
            .collect();
        assert_eq!(odd, [3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn a_label_ends_at_its_first_zero_byte() {
        assert_eq!(label(b"root\0\0garbage\0\0\0"), "root");
        assert_eq!(label(b"exactly-16-bytes"), "exactly-16-bytes");
        assert_eq!(label(&[0xFF, 0]), "\u{FFFD}");
    }
}
