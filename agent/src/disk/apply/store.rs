//! What a copy is written into: a sparse or preallocated file, a block device, an image behind an NBD export.
//!
//! Owns the interface and the plain write loop. Stores know nothing of leaves, rounds or logs; they are used by several threads at
//! once, on ranges that do not overlap.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use longhaul_common::extent::Extent;

/// A place of a fixed size for a disk's content. All calls block.
pub(crate) trait Store: Send + Sync {
    /// Writes `parts` one behind the other from `offset` on, completely.
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;

    /// Makes the range read as zeros.
    fn zero(&self, extent: Extent) -> io::Result<()>;

    /// When it returns, everything written before the call survives a crash of the host.
    fn flush(&self) -> io::Result<()>;

    /// Fills `buf` from `offset` on.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// The next range at or behind `offset` that may hold something but zeros; `None` where zeros follow to the end.
    fn next_data(&self, offset: u64) -> io::Result<Option<Extent>>;

    /// Asks for the range to be written out soon, so that the next flush has little left to do. A hint.
    fn start_writeback(&self, extent: Extent);

    /// Makes later reads come from the device instead of memory, as far as the system allows. After a flush.
    fn drop_cache(&self) -> io::Result<()>;

    /// Gives back what the store holds open besides its file.
    fn close(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Zeros to write where a hole is not worth a system call of its own.
pub(crate) static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Linux takes at most 1,024 parts in one call.
const PARTS_MAX: usize = 1024;

/// Writes all of `parts` from `offset` on, in as few calls as the system allows.
pub(crate) fn write_all(file: &File, parts: &[&[u8]], mut offset: u64) -> io::Result<()> {
    let (mut at, mut skip) = (0, 0);
    while at < parts.len() {
        let mut slices: Vec<_> = parts[at..]
            .iter()
            .take(PARTS_MAX)
            .map(|part| IoSlice::new(part))
            .collect();
        slices[0].advance(skip);
        let mut written = match rustix::io::pwritev(file, &slices, offset) {
            Ok(0) if slices.iter().any(|slice| !slice.is_empty()) => {
                return Err(io::ErrorKind::WriteZero.into());
            }
            Ok(written) => written,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        offset += written as u64;
        while at < parts.len() && written >= parts[at].len() - skip {
            written -= parts[at].len() - skip;
            (at, skip) = (at + 1, 0);
        }
        skip += written;
    }
    Ok(())
}

/// Writes zeros by hand, for stores that know no shorter way.
pub(crate) fn write_zeros(file: &File, extent: Extent) -> io::Result<()> {
    let mut at = extent.offset();
    while at < extent.end() {
        let len = (extent.end() - at).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// Whether an error says that the file system or device does not know the operation, so that another way must be tried.
pub(crate) fn unsupported(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    matches!(
        error,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NOTTY | Errno::NODEV
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_parts_land_one_behind_the_other() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        let mut parts: Vec<&[u8]> = bytes.chunks(3).collect();
        parts.insert(5, &[]);
        parts.push(&[]);
        write_all(&file, &parts, 7).unwrap();
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, 7).unwrap();
        assert_eq!(read, bytes);
        write_zeros(&file, Extent::between(8, 10_006)).unwrap();
        file.read_exact_at(&mut read, 7).unwrap();
        assert!(read[1..9_999].iter().all(|b| *b == 0) && read[0] == bytes[0] && read[9_999] == bytes[9_999]);
    }
}
