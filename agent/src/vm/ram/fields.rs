//! Fields of QEMU's migration stream: big-endian numbers, and strings with their length before them.
//!
//! Owns reading one field of a head that may not be whole. Leaves alone what it means. Promises that a field which is not all there is
//! `None`, never a guess.

pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A string with its length in one byte before it, at `at`; and where it ends.
pub(super) fn str8(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let end = at + 1 + usize::from(*bytes.get(at)?);
    Some((bytes.get(at + 1..end)?, end))
}

/// How many bytes must be there before [`str8`] can say more.
pub(super) fn str8_need(bytes: &[u8], at: usize) -> usize {
    bytes.get(at).map_or(at + 1, |len| at + 1 + usize::from(*len))
}
