//! Reading raw images: files and block devices, by any number of threads at once.
//!
//! Owns positioned reads and the search for holes. Leaves alone locks and changes (`held`). Promises that
//! reading a large image does not push everything else out of the host's page cache.

use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;

use longhaul_common::extent::Extent;
use rustix::fs::{Advice, SeekFrom};
use rustix::io::Errno;

use super::held::HeldFile;
use super::{Allocation, Run, Runs};
use crate::disk::ReadAt;

/// Reads from this size on are taken as part of a copy, and what they leave in the page cache is given back;
/// smaller ones are metadata that is likely to be read again.
const COPY_READ: usize = 64 * 1024;

/// A raw image.
#[derive(Debug)]
pub(super) struct RawImage<'a>(pub(super) &'a HeldFile);

impl ReadAt for RawImage<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.file().read_exact_at(buf, offset)?;
        if buf.len() >= COPY_READ {
            // Advice: nothing depends on its success.
            let _ = rustix::fs::fadvise(
                self.0.file(),
                offset,
                NonZeroU64::new(buf.len() as u64),
                Advice::DontNeed,
            );
        }
        Ok(())
    }
}

impl RawImage<'_> {
    /// The holes and data of `range`, which lies inside the image. Where the system cannot tell, all is data.
    pub(super) fn allocation(&self, range: Extent) -> io::Result<Vec<Run>> {
        let mut runs = Runs::new(range);
        while !runs.is_complete() {
            let at = runs.end();
            // The answer is the call's result, so threads that share the file's position do not disturb each
            // other.
            let data = match rustix::fs::seek(self.0.file(), SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => range.end(), // Nothing but a hole up to the file's end.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                    runs.push_until(range.end(), Allocation::Data);
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            runs.push_until(data, Allocation::Hole);
            if runs.is_complete() {
                break;
            }
            let hole = match rustix::fs::seek(self.0.file(), SeekFrom::Hole(data)) {
                Ok(hole) if hole > data => hole,
                // Changing under us: call it data; `unchanged` will tell.
                Ok(_) | Err(Errno::NXIO) => range.end(),
                Err(error) => return Err(error.into()),
            };
            runs.push_until(hole, Allocation::Data);
        }
        Ok(runs.finish())
    }
}
