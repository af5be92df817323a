//! The feature flags of ext2, ext3 and ext4: which are known here, and what they make the file system's name.
//!
//! Owns the three words of flags. Promises that a flag this version does not know, or whose meaning for allocated blocks it does not
//! know (snapshots, compression, shared blocks), ends in `UnknownFeature`: even a "compatible" flag, since what may be
//! ignored when mounting may not be ignored when a block is dropped.

use super::metadata::Kind;
use crate::disk::fs::Unproven;

/// One flag: the word it stands in and its bit.
#[derive(Clone, Copy, Debug)]
pub(super) enum Flag {
    Compat(u32),
    Incompat(u32),
    RoCompat(u32),
}

pub(super) const HAS_JOURNAL: Flag = Flag::Compat(0x4);
pub(super) const FAST_COMMIT: Flag = Flag::Compat(0x400);
pub(super) const RESIZE_INODE: Flag = Flag::Compat(0x10);
pub(super) const SPARSE_SUPER2: Flag = Flag::Compat(0x200);
pub(super) const NEEDS_RECOVERY: Flag = Flag::Incompat(0x4);
pub(super) const JOURNAL_DEVICE: Flag = Flag::Incompat(0x8);
pub(super) const META_BG: Flag = Flag::Incompat(0x10);
pub(super) const SIXTY_FOUR_BIT: Flag = Flag::Incompat(0x80);
pub(super) const MMP: Flag = Flag::Incompat(0x100);
pub(super) const FLEX_BG: Flag = Flag::Incompat(0x200);
pub(super) const CHECKSUM_SEED: Flag = Flag::Incompat(0x2000);
pub(super) const SPARSE_SUPER: Flag = Flag::RoCompat(0x1);
pub(super) const GDT_CHECKSUM: Flag = Flag::RoCompat(0x10);
pub(super) const BIGALLOC: Flag = Flag::RoCompat(0x200);
pub(super) const METADATA_CHECKSUM: Flag = Flag::RoCompat(0x400);
pub(super) const ORPHAN_PRESENT: Flag = Flag::RoCompat(0x1_0000);

/// dir_prealloc, imagic_inodes, has_journal, ext_attr, resize_inode, dir_index, sparse_super2, fast_commit, stable_inodes,
/// orphan_file.
const COMPAT_KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x200 | 0x400 | 0x800 | 0x1000;
/// filetype, needs_recovery, journal_dev, meta_bg, extent, 64bit, mmp, flex_bg, ea_inode, metadata_csum_seed, large_dir,
/// inline_data, encrypt, casefold.
const INCOMPAT_KNOWN: u32 = 0x2
    | 0x4
    | 0x8
    | 0x10
    | 0x40
    | 0x80
    | 0x100
    | 0x200
    | 0x400
    | 0x2000
    | 0x4000
    | 0x8000
    | 0x1_0000
    | 0x2_0000;
/// sparse_super, large_file, btree_dir, huge_file, uninit_bg, dir_nlink, extra_isize, quota, bigalloc, metadata_csum, read-only,
/// project, verity, orphan_present.
const RO_COMPAT_KNOWN: u32 =
    0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x8000 | 0x1_0000;

/// filetype, needs_recovery, meta_bg: all that ext3 knows.
const INCOMPAT_EXT3: u32 = 0x2 | 0x4 | 0x10;
/// sparse_super, large_file, btree_dir: all that ext3 knows.
const RO_COMPAT_EXT3: u32 = 0x1 | 0x2 | 0x4;

/// The three words of flags of a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Features {
    pub(super) compat: u32,
    pub(super) incompat: u32,
    pub(super) ro_compat: u32,
}

impl Features {
    pub(super) fn has(&self, flag: Flag) -> bool {
        match flag {
            Flag::Compat(bit) => self.compat & bit != 0,
            Flag::Incompat(bit) => self.incompat & bit != 0,
            Flag::RoCompat(bit) => self.ro_compat & bit != 0,
        }
    }

    /// What people call a file system with these features.
    pub(super) fn kind(&self) -> Kind {
        if self.incompat & !INCOMPAT_EXT3 != 0 || self.ro_compat & !RO_COMPAT_EXT3 != 0 {
            Kind("ext4")
        } else if self.has(HAS_JOURNAL) {
            Kind("ext3")
        } else {
            Kind("ext2")
        }
    }

    /// Whether any flag is set at all.
    pub(super) fn any(&self) -> bool {
        self.compat | self.incompat | self.ro_compat != 0
    }

    /// An error where a flag is set whose meaning is not known here.
    pub(super) fn check_known(&self) -> Result<(), Unproven> {
        let words = [
            ("compatible", self.compat & !COMPAT_KNOWN),
            ("incompatible", self.incompat & !INCOMPAT_KNOWN),
            ("read-only compatible", self.ro_compat & !RO_COMPAT_KNOWN),
        ];
        match words.iter().find(|(_, unknown)| *unknown != 0) {
            Some((word, unknown)) => Err(self.kind().unknown(format!("{word} features {unknown:#x}"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Features = Features {
        compat: 0,
        incompat: 0,
        ro_compat: 0,
    };

    #[test]
    fn names_follow_the_features() {
        assert_eq!(NONE.kind(), Kind("ext2"));
        assert_eq!(Features { compat: 0x4, ..NONE }.kind(), Kind("ext3"));
        let extents = Features {
            incompat: 0x42,
            ..NONE
        };
        assert_eq!(extents.kind(), Kind("ext4"));
    }

    #[test]
    fn snapshots_compression_shared_blocks_and_new_flags_are_unknown() {
        let strange = [
            Features {
                compat: 0x100,
                ..NONE
            },
            Features {
                incompat: 0x1,
                ..NONE
            },
            Features {
                ro_compat: 0x80,
                ..NONE
            },
            Features {
                ro_compat: 0x4000,
                ..NONE
            },
            Features {
                compat: 1 << 31,
                ..NONE
            },
        ];
        for features in strange {
            assert!(matches!(
                features.check_known(),
                Err(Unproven::UnknownFeature { .. })
            ));
        }
    }
}
