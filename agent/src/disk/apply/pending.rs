//! Batches that are written but not yet durable.
//!
//! Owns their records until a flush takes them, and the tickets by which the session learns which are durable. No leaf is in here
//! twice: whoever writes a leaf again strips it first.

use std::ops::Range;

use super::record::{ENTRIES_MAX, Record};

/// Records in the order in which their batches were completed.
#[derive(Default)]
pub(crate) struct Pending {
    records: Vec<Record>,
    tickets: u64,
    bytes: u64,
    /// Something was written since the last flush, recorded or not.
    unsynced: bool,
}

/// What a flush is for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) records: Vec<Record>,
    /// The newest ticket.
    pub(crate) through: u64,
    pub(crate) unsynced: bool,
}

impl Pending {
    /// Takes a completed batch of `bytes` bytes of data; its ticket, from 1.
    pub(crate) fn push(&mut self, records: impl IntoIterator<Item = Record>, bytes: u64) -> u64 {
        self.records.extend(records);
        self.push_patch(bytes)
    }

    /// Takes a batch of which no record is to be made.
    pub(crate) fn push_patch(&mut self, bytes: u64) -> u64 {
        self.bytes = self.bytes.saturating_add(bytes);
        self.unsynced = true;
        self.tickets += 1;
        self.tickets
    }

    /// Bytes and records that wait for a flush.
    pub(crate) fn waiting(&self) -> (u64, usize) {
        (self.bytes, self.records.len())
    }

    /// Everything that waits, and the newest ticket.
    pub(crate) fn take(&mut self) -> Taken {
        self.bytes = 0;
        Taken {
            records: std::mem::take(&mut self.records),
            through: self.tickets,
            unsynced: std::mem::take(&mut self.unsynced),
        }
    }

    /// Returns what was taken but could not be logged.
    pub(crate) fn put_back(&mut self, mut records: Vec<Record>) {
        self.unsynced = true;
        records.append(&mut self.records);
        self.records = records;
    }

    /// Forgets the leaves of `ranges`.
    pub(crate) fn strip(&mut self, ranges: &[Range<u64>]) {
        for range in ranges {
            let hit = |record: &Record| record.leaves.start < range.end && range.start < record.leaves.end;
            if !self.records.iter().any(hit) {
                continue;
            }
            let records = std::mem::take(&mut self.records).into_iter();
            self.records = records
                .flat_map(|record| match hit(&record) {
                    true => vec![
                        part(&record, record.leaves.start..range.start.max(record.leaves.start)),
                        part(&record, range.end.min(record.leaves.end)..record.leaves.end),
                    ],
                    false => vec![record],
                })
                .filter(|record| !record.leaves.is_empty())
                .collect();
        }
    }
}

/// What `record` says of the leaves of `range`.
pub(crate) fn part(record: &Record, range: Range<u64>) -> Record {
    let digests = record
        .digests
        .iter()
        .filter(|(leaf, _)| range.contains(leaf))
        .copied()
        .collect();
    Record {
        kind: record.kind,
        version: record.version,
        leaves: range,
        digests,
    }
}

/// The same statements in as few records as can be, ordered by leaf.
pub(crate) fn joined(mut records: Vec<Record>) -> Vec<Record> {
    records.sort_by_key(|record| record.leaves.start);
    let mut out: Vec<Record> = Vec::with_capacity(records.len());
    for mut record in records {
        match out.last_mut() {
            Some(last)
                if last.leaves.end == record.leaves.start
                    && (last.version, last.kind) == (record.version, record.kind)
                    && last.digests.len() + record.digests.len() <= ENTRIES_MAX =>
            {
                last.leaves.end = record.leaves.end;
                last.digests.append(&mut record.digests);
            }
            _ => out.push(record),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use longhaul_common::digest::Digest;
    use longhaul_common::ids::{Attempt, Round};

    use super::super::record::{Kind, Version};
    use super::*;

    fn record(leaves: Range<u64>, data: &[u64]) -> Record {
        let version = Version::new(Attempt(1), Round(0)).unwrap();
        let digests = data
            .iter()
            .map(|leaf| (*leaf, Digest::of(&leaf.to_le_bytes())))
            .collect();
        Record {
            kind: Kind::Written,
            version,
            leaves,
            digests,
        }
    }

    #[test]
    fn stripped_leaves_are_gone_and_the_rest_stays() {
        let mut pending = Pending::default();
        assert_eq!(pending.push([record(0..10, &[0, 5, 9])], 3), 1);
        assert_eq!(pending.push([record(10..12, &[10])], 1), 2);
        pending.strip(&[5..6, 9..11]);
        assert_eq!(pending.waiting(), (4, 3));
        let taken = pending.take();
        assert_eq!(
            taken.records,
            [record(0..5, &[0]), record(6..9, &[]), record(11..12, &[])]
        );
        assert_eq!(
            (taken.through, taken.unsynced, pending.waiting()),
            (2, true, (0, 0))
        );
        assert!(!pending.take().unsynced);
        pending.put_back(taken.records);
        assert_eq!(pending.waiting().1, 3);
        assert!(pending.take().unsynced);
        assert_eq!(pending.push_patch(7), 3);
        assert!(pending.take().unsynced, "a patch needs a flush, too");
    }

    #[test]
    fn neighbours_become_one_record() {
        let records = vec![record(4..6, &[5]), record(0..2, &[0]), record(2..4, &[])];
        assert_eq!(joined(records), [record(0..6, &[0, 5])]);
        assert_eq!(joined(vec![record(0..2, &[]), record(3..4, &[])]).len(), 2);
    }
}
