//! QEMU's image locks: telling whether somebody uses an image, and telling others that we do.
//!
//! Owns the scheme of QEMU's file driver: open-file-description locks on single bytes, always shared ones, so
//! that they also work on files opened for reading. Byte 100 + p is locked by who holds permission p, byte
//! 200 + p by who does not share p with others; testing goes by asking whether an exclusive lock would
//! collide.
//!
//! Promises: what is locked here cannot be opened for writing by any QEMU until the file is closed. Programs
//! that lock nothing are not seen; `holders` and `change` look for those.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

const PERMISSION_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What locking an image came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Locked {
    /// Held until the file is closed.
    Yes,
    /// The file system knows no such locks.
    Unsupported,
    /// Somebody else's use of the image forbids reading it, as the sentence says.
    Conflict(&'static str),
}

/// Claims the image for consistent reading, shared with readers only, as a QEMU that opens it read-only
/// would.
pub(super) fn claim_for_reading(file: &File) -> io::Result<Locked> {
    // First claim, then test: of two who start at once, at least one sees the other.
    for byte in [
        PERMISSION_BASE + CONSISTENT_READ,
        UNSHARED_BASE + WRITE,
        UNSHARED_BASE + RESIZE,
    ] {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&one_byte(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => {
                return Ok(Locked::Conflict("it has locked the whole image for itself"));
            }
            Err(Errno::EINVAL | Errno::ENOLCK | Errno::ENOSYS | Errno::EOPNOTSUPP) => {
                return Ok(Locked::Unsupported);
            }
            Err(error) => return Err(error.into()),
        }
    }
    for (byte, meaning) in [
        (PERMISSION_BASE + WRITE, "it may write to it"),
        (PERMISSION_BASE + RESIZE, "it may resize it"),
        (UNSHARED_BASE + CONSISTENT_READ, "it lets nobody else read it"),
    ] {
        let mut lock = one_byte(libc::F_WRLCK, byte);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        if lock.l_type != libc::F_UNLCK as libc::c_short {
            return Ok(Locked::Conflict(meaning));
        }
    }
    Ok(Locked::Yes)
}

fn one_byte(kind: libc::c_int, start: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(file: &File, kind: libc::c_int, byte: i64) {
        fcntl(file, FcntlArg::F_OFD_SETLK(&one_byte(kind, byte))).unwrap();
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let other = image.reopen().unwrap();
        let ours = File::open(image.path()).unwrap();
        // Another reader, as ours.
        assert_eq!(
            claim_for_reading(&File::open(image.path()).unwrap()).unwrap(),
            Locked::Yes
        );
        let neighbour = File::open(image.path()).unwrap();
        assert_eq!(claim_for_reading(&neighbour).unwrap(), Locked::Yes);
        assert_eq!(claim_for_reading(&ours).unwrap(), Locked::Yes);
        // A virtual machine that shares nothing but reading.
        lock(&other, libc::F_RDLCK, 101);
        assert_eq!(
            claim_for_reading(&ours).unwrap(),
            Locked::Conflict("it may write to it")
        );
        lock(&other, libc::F_UNLCK, 101);
        lock(&other, libc::F_RDLCK, 200);
        assert_eq!(
            claim_for_reading(&ours).unwrap(),
            Locked::Conflict("it lets nobody else read it")
        );
        lock(&other, libc::F_UNLCK, 200);
        lock(&other, libc::F_RDLCK, 103);
        assert_eq!(
            claim_for_reading(&ours).unwrap(),
            Locked::Conflict("it may resize it")
        );
        lock(&other, libc::F_UNLCK, 103);
        assert_eq!(claim_for_reading(&ours).unwrap(), Locked::Yes);
    }
}
