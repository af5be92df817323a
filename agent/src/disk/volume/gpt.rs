//! GUID partition tables (UEFI 2.10, section 5.3): two headers, two copies of the entry array, each with a CRC-32.
//!
//! Owns decoding for one sector size and the decision which copy counts. Leaves the protective MBR to `table`. Promises that
//! entries are given only if their checksum holds and no intact copy contradicts them; at most 1 MiB is read as an array. A copy
//! that sits in a place which the other copy does not vouch for is not believed: disks keep old tables at their end.

use std::io;

use longhaul_common::extent::Extent;

use super::{field, read};
use crate::disk::ReadAt;

/// 128 entries of 128 bytes are usual; Linux reads up to 4 MiB.
const ARRAY_LIMIT: u64 = 1 << 20;

/// One used entry, in sectors; both ends belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Counted from 1, by its place in the array.
    pub(crate) number: u32,
    pub(crate) kind: [u8; 16],
    pub(crate) first: u64,
    pub(crate) last: u64,
}

/// A table that can be believed.
#[derive(Debug)]
pub(crate) struct Found {
    /// Bytes of a sector: 512 or 4096.
    pub(crate) sector: u64,
    pub(crate) entries: Vec<Entry>,
    /// Where the headers and arrays lie, in bytes of the disk.
    pub(crate) reserved: Vec<Extent>,
    /// What is wrong with the copy that was not used.
    pub(crate) note: Option<String>,
}

/// What one sector size shows.
#[derive(Debug)]
pub(crate) enum Gpt {
    Absent,
    /// There is one, and it cannot be believed.
    Broken(String),
    Found(Found),
}

/// Why a header or its array does not count.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GptError {
    #[error("no signature")]
    Signature,
    #[error("a wrong header checksum")]
    HeaderChecksum,
    #[error("impossible header fields")]
    Header,
    #[error("a wrong entry array checksum")]
    ArrayChecksum,
    #[error("an entry that ends before it starts")]
    Entry,
    #[error("sectors that cannot be read")]
    Read(#[from] io::Error),
}

#[derive(Clone, Copy, Debug)]
struct Header {
    at: u64,
    other: u64,
    usable: (u64, u64),
    guid: [u8; 16],
    array: u64,
    count: u32,
    entry_size: u32,
    array_crc: u32,
}

/// Looks for a table with sectors of `sector` bytes.
pub(crate) fn find(disk: &dyn ReadAt, sector: u64) -> Gpt {
    let reader = Reader { disk, sector };
    match reader.header(1) {
        Ok(primary) => match reader.by_primary(primary) {
            Ok(found) => Gpt::Found(found),
            Err(why) => Gpt::Broken(why),
        },
        Err(GptError::Signature) => match reader.by_backup() {
            Some(found) => Gpt::Found(found),
            None => Gpt::Absent,
        },
        Err(why) => match reader.by_backup() {
            Some(found) => Gpt::Found(found),
            None => Gpt::Broken(format!(
                "the primary GPT header has {why}, and no backup vouches for it"
            )),
        },
    }
}

struct Reader<'a> {
    disk: &'a dyn ReadAt,
    sector: u64,
}

impl Reader<'_> {
    /// The primary header is intact. Its array may be damaged: then the backup it names, with the same checksum, has the entries.
    fn by_primary(&self, primary: Header) -> Result<Found, String> {
        let backup = self.header(primary.other);
        if let Ok(backup) = &backup
            && !primary.agrees(backup)
        {
            return Err("the primary and the backup GPT contradict each other".into());
        }
        let (bytes, note) = match (self.array(&primary), backup) {
            (Ok(bytes), Ok(backup)) => (
                bytes,
                self.array(&backup)
                    .err()
                    .map(|e| format!("the backup GPT has {e}")),
            ),
            (Ok(bytes), Err(e)) => (bytes, Some(format!("the backup GPT has {e}"))),
            (Err(e), Ok(backup)) => match self.array(&backup) {
                Ok(bytes) => (
                    bytes,
                    Some(format!("the primary GPT has {e}; the backup is intact")),
                ),
                Err(_) => return Err(format!("both copies of the GPT have {e}")),
            },
            (Err(e), Err(other)) => return Err(format!("the primary GPT has {e}, the backup {other}")),
        };
        self.found(&primary, &bytes, note)
    }

    /// The primary header is gone. The backup in the last sector counts only if the primary array is still the one it describes.
    fn by_backup(&self) -> Option<Found> {
        let last = (self.disk.size() / self.sector).checked_sub(1)?;
        let backup = self.header(last).ok()?;
        let primary = Header {
            at: 1,
            other: last,
            array: 2,
            ..backup
        };
        if backup.other != 1 || self.array(&backup).is_err() {
            return None;
        }
        let bytes = self.array(&primary).ok()?;
        let note = "the primary GPT header is damaged; the backup and both arrays are intact".to_owned();
        self.found(&primary, &bytes, Some(note)).ok()
    }

    fn header(&self, at: u64) -> Result<Header, GptError> {
        let offset = at.checked_mul(self.sector).ok_or(GptError::Header)?;
        if offset
            .checked_add(self.sector)
            .is_none_or(|end| end > self.disk.size())
        {
            return Err(GptError::Signature);
        }
        let bytes = read(self.disk, offset, self.sector as usize)?;
        let header = decode_header(&bytes)?;
        match header.at == at {
            true => Ok(header),
            false => Err(GptError::Header),
        }
    }

    fn array(&self, header: &Header) -> Result<Vec<u8>, GptError> {
        let len = header.array_len().ok_or(GptError::Header)?;
        let offset = header.array.checked_mul(self.sector).ok_or(GptError::Header)?;
        let bytes = read(self.disk, offset, len)?;
        match crc32fast::hash(&bytes) == header.array_crc {
            true => Ok(bytes),
            false => Err(GptError::ArrayChecksum),
        }
    }

    fn found(&self, primary: &Header, array: &[u8], note: Option<String>) -> Result<Found, String> {
        let entries =
            decode_entries(array, primary.entry_size as usize).map_err(|why| format!("the GPT has {why}"))?;
        let bytes = array.len() as u64;
        let sectors = |start: u64, bytes: u64| {
            let start = start.saturating_mul(self.sector);
            Extent::between(start, start.saturating_add(bytes.next_multiple_of(self.sector)))
        };
        let mut reserved = vec![sectors(0, 2 * self.sector), sectors(primary.array, bytes)];
        // The backup array is known to lie right before its header only by custom; the header itself says where.
        if let Ok(backup) = self.header(primary.other) {
            reserved.extend([sectors(backup.at, self.sector), sectors(backup.array, bytes)]);
        }
        Ok(Found {
            sector: self.sector,
            entries,
            reserved,
            note,
        })
    }
}

impl Header {
    fn array_len(&self) -> Option<usize> {
        let len = u64::from(self.count) * u64::from(self.entry_size);
        (len <= ARRAY_LIMIT).then_some(len as usize)
    }

    /// Whether `backup` describes the same table.
    fn agrees(&self, backup: &Self) -> bool {
        let same = |h: &Self| (h.usable, h.guid, h.count, h.entry_size, h.array_crc);
        backup.other == self.at && same(self) == same(backup)
    }
}

fn decode_header(bytes: &[u8]) -> Result<Header, GptError> {
    if bytes.get(..8) != Some(b"EFI PART") {
        return Err(GptError::Signature);
    }
    let u32_at = |at| u32::from_le_bytes(field(bytes, at));
    let u64_at = |at| u64::from_le_bytes(field(bytes, at));
    let size = u32_at(12) as usize;
    if size < 92 || size > bytes.len() {
        return Err(GptError::Header);
    }
    let mut plain = bytes[..size].to_vec();
    plain[16..20].fill(0);
    if crc32fast::hash(&plain) != u32_at(16) {
        return Err(GptError::HeaderChecksum);
    }
    let header = Header {
        at: u64_at(24),
        other: u64_at(32),
        usable: (u64_at(40), u64_at(48)),
        guid: field(bytes, 56),
        array: u64_at(72),
        count: u32_at(80),
        entry_size: u32_at(84),
        array_crc: u32_at(88),
    };
    let sane = u32_at(8) == 0x0001_0000
        && (128..=4096).contains(&header.entry_size)
        && header.entry_size.is_power_of_two()
        && header.array_len().is_some()
        && header.usable.0 <= header.usable.1;
    if sane { Ok(header) } else { Err(GptError::Header) }
}

fn decode_entries(array: &[u8], entry_size: usize) -> Result<Vec<Entry>, GptError> {
    let all = (1..)
        .zip(array.chunks_exact(entry_size))
        .map(|(number, bytes)| Entry {
            number,
            kind: field(bytes, 0),
            first: u64::from_le_bytes(field(bytes, 32)),
            last: u64::from_le_bytes(field(bytes, 40)),
        });
    let used: Vec<Entry> = all.filter(|entry| entry.kind != [0; 16]).collect();
    match used.iter().any(|entry| entry.last < entry.first) {
        true => Err(GptError::Entry),
        false => Ok(used),
    }
}
