//! Every geometry of FAT12 and FAT16 that one changed byte of the boot sector could hide.
//!
//! These kinds have no backup boot sector. If one byte of it was damaged, then the true geometry is among its neighbours, and the
//! directory tree fits it. So a sector is free only if it is free under the geometry that is written there and under every
//! neighbour that the tree fits as well: mostly there is none. Sectors on which they differ are still given if they hold zeros,
//! for a skipped sector reads as zeros.
//!
//! One neighbour is left out: another number of sectors, where the one given fills the volume up to less than a track or a cluster.
//! The file system then cannot be larger, and if it is smaller, what is given too much belongs to no file system.

use longhaul_common::extent::Extent;

use super::Bits;
use super::boot::{Boot, Geometry};
use super::table::{Entry, Table};
use super::tree::Budget;
use super::{WALK_MAX, prove};
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

/// The smallest sector: all places of all neighbours are multiples of it.
const SECTOR: u64 = 512;

/// Sectors that a table may have beyond its entries before a smaller volume is no longer believed, beside one cluster.
const SLACK: u64 = 8;

/// Gives the extents that all geometries agree on; returns their bytes.
pub(super) fn agreed(
    reader: &Reader<'_>,
    boot: &Boot,
    free: &mut dyn FnMut(Extent),
) -> Result<u64, Unproven> {
    let claimed = &boot.geometry;
    let mut budget = Budget::new(WALK_MAX);
    prove(reader, claimed, &mut budget)?;
    let given = sectors(reader, claimed)?;
    let count = claimed.size / SECTOR;
    let mut doubted = Bits::new(count);
    for rival in rivals(reader, boot)? {
        match prove(reader, &rival, &mut budget) {
            Err(error) if budget.is_spent() => return Err(error),
            Err(_) => continue,
            Ok(()) => {}
        }
        doubted.add_missing(&given, &sectors(reader, &rival)?);
    }
    relieve(reader, &mut doubted, count)?;
    let (mut bytes, mut start) = (0, None);
    for sector in 0..=count {
        match (start, given.has(sector) && !doubted.has(sector)) {
            (None, true) => start = Some(sector),
            (Some(first), false) => {
                let extent = Extent::between(first * SECTOR, sector * SECTOR);
                bytes += extent.len();
                free(extent);
                start = None;
            }
            _ => {}
        }
    }
    Ok(bytes)
}

/// The distinct geometries that are worth asking the tree about; of those that differ in size only, the smallest stands for all.
fn rivals(reader: &Reader<'_>, boot: &Boot) -> Result<Vec<Geometry>, Unproven> {
    let claimed = &boot.geometry;
    let track = boot.track.min(63) * claimed.sector;
    let fills = reader.size().saturating_sub(claimed.size) < track.max(claimed.cluster);
    let highest = highest_used(reader, claimed)?;
    let mut rivals: Vec<Geometry> = Vec::new();
    let mut smallest = claimed.clone();
    for geometry in boot.neighbours().filter(|geometry| geometry != claimed) {
        let resized = Geometry {
            size: geometry.size,
            clusters: geometry.clusters,
            ..claimed.clone()
        };
        if geometry != resized {
            if !rivals.contains(&geometry) && geometry.size <= reader.size() {
                rivals.push(geometry);
            }
        } else if !fills
            && tight(&geometry)
            && geometry.end() > highest
            && geometry.clusters < smallest.clusters
        {
            smallest = geometry;
        }
    }
    rivals.push(smallest);
    Ok(rivals)
}

/// The last cluster that is not free.
fn highest_used(reader: &Reader<'_>, geometry: &Geometry) -> Result<u32, Unproven> {
    let mut table = Table::new(reader, geometry);
    let mut highest = 0;
    for cluster in 2..geometry.end() {
        if table.entry(cluster)? != Entry::Free {
            highest = cluster;
        }
    }
    Ok(highest)
}

/// Whether the table has no more room than formatters leave.
fn tight(geometry: &Geometry) -> bool {
    let needed = (u64::from(geometry.end()) * geometry.width.bits()).div_ceil(8);
    geometry.table_len <= needed + geometry.cluster + SLACK * geometry.sector
}

/// The free sectors under one geometry.
fn sectors(reader: &Reader<'_>, geometry: &Geometry) -> Result<Bits, Unproven> {
    let mut free = Bits::new(geometry.size / SECTOR);
    Table::new(reader, geometry).each_free(&mut |cluster| {
        let first = geometry.offset(cluster) / SECTOR;
        (first..first + geometry.cluster / SECTOR).for_each(|sector| free.set(sector));
    })?;
    Ok(free)
}

/// Takes the doubt off every sector that holds zeros.
fn relieve(reader: &Reader<'_>, doubted: &mut Bits, count: u64) -> Result<(), Unproven> {
    let mut bytes = [0; SECTOR as usize];
    for sector in 0..count {
        if doubted.has(sector) {
            reader.read(&mut bytes, sector * SECTOR)?;
            if bytes.iter().all(|byte| *byte == 0) {
                doubted.clear(sector);
            }
        }
    }
    Ok(())
}
