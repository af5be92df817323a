//! The grammar of QEMU's migration stream, version 3: which bytes come next and what they are.
//!
//! Owns the envelope (magic, commands, section headers and footers) and which section it is in; the configuration and block list, RAM
//! records and dirty bitmaps have files of their own. Leaves the bytes alone: it only looks at heads, each a few hundred bytes at most, and says how
//! many bytes of body follow. Promises to give up (`Found::Opaque`) at the first thing it does not know.
//!
//! ```text
//! Magic -> Section <-> Configuration subsections
//!             |  START, PART, END of ram           -> Ram   -> (EOS) -> Footer -> Section
//!             |  START, PART, END of dirty-bitmap  -> Dirty -> (EOS) -> Footer -> Section
//!             `  footer of ram's END               -> the tail: device state, not described by itself
//! ```

use std::collections::HashMap;

use super::fields::{be16, be32, be64, str8, str8_need};
use super::header::after_block;
use super::{dirty, records};

/// How far the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the first pages.
    Header,
    /// QEMU sends pages while the VM may run.
    Iterating,
    /// The VM is stopped for good: last pages and device state. Every byte is waited for.
    Tail,
    /// Something unknown came; the rest passes through as it is.
    Opaque,
}

/// Why the rest of a stream is not looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpaqueReason {
    #[error("the stream does not begin as QEMU's migration stream, version 3")]
    NotQemu,
    #[error("the stream's configuration has a subsection or capability that is not known")]
    Configuration,
    #[error("the stream has a command that is not known, or one of postcopy or COLO")]
    Command,
    #[error("the stream has a section of a device that sends state before the VM stops, which is not known")]
    Section,
    #[error("a section ends otherwise than it began")]
    Footer,
    #[error("the list of RAM blocks has a form that is not known")]
    BlockList,
    #[error("the RAM has a record that is not known")]
    Record,
    #[error("a dirty bitmap has a chunk that is not known")]
    DirtyBitmap,
    #[error("the stream ends before its RAM does")]
    EarlyEnd,
}

/// A RAM block, as the stream's header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// As QEMU writes it.
    pub name: Vec<u8>,
    /// In bytes.
    pub used_length: u64,
}

/// A page's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) block: u16,
    /// In pages from the block's start.
    pub(super) page: u64,
    /// The record does not name its block.
    pub(super) continued: bool,
}

/// What stands at the front of the bytes that were shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Cannot be said before so many bytes are there.
    Need(usize),
    /// A head of so many bytes, and the body behind it: none of them a token.
    Raw { head: usize, body: u64 },
    /// The head of a page record; 4 KiB follow.
    Page { head: usize, place: Place },
    /// A whole record of a zero page.
    Zero { head: usize, place: Place },
    /// From here on nothing is looked at.
    Opaque,
}

/// An error of the grammar ends it.
pub(super) type Next = Result<Found, OpaqueReason>;

/// What is expected next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expect {
    Magic,
    /// Behind the configuration's name: its subsections, or a section.
    Configuration,
    Capability {
        left: u32,
    },
    Section,
    Block {
        /// Bytes of RAM that are still to be named.
        left: u64,
    },
    /// Either the page size of the block before, or what comes behind it.
    PageSize {
        left: u64,
    },
    Record,
    Chunk,
    Footer,
    /// The first part of RAM, behind sections of unknown devices; `seen` are the last bytes.
    FirstPart {
        seen: u128,
        left: u32,
    },
    /// Nothing: all is opaque.
    Nothing,
}

/// A section that is open, or closed by its footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Section {
    id: u32,
    kind: Kind,
    ends: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ram,
    Dirty,
}

/// The parser's state.
pub(super) struct Grammar {
    pub(super) expect: Expect,
    phase: Phase,
    reason: Option<OpaqueReason>,
    ram: Option<u32>,
    dirty: Option<u32>,
    open: Option<Section>,
    /// RAM blocks carry their guest address (x-ignore-shared).
    pub(super) addresses: bool,
    /// RAM blocks may carry their page size (postcopy-ram with huge pages).
    pub(super) page_sizes: bool,
    pub(super) blocks: Vec<Block>,
    pub(super) names: HashMap<Vec<u8>, u16>,
    /// Which block CONTINUE means; `None` where it is not known.
    pub(super) current: Option<u16>,
}

pub(super) const PAGE: u64 = 4096;

/// How much early state of unknown devices is searched for its end: a virtio-mem device has some KiB.
const SEARCH_MAX: u32 = 1 << 20;

impl Grammar {
    pub(super) fn new() -> Self {
        Self {
            expect: Expect::Magic,
            phase: Phase::Header,
            reason: None,
            ram: None,
            dirty: None,
            open: None,
            addresses: false,
            page_sizes: false,
            blocks: Vec::new(),
            names: HashMap::new(),
            current: None,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn reason(&self) -> Option<OpaqueReason> {
        self.reason
    }

    /// What stands at the front of `head`. Moves on where it is not `Need`; the caller consumes exactly what was found.
    pub(super) fn next(&mut self, head: &[u8]) -> Found {
        let found = match self.expect {
            Expect::Record => self.record(head),
            Expect::Magic => self.magic(head),
            Expect::Configuration => self.configuration(head),
            Expect::Capability { left } => self.capability(head, left),
            Expect::Section => self.section(head),
            Expect::Block { left } => self.block(head, left),
            Expect::PageSize { left } => self.page_size(head, left),
            Expect::Chunk => self.chunk(head),
            Expect::Footer => self.footer(head),
            Expect::FirstPart { seen, left } => self.first_part(head, seen, left),
            Expect::Nothing => Ok(Found::Opaque),
        };
        found.unwrap_or_else(|reason| {
            (self.expect, self.phase, self.reason) = (Expect::Nothing, Phase::Opaque, Some(reason));
            Found::Opaque
        })
    }

    fn magic(&mut self, head: &[u8]) -> Next {
        let Some(magic) = be64(head, 0) else {
            return Ok(Found::Need(8));
        };
        if magic != 0x5145_564d_0000_0003 {
            return Err(OpaqueReason::NotQemu);
        }
        self.expect = Expect::Section;
        Ok(raw(8))
    }

    pub(super) fn section(&mut self, head: &[u8]) -> Next {
        match head.first() {
            None => Ok(Found::Need(1)),
            Some(7) => match be32(head, 1) {
                None => Ok(Found::Need(5)),
                // A machine type's name; QEMU's own are shorter than 64 bytes.
                Some(len) if len <= 4096 && self.ram.is_none() => {
                    self.expect = Expect::Configuration;
                    Ok(Found::Raw {
                        head: 5,
                        body: u64::from(len),
                    })
                }
                Some(_) => Err(OpaqueReason::Configuration),
            },
            Some(8) => self.command(head),
            Some(1) => self.start(head),
            Some(kind @ (2 | 3)) => self.part(head, *kind == 3),
            Some(0) => Err(OpaqueReason::EarlyEnd),
            Some(4) => self.unknown(),
            Some(_) => Err(OpaqueReason::Section),
        }
    }

    /// A section of a device that is not known, whose length cannot be told. Before the first pages it is worth to look for RAM behind
    /// it; a guest that feigns that place there makes its own move slower, no more.
    fn unknown(&mut self) -> Next {
        if self.phase != Phase::Header || self.ram.is_none() {
            return Err(OpaqueReason::Section);
        }
        self.expect = Expect::FirstPart {
            seen: 0,
            left: SEARCH_MAX,
        };
        Ok(raw(1))
    }

    /// Looks for a footer of any section with a part of RAM behind it.
    fn first_part(&mut self, head: &[u8], mut seen: u128, left: u32) -> Next {
        const MASK: u128 = 0xff00_0000_00ff_ffff_ffff;
        let id = self.ram.ok_or(OpaqueReason::Section)?;
        let sought = 0x7e00_0000_0002_0000_0000 | u128::from(id);
        if head.is_empty() {
            return Ok(Found::Need(1));
        }
        for (at, byte) in head.iter().take(left as usize).enumerate() {
            seen = (seen << 8) | u128::from(*byte);
            if seen & MASK == sought {
                self.enter_part(Section {
                    id,
                    kind: Kind::Ram,
                    ends: false,
                });
                return Ok(raw(at + 1));
            }
        }
        let left = u32::try_from(head.len())
            .ok()
            .and_then(|len| left.checked_sub(len));
        let left = left.ok_or(OpaqueReason::Section)?;
        self.expect = Expect::FirstPart { seen, left };
        Ok(raw(head.len()))
    }

    fn command(&mut self, head: &[u8]) -> Next {
        let (Some(command), Some(len)) = (be16(head, 1), be16(head, 3)) else {
            return Ok(Found::Need(5));
        };
        let whole = 5 + usize::from(len);
        match (command, len) {
            (1 | 11, 0) | (2, 4) | (3, 0 | 16) if head.len() < whole => return Ok(Found::Need(whole)),
            // Page sizes of all blocks, or-ed.
            (3, 16) => self.page_sizes = be64(head, 5) != Some(PAGE),
            (1, 0) | (2, 4) | (3, 0) => {}
            // Sent when the VM has stopped (QEMU 10).
            (11, 0) => self.phase = Phase::Tail,
            _ => return Err(OpaqueReason::Command),
        }
        Ok(raw(whole))
    }

    /// A device that sends state while the VM runs introduces itself.
    fn start(&mut self, head: &[u8]) -> Next {
        let Some((name, at)) = str8(head, 5) else {
            return Ok(Found::Need(str8_need(head, 5)));
        };
        let (Some(id), Some(instance), Some(version)) = (be32(head, 1), be32(head, at), be32(head, at + 4))
        else {
            return Ok(Found::Need(at + 8));
        };
        let kind = match (name, instance, version) {
            (b"ram", 0, 4) if self.ram.is_none() => Kind::Ram,
            (b"dirty-bitmap", _, 1) if self.dirty.is_none() => Kind::Dirty,
            _ => return self.unknown(),
        };
        match kind {
            Kind::Ram => self.ram = Some(id),
            Kind::Dirty => self.dirty = Some(id),
        }
        self.enter(Section {
            id,
            kind,
            ends: false,
        });
        Ok(raw(at + 8))
    }

    fn part(&mut self, head: &[u8], ends: bool) -> Next {
        let Some(id) = be32(head, 1) else {
            return Ok(Found::Need(5));
        };
        let kind = match Some(id) {
            id if id == self.ram => Kind::Ram,
            id if id == self.dirty => Kind::Dirty,
            _ => return Err(OpaqueReason::Section),
        };
        self.enter_part(Section { id, kind, ends });
        Ok(raw(5))
    }

    fn enter_part(&mut self, section: Section) {
        if section.ends {
            self.phase = Phase::Tail;
        } else if self.phase == Phase::Header {
            self.phase = Phase::Iterating;
        }
        self.enter(section);
    }

    fn enter(&mut self, section: Section) {
        self.open = Some(section);
        self.expect = match section.kind {
            Kind::Ram => Expect::Record,
            Kind::Dirty => Expect::Chunk,
        };
    }

    /// The section's own end was seen.
    fn leave(&mut self) {
        self.expect = Expect::Footer;
    }

    fn footer(&mut self, head: &[u8]) -> Next {
        let Some(kind) = head.first() else {
            return Ok(Found::Need(1));
        };
        let open = self.open.ok_or(OpaqueReason::Footer)?;
        self.expect = match (open.kind, open.ends) {
            (Kind::Ram, true) => Expect::Nothing,
            _ => Expect::Section,
        };
        if *kind != 0x7e {
            // A machine type without footers.
            self.open = None;
            return if self.expect == Expect::Nothing {
                Ok(Found::Opaque)
            } else {
                self.section(head)
            };
        }
        match be32(head, 1) {
            None => {
                self.expect = Expect::Footer;
                Ok(Found::Need(5))
            }
            Some(id) if id == open.id => {
                self.open = None;
                Ok(raw(5))
            }
            Some(_) => Err(OpaqueReason::Footer),
        }
    }

    pub(super) fn record(&mut self, head: &[u8]) -> Next {
        match records::record(self, head)? {
            records::Record::Plain(found) => Ok(found),
            records::Record::EndOfSection => {
                self.leave();
                Ok(raw(8))
            }
            records::Record::BlockList { total } => {
                // Only the START section lists blocks, once.
                if self.phase != Phase::Header || !self.blocks.is_empty() {
                    return Err(OpaqueReason::Record);
                }
                self.expect = after_block(total, false);
                Ok(raw(8))
            }
        }
    }

    fn chunk(&mut self, head: &[u8]) -> Next {
        let chunk = dirty::chunk(head)?;
        if chunk.ends {
            self.leave();
        }
        Ok(chunk.found)
    }
}

/// A head without a body.
pub(super) fn raw(head: usize) -> Found {
    Found::Raw { head, body: 0 }
}
