//! Blocks of the log: their common head, the tags of a descriptor block, the records of a revoke block, their checksums.
//!
//! Owns the decoding of one block at a time. Leaves alone where it lies and what its transaction becomes. Promises to stay inside the
//! block whatever it says.

use super::be32;
use super::header::{Checksums, Header, MAGIC};
use crate::disk::fs::ext::checksum::crc32c;

/// Bytes of the head that each block of the log but logged content has.
const HEAD: usize = 12;
/// Bytes of the checksum at the end of descriptor and revoke blocks.
const TAIL: usize = 4;
/// Where the checksum of a commit block lies.
const COMMIT_CHECKSUM: usize = 16;

const ESCAPED: u32 = 0x1;
const SAME_UUID: u32 = 0x2;
const LAST: u32 = 0x8;

/// What a block of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Descriptor,
    Commit,
    Revoke,
    Other,
}

/// The role and the transaction's number, where `raw` has a head.
pub(super) fn head(raw: &[u8]) -> Option<(Role, u32)> {
    if raw.len() < HEAD || be32(raw, 0) != MAGIC {
        return None;
    }
    let role = match be32(raw, 4) {
        1 => Role::Descriptor,
        2 => Role::Commit,
        5 => Role::Revoke,
        _ => Role::Other,
    };
    Some((role, be32(raw, 8)))
}

/// Whether a block with a head is whole, as far as checksums tell.
pub(super) fn is_whole(header: &Header, role: Role, raw: &[u8]) -> bool {
    let at = match role {
        _ if header.checksums == Checksums::None => return true,
        Role::Commit => COMMIT_CHECKSUM,
        Role::Descriptor | Role::Revoke => raw.len() - TAIL,
        Role::Other => return false,
    };
    let sum = crc32c(header.seed(), &raw[..at]);
    crc32c(crc32c(sum, &[0; 4]), &raw[at + 4..]) == be32(raw, at)
}

/// A logged block as its descriptor names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    /// Its home on the volume.
    pub(super) block: u64,
    /// Its first four bytes were the journal's magic number, and are zeros in the log.
    pub(super) is_escaped: bool,
    /// As wide as [`Checksums`] says.
    pub(super) checksum: u32,
}

/// The tags of a descriptor block, in the order in which their blocks follow it.
pub(super) fn tags(header: &Header, raw: &[u8]) -> Vec<Tag> {
    let len = match (header.checksums, header.is_wide) {
        (Checksums::V3, _) => 16,
        (Checksums::V2, true) => 14,
        (Checksums::V2, false) => 10,
        (Checksums::None, true) => 12,
        (Checksums::None, false) => 8,
    };
    let mut tags = Vec::new();
    let mut rest = &raw[HEAD..raw.len() - tail_len(header)];
    while let Some((bytes, after)) = rest.split_at_checked(len) {
        let (flags, checksum, high) = match header.checksums {
            Checksums::V3 => (be32(bytes, 4), be32(bytes, 12), 8),
            // The upper half of this word is the checksum's place, unused without checksums.
            _ => (be32(bytes, 4) & 0xFFFF, be32(bytes, 4) >> 16, 8),
        };
        let high = if header.is_wide { be32(bytes, high) } else { 0 };
        tags.push(Tag {
            block: u64::from(high) << 32 | u64::from(be32(bytes, 0)),
            is_escaped: flags & ESCAPED != 0,
            checksum,
        });
        if flags & LAST != 0 {
            break;
        }
        let skip = if flags & SAME_UUID == 0 { 16 } else { 0 };
        rest = after.get(skip..).unwrap_or_default();
    }
    tags
}

/// Whether logged content, as it lies in the log, is what the tag says.
pub(super) fn is_content(header: &Header, sequence: u32, checksum: u32, content: &[u8]) -> bool {
    let sum = || crc32c(crc32c(header.seed(), &sequence.to_be_bytes()), content);
    match header.checksums {
        Checksums::None => true,
        Checksums::V2 => sum() & 0xFFFF == checksum,
        Checksums::V3 => sum() == checksum,
    }
}

/// The blocks that a revoke block takes back; `None` where its length is impossible.
pub(super) fn revoked(header: &Header, raw: &[u8]) -> Option<Vec<u64>> {
    let used = be32(raw, HEAD) as usize;
    let records = raw[..raw.len() - tail_len(header)].get(HEAD + 4..used)?;
    let blocks = match header.is_wide {
        true => records
            .chunks_exact(8)
            .map(|record| u64::from(be32(record, 0)) << 32 | u64::from(be32(record, 4)))
            .collect(),
        false => records
            .chunks_exact(4)
            .map(|record| be32(record, 0).into())
            .collect(),
    };
    Some(blocks)
}

fn tail_len(header: &Header) -> usize {
    if header.checksums == Checksums::None {
        0
    } else {
        TAIL
    }
}
