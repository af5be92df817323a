//! Disk images on this host: how they are read, what of them is proven free, how a copy is written.
//!
//! Owns everything that touches an image. Runs on threads of its own, never on the async runtime: all calls here may block.
//! Leaves networks, jobs and credit to `session`.

pub mod apply;
pub mod free_map;
pub mod fs;
pub(crate) mod have;
pub mod image;
pub mod live_free;
pub(crate) mod reader;
pub mod roots;
pub mod scan;
pub(crate) mod spans;
pub mod volume;

use std::io;

/// Something of a fixed size that can be read at any place: an image, a partition, a logical volume, a piece of memory in tests.
pub trait ReadAt: Send + Sync {
    /// Bytes that can be read.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset` on. Reading beyond `size` is an error of kind `UnexpectedEof`, never a short read.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = start.checked_add(buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        let from = self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(from);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn size(&self) -> u64 {
        self.as_slice().size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buf, offset)
    }
}
