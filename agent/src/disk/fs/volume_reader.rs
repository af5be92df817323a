//! Bytes of a volume, with errors in the words of its file system.
//!
//! Owns every access of the FAT and NTFS readers to their volume. Leaves alone what the bytes mean. Promises that a read beyond the
//! volume is an error, never a panic.

use super::Unproven;
use crate::disk::ReadAt;

/// A volume, read as one kind of file system.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    volume: &'a dyn ReadAt,
    kind: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(volume: &'a dyn ReadAt, kind: &'static str) -> Self {
        Self { volume, kind }
    }

    /// Bytes of the volume.
    pub(super) fn size(&self) -> u64 {
        self.volume.size()
    }

    /// Fills `buf` from byte `offset` of the volume on.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), Unproven> {
        let kind = self.kind;
        self.volume
            .read_exact_at(buf, offset)
            .map_err(|source| Unproven::Read { kind, source })
    }
}
