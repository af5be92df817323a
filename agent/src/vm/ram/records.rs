//! Records of QEMU's RAM section: a word of address and flags, then what the flags say.
//!
//! Owns which records become tokens: pages and zero pages at a known place whose every byte follows from the token. Leaves all
//! others as they are (XBZRLE, compressed pages, flushes). Promises that the CONTINUE state follows QEMU's loader: it lives across
//! sections.

use super::fields::{be16, be32, be64, str8, str8_need};
use super::grammar::{Found, Grammar, Next, OpaqueReason, PAGE, Place, raw};

/// The flags are the low 12 bits: the rest is the page's offset in its block.
const FLAGS: u64 = PAGE - 1;
pub(super) const ZERO: u64 = 0x002;
const MEM_SIZE: u64 = 0x004;
pub(super) const PAGE_CONTENT: u64 = 0x008;
const EOS: u64 = 0x010;
pub(super) const CONTINUE: u64 = 0x020;
const XBZRLE: u64 = 0x040;
const COMPRESSED: u64 = 0x100;
const MULTIFD_FLUSH: u64 = 0x200;
/// More than zlib makes of 4 KiB at worst.
const COMPRESSED_MAX: u32 = 8192;

/// What a record is to the section that it stands in.
pub(super) enum Record {
    Plain(Found),
    EndOfSection,
    /// Blocks follow, of so many bytes together.
    BlockList {
        total: u64,
    },
}

pub(super) fn record(grammar: &mut Grammar, head: &[u8]) -> Result<Record, OpaqueReason> {
    let Some(word) = be64(head, 0) else {
        return Ok(Record::Plain(Found::Need(8)));
    };
    match (word, word & FLAGS) {
        (EOS, _) => Ok(Record::EndOfSection),
        (MULTIFD_FLUSH, _) => Ok(Record::Plain(raw(8))),
        (_, MEM_SIZE) => Ok(Record::BlockList { total: word & !FLAGS }),
        _ => page(grammar, head, word).map(Record::Plain),
    }
}

/// A record of one page: `[name unless CONTINUE]`, then the kind's own head.
fn page(grammar: &mut Grammar, head: &[u8], word: u64) -> Next {
    let kind = word & FLAGS & !CONTINUE;
    let continued = word & CONTINUE != 0;
    let own = match kind {
        PAGE_CONTENT => 0,
        ZERO => 1,
        XBZRLE => 3,
        COMPRESSED => 4,
        _ => return Err(OpaqueReason::Record),
    };
    let (name, at) = if continued {
        (None, 8)
    } else {
        match str8(head, 8) {
            Some(([], _)) => return Err(OpaqueReason::Record),
            Some((name, at)) => (Some(name), at),
            None => return Ok(Found::Need(str8_need(head, 8))),
        }
    };
    let whole = at + own;
    if head.len() < whole {
        return Ok(Found::Need(whole));
    }
    if let Some(name) = name {
        grammar.current = grammar.names.get(name).copied();
    }
    let place = place(grammar, word & !FLAGS, continued);
    Ok(match (kind, place) {
        (PAGE_CONTENT, Some(place)) => Found::Page { head: whole, place },
        (ZERO, Some(place)) if head.get(at) == Some(&0) => Found::Zero { head: whole, place },
        (PAGE_CONTENT, None) => body(whole, PAGE),
        (XBZRLE, _) => match be16(head, at + 1) {
            Some(len) if u64::from(len) <= PAGE => body(whole, u64::from(len)),
            _ => return Err(OpaqueReason::Record),
        },
        (COMPRESSED, _) => match be32(head, at) {
            Some(len) if len <= COMPRESSED_MAX => body(whole, u64::from(len)),
            _ => return Err(OpaqueReason::Record),
        },
        _ => raw(whole),
    })
}

fn body(head: usize, body: u64) -> Found {
    Found::Raw { head, body }
}

/// Where a page lies, if in a known block.
fn place(grammar: &Grammar, offset: u64, continued: bool) -> Option<Place> {
    let block = grammar.current?;
    let pages = grammar.blocks.get(usize::from(block))?.used_length / PAGE;
    let page = offset / PAGE;
    (page < pages).then_some(Place {
        block,
        page,
        continued,
    })
}
