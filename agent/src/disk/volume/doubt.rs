//! What speaks against believing a partition table, beyond what it says itself.
//!
//! Owns the search for other claims on a disk with a table, and for volumes that the table does not know. Leaves the table to
//! `table`. Promises nothing about the disk, only reasons: any of them means that the whole disk is copied. An MBR has no
//! checksum, so one flipped bit moves or removes a partition without a trace; what it leaves behind is a file system at the head
//! of a gap.

use longhaul_common::extent::Extent;

use super::judge::Probe;
use super::table::{Cut, between};
use super::view::{Layout, View};
use super::{mbr, signature};
use crate::disk::ReadAt;

const MIB: u64 = 1 << 20;

/// Why `cut` must not be believed, if there is a reason.
pub(crate) fn doubt(disk: &dyn ReadAt, cut: &Cut, probes: &[Probe]) -> Option<String> {
    second_claim(disk, cut, probes).or_else(|| match cut.kind {
        "MBR" => unknown_volume(disk, cut, probes),
        _ => None,
    })
}

/// A disk with a table may carry a claim on all of it: a RAID superblock at its end, a file system from before the table.
fn second_claim(disk: &dyn ReadAt, cut: &Cut, probes: &[Probe]) -> Option<String> {
    let signatures = match signature::find(disk) {
        Ok(found) => found,
        Err(e) => return Some(format!("it cannot be read: {e}")),
    };
    let by_table = |sig: &&signature::Signature| {
        let inside = |range: &Extent| range.intersect(&sig.at) == Some(sig.at);
        sig.kind == "table" || (cut.kind == "GPT" && cut.reserved.iter().any(inside))
    };
    if let Some(other) = signatures.iter().find(|sig| !by_table(sig)) {
        return Some(format!(
            "besides a partition table ({}) it carries {}",
            cut.kind, other.what
        ));
    }
    // The GPT's own sectors lie where a file system would have its header.
    match cut.kind == "MBR" && claimed(disk, probes) {
        true => Some("both a partition table and a file system claim it".into()),
        false => None,
    }
}

fn claimed(volume: &dyn ReadAt, probes: &[Probe]) -> bool {
    probes.iter().any(|probe| !matches!(probe(volume), Ok(None)))
}

/// A volume where tools let a partition begin, but none does.
fn unknown_volume(disk: &dyn ReadAt, cut: &Cut, probes: &[Probe]) -> Option<String> {
    let slots = cut.slots.iter().map(|slot| slot.extent);
    let ranges: Vec<Extent> = slots.chain(cut.reserved.iter().copied()).collect();
    for gap in between(&ranges, disk.size()) {
        let start = gap.offset();
        // Right away, one old track behind the sector of a table, or at the next MiB.
        let heads = [
            start,
            start + 62 * mbr::SECTOR,
            start.saturating_add(MIB - 1) / MIB * MIB,
        ];
        for head in heads.into_iter().filter(|head| *head < gap.end()) {
            let layout = Layout::slice(Extent::between(head, gap.end()));
            let volume = View {
                disk,
                layout: &layout,
            };
            let signed = signature::find(&volume).map_or(true, |found| !found.is_empty());
            if signed || claimed(&volume, probes) {
                return Some(format!(
                    "at byte {head} there is a volume that the MBR does not know; it may be damaged"
                ));
            }
        }
    }
    None
}
