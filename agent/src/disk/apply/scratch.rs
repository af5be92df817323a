//! An empty stand-in for a copy that is not there yet, so that a QEMU can be started on it for a moment.
//!
//! Owns its name, beside the copy's, and its removal. Promises that it holds no data and takes no room, that nothing that exists is
//! opened or replaced, and that it is gone when it is dropped; one that a crash left is found by its name.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::place::{Dir, dress};
use super::qcow2_server;
use super::{TargetError, TargetFormat, TargetOptions};

/// What its name begins with.
const PREFIX: &str = ".longhaul-try-";

/// A stand-in.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Where the stand-in of a copy lies; `None` for a block device, which is there already.
    pub fn path_of(options: &TargetOptions) -> Option<PathBuf> {
        let folder = options.path.parent()?;
        let name = format!("{PREFIX}{}-{}", options.job.short(), options.disk.0);
        let found = std::fs::metadata(&options.path);
        let is_device = found.is_ok_and(|found| found.file_type().is_block_device());
        (!is_device).then(|| folder.join(name))
    }

    /// Makes it, as large as the disk. Blocks.
    ///
    /// # Errors
    /// `Io` where the folder cannot be written; what `qemu-img` says.
    pub fn create(options: &TargetOptions, path: &Path, size: u64) -> Result<Self, TargetError> {
        Self::remove_left(path);
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(TargetError::refused(
                path,
                "it has no folder: write the whole path",
            ));
        };
        let dir = Dir::open(folder)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&dir.fd, name, flags, Mode::from_raw_mode(0o600));
        let file = File::from(fd.map_err(TargetError::during("create", path))?);
        let scratch = Self {
            path: path.to_owned(),
        };
        match options.format {
            TargetFormat::Raw => file.set_len(size).map_err(TargetError::during("size", path))?,
            TargetFormat::Qcow2 => {
                let sparse = TargetOptions {
                    preallocate: false,
                    ..options.clone()
                };
                qcow2_server::create(&sparse, path, size)?;
            }
        }
        dress(&file, path, options)?;
        Ok(scratch)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what a crash left; only a file with such a name is touched.
    pub fn remove_left(path: &Path) {
        let ours = path
            .file_name()
            .is_some_and(|name| name.as_bytes().starts_with(PREFIX.as_bytes()));
        if ours {
            // Gone already: fine.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        Self::remove_left(&self.path);
    }
}
