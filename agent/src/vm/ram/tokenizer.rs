//! The tap: QEMU's stream in slices as they were read, parts for batches out.
//!
//! Owns partial records between slices, the running digest and the counts. Leaves to the grammar what a byte means and to the assembly
//! how a part looks. Promises that the parts together stand for every byte that was pushed, in order, without a gap; that it never
//! fails; and that it holds no more than one part, one record's head and what the caller has not taken yet.

use std::collections::VecDeque;

use longhaul_common::digest::{Digest, Running};

use super::grammar::{Block, Found, Grammar, OpaqueReason, PAGE, Phase, Place};
use super::part::{Assembly, Counts, Part};
use super::sent::{Before, Sent};

/// How a stream is taken apart.
#[derive(Clone, Copy, Debug)]
pub struct TokenizerOptions {
    /// Stands in every part.
    pub generation: u32,
    /// Bytes of data in a part; between 8 KiB and 1 MiB, others count as the nearest.
    pub target: usize,
    /// Bytes of memory for knowing which pages were sent before: 32 MiB follow 1 TiB of RAM. Memory is used as far as pages are seen.
    pub followed_max: u64,
}

impl Default for TokenizerOptions {
    fn default() -> Self {
        Self {
            generation: 0,
            target: 256 << 10,
            followed_max: 32 << 20,
        }
    }
}

/// Takes a stream apart.
pub struct Tokenizer {
    grammar: Grammar,
    body: Body,
    /// The head of a record that is not whole yet, or that of the open page.
    head: Vec<u8>,
    assembly: Assembly,
    ready: VecDeque<Part>,
    sent: Sent,
    digest: Running,
    read: u64,
    /// Stream position behind the last closed part.
    closed: u64,
    totals: Counts,
}

/// What the next bytes are.
#[derive(Clone, Copy)]
enum Body {
    /// A head.
    Head,
    /// So many bytes that are no token.
    Raw(u64),
    /// The rest of a page's content.
    Page { place: Place, left: usize },
    /// All that comes.
    Opaque,
}

impl Tokenizer {
    /// Before the first byte.
    pub fn new(options: &TokenizerOptions) -> Self {
        Self {
            grammar: Grammar::new(),
            body: Body::Head,
            head: Vec::new(),
            assembly: Assembly::new(options.generation, options.target),
            ready: VecDeque::new(),
            sent: Sent::new(options.followed_max),
            digest: Running::default(),
            read: 0,
            closed: 0,
            totals: Counts::default(),
        }
    }

    /// The next bytes of the stream. Take the parts with [`Self::next_part`] after every push: memory is bounded by that alone.
    pub fn push(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.read += bytes.len() as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = match self.body {
                Body::Head => self.push_head(rest),
                Body::Raw(left) => self.push_raw(rest, left),
                Body::Page { place, left } => self.push_page(rest, place, left),
                Body::Opaque => {
                    self.raw(rest);
                    &[]
                }
            };
        }
    }

    /// The next part that is full.
    pub fn next_part(&mut self) -> Option<Part> {
        self.ready.pop_front()
    }

    /// The next part, full or not. What is left behind afterwards is less than one record (see [`Self::pending`]); in the tail's
    /// device state nothing is.
    pub fn cut(&mut self) -> Option<Part> {
        if self.ready.is_empty() {
            self.close();
        }
        self.ready.pop_front()
    }

    /// The stream has ended: what there is of an unfinished record is raw. Take the last parts with [`Self::cut`].
    pub fn finish(&mut self) {
        let head = std::mem::take(&mut self.head);
        let partial = self.assembly.take_partial();
        self.body = Body::Opaque;
        self.raw(&head);
        self.raw(&partial);
    }

    /// From the next part on.
    pub fn set_target(&mut self, target: usize) {
        self.assembly.set_target(target);
    }

    /// How far the stream is.
    pub fn phase(&self) -> Phase {
        self.grammar.phase()
    }

    /// Why the phase is [`Phase::Opaque`].
    pub fn opaque_reason(&self) -> Option<OpaqueReason> {
        self.grammar.reason()
    }

    /// The RAM blocks that the stream's header named so far; a part's `index` counts them.
    pub fn blocks(&self) -> &[Block] {
        &self.grammar.blocks
    }

    /// Bytes pushed so far.
    pub fn position(&self) -> u64 {
        self.read
    }

    /// Bytes pushed that are in no full part.
    pub fn pending(&self) -> u64 {
        self.read - self.closed
    }

    /// Of all bytes pushed so far; the rebuilder's equals it.
    pub fn digest(&self) -> Digest {
        self.digest.digest()
    }

    /// Of all full parts so far.
    pub fn totals(&self) -> Counts {
        self.totals
    }

    /// Looks at the next head; where it is spread over slices, collects it.
    fn push_head<'a>(&mut self, rest: &'a [u8]) -> &'a [u8] {
        if self.head.is_empty() {
            return match self.grammar.next(rest) {
                Found::Need(_) => {
                    self.head.extend_from_slice(rest);
                    &[]
                }
                found => {
                    let len = head_len(found);
                    self.take_head(found, &rest[..len]);
                    &rest[len..]
                }
            };
        }
        let mut head = std::mem::take(&mut self.head);
        let mut rest = rest;
        loop {
            match self.grammar.next(&head) {
                Found::Need(_) if rest.is_empty() => {
                    self.head = head;
                    return rest;
                }
                Found::Need(need) => {
                    let take = need.saturating_sub(head.len()).clamp(1, rest.len());
                    head.extend_from_slice(&rest[..take]);
                    rest = &rest[take..];
                }
                found if head_len(found) == head.len() => {
                    self.take_head(found, &head);
                    return rest;
                }
                // Nothing is left behind otherwise: the grammar asks for no more bytes than a head has.
                _ => {
                    self.body = Body::Opaque;
                    self.raw(&head);
                    return rest;
                }
            }
        }
    }

    fn take_head(&mut self, found: Found, head: &[u8]) {
        match found {
            Found::Need(_) => {}
            Found::Opaque => self.body = Body::Opaque,
            Found::Raw { body, .. } => {
                self.raw(head);
                self.body = if body == 0 { Body::Head } else { Body::Raw(body) };
            }
            Found::Page { place, .. } => {
                if !self.assembly.has_room_for_page() {
                    self.close();
                }
                self.head.extend_from_slice(head);
                self.body = Body::Page {
                    place,
                    left: PAGE as usize,
                };
            }
            Found::Zero { place, .. } => {
                if self.assembly.room() == 0 {
                    self.close();
                }
                let block = &self.grammar.blocks[usize::from(place.block)];
                self.assembly.zero(place, &block.name, head.len());
                let counts = &mut self.assembly.counts;
                match self.sent.mark(&self.grammar.blocks, place.block, place.page) {
                    Before::Sent => counts.resent_zeros += 1,
                    Before::Unknown => counts.unfollowed += 1,
                    Before::Never => {}
                }
            }
        }
    }

    fn push_raw<'a>(&mut self, rest: &'a [u8], left: u64) -> &'a [u8] {
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
        let left = left - take as u64;
        self.body = if left == 0 { Body::Head } else { Body::Raw(left) };
        self.raw(&rest[..take]);
        &rest[take..]
    }

    fn push_page<'a>(&mut self, rest: &'a [u8], place: Place, left: usize) -> &'a [u8] {
        let take = left.min(rest.len());
        self.assembly.content(&rest[..take]);
        self.body = match left - take {
            0 => Body::Head,
            left => Body::Page { place, left },
        };
        if take == left {
            let block = &self.grammar.blocks[usize::from(place.block)];
            self.assembly.page(place, &block.name, self.head.len());
            self.head.clear();
            let counts = &mut self.assembly.counts;
            match self.sent.mark(&self.grammar.blocks, place.block, place.page) {
                Before::Sent => counts.resent_pages += 1,
                Before::Unknown => counts.unfollowed += 1,
                Before::Never => {}
            }
        }
        &rest[take..]
    }

    fn raw(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let take = self.assembly.room().min(bytes.len());
            self.assembly.raw(&bytes[..take]);
            bytes = &bytes[take..];
            if take == 0 {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        if let Some(part) = self.assembly.take() {
            self.closed = part.end();
            self.totals.add(&part.counts);
            self.ready.push_back(part);
        }
    }
}

/// Bytes of the head that was found.
fn head_len(found: Found) -> usize {
    match found {
        Found::Raw { head, .. } | Found::Page { head, .. } | Found::Zero { head, .. } => head,
        Found::Need(_) | Found::Opaque => 0,
    }
}
