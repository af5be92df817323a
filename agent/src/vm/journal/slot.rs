//! The journal's bytes: slots of one sector, each whole, empty, or half written by a crash.
//!
//! Owns the layout and its checks. Leaves files to the parent, meaning to the machines. Promises: a record that decodes was
//! encoded so, behind exactly those before it, in the journal of this job and role; what is neither whole nor plainly the torn
//! end is damage, because a lost RUNNING would be a second owner.
//!
//! ```text
//! slot    512 bytes, little endian
//!         0 magic u32 | 4 length of the body u16 | 6 body | zeros | 472 check 32 | 504 end mark 8
//! check   BLAKE3-keyed(KEY, check of the slot before ‖ bytes 0..472); before the first slot comes 32 zeros
//! first   body: `{"job":"32 hex digits","role":"source"}`; others: one record, JSON
//! ```
//! A sector is written whole or not at all; where a device does less, what was written is a beginning, so the end mark is missing.

use super::Damage;

pub(crate) const SLOT: usize = 512;
const MAGIC: u32 = u32::from_le_bytes(*b"LHh1");
const BODY: usize = 6;
const CHECK: usize = 472;
const END: usize = 504;
const MARK: [u8; 8] = [0xa5; 8];

/// Binds a slot to all before it.
pub(crate) type Check = [u8; 32];

/// What a slot holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Content<'a> {
    Body(&'a [u8], Check),
    Empty,
    /// Begun and not ended: never synced, so nobody relied on it.
    Torn,
}

fn check(before: &Check, slot: &[u8; SLOT]) -> Check {
    let key = blake3::derive_key("longhaul handover journal v1", b"slot");
    let mut hasher = blake3::Hasher::new_keyed(&key);
    hasher.update(before).update(&slot[..CHECK]);
    *hasher.finalize().as_bytes()
}

/// `None` for a body that does not fit.
pub(crate) fn encode(before: &Check, body: &[u8]) -> Option<([u8; SLOT], Check)> {
    let len = u16::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= CHECK - BODY)?;
    let mut slot = [0; SLOT];
    slot[..4].copy_from_slice(&MAGIC.to_le_bytes());
    slot[4..BODY].copy_from_slice(&len.to_le_bytes());
    slot[BODY..BODY + body.len()].copy_from_slice(body);
    let check = check(before, &slot);
    slot[CHECK..END].copy_from_slice(&check);
    slot[END..].copy_from_slice(&MARK);
    Some((slot, check))
}

pub(crate) fn decode<'a>(before: &Check, slot: &'a [u8; SLOT]) -> Result<Content<'a>, Damage> {
    if slot[END..] == [0; 8] {
        return Ok(if slot.iter().all(|byte| *byte == 0) {
            Content::Empty
        } else {
            Content::Torn
        });
    }
    let expected = check(before, slot);
    let len = usize::from(u16::from_le_bytes([slot[4], slot[5]]));
    let intact = slot[END..] == MARK && slot[..4] == MAGIC.to_le_bytes() && slot[CHECK..END] == expected;
    match slot.get(BODY..BODY + len) {
        Some(body) if intact && BODY + len <= CHECK => Ok(Content::Body(body, expected)),
        _ => Err(Damage::Slot),
    }
}
