//! Block bitmaps: which clusters of a group are in use.
//!
//! Owns reading them, or making up those that were never written, and every check that one group's bitmap has to pass by itself:
//! checksum, number of free clusters, padding, and that the file system's own metadata is marked as in use. Leaves alone what
//! files refer to (`walk`).

use std::ops::Range;

use super::bits;
use super::checksum::crc32c;
use super::descriptor::{Descriptor, Descriptors};
use super::features::METADATA_CHECKSUM;
use super::layout::Layout;
use super::{Ext, Unproven};

/// The block bitmaps of a file system, read one at a time.
pub(super) struct BlockBitmaps<'a> {
    ext: &'a Ext<'a>,
    descriptors: Descriptors<'a>,
    layout: Layout,
}

impl<'a> BlockBitmaps<'a> {
    /// Reads every group descriptor once.
    pub(super) fn open(ext: &'a Ext<'a>) -> Result<Self, Unproven> {
        let mut descriptors = Descriptors::new(ext);
        let layout = Layout::read(ext, &mut descriptors)?;
        Ok(Self {
            ext,
            descriptors,
            layout,
        })
    }

    pub(super) fn descriptor(&mut self, group: u32) -> Result<Descriptor, Unproven> {
        self.descriptors.read(group)
    }

    /// Puts the bitmap of `group` into `bitmap`, one block long. Gives how many clusters the group has, and how many are free.
    pub(super) fn load(&mut self, group: u32, bitmap: &mut [u8]) -> Result<(u32, u32), Unproven> {
        let superblock = &self.ext.superblock;
        let descriptor = self.descriptors.read(group)?;
        let own = self.layout.of_group(superblock, group, &descriptor)?;
        let own = own.iter().map(|range| self.clusters(group, range));
        let count = superblock.group_clusters(group);
        if descriptor.blocks_uninitialised {
            bitmap.fill(0);
            own.for_each(|range| bits::set(bitmap, range));
        } else {
            self.ext.read_block(descriptor.block_bitmap, bitmap)?;
            self.check_checksum(group, &descriptor, bitmap)?;
            self.check_padding(group, count, bitmap)?;
            for range in own {
                if bits::find(bitmap, range.clone(), false) != range.end {
                    let what = format!("the block bitmap of group {group} calls metadata free");
                    return Err(superblock.kind.inconsistent(what));
                }
            }
        }
        let free = bits::zeros(bitmap, count);
        if free != descriptor.free_clusters {
            let said = descriptor.free_clusters;
            let what = format!("group {group} says {said} free clusters, its block bitmap {free}");
            return Err(superblock.kind.inconsistent(what));
        }
        Ok((count, free))
    }

    /// The clusters of `group` that blocks of `range`, inside that group, touch.
    fn clusters(&self, group: u32, range: &Range<u64>) -> Range<u32> {
        let start = self.ext.superblock.group_blocks(group).start;
        let size = u64::from(self.ext.superblock.cluster_blocks);
        // Both are at most the number of clusters of the group.
        ((range.start - start) / size) as u32..(range.end - start).div_ceil(size) as u32
    }

    fn check_checksum(&self, group: u32, descriptor: &Descriptor, bitmap: &[u8]) -> Result<(), Unproven> {
        let superblock = &self.ext.superblock;
        let covered = &bitmap[..superblock.clusters_per_group as usize / 8];
        check_bitmap_checksum(self.ext, covered, descriptor.block_bitmap_checksum)
            .then_some(())
            .ok_or_else(|| superblock.kind.checksum(format!("block bitmap of group {group}")))
    }

    /// Clusters behind the end of the file system are marked as in use.
    fn check_padding(&self, group: u32, count: u32, bitmap: &[u8]) -> Result<(), Unproven> {
        let superblock = &self.ext.superblock;
        let padding = count..superblock.clusters_per_group;
        if bits::find(bitmap, padding.clone(), false) == padding.end {
            return Ok(());
        }
        let what = format!("the block bitmap of group {group} has free clusters beyond the end");
        Err(superblock.kind.inconsistent(what))
    }
}

/// Whether `covered` has the checksum that its group's descriptor states, where it states any.
pub(super) fn check_bitmap_checksum(ext: &Ext<'_>, covered: &[u8], stated: u32) -> bool {
    let superblock = &ext.superblock;
    if !superblock.features.has(METADATA_CHECKSUM) {
        return true;
    }
    let sum = crc32c(superblock.checksum_seed, covered);
    let kept = if superblock.descriptor_size >= 64 {
        sum
    } else {
        sum & 0xFFFF
    };
    kept == stated
}
