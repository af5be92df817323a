//! QEMU's image locks, seen from outside: who uses an image, and telling QEMU that we do.
//!
//! QEMU marks the permissions it holds on an image by open-file-description read locks on bytes 100.. and those it denies others
//! on bytes 200.. (block/file-posix.c, `RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE`). File systems without locks count as
//! not in use, as in QEMU itself.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::blink;

/// Both ranges, and the bytes between them that nobody uses.
const FIRST: i64 = 100;
const END: i64 = 264;
/// Behind the byte for consistent reads: permissions to write, and what is denied to others.
const FIRST_WRITE: i64 = 101;

fn range(kind: i32, first: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: first,
        l_len: END - first,
        l_pid: 0,
    }
}

fn without_locks(error: Errno) -> bool {
    matches!(
        error,
        Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS
    )
}

/// Whether a QEMU process (or another agent) has this image open. Our own locks through the same `file` do not count.
pub(crate) fn is_held(file: &File) -> io::Result<bool> {
    is_held_from(file, FIRST)
}

fn is_held_from(file: &File, first: i64) -> io::Result<bool> {
    let mut lock = range(libc::F_WRLCK, first);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        Err(error) if without_locks(error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Denies every use of this image to QEMU until `file` is closed. `false` where somebody uses it.
pub(crate) fn hold(file: &File) -> io::Result<bool> {
    hold_where_free(file, FIRST)
}

/// The same, but somebody who only reads may stay: a QEMU whose VM has left it keeps that of a qcow2 image.
pub(crate) fn hold_beside_readers(file: &File) -> io::Result<bool> {
    hold_where_free(file, FIRST_WRITE)
}

fn hold_where_free(file: &File, first: i64) -> io::Result<bool> {
    // First claim, then test: of two who start at once, at least one sees the other.
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, FIRST))) {
        Ok(_) => {}
        Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
        Err(error) if without_locks(error) => return Ok(true),
        Err(error) => return Err(error.into()),
    }
    let free = blink::wait_out(|| is_held_from(file, first).map(|held| (!held).then_some(())))?.is_some();
    if !free {
        fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, FIRST)))?;
    }
    Ok(free)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_is_held_here_is_refused_to_qemu() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let open = || {
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(image.path())
                .unwrap()
        };
        let (ours, other) = (open(), open());
        let write = || {
            let io = Command::new("qemu-io")
                .args(["-f", "raw", "-c", "write 0 4k"])
                .arg(image.path())
                .output();
            io.expect("qemu-io is needed: install the Debian package qemu-utils")
                .status
                .success()
        };
        assert!(write());
        assert!(hold(&ours).unwrap());
        assert!(!is_held(&ours).unwrap());
        assert!(is_held(&other).unwrap());
        assert!(!write());
        drop(ours);
        assert!(hold(&other).unwrap());
    }

    #[test]
    fn a_reader_may_stay_and_a_writer_may_not() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(image.path()).unwrap();
        let claim = |first: i64| {
            let (file, mut lock) = (open(), range(libc::F_RDLCK, first));
            lock.l_len = 1;
            fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
            file
        };
        let reader = claim(FIRST);
        assert!(!hold(&open()).unwrap());
        assert!(hold_beside_readers(&open()).unwrap());
        let writer = claim(FIRST_WRITE);
        assert!(!hold_beside_readers(&open()).unwrap());
        drop((reader, writer));
        let _jealous = claim(200);
        assert!(!hold_beside_readers(&open()).unwrap());
    }
}
