//! File systems of a guest, as far as their allocation metadata goes: which bytes of a volume are proven free.
//!
//! Owns the common face of all file systems. Each reads its own metadata from an unmounted volume and either says which extents
//! are free, or why nothing can be proven. Promises: a byte is called free only if the file system's own, intact and settled
//! metadata says so; anything unknown, torn, dirty or contradictory ends in [`Unproven`] and the volume is copied whole. No
//! content of a volume, however hostile, makes this code panic, loop without end or allocate more than a few MiB.

pub mod ext;
pub mod fat;
pub mod ntfs;
mod volume_reader;
pub mod xfs;

use std::io;

use longhaul_common::extent::Extent;

use super::ReadAt;

/// What a scan of one file system found, beside the free extents it gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsSummary {
    /// The name people know: "ext4", "xfs", "ntfs", "fat32".
    pub kind: &'static str,
    /// Volume label, empty where there is none.
    pub label: String,
    /// Allocation unit, in bytes.
    pub block_size: u32,
    /// Bytes the file system says it spans, from the volume's start.
    pub size: u64,
    /// Bytes given as free.
    pub free: u64,
}

/// Why nothing of a file system is proven free. The volume is copied whole, and the report carries this sentence.
#[derive(Debug, thiserror::Error)]
pub enum Unproven {
    #[error("{kind} was not cleanly unmounted ({what})")]
    NotClean { kind: &'static str, what: String },
    #[error("{kind} uses a feature this version does not know ({what})")]
    UnknownFeature { kind: &'static str, what: String },
    #[error("{kind} metadata fails its checksum ({what})")]
    Checksum { kind: &'static str, what: String },
    #[error("{kind} metadata contradicts itself ({what})")]
    Inconsistent { kind: &'static str, what: String },
    #[error("{kind} spans {needed} bytes, but the volume has {size}")]
    Truncated {
        kind: &'static str,
        needed: u64,
        size: u64,
    },
    #[error("{kind} is on a running VM, and {what}")]
    InUse { kind: &'static str, what: String },
    #[error("{kind} metadata cannot be read")]
    Read {
        kind: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Which state the free extents of a file system that may be in use reflect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The file system's own identifier.
    pub uuid: [u8; 16],
    /// Whether the superblock says that a mount is writing; `false` for one that is not mounted, read-only or frozen.
    pub is_mounted: bool,
    /// The journal that was laid over; `None` where there is none, and only a freeze can prove anything.
    pub journal: Option<JournalState>,
}

/// A journal, and how far a complete scan of it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalState {
    pub uuid: [u8; 16],
    /// Sequence number of the newest committed transaction; numbers wrap around.
    pub newest: u32,
}

/// A file system that recognised its volume.
pub trait FileSystem: Send {
    /// The name people know.
    fn kind(&self) -> &'static str;

    /// Bytes the file system says it spans; an image shorter than this is refused.
    fn size(&self) -> u64;

    /// Gives every free extent, in bytes from the volume's start, in any order, each once, merged where cheaply possible. On an
    /// error the caller forgets every extent already given.
    fn scan(&self, volume: &dyn ReadAt, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven>;

    /// After a successful scan of a volume that may be in use: the state it saw. `None` for all that read unmounted volumes.
    fn committed(&self) -> Option<Committed> {
        None
    }
}
