//! Volume groups joined with the physical volumes that a disk has.
//!
//! Owns the translation of extents into ranges of the disk. Leaves alone what a logical volume contains. Promises that the ranges
//! given for a group (free ones and those of its logical volumes) never share a byte, and lie inside the physical volumes.

use longhaul_common::extent::Extent;

use super::LvmUnproven;
use super::group::{Group, Logical, Member, understand};
use super::physical::Physical;
use crate::disk::volume::view::Layout;

/// A physical volume and the range of the disk that holds it.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) range: Extent,
    pub(crate) physical: Physical,
    /// Identifier of the volume group.
    pub(crate) group: String,
}

impl Found {
    pub(crate) fn new(range: Extent, physical: Physical) -> Result<Self, LvmUnproven> {
        let group = understand(&physical.text)?.id;
        Ok(Self {
            range,
            physical,
            group,
        })
    }
}

/// What is certain of all physical volumes of one group. The first vector has one entry for each of them, in the order given.
#[derive(Debug)]
pub(crate) struct Placed {
    /// Name of the volume group.
    pub(crate) group: String,
    /// Ranges of the disk that hold free extents.
    pub(crate) free: Vec<Vec<Extent>>,
    pub(crate) logicals: Vec<PlacedLogical>,
}

#[derive(Debug)]
pub(crate) struct PlacedLogical {
    /// "root".
    pub(crate) name: String,
    /// All its ranges that lie on this disk, as a volume where it is whole and plain.
    pub(crate) layout: Layout,
    /// Why its content is not judged.
    pub(crate) refusal: Option<String>,
}

/// Joins physical volumes that carry the same text.
pub(crate) fn place(found: &[Found]) -> Result<Placed, LvmUnproven> {
    let text = found
        .first()
        .map(|one| one.physical.text.as_slice())
        .unwrap_or_default();
    let group = understand(text)?;
    let mut bases = vec![None; group.members.len()];
    let mut free = Vec::new();
    for one in found {
        let index = group
            .members
            .iter()
            .position(|member| member.id == one.physical.uuid);
        let index = index.ok_or_else(|| {
            LvmUnproven::Inconsistent(
                "the physical volume is not in the group that its metadata describes".into(),
            )
        })?;
        let member = &group.members[index];
        let base = base(one, member, &group)?;
        if bases[index].replace(base).is_some() {
            return Err(LvmUnproven::Inconsistent(
                "two partitions claim to be the same physical volume".into(),
            ));
        }
        free.push(free_ranges(member, base, group.extent));
    }
    let place = |logical: &Logical| place_logical(logical, &bases, group.extent);
    let logicals = group.logicals.iter().filter_map(place).collect();
    Ok(Placed {
        group: group.name,
        free,
        logicals,
    })
}

/// Where on the disk extent 0 of a member begins.
fn base(found: &Found, member: &Member, group: &Group) -> Result<u64, LvmUnproven> {
    let physical = &found.physical;
    // `understand` checked that this fits in 64 bits.
    let data = Extent::between(member.start, member.start + member.count * group.extent);
    if data.end() > physical.size.min(found.range.len()) {
        return Err(LvmUnproven::Truncated {
            needed: data.end(),
            size: found.range.len(),
        });
    }
    if physical.data != member.start || physical.areas.iter().any(|area| area.intersect(&data).is_some()) {
        return Err(LvmUnproven::Inconsistent(
            "header and metadata disagree on where the extents begin".into(),
        ));
    }
    Ok(found.range.offset() + member.start)
}

/// The gaps between the extents in use.
fn free_ranges(member: &Member, base: u64, extent: u64) -> Vec<Extent> {
    let mut free = Vec::new();
    let mut at = 0;
    for (first, count) in member.used.iter().copied().chain([(member.count, 0)]) {
        if first > at {
            free.push(Extent::between(base + at * extent, base + first * extent));
        }
        at = first + count;
    }
    free
}

/// `None` where no byte of it lies on this disk.
fn place_logical(logical: &Logical, bases: &[Option<u64>], extent: u64) -> Option<PlacedLogical> {
    let mut layout = Layout::default();
    let mut refusal = logical.refusal.clone();
    for stretch in &logical.stretches {
        let here: Vec<Extent> = stretch
            .areas
            .iter()
            .filter_map(|(member, first)| {
                let start = bases[*member]? + first * extent;
                Some(Extent::between(start, start + stretch.count * extent))
            })
            .collect();
        let whole = here.len() == stretch.areas.len();
        let added = match whole {
            true => layout.append(&here, stretch.chunk),
            false => here
                .iter()
                .try_for_each(|area| layout.append(&[*area], area.len())),
        };
        if !whole || added.is_none() {
            refusal.get_or_insert_with(|| "a part of it lies on another disk".into());
        }
    }
    (layout.size() > 0).then(|| PlacedLogical {
        name: logical.name.clone(),
        layout,
        refusal,
    })
}
