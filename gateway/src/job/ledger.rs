//! What a job has sent, and what of it is durable.
//!
//! Owns the counts behind progress, report and "sent again". Pure. Promises that data counts as sent again exactly where a leaf of it
//! was entered in an earlier attempt without becoming durable there.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use longhaul_common::digest::LEAF;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Round, Sequence};
use longhaul_common::wire::batch::{BatchHeader, Content};
use longhaul_common::wire::sequences::Sequences;
use serde::{Deserialize, Serialize};

/// Of one disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskSums {
    /// Data that entered in this attempt.
    pub entered: u64,
    /// Data that entered in any attempt.
    pub sent: u64,
    /// Durable in this attempt: data and zeros that were read.
    pub durable: u64,
    /// Zeros among `durable`.
    pub zero: u64,
    pub wan: u64,
    pub resent: u64,
}

/// Of the RAM stream, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamSums {
    /// The stream itself, as QEMU wrote it.
    pub stream: u64,
    /// Page contents and raw bytes.
    pub sent: u64,
    pub wan: u64,
}

/// What the journal keeps of a disk's sums, so that they are true after a restart, too. In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Sent {
    /// Disks are read in ascending order: what lies before this has been sent, or needs no sending.
    pub below: u64,
    pub raw_bytes: u64,
    pub wan_bytes: u64,
    pub resent_bytes: u64,
}

/// A batch that is not durable yet.
#[derive(Clone, Copy, Debug)]
struct Open {
    disk: u16,
    data: u64,
    zero: u64,
    wan: u64,
    again: u64,
    /// Leaves that it gives whole: first and count.
    leaves: (u64, u64),
}

/// The counts of a job, over its attempts.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    disks: Vec<DiskSums>,
    /// Leaves that were sent in an earlier attempt or this one.
    sent_leaves: Vec<LeafSet>,
    /// Leaves that were sent in an earlier attempt.
    earlier: Vec<LeafSet>,
    /// Of each disk, everything before this was sent in an earlier attempt: what others remember where this ledger does not.
    earlier_below: Vec<u64>,
    /// Of each disk, the end of the data that was sent.
    below: Vec<u64>,
    open: HashMap<Sequence, Open>,
    /// Batches that became durable in this attempt.
    durable_batches: u64,
    ram: RamSums,
    /// Data and WAN bytes of rounds after the first.
    dirty: (u64, u64),
}

impl Ledger {
    /// For a job of `disks` disks that has sent nothing.
    pub fn new(disks: usize) -> Self {
        Self {
            disks: vec![DiskSums::default(); disks],
            sent_leaves: vec![LeafSet::default(); disks],
            earlier: vec![LeafSet::default(); disks],
            earlier_below: vec![0; disks],
            below: vec![0; disks],
            ..Self::default()
        }
    }

    /// For a job that a former life of this program has begun.
    pub fn restored(disks: usize, sent: &[Sent]) -> Self {
        let mut ledger = Self::new(disks);
        for (index, sent) in sent.iter().enumerate().take(disks) {
            ledger.sent_before(index, sent.below);
            let sums = &mut ledger.disks[index];
            (sums.sent, sums.wan, sums.resent) = (sent.raw_bytes, sent.wan_bytes, sent.resent_bytes);
        }
        ledger
    }

    /// Somebody else knows that everything of a disk before `below` was sent in an earlier attempt.
    pub fn sent_before(&mut self, disk: usize, below: u64) {
        for marks in [&mut self.earlier_below, &mut self.below] {
            if let Some(known) = marks.get_mut(disk) {
                *known = below.max(*known);
            }
        }
    }

    /// What the journal is to keep.
    pub fn sent(&self) -> Vec<Sent> {
        let of = |(sums, below): (&DiskSums, &u64)| Sent {
            below: *below,
            raw_bytes: sums.sent,
            wan_bytes: sums.wan,
            resent_bytes: sums.resent,
        };
        self.disks.iter().zip(&self.below).map(of).collect()
    }

    /// The ledger with which the next attempt starts.
    pub fn next_attempt(mut self) -> Self {
        self.open.clear();
        self.durable_batches = 0;
        self.earlier.clone_from(&self.sent_leaves);
        for disk in &mut self.disks {
            (disk.entered, disk.durable, disk.zero) = (0, 0, 0);
        }
        self
    }

    /// Whether no batch is on its way: each that entered is durable.
    pub fn is_settled(&self) -> bool {
        self.open.is_empty()
    }

    /// A batch has entered that was checked against its disk; `wan` bytes of it go to the peer.
    pub fn entered(&mut self, header: &BatchHeader, wan: u64) {
        if let Some(ram) = &header.ram {
            self.ram.stream = self.ram.stream.saturating_add(ram.len);
            self.ram.sent = self.ram.sent.saturating_add(ram.data_len());
            self.ram.wan = self.ram.wan.saturating_add(wan);
            return;
        }
        let index = usize::from(header.disk.0);
        let (Some(sums), Some(sent), Some(earlier), Some(below)) = (
            self.disks.get_mut(index),
            self.sent_leaves.get_mut(index),
            self.earlier.get(index),
            self.below.get_mut(index),
        ) else {
            return;
        };
        let earlier = Earlier {
            leaves: earlier,
            below: self.earlier_below.get(index).copied().unwrap_or(0),
        };
        let (mut data, mut zero, mut again) = (0, 0, 0);
        for piece in &header.pieces {
            match piece.content {
                Content::Data => data += piece.extent.len(),
                Content::Zero => zero += piece.extent.len(),
                Content::Hole | Content::Free => continue,
            }
            // Later rounds send what the guest wrote again: that is new.
            if piece.content == Content::Data && header.round == Round(0) {
                again += enter_leaves(&piece.extent, &earlier, sent);
                *below = piece.extent.end().max(*below);
            }
        }
        sums.entered = sums.entered.saturating_add(data);
        sums.sent = sums.sent.saturating_add(data);
        sums.wan = sums.wan.saturating_add(wan);
        sums.resent = sums.resent.saturating_add(again);
        if header.round != Round(0) {
            self.dirty = (
                self.dirty.0.saturating_add(data),
                self.dirty.1.saturating_add(wan),
            );
        }
        self.open.insert(
            header.sequence,
            Open {
                disk: header.disk.0,
                data,
                zero,
                wan,
                again,
                leaves: (header.leaves.first, header.leaves.count),
            },
        );
    }

    /// These have entered, but were never sent: the attempt ended before.
    pub fn withdraw(&mut self, unsent: &[Sequence]) {
        for sequence in unsent {
            let Some(open) = self.open.remove(sequence) else {
                continue;
            };
            let index = usize::from(open.disk);
            if let Some(sums) = self.disks.get_mut(index) {
                sums.entered -= open.data;
                sums.sent -= open.data;
                sums.wan -= open.wan;
                sums.resent -= open.again;
            }
            let (first, count) = open.leaves;
            if let (Some(sent), Some(earlier)) = (self.sent_leaves.get_mut(index), self.earlier.get(index)) {
                sent.withdraw(first..first.saturating_add(count), earlier);
            }
        }
    }

    /// So much was sent a second time because a connection died; counted for the first disk.
    pub fn again(&mut self, raw: u64, wan: u64) {
        if let Some(sums) = self.disks.first_mut() {
            sums.resent += raw;
            sums.wan = sums.wan.saturating_add(wan);
        }
    }

    /// These batches are durable.
    pub fn durable(&mut self, sequences: &Sequences) {
        for sequence in sequences.among(self.open.keys().copied()) {
            let Some(open) = self.open.remove(&sequence) else {
                continue;
            };
            self.durable_batches += 1;
            if let Some(sums) = self.disks.get_mut(usize::from(open.disk)) {
                sums.durable = sums.durable.saturating_add(open.data).saturating_add(open.zero);
                sums.zero = sums.zero.saturating_add(open.zero);
            }
        }
    }

    /// Batches that became durable in this attempt.
    pub fn durable_batches(&self) -> u64 {
        self.durable_batches
    }

    /// What the RAM stream came to.
    pub fn ram(&self) -> RamSums {
        self.ram
    }

    /// Data and WAN bytes of rounds after the first.
    pub fn dirty(&self) -> (u64, u64) {
        self.dirty
    }

    /// Each disk's sums.
    pub fn disks(&self) -> &[DiskSums] {
        &self.disks
    }

    /// All disks' sums together.
    pub fn total(&self) -> DiskSums {
        self.disks.iter().fold(DiskSums::default(), |mut sum, disk| {
            sum.entered = sum.entered.saturating_add(disk.entered);
            sum.sent = sum.sent.saturating_add(disk.sent);
            sum.durable = sum.durable.saturating_add(disk.durable);
            sum.zero = sum.zero.saturating_add(disk.zero);
            sum.wan = sum.wan.saturating_add(disk.wan);
            sum.resent = sum.resent.saturating_add(disk.resent);
            sum
        })
    }
}

/// What earlier attempts have sent of one disk.
struct Earlier<'a> {
    leaves: &'a LeafSet,
    below: u64,
}

/// Leaves of a disk: one bit each, in words by number. Costs memory for what was really sent, wherever an agent says that it lies.
#[derive(Clone, Debug, Default)]
struct LeafSet(BTreeMap<u64, u64>);

impl LeafSet {
    fn has(&self, leaf: u64) -> bool {
        self.0
            .get(&(leaf / 64))
            .is_some_and(|word| word >> (leaf % 64) & 1 == 1)
    }

    /// Takes out every one of `leaves` that is not in `earlier`.
    fn withdraw(&mut self, leaves: Range<u64>, earlier: &Self) {
        if leaves.is_empty() {
            return;
        }
        for (index, word) in self.0.range_mut(leaves.start / 64..=(leaves.end - 1) / 64) {
            let inside = (0..64).filter(|bit| leaves.contains(&(index * 64 + bit)));
            inside
                .filter(|bit| !earlier.has(index * 64 + bit))
                .for_each(|bit| *word &= !(1 << bit));
        }
    }

    fn add(&mut self, leaf: u64) {
        *self.0.entry(leaf / 64).or_default() |= 1 << (leaf % 64);
    }
}

/// Marks the leaves that `extent` touches as sent; gives how many of its bytes lie in leaves that were sent earlier.
fn enter_leaves(extent: &Extent, earlier: &Earlier<'_>, sent: &mut LeafSet) -> u64 {
    let mut again = 0;
    for leaf in extent.offset() / LEAF..extent.end().div_ceil(LEAF) {
        sent.add(leaf);
        if earlier.leaves.has(leaf) || leaf.saturating_mul(LEAF) < earlier.below {
            let whole = Extent::between(leaf * LEAF, (leaf + 1).saturating_mul(LEAF));
            again += whole.intersect(extent).map_or(0, |part| part.len());
        }
    }
    again
}

#[cfg(test)]
mod tests {
    use longhaul_common::digest::Digest;
    use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round};
    use longhaul_common::wire::batch::{Leaves, Piece};

    use super::*;

    fn batch(sequence: u64, leaf: u64) -> BatchHeader {
        let extent = Extent::new(leaf * LEAF, LEAF).unwrap();
        BatchHeader {
            job: JobId::random(),
            attempt: Attempt(1),
            disk: DiskIndex(0),
            round: Round(0),
            sequence: Sequence(sequence),
            pieces: vec![Piece {
                extent,
                content: Content::Data,
            }],
            leaves: Leaves {
                first: leaf,
                count: 1,
                digests: vec![],
            },
            ram: None,
            urgent: false,
            digest: Digest([0; 32]),
        }
    }

    #[test]
    fn only_what_is_entered_twice_counts_as_sent_again() {
        let mut ledger = Ledger::new(1);
        for n in 0..4 {
            ledger.entered(&batch(n, n), 100);
        }
        ledger.durable(&[Sequence(0), Sequence(1), Sequence(9)].into_iter().collect());
        assert_eq!((ledger.durable_batches(), ledger.total().durable), (2, 2 * LEAF));
        let mut ledger = ledger.next_attempt();
        // Leaf 0 and 1 are durable; 2 was lost on the way, 4 is new.
        ledger.entered(&batch(0, 2), 100);
        ledger.entered(&batch(1, 4), 100);
        assert_eq!(
            (ledger.total().resent, ledger.total().sent, ledger.total().wan),
            (LEAF, 6 * LEAF, 600)
        );
        assert_eq!(ledger.durable_batches(), 0);
    }

    #[test]
    fn a_restart_of_the_program_forgets_nothing() {
        let mut ledger = Ledger::new(1);
        for n in 0..4 {
            ledger.entered(&batch(n, n), 100);
        }
        let kept = ledger.sent();
        let mut ledger = Ledger::restored(1, &kept);
        ledger.entered(&batch(0, 3), 100);
        ledger.entered(&batch(1, 4), 100);
        assert_eq!((ledger.total().resent, ledger.total().sent), (LEAF, 6 * LEAF));
        assert_eq!(ledger.sent()[0].below, 5 * LEAF);
        // The source agent remembers more than the journal.
        ledger.sent_before(0, 8 * LEAF);
        ledger.entered(&batch(2, 7), 100);
        assert_eq!((ledger.total().resent, ledger.total().wan), (2 * LEAF, 700));
    }

    #[test]
    fn what_never_left_is_not_sent_again() {
        let mut ledger = Ledger::new(1);
        for n in 0..4 {
            ledger.entered(&batch(n, n), 100);
        }
        ledger.withdraw(&[Sequence(2), Sequence(3), Sequence(9)]);
        assert_eq!((ledger.total().sent, ledger.total().wan), (2 * LEAF, 200));
        let mut ledger = ledger.next_attempt();
        ledger.entered(&batch(0, 1), 100);
        ledger.entered(&batch(1, 3), 100);
        assert_eq!((ledger.total().resent, ledger.total().sent), (LEAF, 4 * LEAF));
    }
}
