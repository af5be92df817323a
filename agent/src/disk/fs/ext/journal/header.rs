//! The journal's superblock: where the log begins, and how it is written.
//!
//! Owns its parsing, its checksum and the refusal of journals that prove nothing: an aborted one, fast commits (allocations
//! outside of transactions), commits that do not wait for their blocks (`async_commit`), checksums of the first kind (over a whole
//! transaction). Leaves the log alone.

use super::be32;
use crate::disk::fs::Unproven;
use crate::disk::fs::ext::checksum::crc32c;
use crate::disk::fs::ext::metadata::Kind;

/// `JBD2_MAGIC_NUMBER`
pub(super) const MAGIC: u32 = 0xC03B_3998;
/// Bytes that the superblock spans.
pub(super) const HEADER_LEN: usize = 1024;

/// `JBD2_FEATURE_COMPAT_CHECKSUM`
const COMPAT_CHECKSUM: u32 = 0x1;
const INCOMPAT_WIDE: u32 = 0x2;
const INCOMPAT_ASYNC_COMMIT: u32 = 0x4;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
/// Those above, and revoke blocks (0x1), which are read where they are met.
const INCOMPAT_KNOWN: u32 = 0x3F;
/// `JBD2_CRC32C_CHKSUM`
const CRC32C: u8 = 4;

/// How blocks of the log carry checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksums {
    None,
    /// 16 bits for each logged block.
    V2,
    /// 32 bits for each logged block.
    V3,
}

/// The journal's superblock, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) uuid: [u8; 16],
    pub(super) checksums: Checksums,
    /// Block numbers have 64 bits.
    pub(super) is_wide: bool,
    /// First block of the log, and the block behind its last.
    pub(super) first: u32,
    pub(super) end: u32,
    /// Number of the first transaction in the log.
    pub(super) sequence: u32,
    /// Where that one begins; 0 where the log is empty.
    pub(super) start: u32,
}

impl Header {
    /// From the first bytes of the journal, whose file has `blocks` blocks of `block_size` bytes.
    pub(super) fn parse(
        kind: Kind,
        raw: &[u8; HEADER_LEN],
        block_size: u32,
        blocks: u64,
    ) -> Result<Self, Unproven> {
        let wrong = |what: &str| kind.inconsistent(format!("journal: {what}"));
        let version_2 = match (be32(raw, 0), be32(raw, 4)) {
            (MAGIC, 3) => false,
            (MAGIC, 4) => true,
            _ => return Err(wrong("it has no superblock")),
        };
        let features = |at| if version_2 { be32(raw, at) } else { 0 };
        let checksums = refuse_features(kind, features(0x24), features(0x28), features(0x2C))?;
        if checksums != Checksums::None {
            let sum = crc32c(crc32c(u32::MAX, &raw[..0xFC]), &[0; 4]);
            if raw[0x50] != CRC32C || crc32c(sum, &raw[0x100..]) != be32(raw, 0xFC) {
                return Err(kind.checksum("superblock of the journal"));
            }
        }
        if be32(raw, 0x20) != 0 {
            return Err(kind.in_use("its journal was aborted"));
        }
        let header = Self {
            uuid: std::array::from_fn(|i| if version_2 { raw[0x30 + i] } else { 0 }),
            checksums,
            is_wide: features(0x28) & INCOMPAT_WIDE != 0,
            first: be32(raw, 0x14),
            end: be32(raw, 0x10),
            sequence: be32(raw, 0x18),
            start: be32(raw, 0x1C),
        };
        if be32(raw, 0xC) != block_size {
            return Err(wrong("it has another block size"));
        }
        if header.first == 0 || header.first >= header.end || u64::from(header.end) > blocks {
            return Err(wrong("impossible bounds of the log"));
        }
        if header.start != 0 && !(header.first..header.end).contains(&header.start) {
            return Err(wrong("the log begins outside of itself"));
        }
        Ok(header)
    }

    /// Blocks of the log.
    pub(super) fn len(&self) -> u32 {
        self.end - self.first
    }

    /// What the checksums of all blocks begin with.
    pub(super) fn seed(&self) -> u32 {
        crc32c(u32::MAX, &self.uuid)
    }

    /// The block `by` blocks behind `at`, around the end; `by` is at most the log's length.
    pub(super) fn step(&self, at: u32, by: u32) -> u32 {
        let offset = (u64::from(at - self.first) + u64::from(by)) % u64::from(self.len());
        // Less than the log's length, a 32-bit number.
        self.first + offset as u32
    }
}

fn refuse_features(kind: Kind, compat: u32, incompat: u32, ro_compat: u32) -> Result<Checksums, Unproven> {
    if compat & !COMPAT_CHECKSUM != 0 || incompat & !INCOMPAT_KNOWN != 0 || ro_compat != 0 {
        return Err(kind.unknown(format!(
            "journal features {compat:#x}, {incompat:#x}, {ro_compat:#x}"
        )));
    }
    let refused = [
        (
            compat & COMPAT_CHECKSUM,
            "its journal has checksums of the first kind, which are not read here",
        ),
        (
            incompat & INCOMPAT_ASYNC_COMMIT,
            "its journal commits without waiting for the blocks (async_commit)",
        ),
        (
            incompat & INCOMPAT_FAST_COMMIT,
            "its journal has a fast-commit area in use",
        ),
    ];
    if let Some((_, why)) = refused.iter().find(|(bits, _)| *bits != 0) {
        return Err(kind.in_use(*why));
    }
    match (incompat & INCOMPAT_CSUM_V2 != 0, incompat & INCOMPAT_CSUM_V3 != 0) {
        (true, true) => Err(kind.inconsistent("journal: two kinds of checksums at once")),
        (true, false) => Ok(Checksums::V2),
        (false, true) => Ok(Checksums::V3),
        (false, false) => Ok(Checksums::None),
    }
}
