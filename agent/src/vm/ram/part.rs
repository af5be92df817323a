//! A part of the stream on its way into a batch: tokens, page contents and raw bytes.
//!
//! Owns the limits of a part and how its data is laid out: pages first, then raw bytes. Leaves to the tokenizer what becomes a token.
//! Promises that what it gives passes `RamPart::check`, stays within its target size, and stands for at most [`PART_LEN_MAX`] bytes.

use bytes::Bytes;
use longhaul_common::wire::batch::RAW_MAX;
use longhaul_common::wire::ram::{RamPart, Records, TOKENS_MAX, Token};

use super::grammar::{PAGE, Place};

/// Most bytes of the stream that one part stands for: zero pages have no data, and yet 9 bytes each.
pub const PART_LEN_MAX: u64 = 2 << 20;
/// Least target size of a part's data.
pub const TARGET_MIN: usize = 8 << 10;
/// Most bytes of tokens as the batch's header carries them; the header's limit is 128 KiB.
const TOKENS_LEN_MAX: usize = 96 << 10;
/// A token but for its name, encoded, at most.
const TOKEN_LEN: usize = 20;
/// A record of a page but for its content, at most.
const RECORD_LEN_MAX: u64 = 8 + 256 + 1;

/// What a stretch of the stream held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zeros: u64,
    /// Bytes that are no page: envelopes, device state, all that is opaque.
    pub raw_bytes: u64,
    /// Of `pages`, those that were in the stream before, with content or as zeros.
    pub resent_pages: u64,
    /// Of `zeros`, those that were in the stream before.
    pub resent_zeros: u64,
    /// Pages and zero pages of blocks too large to be followed: it is not known whether they were sent before.
    pub unfollowed: u64,
}

/// A part and its data, ready for a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub header: RamPart,
    /// Page contents, then raw bytes: `header.data_len()` bytes.
    pub data: Bytes,
    pub counts: Counts,
}

impl Part {
    /// First byte of the stream behind it.
    pub fn end(&self) -> u64 {
        self.header.offset.saturating_add(self.header.len)
    }
}

impl Counts {
    /// Adds another stretch.
    pub fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        self.zeros += other.zeros;
        self.raw_bytes += other.raw_bytes;
        self.resent_pages += other.resent_pages;
        self.resent_zeros += other.resent_zeros;
        self.unfollowed += other.unfollowed;
    }
}

/// The part that is being made.
pub(super) struct Assembly {
    generation: u32,
    target: usize,
    offset: u64,
    len: u64,
    tokens: Vec<Token>,
    tokens_len: usize,
    /// Blocks that this part has named.
    named: Vec<u16>,
    pages: Vec<u8>,
    raw: Vec<u8>,
    /// Bytes at the end of `pages` that belong to a page which is not complete, and so not in the part yet.
    partial: usize,
    pub(super) counts: Counts,
}

impl Assembly {
    pub(super) fn new(generation: u32, target: usize) -> Self {
        Self {
            generation,
            target: target.clamp(TARGET_MIN, RAW_MAX),
            offset: 0,
            len: 0,
            tokens: Vec::new(),
            tokens_len: 0,
            named: Vec::new(),
            pages: Vec::new(),
            raw: Vec::new(),
            partial: 0,
            counts: Counts::default(),
        }
    }

    /// Of the parts from the next one on.
    pub(super) fn set_target(&mut self, target: usize) {
        self.target = target.clamp(TARGET_MIN, RAW_MAX);
    }

    /// Bytes of data that still fit.
    pub(super) fn room(&self) -> usize {
        if self.tokens.len() + 2 > TOKENS_MAX || self.tokens_len > TOKENS_LEN_MAX {
            return 0;
        }
        let data = self.target.saturating_sub(self.pages.len() + self.raw.len());
        let len = PART_LEN_MAX - RECORD_LEN_MAX;
        data.min(len.saturating_sub(self.len) as usize)
    }

    pub(super) fn has_room_for_page(&self) -> bool {
        self.room() >= PAGE as usize
    }

    /// Adds bytes verbatim, at most as many as there is room for, and no page may be open.
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if self.raw.capacity() == 0 && bytes.len() > PAGE as usize {
            self.raw.reserve(self.target);
        }
        self.raw.extend_from_slice(bytes);
        self.len += bytes.len() as u64;
        self.counts.raw_bytes += bytes.len() as u64;
        match self.tokens.last_mut() {
            Some(Token::Raw(count)) => *count += bytes.len() as u32,
            _ => self.token(Token::Raw(bytes.len() as u32)),
        }
    }

    /// Adds content to the open page.
    pub(super) fn content(&mut self, bytes: &[u8]) {
        if self.pages.capacity() == 0 {
            self.pages.reserve(self.target);
        }
        self.pages.extend_from_slice(bytes);
        self.partial += bytes.len();
    }

    /// The open page's content is complete: `head` bytes and the content become a record.
    pub(super) fn page(&mut self, place: Place, name: &[u8], head: usize) {
        self.partial = 0;
        self.counts.pages += 1;
        self.len += head as u64 + PAGE;
        match self.tokens.last_mut() {
            Some(Token::Pages(run)) if extends(run, place) => run.count += 1,
            _ => {
                self.name(place, name);
                self.token(Token::Pages(run(place)));
            }
        }
    }

    /// A whole record of `head` bytes.
    pub(super) fn zero(&mut self, place: Place, name: &[u8], head: usize) {
        self.counts.zeros += 1;
        self.len += head as u64;
        match self.tokens.last_mut() {
            Some(Token::Zeros(run)) if extends(run, place) => run.count += 1,
            _ => {
                self.name(place, name);
                self.token(Token::Zeros(run(place)));
            }
        }
    }

    fn name(&mut self, place: Place, name: &[u8]) {
        if place.continued || self.named.contains(&place.block) {
            return;
        }
        self.named.push(place.block);
        self.tokens_len += name.len();
        self.token(Token::Block {
            index: place.block,
            name: name.to_vec(),
        });
    }

    fn token(&mut self, token: Token) {
        self.tokens_len += TOKEN_LEN;
        self.tokens.push(token);
    }

    /// Gives up the open page: its content so far.
    pub(super) fn take_partial(&mut self) -> Vec<u8> {
        let whole = self.pages.len() - self.partial;
        self.partial = 0;
        self.pages.split_off(whole)
    }

    /// Closes the part, if there is anything in it. An open page goes on in the next.
    pub(super) fn take(&mut self) -> Option<Part> {
        if self.len == 0 {
            return None;
        }
        let partial = self.take_partial();
        let mut data = std::mem::take(&mut self.pages);
        let raw = std::mem::take(&mut self.raw);
        if data.is_empty() {
            data = raw;
        } else {
            data.extend_from_slice(&raw);
        }
        // What is cut early would hold a whole part's memory until it is acknowledged.
        if data.len() < data.capacity() / 2 {
            data.shrink_to_fit();
        }
        if !partial.is_empty() {
            self.content(&partial);
        }
        self.tokens_len = 0;
        self.named.clear();
        let header = RamPart {
            generation: self.generation,
            offset: self.offset,
            len: std::mem::take(&mut self.len),
            tokens: std::mem::take(&mut self.tokens),
        };
        self.offset += header.len;
        Some(Part {
            header,
            data: data.into(),
            counts: std::mem::take(&mut self.counts),
        })
    }
}

fn extends(run: &Records, place: Place) -> bool {
    place.continued && run.block == place.block && run.first + u64::from(run.count) == place.page
}

fn run(place: Place) -> Records {
    Records {
        block: place.block,
        first: place.page,
        count: 1,
        continued: place.continued,
    }
}
