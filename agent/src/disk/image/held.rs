//! One file of an image, held for the time of the copy: open, locked, and known well enough to notice a
//! change.
//!
//! Owns the refusal of files that others use, and the detection of writes that happened all the same. Leaves
//! alone what the file contains. Every file of a chain is held: a backing file may be changed as well.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, SeekFrom};

use super::error::ImageError;
use super::holders::{self, Holder};
use super::locks::{self, Locked};

/// How long a process must have a file open for writing to count as its user.
const WRITER_PATIENCE: Duration = Duration::from_secs(2);

/// A file that is held.
#[derive(Debug)]
pub(super) struct HeldFile {
    path: PathBuf,
    /// The same place free of links, as it was when the path was permitted.
    real: PathBuf,
    file: File,
    size: u64,
    print: Fingerprint,
    is_locked: bool,
}

/// What stays the same as long as nobody writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fingerprint {
    File {
        size: u64,
        modified: (i64, i64),
        changed: (i64, i64),
    },
    /// Best effort: the kernel's count of written sectors, where it has one. Writes to a device below this
    /// one are missed.
    Device { size: u64, written: Option<u64> },
}

impl HeldFile {
    /// Opens and locks `path`, which was found to mean `real`; refuses what is neither a file nor a block
    /// device, and what somebody else may write to.
    pub(super) fn open(path: &Path, real: &Path) -> Result<Self, ImageError> {
        // Looked at before it is opened: opening a named pipe would wait for its writer.
        let metadata = fs::metadata(path).map_err(ImageError::io("find", path))?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            let what = if metadata.is_dir() {
                "a directory"
            } else {
                "a pipe, socket or character device"
            };
            return Err(ImageError::Kind {
                path: path.to_owned(),
                what,
            });
        }
        let file = if is_device {
            open_device(real, &metadata)?
        } else {
            open_file(real).map_err(ImageError::io("open", path))?
        };
        let metadata = file.metadata().map_err(ImageError::io("examine", path))?;
        let is_locked = refuse_if_used(path, &file, &metadata)?;
        let print = Fingerprint::of(&file).map_err(ImageError::io("examine", path))?;
        // Advice: nothing depends on its success.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        Ok(Self {
            path: path.to_owned(),
            real: real.to_owned(),
            file,
            size: print.size(),
            print,
            is_locked,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The name by which QEMU should open it: free of links, so that none can be turned elsewhere in between.
    pub(super) fn name_for_qemu(&self) -> &Path {
        &self.real
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Size in bytes when it was opened.
    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    pub(super) const fn is_device(&self) -> bool {
        matches!(self.print, Fingerprint::Device { .. })
    }

    /// Whether image locks protect it; false where the file system has none.
    pub(super) const fn is_locked(&self) -> bool {
        self.is_locked
    }

    /// Device and inode number: two paths to the same file have the same.
    pub(super) fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Gives the host's memory back that reading this file has filled.
    pub(super) fn forget_cached(&self) {
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed); // Advice: nothing depends on it.
    }

    /// Refuses with the change where the file is no longer what was opened.
    pub(super) fn unchanged(&self) -> Result<(), ImageError> {
        let now = Fingerprint::of(&self.file).map_err(ImageError::io("examine", &self.path))?;
        let what = self.moved().or_else(|| self.print.difference(&now));
        what.map_or(Ok(()), |what| {
            Err(ImageError::Changed {
                path: self.path.clone(),
                what,
            })
        })
    }

    /// Whether the path leads elsewhere by now.
    fn moved(&self) -> Option<String> {
        let opened = self.file.metadata().ok()?;
        match fs::metadata(&self.path) {
            Ok(found) if self.is_device() && found.rdev() == opened.rdev() => None,
            Ok(found) if !self.is_device() && (found.dev(), found.ino()) == (opened.dev(), opened.ino()) => {
                None
            }
            Ok(_) => Some("another file took its place".into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some("it was removed or renamed".into()),
            Err(error) => Some(format!("it can no longer be found ({error})")),
        }
    }
}

/// Opens a file, not following a link that took its place since the path was resolved.
fn open_file(real: &Path) -> io::Result<File> {
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    File::options().read(true).custom_flags(no_follow).open(real)
}

/// Opens a block device exclusively: fails while it is mounted or part of another device, and bars that while
/// it is open.
fn open_device(path: &Path, metadata: &Metadata) -> Result<File, ImageError> {
    let exclusive = rustix::fs::OFlags::EXCL.bits() as i32;
    match File::options().read(true).custom_flags(exclusive).open(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(ImageError::InUse {
            path: path.to_owned(),
            holder: holders::of_device(metadata.rdev()),
            what: "it is mounted or part of another device".into(),
        }),
        other => other.map_err(ImageError::io("open", path)),
    }
}

/// Locks the file, and looks for users who take no locks. Gives whether locks exist on this file system.
fn refuse_if_used(path: &Path, file: &File, metadata: &Metadata) -> Result<bool, ImageError> {
    let in_use = |holder: String, what: &str| ImageError::InUse {
        path: path.to_owned(),
        holder,
        what: what.to_owned(),
    };
    let locked = locks::claim_for_reading(file).map_err(ImageError::io("lock", path))?;
    if let Locked::Conflict(what) = locked {
        let holders = holders::processes(path, metadata);
        let holder = holders
            .iter()
            .find(|holder| holder.locks && holder.writes)
            .or_else(|| holders.iter().find(|holder| holder.locks));
        return Err(in_use(
            holder.map_or_else(|| "another program".into(), ToString::to_string),
            what,
        ));
    }
    if let Some(device) = holders::writable_loop(metadata) {
        return Err(in_use(
            device.display().to_string(),
            "the loop device may write to it (losetup -d ends that)",
        ));
    }
    if let Some(writer) = lasting_writer(path, metadata) {
        return Err(in_use(writer.to_string(), "it has it open for writing"));
    }
    Ok(locked == Locked::Yes)
}

/// A process that has the file open for writing all through the time that is given to those who only look (a
/// new process that still has its parent's files, a tool that tries devices).
fn lasting_writer(path: &Path, metadata: &Metadata) -> Option<Holder> {
    let writers = || {
        holders::processes(path, metadata)
            .into_iter()
            .filter(|holder| holder.writes)
    };
    let mut suspects: Vec<_> = writers().collect();
    let deadline = Instant::now() + WRITER_PATIENCE;
    while !suspects.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        let still: Vec<_> = writers().collect();
        suspects.retain(|suspect| still.contains(suspect));
    }
    suspects.into_iter().next()
}

impl Fingerprint {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.file_type().is_block_device() {
            return Ok(Self::File {
                size: metadata.size(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                changed: (metadata.ctime(), metadata.ctime_nsec()),
            });
        }
        // Writes that still wait in memory would be counted later and look like new ones.
        rustix::fs::fsync(file)?;
        let size = rustix::fs::seek(file, SeekFrom::End(0))?;
        Ok(Self::Device {
            size,
            written: holders::written_sectors(file),
        })
    }

    const fn size(&self) -> u64 {
        match self {
            Self::File { size, .. } | Self::Device { size, .. } => *size,
        }
    }

    fn difference(&self, now: &Self) -> Option<String> {
        if self.size() != now.size() {
            return Some(format!(
                "its size went from {} to {} bytes",
                self.size(),
                now.size()
            ));
        }
        match (self, now) {
            (
                Self::File {
                    modified, changed, ..
                },
                Self::File {
                    modified: modified_now,
                    changed: changed_now,
                    ..
                },
            ) => {
                if modified != modified_now {
                    let (before, after) = (stamp(*modified), stamp(*modified_now));
                    return Some(format!(
                        "it was written to (modified at {after}, before that at {before})"
                    ));
                }
                (changed != changed_now).then(|| {
                    "its owner, mode or links were changed, or it was written to and its time set back".into()
                })
            }
            (
                Self::Device {
                    written: Some(before),
                    ..
                },
                Self::Device {
                    written: Some(after), ..
                },
            ) => {
                let bytes = after.wrapping_sub(*before).wrapping_mul(512);
                (before != after).then(|| format!("{bytes} bytes were written to it"))
            }
            _ => None,
        }
    }
}

/// Seconds since 1970, as `stat -c %Y` and `date -d @…` take them.
fn stamp((seconds, nanoseconds): (i64, i64)) -> String {
    format!("@{seconds}.{nanoseconds:09}")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn change_after(change: impl FnOnce(&Path)) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        fs::write(&path, [7; 5000]).unwrap();
        let held = HeldFile::open(&path, &path).unwrap();
        held.unchanged().unwrap();
        std::thread::sleep(Duration::from_millis(20)); // File times tick slower than this program runs.
        change(&path);
        held.unchanged().unwrap_err().to_string()
    }

    #[test]
    fn every_change_is_named() {
        let written = change_after(|path| {
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .write_all(b"x")
                .unwrap();
        });
        assert!(written.contains("it was written to"), "{written}");
        let longer = change_after(|path| fs::write(path, [7; 5001]).unwrap());
        assert!(
            longer.contains("its size went from 5000 to 5001 bytes"),
            "{longer}"
        );
        let removed = change_after(|path| fs::remove_file(path).unwrap());
        assert!(removed.contains("it was removed or renamed"), "{removed}");
        let replaced = change_after(|path| {
            fs::write(path.with_extension("new"), [7; 5000]).unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        });
        assert!(replaced.contains("another file took its place"), "{replaced}");
        let forged = change_after(|path| {
            let file = File::options().write(true).open(path).unwrap();
            let modified = file.metadata().unwrap().modified().unwrap();
            (&file).write_all(b"x").unwrap();
            file.set_modified(modified).unwrap();
        });
        assert!(forged.contains("its time set back"), "{forged}");
    }

    #[test]
    fn only_files_and_block_devices_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let error = HeldFile::open(folder.path(), folder.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("is a directory, neither a regular file nor a block device"),
            "{error}"
        );
        let error = HeldFile::open(Path::new("/dev/zero"), Path::new("/dev/zero"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("character device"), "{error}");
        let none = folder.path().join("none");
        assert!(
            HeldFile::open(&none, &none)
                .unwrap_err()
                .to_string()
                .starts_with("cannot find ")
        );
    }
}
