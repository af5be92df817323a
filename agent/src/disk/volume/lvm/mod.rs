//! LVM2: physical volumes, their text metadata, and the logical volumes whose place on this disk is certain.
//!
//! `physical` reads label, header and metadata areas of one volume; `text` parses the metadata; `group` makes a volume group of
//! it; `place` joins a group with the physical volumes that this disk has. Promises: an extent of a physical volume is called
//! free only where every intact metadata copy on this disk says the same and nothing in the group is unknown; a logical volume
//! is judged only if it is linear or striped, whole on this disk, visible, and no other logical volume refers to it.

pub(crate) mod group;
pub(crate) mod physical;
pub(crate) mod place;
pub(crate) mod text;

use std::io;

/// Why a physical volume is copied whole.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum LvmUnproven {
    #[error("the LVM {0} is damaged")]
    Damaged(&'static str),
    #[error("the LVM {0} fails its checksum")]
    Checksum(&'static str),
    #[error("the physical volume belongs to no volume group")]
    NoGroup,
    #[error(
        "the physical volume has no metadata area in use; another disk of its volume group knows what is free"
    )]
    NoMetadata,
    #[error("the LVM metadata copies differ: a change of the volume group was not completed")]
    Differ,
    #[error("a change of the volume group was begun and not completed")]
    Precommitted,
    #[error("the LVM metadata cannot be understood (line {line}: {what})")]
    Text { line: usize, what: &'static str },
    #[error("the LVM metadata says something this version does not know ({0})")]
    Unknown(String),
    #[error("the LVM metadata contradicts itself ({0})")]
    Inconsistent(String),
    #[error("another physical volume of this disk has metadata that cannot be trusted")]
    Sibling,
    #[error("the physical volume needs {needed} bytes, but its volume has {size}")]
    Truncated { needed: u64, size: u64 },
    #[error("the LVM metadata cannot be read: {0}")]
    Read(String),
}

impl From<io::Error> for LvmUnproven {
    fn from(source: io::Error) -> Self {
        Self::Read(source.to_string())
    }
}

/// LVM's checksum: CRC-32 with a start value of its own and without the final inversion.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!0xf597_a6cf);
    hasher.update(bytes);
    !hasher.finalize()
}
