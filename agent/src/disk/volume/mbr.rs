//! MBR partition tables: the four entries, and the chain of extended boot records behind an extended one.
//!
//! Owns decoding. Leaves alone what lies in a partition and which table counts (`table`). Promises at most [`LOGICAL_LIMIT`]
//! logical partitions, each record behind the last, so that no chain, however hostile, is followed for ever. A table has no
//! checksum: what does not look exactly as the common tools write it is refused, and its partitions are copied whole.

use std::io;

use super::{field, read};
use crate::disk::ReadAt;

/// An MBR counts sectors of 512 bytes here. Disks of 4096-byte sectors are told apart by `table`.
pub(crate) const SECTOR: u64 = 512;

/// Far above what people make. Linux reads at most 255 partitions.
const LOGICAL_LIMIT: usize = 128;

/// One used entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As Linux numbers them: 1-4, logical ones from 5 on.
    pub(crate) number: u32,
    /// Type byte.
    pub(crate) kind: u8,
    /// First sector, from the disk's start.
    pub(crate) start: u64,
    pub(crate) sectors: u64,
}

impl Entry {
    /// Whether it holds a chain of extended boot records.
    pub(crate) const fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    pub(crate) const fn end(&self) -> u64 {
        self.start + self.sectors
    }
}

/// The used entries of a boot sector; `None` where it holds no table. Linux, too, asks for the signature and for boot flags that
/// are 0 or 0x80: code and texts of a file system's boot sector do not pass.
pub(crate) fn decode(sector: &[u8]) -> Option<Vec<Entry>> {
    if field(sector, 510) != [0x55, 0xaa] {
        return None;
    }
    let slots: Vec<&[u8]> = sector.get(446..510)?.chunks_exact(16).collect();
    if slots.iter().any(|slot| slot[0] & 0x7f != 0) {
        return None;
    }
    let entries = (1..).zip(&slots).map(|(number, slot)| Entry {
        number,
        kind: slot[4],
        start: u32::from_le_bytes(field(slot, 8)).into(),
        sectors: u32::from_le_bytes(field(slot, 12)).into(),
    });
    Some(
        entries
            .filter(|entry| entry.kind != 0 && entry.sectors != 0)
            .collect(),
    )
}

/// The table in the first sector of `volume`, if there is one.
pub(crate) fn primary(volume: &dyn ReadAt) -> io::Result<Option<Vec<Entry>>> {
    match volume.size() < SECTOR {
        true => Ok(None),
        false => Ok(decode(&read(volume, 0, SECTOR as usize)?)),
    }
}

/// The logical partitions of an extended one, and the sectors of their records.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) logical: Vec<Entry>,
    pub(crate) records: Vec<u64>,
}

/// Why a chain of extended boot records cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChainError {
    #[error("the extended boot record at sector {0} is damaged")]
    Record(u64),
    #[error("the extended boot record at sector {0} points outside its extended partition")]
    Outside(u64),
    #[error("the extended boot record at sector {0} does not point forward")]
    Cycle(u64),
    #[error("there are more than {LOGICAL_LIMIT} logical partitions")]
    TooMany,
    #[error("the extended boot record at sector {sector} cannot be read")]
    Read {
        sector: u64,
        #[source]
        source: io::Error,
    },
}

/// Follows the chain inside `extended`. Start sectors in a record count from the record, links from the extended partition.
pub(crate) fn logical(disk: &dyn ReadAt, extended: &Entry) -> Result<Chain, ChainError> {
    let mut chain = Chain::default();
    let mut at = extended.start;
    loop {
        if chain.records.len() == LOGICAL_LIMIT {
            return Err(ChainError::TooMany);
        }
        chain.records.push(at);
        let (data, link) = record(disk, at)?;
        if let Some(data) = data {
            let start = at + data.start;
            let number = 5 + chain.logical.len() as u32;
            let entry = Entry {
                number,
                start,
                ..data
            };
            if data.start == 0 || entry.end() > extended.end() {
                return Err(ChainError::Outside(at));
            }
            chain.logical.push(entry);
        }
        let Some(link) = link else { return Ok(chain) };
        let next = extended.start + link.start;
        if next >= extended.end() {
            return Err(ChainError::Outside(at));
        }
        // Tools that move partitions may leave a chain out of order. It is legal, rare, and not told from a cycle at a glance.
        if next <= at {
            return Err(ChainError::Cycle(at));
        }
        at = next;
    }
}

/// The data entry and the link of the record at sector `at`.
fn record(disk: &dyn ReadAt, at: u64) -> Result<(Option<Entry>, Option<Entry>), ChainError> {
    let bytes =
        read(disk, at * SECTOR, SECTOR as usize).map_err(|source| ChainError::Read { sector: at, source })?;
    let entries = decode(&bytes).ok_or(ChainError::Record(at))?;
    let slot = |number| entries.iter().find(|entry| entry.number == number).copied();
    let (data, link) = (slot(1), slot(2));
    let odd = data.is_some_and(|entry| entry.is_extended())
        || link.is_some_and(|entry| !entry.is_extended())
        || entries.iter().any(|entry| entry.number > 2);
    match odd {
        true => Err(ChainError::Record(at)),
        false => Ok((data, link)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sector with the given entries: (type, start, sectors).
    fn sector(entries: &[(u8, u32, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[510..].copy_from_slice(&[0x55, 0xaa]);
        for (slot, (kind, start, sectors)) in bytes[446..].chunks_exact_mut(16).zip(entries) {
            slot[4] = *kind;
            slot[8..12].copy_from_slice(&start.to_le_bytes());
            slot[12..16].copy_from_slice(&sectors.to_le_bytes());
        }
        bytes
    }

    const EXTENDED: Entry = Entry {
        number: 2,
        kind: 5,
        start: 4,
        sectors: 60,
    };

    fn chain(records: &[(u64, Vec<u8>)]) -> Result<Chain, ChainError> {
        let mut disk = vec![0; 64 * 512];
        for (at, bytes) in records {
            disk[*at as usize * 512..][..512].copy_from_slice(bytes);
        }
        logical(&disk, &EXTENDED)
    }

    #[test]
    fn a_chain_is_followed_in_order() {
        let chain = chain(&[
            (4, sector(&[(0x83, 2, 8), (5, 20, 20)])),
            (24, sector(&[(0, 0, 0), (5, 40, 20)])),
            (44, sector(&[(0x82, 1, 19)])),
        ])
        .unwrap();
        let found: Vec<_> = chain
            .logical
            .iter()
            .map(|e| (e.number, e.kind, e.start, e.sectors))
            .collect();
        assert_eq!(found, [(5, 0x83, 6, 8), (6, 0x82, 45, 19)]);
        assert_eq!(chain.records, [4, 24, 44]);
    }

    #[test]
    fn cycles_and_strays_end_the_chain() {
        let own = chain(&[(4, sector(&[(0x83, 2, 8), (5, 0, 20)]))]);
        assert!(matches!(own, Err(ChainError::Cycle(4))), "{own:?}");
        let back = chain(&[
            (4, sector(&[(0x83, 2, 8), (5, 20, 20)])),
            (24, sector(&[(0x83, 2, 8), (5, 10, 20)])),
        ]);
        assert!(matches!(back, Err(ChainError::Cycle(24))), "{back:?}");
        let out = chain(&[(4, sector(&[(0x83, 2, 8), (5, u32::MAX, 20)]))]);
        assert!(matches!(out, Err(ChainError::Outside(4))), "{out:?}");
        let long = chain(&[(4, sector(&[(0x83, 2, 59)]))]);
        assert!(matches!(long, Err(ChainError::Outside(4))), "{long:?}");
        let torn = chain(&[(4, sector(&[(0x83, 2, 8), (5, 20, 20)]))]);
        assert!(matches!(torn, Err(ChainError::Record(24))), "{torn:?}");
    }

    #[test]
    fn a_chain_without_end_is_cut() {
        let mut disk = vec![0; 2048 * 512];
        for at in 1..2047u32 {
            disk[at as usize * 512..][..512].copy_from_slice(&sector(&[(0, 0, 0), (5, at, 1)]));
        }
        let extended = Entry {
            start: 1,
            sectors: 2047,
            ..EXTENDED
        };
        assert!(matches!(logical(&disk, &extended), Err(ChainError::TooMany)));
    }

    #[test]
    fn a_boot_sector_with_text_is_no_table() {
        let mut bytes = sector(&[(0x83, 1, 1)]);
        bytes[446] = b'D';
        assert!(decode(&bytes).is_none());
        assert!(decode(&bytes[..300]).is_none());
    }
}
