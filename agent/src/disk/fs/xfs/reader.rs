//! The one place through which XFS metadata is read.
//!
//! Owns reading and, on version 5, the check that a piece of metadata is what it says: checksum (CRC-32C), UUID, and a log
//! sequence number (LSN) not newer than the log. Leaves alone what the fields mean. Promises that fields outside a buffer read
//! as zero instead of panicking; callers read at constant places of buffers that are long enough.

use super::geometry::Geometry;
use super::{KIND, Unproven, checksum, inconsistent};
use crate::disk::ReadAt;

/// Reads metadata of one volume.
pub(super) struct Reader<'a> {
    volume: &'a dyn ReadAt,
    pub(super) geometry: &'a Geometry,
    /// The UUID in every piece of metadata; `None` on version 4, which has neither UUIDs nor checksums in metadata.
    pub(super) metadata_uuid: Option<[u8; 16]>,
    newest: Lsn,
}

/// A place in the log: (cycle, block), in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lsn(pub(super) u64);

impl Lsn {
    pub(super) fn new(cycle: u32, block: u32) -> Self {
        Self(u64::from(cycle) << 32 | u64::from(block))
    }
}

/// Metadata written outside any transaction (by growfs) carries this instead of a place in the log.
const LSN_NONE: u64 = u64::MAX;

/// Where a piece of version 5 metadata keeps its own proof, in bytes from its start.
pub(super) struct Seal {
    pub(super) crc: usize,
    pub(super) uuid: usize,
    pub(super) lsn: usize,
}

impl<'a> Reader<'a> {
    /// Refuses nothing for its LSN until [`Self::allow_up_to`] says where the log ends.
    pub(super) fn new(
        volume: &'a dyn ReadAt,
        geometry: &'a Geometry,
        metadata_uuid: Option<[u8; 16]>,
    ) -> Self {
        Self {
            volume,
            geometry,
            metadata_uuid,
            newest: Lsn(LSN_NONE),
        }
    }

    /// From now on, metadata with an LSN beyond `head` is refused, as Linux does: it comes from another life of this log.
    pub(super) fn allow_up_to(&mut self, head: Lsn, superblock: Option<Lsn>) -> Result<(), Unproven> {
        self.newest = head;
        superblock.map_or(Ok(()), |lsn| self.check_lsn("superblock", lsn))
    }

    /// Fills `buf` from byte `offset` on.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), Unproven> {
        read_at(self.volume, buf, offset)
    }

    /// Checks the seal of one piece of metadata; does nothing on version 4.
    pub(super) fn check(&self, what: &str, bytes: &[u8], seal: &Seal) -> Result<(), Unproven> {
        let Some(expected) = self.metadata_uuid else {
            return Ok(());
        };
        if !crc_matches(bytes, seal.crc) {
            return Err(checksum(what));
        }
        if uuid(bytes, seal.uuid) != expected {
            return Err(inconsistent(format!("{what} belongs to another file system")));
        }
        self.check_lsn(what, Lsn(be64(bytes, seal.lsn)))
    }

    fn check_lsn(&self, what: &str, lsn: Lsn) -> Result<(), Unproven> {
        if lsn > self.newest && lsn.0 != LSN_NONE {
            return Err(inconsistent(format!("{what} is newer than the log")));
        }
        Ok(())
    }
}

/// Fills `buf` from byte `offset` of `volume` on.
pub(super) fn read_at(volume: &dyn ReadAt, buf: &mut [u8], offset: u64) -> Result<(), Unproven> {
    volume
        .read_exact_at(buf, offset)
        .map_err(|source| Unproven::Read { kind: KIND, source })
}

/// Whether `bytes` have the CRC-32C that they carry, little-endian, at byte `at`; the field counts as zero.
pub(super) fn crc_matches(bytes: &[u8], at: usize) -> bool {
    let (Some(before), Some(after)) = (bytes.get(..at), bytes.get(at + 4..)) else {
        return false;
    };
    let crc = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after);
    crc.swap_bytes() == be32(bytes, at)
}

pub(super) fn byte(bytes: &[u8], at: usize) -> u8 {
    array(bytes, at, u8::from_be_bytes)
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    array(bytes, at, u16::from_be_bytes)
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    array(bytes, at, u32::from_be_bytes)
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    array(bytes, at, u64::from_be_bytes)
}

pub(super) fn uuid(bytes: &[u8], at: usize) -> [u8; 16] {
    array(bytes, at, |uuid| uuid)
}

fn array<const N: usize, T: Default>(bytes: &[u8], at: usize, make: fn([u8; N]) -> T) -> T {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk::<N>());
    found.map_or_else(T::default, |array| make(*array))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crc_covers_every_byte_but_its_own() {
        let mut bytes: Vec<u8> = (0..=255).collect();
        bytes[100..104].fill(0);
        let crc = crc32c::crc32c(&bytes);
        bytes[100..104].copy_from_slice(&crc.to_le_bytes());
        assert!(crc_matches(&bytes, 100));
        for at in 0..bytes.len() {
            bytes[at] ^= 0x10;
            assert!(!crc_matches(&bytes, 100), "byte {at}");
            bytes[at] ^= 0x10;
        }
        assert!(!crc_matches(&bytes, 253));
    }

    #[test]
    fn fields_outside_a_buffer_read_as_zero() {
        assert_eq!(be32(&[0, 0, 1, 2, 3], 1), 0x0001_0203);
        assert_eq!(be32(&[1, 2, 3, 4], 1), 0);
        assert_eq!(be64(&[], usize::MAX), 0);
    }
}
