//! The primary superblock: is this an XFS volume whose free space this version can read?
//!
//! Owns the signature, the version, every feature bit and why it may be accepted, and the place of the log. Leaves alone
//! counters: nothing here is believed about free space. Promises that a bit, version or device it does not know ends in
//! [`Unproven`].

use super::geometry::Geometry;
use super::reader::{Lsn, be16, be32, be64, byte, crc_matches, read_at, uuid};
use super::{KIND, Unproven, checksum, inconsistent, not_clean, unknown_feature};
use crate::disk::ReadAt;

const MAGIC: u32 = u32::from_be_bytes(*b"XFSB");
/// The smallest sector; every field lies in it.
const SECTOR_MIN: usize = 512;
const CRC: usize = 224;
const LOG_BYTES_MAX: u64 = 2 << 30;

/// Bits of the version word: attributes, 32-bit link counts, quota, inode alignment, data stripes, log v2, sector size, unwritten
/// extents, directories v2, case folding, "more bits follow". They shape inodes, directories and placement; what is taken leaves
/// the free-space trees in all of them. Missing: shared read-only (0x0200), which Linux refuses as well.
const VERSION_BITS: u16 = 0xfdf0;
/// `features2`: lazy superblock counters (counters are not used here), attributes v2, 32-bit project ids, checksums, file types.
/// Missing: the parent pointers of another system (0x10).
const FEATURES2: u32 = 0x02 | 0x08 | 0x80 | 0x100 | 0x200;

/// A known bit of version 5, and what it changes.
type Bit = (u32, &'static str);

/// Bits that older kernels may mount read-only. The blocks of each further tree are taken out of the free-space trees when the
/// tree grows (those of `rmapbt` come through the free list); none of them frees a block or lends one.
const RO_COMPAT: [Bit; 4] = [
    (1 << 0, "finobt: a second inode tree in blocks of its own"),
    (
        1 << 1,
        "rmapbt: a tree of owners, written beside the free-space trees",
    ),
    (
        1 << 2,
        "reflink: a block leaves the owners' count before it enters the free-space trees, by one transaction",
    ),
    (1 << 3, "inobtcount: two counters in the AGI"),
];
/// Bits that older kernels may not mount. All of these live inside inodes, directories or the superblock. Missing, because they
/// could not be tested against the tools: metadir (0x100), zoned (0x200), zone gaps (0x400).
const INCOMPAT: [Bit; 7] = [
    (1 << 0, "ftype: a type byte in directory entries"),
    (
        1 << 1,
        "spinodes: inode chunks with holes; a hole is free or used by the free-space trees alone",
    ),
    (1 << 2, "meta_uuid: metadata keeps the UUID it was made with"),
    (1 << 3, "bigtime: wider time stamps in inodes"),
    (1 << 5, "nrext64: wider extent counters in inodes"),
    (1 << 6, "exchange: files may swap mappings; blocks stay used"),
    (1 << 7, "parent: parent pointers in attributes"),
];
const META_UUID: u32 = 1 << 2;
const NEEDS_REPAIR: u32 = 1 << 4;
/// Bits that matter to log recovery only. The log must be clean, so there is none.
const LOG_INCOMPAT: [Bit; 1] = [(1 << 0, "logged attributes")];

/// What the superblock says, as far as free space depends on it.
pub(super) struct Superblock {
    pub(super) geometry: Geometry,
    /// Empty where there is none.
    pub(super) label: String,
    /// In the log's record headers.
    pub(super) uuid: [u8; 16],
    /// In every other piece of metadata; `None` on version 4.
    pub(super) metadata_uuid: Option<[u8; 16]>,
    /// When the superblock was written last; `None` on version 4.
    pub(super) lsn: Option<Lsn>,
    pub(super) log: LogPlace,
    pub(super) features: Features,
}

/// Which trees an AG has beside the free-space trees and the inode tree.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Features {
    pub(super) free_inodes: bool,
    pub(super) owners: bool,
    pub(super) references: bool,
}

/// The internal log: a run of blocks inside one AG.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogPlace {
    pub(super) ag: u32,
    pub(super) start: u32,
    pub(super) blocks: u32,
}

impl Superblock {
    /// `None` where the volume does not begin with the signature.
    pub(super) fn read(volume: &dyn ReadAt) -> Result<Option<Self>, Unproven> {
        let mut head = [0; SECTOR_MIN];
        if volume.size() < head.len() as u64 {
            return Ok(None);
        }
        read_at(volume, &mut head, 0)?;
        if be32(&head, 0) != MAGIC {
            return Ok(None);
        }
        Self::parse(volume, &head).map(Some)
    }

    fn parse(volume: &dyn ReadAt, head: &[u8]) -> Result<Self, Unproven> {
        let version_5 = is_version_5(head)?;
        let geometry = Geometry::parse(head)?;
        if version_5 {
            check_crc(volume, &geometry)?;
        }
        check_state(head)?;
        let features = if version_5 {
            check_features(head)?
        } else {
            Features::default()
        };
        let log = log_place(head, &geometry)?;
        let own_uuid = uuid(head, 32);
        let separate = version_5 && be32(head, 216) & META_UUID != 0;
        let metadata_uuid = if separate { uuid(head, 248) } else { own_uuid };
        Ok(Self {
            label: label(head),
            uuid: own_uuid,
            metadata_uuid: version_5.then_some(metadata_uuid),
            lsn: version_5.then(|| Lsn(be64(head, 240))),
            geometry,
            log,
            features,
        })
    }
}

fn is_version_5(head: &[u8]) -> Result<bool, Unproven> {
    let version = be16(head, 100);
    let features2 = be32(head, 200) | be32(head, 204);
    if !matches!(version & 0xf, 4 | 5) {
        return Err(unknown_feature(format!("version {}", version & 0xf)));
    }
    let unknown = version & !0xf & !VERSION_BITS;
    if unknown != 0 {
        return Err(unknown_feature(format!("version bits {unknown:#x}")));
    }
    if version & 0x8000 != 0 && features2 & !FEATURES2 != 0 {
        return Err(unknown_feature(format!(
            "features2 bits {:#x}",
            features2 & !FEATURES2
        )));
    }
    Ok(version & 0xf == 5)
}

fn check_crc(volume: &dyn ReadAt, geometry: &Geometry) -> Result<(), Unproven> {
    let sector = u64::from(geometry.sector_size);
    if volume.size() < sector {
        return Err(Unproven::Truncated {
            kind: KIND,
            needed: geometry.size(),
            size: volume.size(),
        });
    }
    let mut bytes = vec![0; geometry.sector_size as usize];
    read_at(volume, &mut bytes, 0)?;
    if !crc_matches(&bytes, CRC) {
        return Err(checksum("superblock"));
    }
    Ok(())
}

/// What holds for both versions: made completely, not shared, and all data on this volume.
fn check_state(head: &[u8]) -> Result<(), Unproven> {
    if byte(head, 126) != 0 {
        return Err(not_clean("making or copying the file system was not finished"));
    }
    if byte(head, 179) != 0 {
        return Err(unknown_feature("shared read-only"));
    }
    if be64(head, 16) != 0 || be64(head, 24) != 0 || be32(head, 92) != 0 {
        return Err(unknown_feature("real-time device"));
    }
    Ok(())
}

fn check_features(head: &[u8]) -> Result<Features, Unproven> {
    let ro_compat = be32(head, 212);
    let incompat = be32(head, 216);
    if incompat & NEEDS_REPAIR != 0 {
        return Err(inconsistent("its superblock says that it must be repaired"));
    }
    refuse_unknown("compat", be32(head, 208), &[])?;
    refuse_unknown("ro_compat", ro_compat, &RO_COMPAT)?;
    refuse_unknown("incompat", incompat, &INCOMPAT)?;
    refuse_unknown("log_incompat", be32(head, 220), &LOG_INCOMPAT)?;
    Ok(Features {
        free_inodes: ro_compat & 1 != 0,
        owners: ro_compat & 2 != 0,
        references: ro_compat & 4 != 0,
    })
}

fn refuse_unknown(word: &str, bits: u32, known: &[Bit]) -> Result<(), Unproven> {
    let unknown = known.iter().fold(bits, |left, (bit, _)| left & !bit);
    match unknown {
        0 => Ok(()),
        unknown => Err(unknown_feature(format!("{word} bits {unknown:#x}"))),
    }
}

fn log_place(head: &[u8], geometry: &Geometry) -> Result<LogPlace, Unproven> {
    let start = be64(head, 48);
    let blocks = be32(head, 96);
    if start == 0 {
        return Err(not_clean("its log lies on another device and cannot be checked"));
    }
    let ag = u32::try_from(start >> geometry.ag_block_bits).unwrap_or(u32::MAX);
    let in_ag = start & ((1 << geometry.ag_block_bits) - 1);
    let end = in_ag + u64::from(blocks);
    let bytes = u64::from(blocks) * u64::from(geometry.block_size);
    let inside = in_ag >= geometry.header_blocks().into() && end <= geometry.ag_len(ag).into();
    if blocks == 0 || bytes > LOG_BYTES_MAX || !inside {
        return Err(inconsistent(
            "superblock: the log does not lie in one allocation group",
        ));
    }
    Ok(LogPlace {
        ag,
        start: u32::try_from(in_ag).unwrap_or(u32::MAX),
        blocks,
    })
}

fn label(head: &[u8]) -> String {
    let name: &[u8] = head.get(108..120).unwrap_or_default();
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_bits_pass_and_each_other_bit_is_refused() {
        for (known, all) in [
            (&RO_COMPAT[..], 0xf),
            (&INCOMPAT[..], 0xef),
            (&LOG_INCOMPAT[..], 1),
        ] {
            assert!(refuse_unknown("bits", all, known).is_ok());
            for bit in (0..32).map(|shift| 1u32 << shift).filter(|bit| bit & all == 0) {
                let refused = refuse_unknown("bits", all | bit, known);
                assert!(
                    matches!(refused, Err(Unproven::UnknownFeature { .. })),
                    "{bit:#x}"
                );
            }
        }
    }

    #[test]
    fn a_volume_without_the_signature_or_too_short_for_it_is_not_xfs() {
        assert!(matches!(Superblock::read(&vec![0u8; 4096]), Ok(None)));
        assert!(matches!(Superblock::read(&b"XFSB".to_vec()), Ok(None)));
        let mut only_magic = vec![0; 4096];
        only_magic[..4].copy_from_slice(b"XFSB");
        assert!(Superblock::read(&only_magic).is_err());
    }

    #[test]
    fn a_label_ends_at_its_first_zero() {
        let mut head = [0; 512];
        head[108..120].copy_from_slice(b"root\0garbage");
        assert_eq!(label(&head), "root");
        head[108..120].copy_from_slice(b"twelve-bytes");
        assert_eq!(label(&head), "twelve-bytes");
    }
}
