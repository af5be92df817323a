//! What the file system keeps for itself: superblocks, group descriptors, bitmaps, inode tables.
//!
//! Owns the list of these blocks for each group. With `flex_bg` a group may hold the bitmaps and inode tables of any other group:
//! those are gathered once, merged, in memory that grows with their scatter and not with the volume. Promises that no two of
//! them overlap; a file system where they do is refused.

use std::collections::BTreeMap;
use std::ops::Range;

use super::descriptor::{Descriptor, Descriptors};
use super::features::{FLEX_BG, META_BG, MMP};
use super::metadata::Kind;
use super::superblock::Superblock;
use super::{Ext, Unproven};

/// Most separate places outside their own groups at which bitmaps and inode tables may lie: about 4 MiB of memory. A 16 TiB
/// volume as mke2fs makes it has 25,000.
const SCATTER_MAX: usize = 1 << 17;

/// Ranges of blocks that never overlap, merged where they touch.
struct Ranges {
    /// End by start.
    ends: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Takes in `range`; `false` where it overlaps another.
    fn insert(&mut self, range: &Range<u64>) -> bool {
        let before = self.ends.range(..=range.start).next_back();
        let before = before.map(|(start, end)| (*start, *end));
        let after = self.ends.range(range.start..).next();
        let after = after.map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, end)| end > range.start)
            || after.is_some_and(|(start, _)| start < range.end)
        {
            return false;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((touching, _)) = before.filter(|(_, end)| *end == range.start) {
            start = touching;
        }
        if let Some((touching, far)) = after.filter(|(start, _)| *start == range.end) {
            self.ends.remove(&touching);
            end = far;
        }
        self.ends.insert(start, end);
        true
    }

    /// The parts of the ranges that lie in `window`.
    fn within(&self, window: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let window = window.clone();
        let before = self.ends.range(..window.start).next_back();
        before
            .into_iter()
            .chain(self.ends.range(window.clone()))
            .map(move |(start, end)| (*start).max(window.start)..(*end).min(window.end))
            .filter(|range| range.start < range.end)
    }
}

/// Bitmaps and inode tables that lie outside the groups they serve.
pub(super) struct Layout {
    foreign: Ranges,
}

impl Layout {
    /// Reads every group descriptor once.
    pub(super) fn read(ext: &Ext<'_>, descriptors: &mut Descriptors<'_>) -> Result<Self, Unproven> {
        let superblock = &ext.superblock;
        let mut foreign = Ranges {
            ends: BTreeMap::new(),
        };
        if superblock.features.has(MMP) {
            let block = superblock.mmp_block;
            let range = checked_range(superblock, block, 1, "multiple mount protection")?;
            foreign.insert(&range);
        }
        for group in 0..superblock.groups {
            let descriptor = descriptors.read(group)?;
            let home = superblock.group_blocks(group);
            for (range, what) in served(superblock, &descriptor)? {
                if inside(&range, &home) {
                    continue;
                }
                if !superblock.features.has(FLEX_BG) {
                    let what = format!("{what} of group {group} lies outside it without flex_bg");
                    return Err(superblock.kind.inconsistent(what));
                }
                if !foreign.insert(&range) {
                    return Err(overlap(superblock.kind, group));
                }
            }
            if foreign.ends.len() > SCATTER_MAX {
                let what = format!("bitmaps and inode tables lie at more than {SCATTER_MAX} places");
                return Err(superblock.kind.inconsistent(what));
            }
        }
        Ok(Self { foreign })
    }

    /// The blocks of `group` that the file system keeps for itself: in order, none twice.
    pub(super) fn of_group(
        &self,
        superblock: &Superblock,
        group: u32,
        descriptor: &Descriptor,
    ) -> Result<Vec<Range<u64>>, Unproven> {
        let home = superblock.group_blocks(group);
        let mut ranges: Vec<_> = self.foreign.within(&home).collect();
        for (range, _) in served(superblock, descriptor)? {
            if inside(&range, &home) {
                ranges.push(range);
            }
        }
        ranges.extend(head(superblock, group)?);
        ranges.sort_unstable_by_key(|range| range.start);
        if ranges.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err(overlap(superblock.kind, group));
        }
        Ok(ranges)
    }
}

fn overlap(kind: Kind, group: u32) -> Unproven {
    kind.inconsistent(format!("metadata in or of group {group} overlaps other metadata"))
}

fn inside(range: &Range<u64>, home: &Range<u64>) -> bool {
    range.start >= home.start && range.end <= home.end
}

/// `count` blocks from `start` on, which must lie inside the file system.
fn checked_range(
    superblock: &Superblock,
    start: u64,
    count: u64,
    what: &str,
) -> Result<Range<u64>, Unproven> {
    match start.checked_add(count) {
        Some(end) if start > superblock.first_data_block && end <= superblock.blocks => Ok(start..end),
        _ => Err(superblock
            .kind
            .inconsistent(format!("{what} at impossible block {start}"))),
    }
}

/// The bitmaps and the inode table that a descriptor points to.
fn served(
    superblock: &Superblock,
    descriptor: &Descriptor,
) -> Result<[(Range<u64>, &'static str); 3], Unproven> {
    let piece = |start, count, what| Ok((checked_range(superblock, start, count, what)?, what));
    Ok([
        piece(descriptor.block_bitmap, 1, "block bitmap")?,
        piece(descriptor.inode_bitmap, 1, "inode bitmap")?,
        piece(
            descriptor.inode_table,
            superblock.inode_table_blocks.into(),
            "inode table",
        )?,
    ])
}

/// The superblock and group descriptors at the head of `group`, and the room kept for more of them.
/// `None` where `group` begins with nothing of the kind.
fn head(superblock: &Superblock, group: u32) -> Result<Option<Range<u64>>, Unproven> {
    let home = superblock.group_blocks(group);
    let has_super = superblock.has_super(group);
    let start = if has_super {
        superblock.super_block(group)
    } else {
        home.start
    };
    let per_block = superblock.descriptors_per_block();
    let scattered = superblock.features.has(META_BG) && group / per_block >= superblock.first_meta_bg;
    let descriptors = if scattered {
        // The first two groups and the last one of those that a block of descriptors describes have a copy of it.
        u64::from([0, 1, per_block - 1].contains(&(group % per_block)))
    } else if !has_super {
        0
    } else if superblock.features.has(META_BG) {
        superblock.first_meta_bg.into()
    } else {
        u64::from(superblock.descriptor_blocks) + u64::from(superblock.reserved_descriptor_blocks)
    };
    let end = start + u64::from(has_super) + descriptors;
    if start == end {
        return Ok(None);
    }
    // Only the end of the file system may cut the room for more descriptors short.
    if end > home.end && home.end != superblock.blocks {
        let what = format!("group {group} is too small for its group descriptors");
        return Err(superblock.kind.inconsistent(what));
    }
    Ok(Some(start..end.min(home.end)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_agree_with_a_plain_bool_per_block(
            inserts in prop::collection::vec((0u64..200, 1u64..20), 0..40), window in (0u64..200, 1u64..60),
        ) {
            let mut ranges = Ranges { ends: BTreeMap::new() };
            let mut plain = [false; 300];
            for (start, len) in inserts {
                let range = start..start + len;
                let blocks = &mut plain[start as usize..(start + len) as usize];
                let free = blocks.iter().all(|taken| !taken);
                prop_assert_eq!(ranges.insert(&range), free);
                blocks.fill(true);
                if !free {
                    return Ok(()); // After a refusal nothing is promised.
                }
            }
            let (start, len) = window;
            let mut seen = [false; 300];
            for range in ranges.within(&(start..start + len)) {
                prop_assert!(inside(&range, &(start..start + len)));
                seen[range.start as usize..range.end as usize].fill(true);
            }
            for block in start..start + len {
                prop_assert_eq!(seen[block as usize], plain[block as usize]);
            }
            prop_assert!(ranges.ends.iter().zip(ranges.ends.iter().skip(1)).all(|(a, b)| a.1 < b.0));
        }
    }
}
