//! FAT12, FAT16 and FAT32.
//!
//! Owns the recognition of a FAT volume and the order in which its metadata is questioned. FAT has no checksums, so every number that
//! decides over a cluster needs a second witness:
//!
//! - the table: its second copy; where there is only one, the directory tree, which must account for every entry in use;
//! - the geometry of FAT32: the backup boot sector;
//! - the geometry of FAT12 and FAT16, which have no backup: the directory tree must fit it, and a cluster is free only if it is
//!   also free under every other geometry one changed byte away that the tree fits as well (`rivals`).
//!
//! Leaves exFAT alone: it is another file system and is not recognised here. Promises to end on any bytes, within about 8 MiB.
//!
//! Source: Microsoft, "FAT: General Overview of On-Disk Format", 1.03, and what Linux, Windows and dosfstools write.

mod bits;
mod boot;
mod fields;
mod rivals;
mod table;
mod tree;

use longhaul_common::extent::Extent;

use self::bits::Bits;
use self::boot::{Boot, Geometry, inconsistent};
use self::table::{Entry, Table};
use self::tree::Budget;
use super::{FileSystem, FsSummary, Unproven};
use crate::disk::ReadAt;
use crate::disk::fs::volume_reader::Reader;

/// Bytes that walks over the directory tree may read for one volume: a few seconds of a slow disk, four million files.
const WALK_MAX: u64 = 256 << 20;

/// Recognises the file system: `None` where the volume does not carry its signature, an error where it does but cannot be used.
pub fn probe(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let mut sector = [0; boot::LEN];
    if volume.size() < sector.len() as u64 {
        return Ok(None);
    }
    Reader::new(volume, "fat").read(&mut sector, 0)?;
    let Some(boot) = Boot::recognise(&sector)? else {
        return Ok(None);
    };
    Ok(Some(Box::new(Fat { boot })))
}

struct Fat {
    boot: Boot,
}

impl FileSystem for Fat {
    fn kind(&self) -> &'static str {
        self.boot.geometry.width.name()
    }

    fn size(&self) -> u64 {
        self.boot.geometry.size
    }

    fn scan(&self, volume: &dyn ReadAt, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        let geometry = &self.boot.geometry;
        if volume.size() < geometry.size {
            return Err(Unproven::Truncated {
                kind: self.kind(),
                needed: geometry.size,
                size: volume.size(),
            });
        }
        let reader = Reader::new(volume, "fat");
        self.boot.settled()?;
        if geometry.backed_up() {
            self.boot.confirm(&reader)?;
        }
        Table::new(&reader, geometry).settled()?;
        let free = match geometry.backed_up() {
            true => from_table(&reader, geometry, free)?,
            false => rivals::agreed(&reader, &self.boot, free)?,
        };
        Ok(FsSummary {
            kind: self.kind(),
            label: self.boot.label.clone(),
            block_size: geometry.cluster as u32,
            size: geometry.size,
            free,
        })
    }
}

/// Proves a geometry and its table: the copies agree, and the tree fits where there is nothing else to confirm them.
fn prove(reader: &Reader<'_>, geometry: &Geometry, budget: &mut Budget) -> Result<(), Unproven> {
    let mut table = Table::new(reader, geometry);
    table.headed()?;
    if geometry.backed_up() && table.entry(geometry.root_cluster)? == Entry::Free {
        return Err(inconsistent(
            geometry.width,
            "its root directory lies in a free cluster",
        ));
    }
    if geometry.fats == 1 || !geometry.backed_up() {
        tree::fits(reader, geometry, &mut table, budget)?;
    }
    table.copies_agree()
}

/// Gives the free clusters of a geometry that needs no further witness; returns their bytes.
fn from_table(
    reader: &Reader<'_>,
    geometry: &Geometry,
    free: &mut dyn FnMut(Extent),
) -> Result<u64, Unproven> {
    prove(reader, geometry, &mut Budget::new(WALK_MAX))?;
    let (mut bytes, mut run) = (0, Extent::between(0, 0));
    let mut give = |extent: Extent| {
        if !extent.is_empty() {
            bytes += extent.len();
            free(extent);
        }
    };
    Table::new(reader, geometry).each_free(&mut |cluster| {
        let start = geometry.offset(cluster);
        if start != run.end() || run.is_empty() {
            give(run);
            run = Extent::between(start, start);
        }
        run = Extent::between(run.offset(), start + geometry.cluster);
    })?;
    give(run);
    Ok(bytes)
}
