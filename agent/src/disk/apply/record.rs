//! The progress log's bytes: one header, then records, each with its own checksums.
//!
//! Owns the layout and its checks. Leaves files and syncing to `progress_log`, meaning to `replay`. Promises: a record that
//! decodes was encoded so, for a disk of this many leaves; no length is believed before its checksum.
//!
//! ```text
//! header  0 magic 8 | 8 version u32 | 12 disk u16 | 14 zero u16 | 16 job 32 hex digits | 48 size u64
//!         | 56 digest of what the log is bound to 32 | 88 crc32c of 0..88 u32 | 92 zero u32          = 96 bytes
//! record  0 magic u32 | 4 kind u8 | 5 zero 3 | 8 attempt u32 | 12 round u32 | 16 first leaf u64 | 24 leaves u64
//!         | 32 entries u32 | 36 crc32c of 0..36 u32 | entries: leaf u64, digest 32 | crc32c of the entries u32
//! ```
//! Little endian. Kind 1, written: the leaves are durable, those without an entry are zero. Kind 2, void: what was said of
//! the leaves holds no more, they are about to be written again. Kind 3, shadow: the leaves are as the shadow was left that the copy
//! began with; no entries.

use std::ops::Range;

use longhaul_common::digest::{Digest, leaf_count};
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round};

pub(crate) const HEADER: usize = 96;
pub(crate) const HEAD: usize = 40;
pub(crate) const ENTRY: usize = 40;

/// Entries of one record at most: bounds what a reader has to believe and hold.
pub(crate) const ENTRIES_MAX: usize = 4096;

const MAGIC: [u8; 8] = *b"LHAPPLY\0";
const FORMAT: u32 = 1;
const RECORD: u32 = u32::from_le_bytes(*b"LHr1");
const ROUND_BITS: u32 = 30;

/// (attempt, round) in one comparable number; zero is older than every other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u64);

impl Version {
    /// `None` for attempt 0 and for rounds from 2^30 on.
    pub(crate) fn new(attempt: Attempt, round: Round) -> Option<Self> {
        let fits = attempt.0 > 0 && round.0 < 1 << ROUND_BITS;
        fits.then(|| Self(u64::from(attempt.0) << ROUND_BITS | u64::from(round.0)))
    }

    /// The number, below 2^62.
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    fn attempt(self) -> u32 {
        (self.0 >> ROUND_BITS) as u32
    }

    fn round(self) -> u32 {
        (self.0 & ((1 << ROUND_BITS) - 1)) as u32
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Written,
    Void,
    Shadow,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Written => 1,
            Self::Void => 2,
            Self::Shadow => 3,
        }
    }
}

/// One statement about a range of leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) kind: Kind,
    pub(crate) version: Version,
    pub(crate) leaves: Range<u64>,
    /// Ascending, inside `leaves`, at most `ENTRIES_MAX`.
    pub(crate) digests: Vec<(u64, Digest)>,
}

/// What a log belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) job: JobId,
    pub(crate) disk: DiskIndex,
    pub(crate) size: u64,
    /// Digest of what names the very file or device.
    pub(crate) bound: Digest,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn digest_at(bytes: &[u8], at: usize) -> Option<Digest> {
    Some(Digest(bytes.get(at..at + 32)?.try_into().ok()?))
}

impl Header {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        out.extend_from_slice(&self.disk.0.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(self.job.to_string().as_bytes());
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&self.bound.0);
        out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out
    }

    /// `None` for anything that is not a whole, undamaged header of this format.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let intact = bytes.len() == HEADER
            && bytes[..8] == MAGIC
            && u32_at(bytes, 8)? == FORMAT
            && u32_at(bytes, 88)? == crc32c::crc32c(&bytes[..88]);
        if !intact {
            return None;
        }
        Some(Self {
            job: std::str::from_utf8(&bytes[16..48]).ok()?.parse().ok()?,
            disk: DiskIndex(u16::from_le_bytes(bytes[12..14].try_into().ok()?)),
            size: u64_at(bytes, 48)?,
            bound: digest_at(bytes, 56)?,
        })
    }

    pub(crate) fn leaves(&self) -> u64 {
        leaf_count(self.size)
    }
}

impl Record {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&RECORD.to_le_bytes());
        out.extend_from_slice(&[self.kind.code(), 0, 0, 0]);
        out.extend_from_slice(&self.version.attempt().to_le_bytes());
        out.extend_from_slice(&self.version.round().to_le_bytes());
        out.extend_from_slice(&self.leaves.start.to_le_bytes());
        out.extend_from_slice(&(self.leaves.end - self.leaves.start).to_le_bytes());
        out.extend_from_slice(&(self.digests.len() as u32).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&out[start..]).to_le_bytes());
        let body = out.len();
        for (leaf, digest) in &self.digests {
            out.extend_from_slice(&leaf.to_le_bytes());
            out.extend_from_slice(&digest.0);
        }
        out.extend_from_slice(&crc32c::crc32c(&out[body..]).to_le_bytes());
    }
}

/// A record's checked beginning: what follows it, and how long that is.
pub(crate) struct Head {
    record: Record,
    entries: usize,
}

impl Head {
    /// `None` where the bytes are damaged or say something impossible of a disk with `leaves` leaves.
    pub(crate) fn decode(bytes: &[u8; HEAD], leaves: u64) -> Option<Self> {
        if u32_at(bytes, 0)? != RECORD || u32_at(bytes, 36)? != crc32c::crc32c(&bytes[..36]) {
            return None;
        }
        let kind = match bytes[4..8] {
            [1, 0, 0, 0] => Kind::Written,
            [2, 0, 0, 0] => Kind::Void,
            [3, 0, 0, 0] => Kind::Shadow,
            _ => return None,
        };
        let version = Version::new(Attempt(u32_at(bytes, 8)?), Round(u32_at(bytes, 12)?))?;
        let (first, count) = (u64_at(bytes, 16)?, u64_at(bytes, 24)?);
        let end = first
            .checked_add(count)
            .filter(|end| count > 0 && *end <= leaves)?;
        let entries = usize::try_from(u32_at(bytes, 32)?)
            .ok()
            .filter(|entries| *entries <= ENTRIES_MAX && (kind != Kind::Shadow || *entries == 0))?;
        let record = Record {
            kind,
            version,
            leaves: first..end,
            digests: Vec::new(),
        };
        Some(Self { record, entries })
    }

    /// Bytes behind the head.
    pub(crate) fn body_len(&self) -> usize {
        self.entries * ENTRY + 4
    }

    /// The whole record, from the `body_len` bytes behind the head.
    pub(crate) fn complete(mut self, body: &[u8]) -> Option<Record> {
        let (entries, crc) = body.split_at_checked(self.entries * ENTRY)?;
        if u32_at(crc, 0)? != crc32c::crc32c(entries) {
            return None;
        }
        let mut next = self.record.leaves.start;
        for entry in entries.chunks_exact(ENTRY) {
            let leaf = u64_at(entry, 0)?;
            if leaf < next || leaf >= self.record.leaves.end {
                return None;
            }
            next = leaf + 1;
            self.record.digests.push((leaf, digest_at(entry, 8)?));
        }
        Some(self.record)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8], leaves: u64) -> Option<Record> {
        let head = Head::decode(bytes.get(..HEAD)?.try_into().ok()?, leaves)?;
        let body = bytes.get(HEAD..HEAD + head.body_len())?;
        head.complete(body)
    }

    fn record() -> Record {
        Record {
            kind: Kind::Written,
            version: Version::new(Attempt(3), Round(7)).unwrap(),
            leaves: 10..20,
            digests: vec![(10, Digest::of(b"a")), (19, Digest::of(b"b"))],
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut bytes = Vec::new();
        record().encode(&mut bytes);
        assert_eq!(decode(&bytes, 20), Some(record()));
        assert_eq!(decode(&bytes, 19), None);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bytes, 20), None, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        let header = Header {
            job: JobId::random(),
            disk: DiskIndex(2),
            size: 1 << 40,
            bound: Digest::of(b"x"),
        };
        let mut bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Some(header));
        for bit in 0..92 * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&bytes), None, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_shadow_is_stated_without_digests() {
        let shadow = Record {
            kind: Kind::Shadow,
            digests: Vec::new(),
            ..record()
        };
        let mut bytes = Vec::new();
        shadow.encode(&mut bytes);
        assert_eq!(decode(&bytes, 20), Some(shadow));
        let forged = Record {
            kind: Kind::Shadow,
            ..record()
        };
        let mut bytes = Vec::new();
        forged.encode(&mut bytes);
        assert_eq!(decode(&bytes, 20), None);
    }

    #[test]
    fn versions_compare_by_attempt_then_round() {
        let version = |attempt, round| Version::new(Attempt(attempt), Round(round));
        assert!(version(1, (1 << 30) - 1) < version(2, 0) && version(2, 0) < version(2, 1));
        assert!(version(0, 1).is_none() && version(1, 1 << 30).is_none());
        assert!(version(u32::MAX, (1 << 30) - 1).unwrap().bits() < 1 << 62);
        assert!(Version::default() < version(1, 0).unwrap());
    }

    proptest! {
        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(decode(&bytes, u64::MAX), None);
            prop_assert_eq!(Header::decode(&bytes), None);
        }

        /// Even with right checksums, what is said must be possible.
        #[test]
        fn forged_heads_are_bounded(mut head in any::<[u8; 36]>(), kind in 1u8..4) {
            head[..4].copy_from_slice(&RECORD.to_le_bytes());
            head[4..8].copy_from_slice(&[kind, 0, 0, 0]);
            let mut bytes = [0; HEAD];
            bytes[..36].copy_from_slice(&head);
            bytes[36..].copy_from_slice(&crc32c::crc32c(&head).to_le_bytes());
            if let Some(head) = Head::decode(&bytes, 1 << 20) {
                prop_assert!(head.record.leaves.end <= 1 << 20 && head.entries <= ENTRIES_MAX);
            }
        }
    }
}
