//! XFS, versions 4 and 5: which bytes of an unmounted volume are free.
//!
//! Owns the order of the proof: the superblock is known and whole, the log ends in an unmount record, and in each allocation
//! group (AG) the by-block and the by-length free-space tree name the same extents, which lie inside the AG and beside everything
//! whose place is known (headers, trees, free list, log). Leaves alone inodes, directories and reference counts: a block is
//! free only if the free-space trees say so, whatever else the volume holds.
//!
//! Promises: one flipped byte anywhere in the metadata never makes a used block free, with checksums (v5) or without (v4: both
//! trees would have to lie alike); each block of a tree is read once; memory stays within a few MiB.
//!
//! Layouts: "XFS Algorithms & Data Structures", 3rd edition; the log as `xlog_find_tail` of Linux reads it.

mod free_space;
mod geometry;
mod group;
mod log;
mod reader;
mod superblock;

use longhaul_common::extent::Extent;

use self::group::Group;
use self::reader::Reader;
use self::superblock::Superblock;
use super::{Committed, FileSystem, FsSummary, Unproven};
use crate::disk::ReadAt;

const KIND: &str = "xfs";

/// Recognises the file system: `None` where the volume does not carry its signature, an error where it does but cannot be used.
pub fn probe(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let superblock = Superblock::read(volume)?;
    Ok(superblock.map(|superblock| Box::new(Xfs { superblock }) as Box<dyn FileSystem>))
}

/// The same for a file system that the guest's agent has frozen: all its metadata is in place, and its log ends in a record that
/// only says so.
pub fn probe_frozen(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let superblock = Superblock::read(volume)?;
    Ok(superblock.map(|superblock| Box::new(Frozen(Xfs { superblock })) as Box<dyn FileSystem>))
}

/// The same for one that runs: it is recognised and gives nothing.
pub fn probe_running(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let superblock = Superblock::read(volume)?;
    Ok(superblock.map(|superblock| Box::new(Running(Xfs { superblock })) as Box<dyn FileSystem>))
}

struct Xfs {
    superblock: Superblock,
}

struct Frozen(Xfs);

impl FileSystem for Frozen {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn scan(&self, volume: &dyn ReadAt, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        self.0.scan_from(volume, log::head, free)
    }

    fn committed(&self) -> Option<Committed> {
        Some(Committed {
            uuid: self.0.superblock.uuid,
            is_mounted: true,
            journal: None,
        })
    }
}

struct Running(Xfs);

impl FileSystem for Running {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn scan(&self, _: &dyn ReadAt, _: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        Err(Unproven::InUse {
            kind: KIND,
            what: "it keeps metadata in memory without limit: only a freeze by the guest's agent proves what is free".into(),
        })
    }
}

impl FileSystem for Xfs {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn size(&self) -> u64 {
        self.superblock.geometry.size()
    }

    fn scan(&self, volume: &dyn ReadAt, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        self.scan_from(volume, log::require_clean, free)
    }
}

/// Gives the place at which the next record of the log would be written, or why the log speaks against the free-space trees.
type FindHead = fn(&Reader<'_>, &Superblock) -> Result<reader::Lsn, Unproven>;

impl Xfs {
    fn scan_from(
        &self,
        volume: &dyn ReadAt,
        find_head: FindHead,
        free: &mut dyn FnMut(Extent),
    ) -> Result<FsSummary, Unproven> {
        let superblock = &self.superblock;
        let geometry = &superblock.geometry;
        if volume.size() < self.size() {
            return Err(Unproven::Truncated {
                kind: KIND,
                needed: self.size(),
                size: volume.size(),
            });
        }
        let mut reader = Reader::new(volume, geometry, superblock.metadata_uuid);
        let head = find_head(&reader, superblock)?;
        reader.allow_up_to(head, superblock.lsn)?;
        let mut total = 0;
        for number in 0..geometry.ag_count {
            let group = Group::read(&reader, superblock, number)?;
            free_space::scan(&reader, &group, &mut |run| {
                total += run.len();
                free(run);
            })?;
        }
        Ok(FsSummary {
            kind: KIND,
            label: superblock.label.clone(),
            block_size: geometry.block_size,
            size: self.size(),
            free: total,
        })
    }
}

fn inconsistent(what: impl Into<String>) -> Unproven {
    Unproven::Inconsistent {
        kind: KIND,
        what: what.into(),
    }
}

fn not_clean(what: impl Into<String>) -> Unproven {
    Unproven::NotClean {
        kind: KIND,
        what: what.into(),
    }
}

fn unknown_feature(what: impl Into<String>) -> Unproven {
    Unproven::UnknownFeature {
        kind: KIND,
        what: what.into(),
    }
}

fn checksum(what: impl Into<String>) -> Unproven {
    Unproven::Checksum {
        kind: KIND,
        what: what.into(),
    }
}
