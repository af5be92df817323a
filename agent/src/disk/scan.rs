//! What of a disk is proven free: the whole way from an image to its free map, and the lines of the report about it.
//!
//! Owns the order of things: table, slots, volumes, LVM, gaps. Leaves decoding to [`crate::disk::volume`] and the file systems to
//! [`crate::disk::fs`]. Promises that [`scan`] never fails: what cannot be proven is copied, and a line says why. Every byte of
//! the disk belongs to a line of the report or to its summed line of gaps.

use longhaul_common::extent::Extent;
use serde::{Deserialize, Serialize};

use super::free_map::FreeMap;
use super::fs::Committed;
use super::volume::doubt::doubt;
use super::volume::judge::{Outcome, Probe, judge};
use super::volume::lvm::LvmUnproven;
use super::volume::lvm::physical::read_physical;
use super::volume::lvm::place::{Found, Placed, place};
use super::volume::sentence;
use super::volume::table::{self, Cut, Slot, Table, between};
use super::volume::view::{Layout, View};
use super::{ReadAt, fs};

/// File systems that can prove free space.
const PROBES: &[Probe] = &[fs::ext::probe, fs::xfs::probe, fs::ntfs::probe, fs::fat::probe];
/// Physical volumes judged on one disk, beyond which none is; each may hold 1 MiB of metadata in memory.
const PHYSICAL_LIMIT: usize = 16;
/// Partitions and logical volumes judged on one disk; each costs up to 1 MiB of reading before its file system is known.
const VOLUME_LIMIT: usize = 512;

/// What a scan found.
pub struct Scan {
    pub free: FreeMap,
    /// In disk order, logical volumes behind their physical ones.
    pub parts: Vec<Part>,
    /// Bytes that the image must have at least, by what its partitions, physical volumes and file systems say of themselves.
    pub needs: u64,
    /// A sentence for each that the image is too short for. Not empty: the image is damaged or cut, and must be refused.
    pub shortfalls: Vec<String>,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// "partition 2: ext4 'root'".
    pub name: String,
    /// Range of the disk. Of a logical volume and of the gaps: from their first to their last byte, with others in between.
    pub extent: Extent,
    /// "ext4", "lvm2", "swap", "gaps", "unknown".
    pub kind: String,
    /// What proves the free bytes; `None` where all of it is copied.
    pub proof: Option<Proof>,
    /// Bytes skipped, in whole blocks of the disk.
    pub free_bytes: u64,
    /// Why all of it is copied.
    pub reason: Option<String>,
}

/// Why a free block may be skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// The file system of a powered-off disk is clean, and its metadata says so.
    Unmounted,
    /// LVM metadata: the extents belong to no logical volume.
    FreeExtents,
    /// On a running VM: frozen by the guest's agent while the dirty bitmap was switched on.
    Frozen,
    /// On a running VM: free in a transaction of the journal that began after the dirty bitmap was switched on.
    Journal,
    /// On a running VM: a dirty bitmap has been on for long, and the journal's file system commits within that time.
    Age,
}

impl Proof {
    /// As the report says it.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Unmounted => "unmounted",
            Self::FreeExtents => "free extents",
            Self::Frozen => "frozen",
            Self::Journal => "journal",
            Self::Age => "age",
        }
    }
}

/// Scans a disk that nothing writes to.
pub fn scan(disk: &dyn ReadAt) -> Scan {
    scan_with(disk, PROBES)
}

/// Scans with a given set of file systems.
pub fn scan_with(disk: &dyn ReadAt, probes: &[Probe]) -> Scan {
    scan_seen(disk, probes).0
}

/// What a part with free extents is made of, beyond its line of the report: lets two scans of a running disk be compared.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Index of its line.
    pub(crate) line: usize,
    /// "partition 2", "logical volume vg/root", "whole disk".
    pub(crate) place: String,
    /// Ranges of the disk in which its free extents lie.
    pub(crate) ranges: Vec<Extent>,
    /// Of a file system that may be in use.
    pub(crate) committed: Option<Committed>,
    /// Of a physical volume: BLAKE3 of what its metadata says.
    pub(crate) metadata: Option<[u8; 32]>,
}

/// Scans, and gives for every part with a proof what it was made of.
pub(crate) fn scan_seen(disk: &dyn ReadAt, probes: &[Probe]) -> (Scan, Vec<Seen>) {
    let mut scanner = Scanner {
        disk,
        probes,
        physicals: Vec::new(),
        damaged: false,
        judged: 0,
        seen: Vec::new(),
        found: Scan {
            free: FreeMap::new(disk.size()),
            parts: Vec::new(),
            needs: 0,
            shortfalls: Vec::new(),
        },
    };
    let whole = Extent::between(0, disk.size());
    match table::read(disk) {
        Table::None => scanner.volume("whole disk", whole),
        Table::Refused(why) => scanner.copied("whole disk", whole, "unknown", why),
        Table::Cut(cut) => match doubt(disk, &cut, probes) {
            Some(why) => scanner.copied("whole disk", whole, "unknown", why),
            None => scanner.slots(&cut),
        },
    }
    scanner.groups();
    (scanner.found, scanner.seen)
}

struct Scanner<'a> {
    disk: &'a dyn ReadAt,
    probes: &'a [Probe],
    /// Physical volumes, judged together at the end; with each the index of its line.
    physicals: Vec<(usize, Found)>,
    /// Whether a physical volume was met whose metadata does not hold: it might describe the others anew.
    damaged: bool,
    judged: usize,
    seen: Vec<Seen>,
    found: Scan,
}

impl Scanner<'_> {
    fn slots(&mut self, cut: &Cut) {
        if let Some(note) = &cut.note {
            let extent = cut.reserved.first().copied().unwrap_or(Extent::between(0, 0));
            self.copied("partition table", extent, cut.kind, note.clone());
        }
        let mut slots: Vec<&Slot> = cut.slots.iter().collect();
        slots.sort_by_key(|slot| slot.extent);
        for slot in &slots {
            self.needs(&slot.name, slot.extent.end());
            match &slot.refusal {
                Some((kind, why)) => self.copied(&slot.name, slot.extent, kind, why.clone()),
                None if self.is_full() => self.copied(&slot.name, slot.extent, "unknown", too_many()),
                None => self.volume(&slot.name, slot.extent),
            }
        }
        self.gaps(&slots);
    }

    /// One line for all that belongs to no partition.
    fn gaps(&mut self, slots: &[&Slot]) {
        let ranges: Vec<Extent> = slots.iter().map(|slot| slot.extent).collect();
        let gaps = between(&ranges, self.disk.size());
        let (Some(first), Some(last)) = (gaps.first(), gaps.last()) else {
            return;
        };
        let sum: u64 = gaps.iter().map(Extent::len).sum();
        let why = format!("{sum} bytes of tables, boot areas and gaps are copied");
        let hull = Extent::between(first.offset(), last.end());
        self.copied("outside of partitions", hull, "gaps", why);
    }

    /// Judges one partition, or the whole disk.
    fn volume(&mut self, name: &str, range: Extent) {
        let layout = Layout::slice(range);
        match self.judge(name, &layout, range) {
            Some((kind, needs)) => {
                self.needs(&format!("{name}: {kind}"), range.offset().saturating_add(needs))
            }
            None => self.physical(name, range, &layout),
        }
    }

    /// Judges a volume and writes its line; returns its kind and the bytes that it says it spans. `None`, and no line, where it is
    /// a physical volume.
    fn judge(&mut self, name: &str, layout: &Layout, range: Extent) -> Option<(String, u64)> {
        self.judged += 1;
        let (free, mut free_bytes) = (&mut self.found.free, 0);
        let view = View {
            disk: self.disk,
            layout,
        };
        let judgement = judge(&view, self.probes, &mut |extent| {
            layout.locate(extent, &mut |range| free_bytes += free.mark(&range));
        });
        let (proof, reason) = match judgement.outcome {
            Outcome::Physical => return None,
            Outcome::Proven => {
                self.seen.push(Seen {
                    line: self.found.parts.len(),
                    place: name.to_owned(),
                    ranges: layout.disk_ranges().collect(),
                    committed: judgement.committed,
                    metadata: None,
                });
                (Some(Proof::Unmounted), None)
            }
            Outcome::Copied(why) => {
                layout.disk_ranges().for_each(|range| free.clear(&range));
                free_bytes = 0;
                (None, Some(why))
            }
        };
        let label = match judgement.label.as_str() {
            "" => String::new(),
            label => format!(" '{label}'"),
        };
        self.found.parts.push(Part {
            name: format!("{name}: {}{label}", judgement.kind),
            extent: range,
            kind: judgement.kind.clone(),
            proof,
            free_bytes,
            reason,
        });
        Some((judgement.kind, judgement.needs))
    }

    fn is_full(&self) -> bool {
        self.judged >= VOLUME_LIMIT
    }

    fn physical(&mut self, name: &str, range: Extent, layout: &Layout) {
        let view = View {
            disk: self.disk,
            layout,
        };
        let name = format!("{name}: LVM physical volume");
        let why = match read_physical(&view).and_then(|physical| Found::new(range, physical)) {
            Ok(_) if self.physicals.len() == PHYSICAL_LIMIT => {
                self.damaged = true;
                format!("there are more than {PHYSICAL_LIMIT} physical volumes")
            }
            Ok(found) => {
                self.needs(&name, range.offset().saturating_add(found.physical.size));
                self.physicals.push((self.found.parts.len(), found));
                String::new()
            }
            Err(why) => {
                self.damaged |= !matches!(why, LvmUnproven::NoGroup | LvmUnproven::NoMetadata);
                self.needs_of(&name, range, &why);
                sentence(&why)
            }
        };
        self.copied(&name, range, "lvm2", why);
    }

    /// Physical volumes of one group are judged together; their texts must be equal.
    fn groups(&mut self) {
        let mut rest = std::mem::take(&mut self.physicals);
        while let Some((_, first)) = rest.first() {
            let id = first.group.clone();
            let (group, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(_, one)| one.group == id);
            rest = others;
            self.group(&group);
        }
    }

    fn group(&mut self, group: &[(usize, Found)]) {
        let found: Vec<Found> = group.iter().map(|(_, found)| found.clone()).collect();
        let equal = found
            .iter()
            .all(|one| one.physical.text == found[0].physical.text);
        let placed = match (self.damaged, equal) {
            (true, _) => Err(LvmUnproven::Sibling),
            (_, false) => Err(LvmUnproven::Differ),
            _ => place(&found),
        };
        match placed {
            Ok(placed) => self.placed(group, &placed),
            Err(why) => {
                for (line, found) in group {
                    let name = self.found.parts[*line].name.clone();
                    self.needs_of(&name, found.range, &why);
                    self.found.parts[*line].reason = Some(sentence(&why));
                }
            }
        }
    }

    fn placed(&mut self, group: &[(usize, Found)], placed: &Placed) {
        for ((line, found), free) in group.iter().zip(&placed.free) {
            self.seen.push(Seen {
                line: *line,
                place: self.found.parts[*line].name.clone(),
                ranges: free.clone(),
                committed: None,
                metadata: Some(fingerprint(found)),
            });
            let free_bytes = free.iter().map(|range| self.found.free.mark(range)).sum();
            let part = &mut self.found.parts[*line];
            part.name = format!("{} of {}", part.name, placed.group);
            part.proof = Some(Proof::FreeExtents);
            part.free_bytes = free_bytes;
            part.reason = None;
        }
        for logical in &placed.logicals {
            let name = format!("logical volume {}/{}", placed.group, logical.name);
            let refusal = logical.refusal.clone().or_else(|| self.is_full().then(too_many));
            let hull = logical.layout.hull();
            if let Some(why) = refusal {
                self.copied(&name, hull, "unknown", why);
            } else if self.judge(&name, &logical.layout, hull).is_none() {
                let why = "a physical volume inside a logical one is copied";
                self.copied(&name, hull, "lvm2", why.to_owned());
            }
        }
    }

    fn copied(&mut self, name: &str, extent: Extent, kind: &str, why: String) {
        self.found.parts.push(Part {
            name: name.to_owned(),
            extent,
            kind: kind.to_owned(),
            proof: None,
            free_bytes: 0,
            reason: Some(why),
        });
    }

    fn needs_of(&mut self, name: &str, range: Extent, why: &LvmUnproven) {
        if let LvmUnproven::Truncated { needed, .. } = why {
            self.needs(name, range.offset().saturating_add(*needed));
        }
    }

    fn needs(&mut self, name: &str, end: u64) {
        let size = self.disk.size();
        self.found.needs = self.found.needs.max(end);
        if end > size {
            self.found
                .shortfalls
                .push(format!("{name} needs an image of {end} bytes, but it has {size}"));
        }
    }
}

fn fingerprint(found: &Found) -> [u8; 32] {
    let physical = &found.physical;
    let mut hasher = blake3::Hasher::new();
    for number in [
        found.range.offset(),
        found.range.len(),
        physical.data,
        physical.size,
    ] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(physical.uuid.as_bytes());
    hasher.update(&physical.text);
    *hasher.finalize().as_bytes()
}

fn too_many() -> String {
    format!("only the first {VOLUME_LIMIT} volumes of a disk are judged")
}
