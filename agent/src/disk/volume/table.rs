//! Which partition table a disk has, and the slots it cuts the disk into.
//!
//! Owns the choice between GPT, MBR and none, as Linux makes it, but refusing wherever two tables could be meant. Leaves decoding
//! to `gpt` and `mbr`, and what a slot holds to `judge`. Promises that slots given without a refusal overlap neither each other
//! nor the table, and lie on the disk.

use longhaul_common::extent::Extent;

use super::mbr::{self, ChainError};
use super::{gpt, sentence, signature, view};
use crate::disk::ReadAt;
use gpt::Gpt;

/// The table of a disk.
pub(crate) enum Table {
    /// No table: the disk itself may be a volume.
    None,
    /// There is one that cannot be believed; nothing on this disk is proven.
    Refused(String),
    Cut(Cut),
}

/// A disk cut into slots.
pub(crate) struct Cut {
    /// "GPT" or "MBR".
    pub(crate) kind: &'static str,
    pub(crate) slots: Vec<Slot>,
    /// Bytes of the disk that hold the table itself.
    pub(crate) reserved: Vec<Extent>,
    /// What is worth knowing about the table.
    pub(crate) note: Option<String>,
}

/// A partition.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// "partition 2".
    pub(crate) name: String,
    /// In bytes of the disk; may end beyond the disk, then `refusal` says so.
    pub(crate) extent: Extent,
    /// Why it is copied whole without a look inside.
    pub(crate) refusal: Option<(&'static str, String)>,
}

/// Reads the table of a disk.
pub(crate) fn read(disk: &dyn ReadAt) -> Table {
    let entries = match mbr::primary(disk) {
        Ok(entries) => entries.unwrap_or_default(),
        Err(e) => return Table::Refused(format!("the first sector cannot be read: {e}")),
    };
    let protective = entries.iter().any(|entry| entry.kind == 0xee);
    let gpt = match (gpt::find(disk, 512), gpt::find(disk, 4096)) {
        (Gpt::Absent, one) | (one, Gpt::Absent) => one,
        _ => Gpt::Broken("there is a GPT for 512-byte and one for 4096-byte sectors".into()),
    };
    match gpt {
        Gpt::Absent if protective => {
            Table::Refused("the protective MBR announces a GPT that is not there".into())
        }
        Gpt::Absent if covers_itself(&entries) => Table::None,
        Gpt::Absent => cut_mbr(disk, &entries),
        _ if !protective => Table::Refused("there is a GPT, but no protective MBR announces it".into()),
        Gpt::Broken(why) => Table::Refused(why),
        Gpt::Found(found) => cut_gpt(disk, &entries, found),
    }
}

/// No partition at all, or the one over everything from sector 0 on that some FAT tools write into their own boot sector.
fn covers_itself(entries: &[mbr::Entry]) -> bool {
    matches!(entries, [] | [mbr::Entry { start: 0, .. }])
}

fn cut_gpt(disk: &dyn ReadAt, hybrid: &[mbr::Entry], found: gpt::Found) -> Table {
    let slots: Vec<Slot> = found
        .entries
        .iter()
        .map(|entry| Slot {
            name: format!("partition {}", entry.number),
            extent: Extent::between(
                entry.first.saturating_mul(found.sector),
                entry.last.saturating_add(1).saturating_mul(found.sector),
            ),
            refusal: gpt_role(&entry.kind),
        })
        .collect();
    let twin = |entry: &mbr::Entry| {
        let range = entry_extent(entry, found.sector);
        entry.kind == 0xee || slots.iter().any(|slot| slot.extent == range)
    };
    if !hybrid.iter().all(twin) {
        return Table::Refused("the hybrid MBR has a partition that the GPT does not have".into());
    }
    Table::Cut(settle(
        disk,
        Cut {
            kind: "GPT",
            slots,
            reserved: found.reserved,
            note: found.note,
        },
    ))
}

fn cut_mbr(disk: &dyn ReadAt, entries: &[mbr::Entry]) -> Table {
    if entries.iter().filter(|entry| entry.is_extended()).count() > 1 {
        return Table::Refused("the MBR has more than one extended partition".into());
    }
    if could_mean_large_sectors(disk, entries) {
        return Table::Refused("the MBR may count sectors of 512 or of 4096 bytes".into());
    }
    let mut cut = Cut {
        kind: "MBR",
        slots: Vec::new(),
        reserved: vec![Extent::between(0, mbr::SECTOR)],
        note: None,
    };
    for entry in entries {
        match entry.is_extended() {
            false => cut.slots.push(mbr_slot(entry)),
            true => cut_extended(disk, entry, &mut cut),
        }
    }
    Table::Cut(settle(disk, cut))
}

fn cut_extended(disk: &dyn ReadAt, extended: &mbr::Entry, cut: &mut Cut) {
    match mbr::logical(disk, extended) {
        Ok(chain) => {
            // Only the records and the partitions between them are claimed; a primary partition inside the extended one overlaps.
            let records = chain.records.iter().map(|at| at * mbr::SECTOR);
            cut.reserved
                .extend(records.map(|at| Extent::between(at, at + mbr::SECTOR)));
            cut.slots.extend(chain.logical.iter().map(mbr_slot));
        }
        Err(why) => cut.slots.push(Slot {
            name: format!("partition {}", extended.number),
            extent: entry_extent(extended, mbr::SECTOR),
            refusal: Some(("extended partition", chain_refusal(&why))),
        }),
    }
}

fn chain_refusal(why: &ChainError) -> String {
    format!("its logical partitions are not known: {}", sentence(why))
}

fn mbr_slot(entry: &mbr::Entry) -> Slot {
    let dynamic = "a Windows dynamic disk may spread a volume over several disks";
    Slot {
        name: format!("partition {}", entry.number),
        extent: entry_extent(entry, mbr::SECTOR),
        refusal: (entry.kind == 0x42).then(|| ("dynamic disk", dynamic.to_owned())),
    }
}

fn entry_extent(entry: &mbr::Entry, sector: u64) -> Extent {
    Extent::between(entry.start * sector, entry.end() * sector)
}

/// The partition type says what some content is that has no signature, or that its content must not be judged alone.
fn gpt_role(kind: &[u8; 16]) -> Option<(&'static str, String)> {
    let guid = |hex: u128| {
        let mut bytes = hex.to_be_bytes();
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    };
    let roles = [
        (
            0x21686148_6449_6e6f_744e_656564454649,
            "BIOS boot area",
            "boot code is copied",
        ),
        (
            0x9e1a2d38_c612_4316_aa26_8b49521e5a8b,
            "PReP boot area",
            "boot code is copied",
        ),
        (
            0xe3c9e316_0b5c_4db8_817d_f92df00215ae,
            "Microsoft reserved",
            "it is copied",
        ),
        (
            0x5808c8aa_7e8f_42e0_85d2_e1e90434cfb3,
            "dynamic disk",
            "its database is copied",
        ),
        (
            0xaf9b60a0_1431_4f62_bc68_3311714a69ad,
            "dynamic disk",
            "a volume may spread over several disks",
        ),
        (
            0xe75caf8f_f680_4cee_afa3_b001e56efc2d,
            "storage space",
            "a volume may spread over several disks",
        ),
    ];
    let found = roles.iter().find(|(hex, ..)| guid(*hex) == *kind)?;
    Some((found.1, found.2.to_owned()))
}

/// An MBR does not say how large its sectors are. Where the other reading finds known content too, neither is believed.
fn could_mean_large_sectors(disk: &dyn ReadAt, entries: &[mbr::Entry]) -> bool {
    let large: Vec<Extent> = entries.iter().map(|entry| entry_extent(entry, 4096)).collect();
    let whole = Extent::between(0, disk.size());
    large.iter().all(|extent| extent.end() <= whole.end())
        && large.iter().any(|extent| {
            let layout = view::Layout::slice(*extent);
            let volume = view::View {
                disk,
                layout: &layout,
            };
            signature::find(&volume).map_or(true, |found| !found.is_empty())
        })
}

/// Refuses slots that overlap another slot or the table, or end beyond the disk.
fn settle(disk: &dyn ReadAt, mut cut: Cut) -> Cut {
    let ranges: Vec<Extent> = cut
        .slots
        .iter()
        .map(|slot| slot.extent)
        .chain(cut.reserved.iter().copied())
        .collect();
    let overlapped = overlapping(&ranges);
    for (slot, overlaps) in cut.slots.iter_mut().zip(overlapped) {
        let beyond = slot.extent.end() > disk.size();
        if beyond {
            slot.refusal = Some(("unknown", "it ends beyond the end of the image".to_owned()));
        } else if overlaps {
            slot.refusal = Some((
                "unknown",
                "it overlaps another partition or the partition table".to_owned(),
            ));
        }
    }
    cut
}

/// The ranges of a disk of `size` bytes that lie in none of `ranges`, in order.
pub(crate) fn between(ranges: &[Extent], size: u64) -> Vec<Extent> {
    let mut order = ranges.to_vec();
    order.sort_unstable();
    let mut gaps = Vec::new();
    let mut at = 0;
    for range in order.into_iter().chain([Extent::between(size, size)]) {
        if at < range.offset().min(size) {
            gaps.push(Extent::between(at, range.offset().min(size)));
        }
        at = at.max(range.end());
    }
    gaps
}

/// For each range, whether it shares a byte with another.
pub(crate) fn overlapping(ranges: &[Extent]) -> Vec<bool> {
    let mut order: Vec<usize> = (0..ranges.len()).filter(|i| !ranges[*i].is_empty()).collect();
    order.sort_by_key(|i| ranges[*i].offset());
    let mut hit = vec![false; ranges.len()];
    // Of the ranges so far, the one that ends last; whoever starts before that end overlaps it.
    let mut furthest: Option<usize> = None;
    for i in order {
        if let Some(before) = furthest
            && ranges[i].offset() < ranges[before].end()
        {
            hit[i] = true;
            hit[before] = true;
        }
        if furthest.is_none_or(|before| ranges[i].end() > ranges[before].end()) {
            furthest = Some(i);
        }
    }
    hit
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn overlap_agrees_with_comparing_every_pair(ranges in prop::collection::vec((0u64..60, 0u64..12), 0..14)) {
            let ranges: Vec<Extent> = ranges.iter().map(|(at, len)| Extent::new(*at, *len).unwrap()).collect();
            let plain: Vec<bool> = (0..ranges.len())
                .map(|i| (0..ranges.len()).any(|j| i != j && ranges[i].intersect(&ranges[j]).is_some()))
                .collect();
            prop_assert_eq!(overlapping(&ranges), plain);
        }
    }
}
