//! How metadata of an ext file system is read, and in which words its faults are told.
//!
//! Owns the one door through which every byte of metadata comes (nothing else in `ext` touches the volume) and the making of
//! errors that name the file system. Leaves alone what the bytes mean. The volume may be one with a committed journal laid over it
//! (`journal::overlay`); nothing here knows.

use std::io;

use crate::disk::ReadAt;
use crate::disk::fs::Unproven;

/// The name of the file system at hand, and the errors that carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind(pub(super) &'static str);

impl Kind {
    pub(super) fn not_clean(self, what: impl Into<String>) -> Unproven {
        Unproven::NotClean {
            kind: self.0,
            what: what.into(),
        }
    }

    pub(super) fn unknown(self, what: impl Into<String>) -> Unproven {
        Unproven::UnknownFeature {
            kind: self.0,
            what: what.into(),
        }
    }

    pub(super) fn in_use(self, what: impl Into<String>) -> Unproven {
        Unproven::InUse {
            kind: self.0,
            what: what.into(),
        }
    }

    pub(super) fn checksum(self, what: impl Into<String>) -> Unproven {
        Unproven::Checksum {
            kind: self.0,
            what: what.into(),
        }
    }

    pub(super) fn inconsistent(self, what: impl Into<String>) -> Unproven {
        Unproven::Inconsistent {
            kind: self.0,
            what: what.into(),
        }
    }

    fn unreadable(self, source: io::Error) -> Unproven {
        Unproven::Read { kind: self.0, source }
    }
}

/// The metadata of one volume.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a> {
    volume: &'a dyn ReadAt,
}

impl<'a> Metadata<'a> {
    pub(super) fn new(volume: &'a dyn ReadAt) -> Self {
        Self { volume }
    }

    /// Bytes the volume holds.
    pub(super) fn size(&self) -> u64 {
        self.volume.size()
    }

    /// Fills `buf` from byte `offset` of the volume on.
    pub(super) fn read(&self, kind: Kind, offset: u64, buf: &mut [u8]) -> Result<(), Unproven> {
        self.volume
            .read_exact_at(buf, offset)
            .map_err(|source| kind.unreadable(source))
    }
}

/// The little-endian 16-bit number at `at`, which the caller keeps inside `bytes`.
pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The little-endian 32-bit number at `at`, which the caller keeps inside `bytes`.
pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The little-endian 64-bit number at `at`, which the caller keeps inside `bytes`.
pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}
