//! How FAT metadata is read: bytes of the volume, and little-endian fields of a structure.
//!
//! Owns every access to the volume. Promises that a read beyond it is an error, never a panic.

use crate::disk::ReadAt;
use crate::disk::fs::Unproven;

/// The volume, with errors in the words of this file system.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    volume: &'a dyn ReadAt,
}

impl<'a> Reader<'a> {
    pub(super) fn new(volume: &'a dyn ReadAt) -> Self {
        Self { volume }
    }

    /// Bytes of the volume.
    pub(super) fn size(&self) -> u64 {
        self.volume.size()
    }

    /// Fills `buf` from byte `offset` of the volume on.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), Unproven> {
        self.volume
            .read_exact_at(buf, offset)
            .map_err(|source| Unproven::Read { kind: "fat", source })
    }
}

/// The 16-bit number at `at`; 0 beyond the end.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at + 2) {
        Some(&[low, high]) => u16::from_le_bytes([low, high]),
        _ => 0,
    }
}

/// The 32-bit number at `at`; 0 beyond the end.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}
