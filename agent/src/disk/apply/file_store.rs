//! A raw image in a regular file: sparse, or with all its space reserved.
//!
//! Owns how zeros are made (a hole where sparse, a zeroed and still reserved range where preallocated) and the hints that keep the
//! page cache small. Falls back to writing zeros where the file system knows neither.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use longhaul_common::extent::Extent;
use rustix::fs::{Advice, FallocateFlags, SeekFrom};

use super::store::{self, Store};

pub(crate) struct FileStore {
    file: File,
    size: u64,
    preallocated: bool,
}

impl FileStore {
    pub(crate) fn new(file: File, size: u64, preallocated: bool) -> Self {
        Self {
            file,
            size,
            preallocated,
        }
    }
}

impl Store for FileStore {
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        store::write_all(&self.file, parts, offset)
    }

    fn zero(&self, extent: Extent) -> io::Result<()> {
        let how = if self.preallocated {
            FallocateFlags::ZERO_RANGE
        } else {
            FallocateFlags::PUNCH_HOLE
        };
        match rustix::fs::fallocate(
            &self.file,
            how | FallocateFlags::KEEP_SIZE,
            extent.offset(),
            extent.len(),
        ) {
            Err(error) if store::unsupported(error) => store::write_zeros(&self.file, extent),
            done => Ok(done?),
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Extent>> {
        next_data(&self.file, offset, self.size)
    }

    fn start_writeback(&self, extent: Extent) {
        start_writeback(&self.file, extent);
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }
}

/// The file's next range that is no hole. The position that the system keeps for the file is used for nothing else.
pub(crate) fn next_data(file: &File, offset: u64, size: u64) -> io::Result<Option<Extent>> {
    if offset >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(error) if store::unsupported(error) => return Ok(Some(Extent::between(offset, size))),
        start => start?,
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok((start < size).then(|| Extent::between(start, end.min(size))))
}

/// `DONTNEED` starts writing dirty pages without waiting and drops those that are clean: early writeback and a small cache in one.
pub(crate) fn start_writeback(file: &File, extent: Extent) {
    if let Some(len) = std::num::NonZeroU64::new(extent.len()) {
        // Only a hint: a failed write shows in the flush.
        let _ = rustix::fs::fadvise(file, extent.offset(), Some(len), Advice::DontNeed);
    }
}
