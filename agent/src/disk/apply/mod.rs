//! Writing copies: from batches to a finished image or block device (stages 9 and 10 of the data's way).
//!
//! Owns the target's file or device, its temporary name, and the progress log beside it. Leaves networks, batch digests and
//! credit to `session`. Everything here blocks and belongs on plain threads.
//!
//! Promises: what [`Target::flush`] reported durable is there after any crash, and [`Target::open`] lists it again; an older
//! (attempt, round) never lands on a newer one; the final name appears only by [`Target::promote`], complete and synced.
//!
//! ```text
//! open -> Have (leaves that need not be sent) -> apply* / flush* -> verify -> promote
//!                                                                         \-> discard
//! ```
//! One thread flushes, when `apply` says that it is due; any number of threads apply.
//! After [`TargetError::NoSpace`] from `apply` the same batch may be applied again; after any error of `flush`, drop the target
//! and open it again: what `Have` then lacks must be sent again.

mod batch;
mod blink;
mod board;
mod compact;
mod device_store;
mod error;
mod file_store;
mod finish;
mod hostile;
pub(crate) mod image_lock;
mod open;
mod patch;
mod pending;
mod place;
mod placed;
mod progress_log;
mod qcow2_server;
mod qcow2_store;
mod read_back;
mod record;
mod replay;
mod scratch;
mod shadow;
mod space;
mod store;
mod target;
mod verify;

use std::path::PathBuf;

use longhaul_common::digest::Digest;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{DiskIndex, JobId};

pub use error::TargetError;
pub use finish::finish_promotion;
pub use hostile::{example_log, replay_log};
pub(crate) use open::is_device;
pub use place::partial_name;
pub use placed::{Placed, link_early, promote_after_crash, unlink_after_crash};
pub use replay::{Durable, Have};
pub use scratch::Scratch;
pub use shadow::{Left, Returned, Seal, Shadow};
pub use space::check_space;
pub use target::{Applied, Flushed, Target, Ticket};

/// How the copy is stored. A `Raw` path that names a block device is written as a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetFormat {
    Raw,
    Qcow2,
}

impl TargetFormat {
    /// As `qemu-img` calls it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where and how one disk's copy is written.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// The final path, as `disk::roots::resolve_inside` gave it: its directory holds no symbolic link.
    pub path: PathBuf,
    pub format: TargetFormat,
    /// Reserve all space at once, and keep it where the disk is zero.
    pub preallocate: bool,
    /// Replace an existing file; write to a block device that is not blank.
    pub overwrite: bool,
    /// User and group number of a new file; unset keeps the agent's own.
    pub owner: Option<(u32, u32)>,
    /// Permission bits of a new file; unset means 0600.
    pub mode: Option<u32>,
    /// SELinux label of a new file.
    pub label: Option<String>,
    /// After so many bytes `apply` says that a flush is due.
    pub flush_bytes: u64,
    /// Sockets of helper processes; need not survive a reboot.
    pub run_dir: PathBuf,
    /// Progress logs of block devices; must survive a reboot.
    pub state_dir: PathBuf,
    pub qemu_img: PathBuf,
    pub qemu_nbd: PathBuf,
    pub job: JobId,
    pub disk: DiskIndex,
}

/// A stretch of a batch's content.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    Data {
        offset: u64,
        bytes: &'a [u8],
    },
    /// Zero or free: must read as zeros.
    Zero(Extent),
}

impl Piece<'_> {
    /// The bytes of the disk it describes, cut at 64 bits where hostile numbers would overflow.
    pub(crate) fn extent(&self) -> Extent {
        match self {
            Self::Data { offset, bytes } => {
                Extent::between(*offset, offset.saturating_add(bytes.len() as u64))
            }
            Self::Zero(extent) => *extent,
        }
    }
}

#[cfg(test)]
impl TargetOptions {
    /// A raw image, with all else in its folder.
    pub(crate) fn raw(path: PathBuf, job: JobId) -> Self {
        let folder = path.parent().map(PathBuf::from).unwrap_or_default();
        Self {
            path,
            format: TargetFormat::Raw,
            preallocate: false,
            overwrite: false,
            owner: None,
            mode: None,
            label: None,
            flush_bytes: 1 << 20,
            run_dir: folder.clone(),
            state_dir: folder,
            qemu_img: "qemu-img".into(),
            qemu_nbd: "qemu-nbd".into(),
            job,
            disk: DiskIndex(0),
        }
    }
}

/// What the leaves of a batch hold: `count` leaves from `first` on, each covered completely by the batch's pieces.
#[derive(Clone, Debug, Default)]
pub struct LeafRecord {
    pub first: u64,
    /// Leaves with data and their digests, in ascending order; all others are zero throughout.
    pub digests: Vec<(u64, Digest)>,
    pub count: u64,
}

pub use longhaul_common::wire::session::DISK_SIZE_MAX;
