//! Chunks of QEMU's `dirty-bitmap` section, version 1.
//!
//! Owns how long a chunk is. Leaves its content alone: all of it passes as it is, so that RAM behind it is still understood. Promises
//! to refuse flags that are not known.

use super::fields::{be16, be32, be64, str8, str8_need};
use super::grammar::{Found, OpaqueReason, raw};

const EOS: u32 = 0x01;
const ZEROES: u32 = 0x02;
const BITMAP_NAME: u32 = 0x04;
const DEVICE_NAME: u32 = 0x08;
const START: u32 = 0x10;
const COMPLETE: u32 = 0x20;
const BITS: u32 = 0x40;
const KNOWN: u32 = EOS | ZEROES | BITMAP_NAME | DEVICE_NAME | START | COMPLETE | BITS;
/// QEMU sends a bitmap in pieces of 1 KiB; this is far more.
const BITS_MAX: u64 = 16 << 20;

/// A chunk, and whether the section ends with it.
pub(super) struct Chunk {
    pub(super) found: Found,
    pub(super) ends: bool,
}

pub(super) fn chunk(head: &[u8]) -> Result<Chunk, OpaqueReason> {
    let need = |bytes| Chunk {
        found: Found::Need(bytes),
        ends: false,
    };
    let (flags, mut at) = match flags(head) {
        Ok(found) => found,
        Err(bytes) => return Ok(need(bytes)),
    };
    if flags & !KNOWN != 0 {
        return Err(OpaqueReason::DirtyBitmap);
    }
    for name in [DEVICE_NAME, BITMAP_NAME] {
        if flags & name != 0 {
            match str8(head, at) {
                Some((_, end)) => at = end,
                None => return Ok(need(str8_need(head, at))),
            }
        }
    }
    if flags & EOS != 0 {
        return Ok(Chunk {
            found: raw(at),
            ends: true,
        });
    }
    let own = match (flags & START, flags & BITS, flags & ZEROES) {
        (0, 0, _) => 0,
        (0, _, 0) => 20,
        (0, _, _) => 12,
        (_, 0, _) => 5,
        _ => return Err(OpaqueReason::DirtyBitmap),
    };
    if head.len() < at + own {
        return Ok(need(at + own));
    }
    let body = match own {
        20 => be64(head, at + 12).unwrap_or(u64::MAX),
        _ => 0,
    };
    if body > BITS_MAX {
        return Err(OpaqueReason::DirtyBitmap);
    }
    Ok(Chunk {
        found: Found::Raw { head: at + own, body },
        ends: false,
    })
}

/// The flags and their length, of 1, 2 or 4 bytes; or how many bytes it takes to say.
fn flags(head: &[u8]) -> Result<(u32, usize), usize> {
    let first = *head.first().ok_or(1_usize)?;
    if first & 0x80 == 0 {
        return Ok((u32::from(first), 1));
    }
    let short = be16(head, 0).ok_or(2_usize)?;
    if short & 0x80 == 0 {
        return Ok((u32::from(short & 0x7fff), 2));
    }
    let long = be32(head, 0).ok_or(4_usize)?;
    Ok((long & 0x7f7f_ffff, 4))
}
