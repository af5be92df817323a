//! The scan itself: from block bitmaps to free extents.
//!
//! Owns the merging of free runs over group boundaries, the sum over all groups, and the decision whether the bitmaps must be
//! confirmed by a walk over the inodes.

use longhaul_common::extent::Extent;

use super::bitmap::BlockBitmaps;
use super::superblock::Superblock;
use super::{Ext, FsSummary, Unproven, bits, walk};

/// Gives every free extent of an unmounted file system, proven.
pub(super) fn scan(ext: &Ext<'_>, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
    let superblock = &ext.superblock;
    let mut bitmaps = BlockBitmaps::open(ext)?;
    let (free, free_clusters) = runs(ext, &mut bitmaps, free)?;
    check_total(superblock, free_clusters)?;
    if !superblock.bitmaps_have_full_checksums() {
        let used = superblock.size() - free;
        walk::check(ext, &mut bitmaps, used / u64::from(superblock.block_size))?;
    }
    Ok(summary(superblock, free))
}

/// Gives every extent that the group descriptors and block bitmaps of `ext` call free. Neither the superblock's count nor the
/// inodes are asked: on a mounted volume they are older than the bitmaps.
pub(super) fn scan_bitmaps(ext: &Ext<'_>, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
    let mut bitmaps = BlockBitmaps::open(ext)?;
    let (free, _) = runs(ext, &mut bitmaps, free)?;
    Ok(summary(&ext.superblock, free))
}

/// Gives the free runs of all groups; how many bytes and how many clusters they are.
fn runs<'a>(
    ext: &'a Ext<'a>,
    bitmaps: &mut BlockBitmaps<'a>,
    free: &mut dyn FnMut(Extent),
) -> Result<(u64, u64), Unproven> {
    let superblock = &ext.superblock;
    let mut runs = FreeRuns::new(superblock, free);
    let mut bitmap = vec![0; superblock.block_size as usize];
    let mut free_clusters = 0;
    for group in 0..superblock.groups {
        let (count, free) = bitmaps.load(group, &mut bitmap)?;
        free_clusters += u64::from(free);
        for run in bits::zero_runs(&bitmap, count) {
            runs.add(group, run.start, run.end);
        }
    }
    Ok((runs.finish(), free_clusters))
}

fn summary(superblock: &Superblock, free: u64) -> FsSummary {
    FsSummary {
        kind: superblock.kind.0,
        label: superblock.label.clone(),
        block_size: superblock.block_size * superblock.cluster_blocks,
        size: superblock.size(),
        free,
    }
}

/// The superblock's own count, written at every unmount, is the sum over the groups. Whether the missing blocks of a last,
/// short cluster count as free is left open.
fn check_total(superblock: &Superblock, free_clusters: u64) -> Result<(), Unproven> {
    let cluster = u64::from(superblock.cluster_blocks);
    let counted = free_clusters * cluster;
    if counted.abs_diff(superblock.free_blocks) < cluster {
        return Ok(());
    }
    let said = superblock.free_blocks;
    let what = format!("the superblock says {said} free blocks, the groups {counted}");
    Err(superblock.kind.inconsistent(what))
}

/// Free runs on their way out, merged where they touch.
struct FreeRuns<'a> {
    superblock: &'a Superblock,
    give: &'a mut dyn FnMut(Extent),
    pending: Extent,
    total: u64,
}

impl<'a> FreeRuns<'a> {
    fn new(superblock: &'a Superblock, give: &'a mut dyn FnMut(Extent)) -> Self {
        Self {
            superblock,
            give,
            pending: Extent::between(0, 0),
            total: 0,
        }
    }

    /// Takes the free clusters `[start, end)` of `group`.
    fn add(&mut self, group: u32, start: u32, end: u32) {
        let blocks = self.superblock.group_blocks(group);
        let bytes = |cluster: u32| {
            let block = blocks.start + u64::from(cluster) * u64::from(self.superblock.cluster_blocks);
            block.min(blocks.end) * u64::from(self.superblock.block_size)
        };
        let run = Extent::between(bytes(start), bytes(end));
        if self.pending.end() == run.offset() && !self.pending.is_empty() {
            self.pending = Extent::between(self.pending.offset(), run.end());
        } else {
            self.flush();
            self.pending = run;
        }
    }

    fn flush(&mut self) {
        if !self.pending.is_empty() {
            self.total += self.pending.len();
            (self.give)(self.pending);
        }
    }

    /// Gives the last run, and how many bytes there were in all.
    fn finish(mut self) -> u64 {
        self.flush();
        self.total
    }
}
