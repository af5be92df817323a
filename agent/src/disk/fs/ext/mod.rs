//! ext2, ext3, ext4: free clusters of an unmounted volume.
//!
//! Owns the order of the proof: superblock and its copies, cleanliness, group descriptors, block bitmaps, and - where bitmaps
//! carry no full checksums - a walk over every inode in use that asks the bitmaps for each block a file refers to. Leaves alone
//! file names and contents. Promises: no single damaged byte of metadata makes a used block come out as free. A damaged bitmap
//! without checksum contradicts its group's count, the file system's own metadata, or a file; a damaged description of the
//! file system contradicts the copies of the superblock or the sums over all groups.
//!
//! A volume that may be mounted is read by `journal`, which lays the committed journal over it and then uses the same code.
//!
//! ```text
//! superblock -> backup -> clean -> descriptor -> layout -> bitmap -> (walk -> mapping) -> free extents
//!                  everything reads through metadata::Metadata
//! ```

mod backup;
mod bitmap;
mod bits;
mod checksum;
mod clean;
mod descriptor;
mod features;
mod free;
mod inode;
mod journal;
mod layout;
mod mapping;
mod metadata;
mod superblock;
mod walk;

use longhaul_common::extent::Extent;

pub(in crate::disk) use self::journal::is_after;
pub use self::journal::running::{probe_frozen, probe_running};
use self::metadata::Metadata;
use self::superblock::Superblock;
use super::{FileSystem, FsSummary, Unproven};
use crate::disk::ReadAt;

/// Recognises the file system: `None` where the volume does not carry its signature, an error where it does but cannot be used.
pub fn probe(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let Some(ext) = Ext::open(volume)? else {
        return Ok(None);
    };
    Ok(Some(Box::new(Found {
        kind: ext.superblock.kind.0,
        size: ext.superblock.size(),
    })))
}

/// A file system that was recognised.
struct Found {
    kind: &'static str,
    size: u64,
}

impl FileSystem for Found {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn scan(&self, volume: &dyn ReadAt, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        let ext = Ext::open(volume)?.ok_or_else(|| Unproven::Inconsistent {
            kind: self.kind,
            what: "the superblock vanished".into(),
        })?;
        clean::check(&ext)?;
        free::scan(&ext, free)
    }
}

/// A volume with a sane superblock.
struct Ext<'a> {
    superblock: Superblock,
    metadata: Metadata<'a>,
}

impl<'a> Ext<'a> {
    /// Reads the superblock and looks at its copies; `None` where there is none.
    fn open(volume: &'a dyn ReadAt) -> Result<Option<Self>, Unproven> {
        let metadata = Metadata::new(volume);
        let Some(superblock) = Superblock::read(&metadata)? else {
            return Ok(None);
        };
        // First the copies: a damaged size must not pass for a truncated image, which is refused altogether.
        backup::check(&superblock, &metadata)?;
        if superblock.size() > metadata.size() {
            return Err(Unproven::Truncated {
                kind: superblock.kind.0,
                needed: superblock.size(),
                size: metadata.size(),
            });
        }
        Ok(Some(Self { superblock, metadata }))
    }

    /// Fills `buf`, one or more whole blocks, from `block` on.
    fn read_block(&self, block: u64, buf: &mut [u8]) -> Result<(), Unproven> {
        let superblock = &self.superblock;
        let size = u64::from(superblock.block_size);
        let inside = block
            .checked_mul(size)
            .filter(|offset| offset.saturating_add(buf.len() as u64) <= superblock.size());
        match inside {
            Some(offset) => self.metadata.read(superblock.kind, offset, buf),
            None => Err(superblock
                .kind
                .inconsistent(format!("metadata at block {block}, beyond the end"))),
        }
    }
}
