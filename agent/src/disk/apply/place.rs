//! Where a copy lies: its directory, its temporary name, its final name.
//!
//! Owns every name operation of a target, all relative to a directory opened once, so that no symbolic link is ever followed and a
//! renamed directory changes nothing. Leaves content to the stores. Promises: the final name appears by one rename, after the file is
//! synced, and never replaces anything unless that was allowed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use longhaul_common::digest::Digest;
use longhaul_common::ids::JobId;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, ResolveFlags, StatxFlags, XattrFlags};
use rustix::io::Errno;

use super::{TargetError, TargetOptions, image_lock};

/// A directory held open.
pub(crate) struct Dir {
    pub(crate) fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// Opens `path`, which must hold no symbolic link.
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>, TargetError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut fd = rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS);
        if matches!(fd, Err(Errno::NOSYS | Errno::PERM)) {
            // Kernels before 5.6, and containers that do not know the call.
            fd = rustix::fs::openat(CWD, path, flags | OFlags::NOFOLLOW, Mode::empty());
        }
        if matches!(fd, Err(Errno::LOOP)) {
            return Err(TargetError::refused(
                path,
                "a symbolic link leads there: name the real directory",
            ));
        }
        let fd = fd.map_err(TargetError::during("open the directory", path))?;
        Ok(Arc::new(Self {
            fd,
            path: path.to_owned(),
        }))
    }

    pub(crate) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Makes names that were added, renamed or removed survive a crash.
    pub(crate) fn sync(&self) -> Result<(), TargetError> {
        rustix::fs::fsync(&self.fd).map_err(TargetError::during("sync the directory", &self.path))
    }

    /// Removes a file; content with one that is not there.
    pub(crate) fn remove(&self, name: &OsStr) -> Result<(), TargetError> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            done => done.map_err(TargetError::during("remove", &self.join(name))),
        }
    }

    /// Opens an existing file, never through a symbolic link.
    pub(crate) fn open_file(&self, name: &OsStr, flags: OFlags) -> Result<File, TargetError> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&self.fd, name, flags, Mode::empty());
        file.map(File::from)
            .map_err(TargetError::during("open", &self.join(name)))
    }
}

/// The name of a job's partial copy beside its final name.
pub fn partial_name(name: &str, job: JobId) -> String {
    format!(".{name}.longhaul-{}.partial", job.short())
}

/// The names of a target that is a file.
pub(crate) struct Place {
    pub(crate) dir: Arc<Dir>,
    pub(crate) file_name: OsString,
    pub(crate) partial_name: OsString,
    pub(crate) log_name: String,
}

impl Place {
    pub(crate) fn of(options: &TargetOptions) -> Result<Self, TargetError> {
        let path = &options.path;
        let (Some(parent), Some(name)) = (path.parent().filter(|_| path.is_absolute()), path.file_name())
        else {
            return Err(TargetError::refused(
                path,
                "an absolute path that ends in a file name is needed",
            ));
        };
        let Some(text) = name.to_str() else {
            return Err(TargetError::refused(path, "its name must be UTF-8"));
        };
        let stem = format!(".{text}.longhaul-{}", options.job.short());
        Ok(Self {
            dir: Dir::open(parent)?,
            file_name: name.to_owned(),
            partial_name: partial_name(text, options.job).into(),
            log_name: format!("{stem}.log"),
        })
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join(&self.file_name)
    }

    pub(crate) fn partial_path(&self) -> PathBuf {
        self.dir.join(&self.partial_name)
    }

    /// The file under the final name; `None` where there is none.
    pub(crate) fn final_file(&self) -> Result<Option<File>, TargetError> {
        self.existing(&self.file_name, OFlags::RDONLY)
    }

    /// The partial copy; `None` where there is none.
    pub(crate) fn partial_file(&self) -> Result<Option<File>, TargetError> {
        self.own_file(&self.partial_name)
    }

    /// A file of ours beside it, to be written; `None` where there is none.
    pub(crate) fn own_file(&self, name: &OsStr) -> Result<Option<File>, TargetError> {
        let Some(file) = self.existing(name, OFlags::RDWR)? else {
            return Ok(None);
        };
        let path = self.dir.join(name);
        let links = file
            .metadata()
            .map_err(TargetError::during("examine", &path))?
            .nlink();
        match links {
            1 => Ok(Some(file)),
            _ => Err(TargetError::refused(
                &path,
                "a partial copy or shadow must have one name only: remove the others",
            )),
        }
    }

    fn existing(&self, name: &OsStr, flags: OFlags) -> Result<Option<File>, TargetError> {
        let path = self.dir.join(name);
        let stat = match rustix::fs::statat(&self.dir.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            stat => stat.map_err(TargetError::during("examine", &path))?,
        };
        let refused =
            || TargetError::refused(&path, "something that is no plain file has this name: remove it");
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(refused());
        }
        let file = self.dir.open_file(name, flags)?;
        let kind = file
            .metadata()
            .map_err(TargetError::during("examine", &path))?
            .file_type();
        if !kind.is_file() || kind.is_block_device() {
            return Err(refused());
        }
        Ok(Some(file))
    }

    /// Refuses a final name that is taken, or whose file may be replaced but is in use.
    pub(crate) fn check_final(&self, overwrite: bool) -> Result<(), TargetError> {
        let path = self.path();
        if self.is_linked()? {
            return Ok(());
        }
        if !overwrite && rustix::fs::statat(&self.dir.fd, &self.file_name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
        {
            return Err(TargetError::Exists { path });
        }
        let Some(file) = self.final_file()? else {
            return Ok(());
        };
        if image_lock::is_held(&file).map_err(TargetError::during("examine", &path))? {
            return Err(TargetError::in_use(&path, "a QEMU process holds its image lock"));
        }
        Ok(())
    }

    /// Lets the final name lead to the partial copy, for a QEMU that opens it before it is complete: when the copy takes its name, QEMU's
    /// own idea of its file stays true. Refused where the name is taken, also where it might be replaced: the old file stays until
    /// the new one is complete, and both cannot have the name.
    pub(crate) fn link(&self) -> Result<(), TargetError> {
        if self.is_linked()? {
            return Ok(());
        }
        match rustix::fs::symlinkat(&self.partial_name, &self.dir.fd, &self.file_name) {
            Err(Errno::EXIST) => Err(TargetError::Exists { path: self.path() }),
            done => done.map_err(TargetError::during("link", &self.path())),
        }
    }

    /// Takes that link away, if it is there.
    pub(crate) fn unlink(&self) -> Result<(), TargetError> {
        match self.is_linked()? {
            true => self.dir.remove(&self.file_name),
            false => Ok(()),
        }
    }

    /// Whether the final name is our own link to the partial copy.
    pub(crate) fn is_linked(&self) -> Result<bool, TargetError> {
        match rustix::fs::readlinkat(&self.dir.fd, &self.file_name, Vec::new()) {
            Ok(to) => Ok(OsStr::from_bytes(to.as_bytes()) == self.partial_name),
            Err(Errno::NOENT | Errno::INVAL) => Ok(false),
            Err(error) => Err(TargetError::during("examine", &self.path())(error)),
        }
    }

    /// A new, empty partial copy that only this user may read.
    pub(crate) fn create_partial(&self) -> Result<File, TargetError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir.fd, &self.partial_name, flags, Mode::RUSR | Mode::WUSR);
        file.map(File::from)
            .map_err(TargetError::during("create", &self.partial_path()))
    }

    /// Gives the finished copy its owner, mode, label and final name, durably.
    pub(crate) fn promote(&self, file: &File, options: &TargetOptions) -> Result<PathBuf, TargetError> {
        let (partial, path) = (self.partial_path(), self.path());
        self.check_final(options.overwrite)?;
        dress(file, &partial, options)?;
        file.sync_all().map_err(TargetError::during("sync", &partial))?;
        self.rename(options.overwrite)?;
        self.dir.sync()?;
        Ok(path)
    }

    /// Renames a file of ours beside it to another name that is free.
    pub(crate) fn rename_own(&self, from: &OsStr, to: &OsStr) -> Result<(), TargetError> {
        let (dir, path) = (&self.dir.fd, self.dir.join(to));
        let renamed = match rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
            // File systems without RENAME_NOREPLACE (NFS).
            Err(Errno::INVAL) => rustix::fs::linkat(dir, from, dir, to, AtFlags::empty())
                .and_then(|()| rustix::fs::unlinkat(dir, from, AtFlags::empty())),
            renamed => renamed,
        };
        match renamed {
            Err(Errno::EXIST) => Err(TargetError::Exists { path }),
            renamed => renamed.map_err(TargetError::during("rename a copy to", &path)),
        }?;
        self.dir.sync()
    }

    fn rename(&self, overwrite: bool) -> Result<(), TargetError> {
        let (dir, partial, name) = (&self.dir.fd, &self.partial_name, &self.file_name);
        let path = self.path();
        let renamed = if overwrite || self.is_linked()? {
            rustix::fs::renameat(dir, partial, dir, name)
        } else {
            rustix::fs::renameat_with(dir, partial, dir, name, RenameFlags::NOREPLACE)
        };
        let renamed = match renamed {
            // File systems without RENAME_NOREPLACE (NFS): a second name never replaces anything either.
            Err(Errno::INVAL) if !overwrite => rustix::fs::linkat(dir, partial, dir, name, AtFlags::empty())
                .and_then(|()| rustix::fs::unlinkat(dir, partial, AtFlags::empty())),
            renamed => renamed,
        };
        match renamed {
            Err(Errno::EXIST) => Err(TargetError::Exists { path }),
            renamed => renamed.map_err(TargetError::during("rename the finished copy to", &path)),
        }
    }
}

/// Sets owner, mode and label. The owner first: changing it clears bits of the mode.
pub(crate) fn dress(file: &File, path: &Path, options: &TargetOptions) -> Result<(), TargetError> {
    if let Some((user, group)) = options.owner {
        let (user, group) = (rustix::fs::Uid::from_raw(user), rustix::fs::Gid::from_raw(group));
        rustix::fs::fchown(file, Some(user), Some(group))
            .map_err(TargetError::during("set the owner of", path))?;
    }
    if let Some(mode) = options.mode {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        rustix::fs::fchmod(file, mode).map_err(TargetError::during("set the mode of", path))?;
    }
    if let Some(label) = &options.label {
        // The zero byte belongs to the value, as libselinux writes it.
        let value = [label.as_bytes(), &[0]].concat();
        rustix::fs::fsetxattr(file, "security.selinux", &value, XattrFlags::empty())
            .map_err(TargetError::during("set the SELinux label of", path))?;
    }
    Ok(())
}

/// What tells this very file from another one that takes its name later: number and birth, since numbers are used again.
pub(crate) fn file_identity(file: &File, format: &str, path: &Path) -> Result<Digest, TargetError> {
    let mask = StatxFlags::INO | StatxFlags::BTIME;
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, mask)
        .map_err(TargetError::during("examine", path))?;
    let born = (stat.stx_mask & StatxFlags::BTIME.bits() != 0).then_some(stat.stx_btime);
    let born = born.map(|time| (time.tv_sec, time.tv_nsec)).unwrap_or_default();
    Ok(Digest::of(
        format!("{format} inode {} born {born:?}", stat.stx_ino).as_bytes(),
    ))
}
