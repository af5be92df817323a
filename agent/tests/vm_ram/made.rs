//! Streams written by hand, and what every test of the tap asks: the same bytes again.

#![allow(dead_code, reason = "no test needs all of it")]

use longhaul_agent::vm::ram::{Accepted, Part, Rebuilder, Tokenizer, TokenizerOptions};
use longhaul_common::digest::Digest;

pub(crate) const RAM: u32 = 2;
pub(crate) const DIRTY: u32 = 3;
const ZERO: u64 = 0x02;
const PAGE: u64 = 0x08;
const CONTINUE: u64 = 0x20;

/// A stream in the making.
#[derive(Clone, Default)]
pub(crate) struct Stream(pub(crate) Vec<u8>);

impl Stream {
    pub(crate) fn begun() -> Self {
        let mut stream = Self::default();
        stream.put(b"QEVM\0\0\0\x03\x07");
        stream.be32(11).put(b"pc-q35-10.0");
        stream
    }

    /// With these blocks, ready for pages.
    pub(crate) fn with_blocks(blocks: &[(&str, u64)]) -> Self {
        let mut stream = Self::begun();
        stream.ram_start(blocks);
        stream
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn be16(&mut self, number: u16) -> &mut Self {
        self.put(&number.to_be_bytes())
    }

    pub(crate) fn be32(&mut self, number: u32) -> &mut Self {
        self.put(&number.to_be_bytes())
    }

    pub(crate) fn be64(&mut self, number: u64) -> &mut Self {
        self.put(&number.to_be_bytes())
    }

    pub(crate) fn str8(&mut self, text: &str) -> &mut Self {
        self.put(&[text.len() as u8]).put(text.as_bytes())
    }

    pub(crate) fn start(&mut self, id: u32, name: &str, version: u32) -> &mut Self {
        self.put(&[1]).be32(id).str8(name).be32(0).be32(version)
    }

    pub(crate) fn ram_start(&mut self, blocks: &[(&str, u64)]) -> &mut Self {
        let total: u64 = blocks.iter().map(|(_, len)| len).sum();
        self.start(RAM, "ram", 4).be64(total | 4);
        for (name, len) in blocks {
            self.str8(name).be64(*len);
        }
        self.eos(RAM)
    }

    pub(crate) fn command(&mut self, command: u16, body: &[u8]) -> &mut Self {
        self.put(&[8]).be16(command).be16(body.len() as u16).put(body)
    }

    pub(crate) fn part(&mut self, id: u32) -> &mut Self {
        self.put(&[2]).be32(id)
    }

    pub(crate) fn end(&mut self, id: u32) -> &mut Self {
        self.put(&[3]).be32(id)
    }

    pub(crate) fn footer(&mut self, id: u32) -> &mut Self {
        self.put(&[0x7e]).be32(id)
    }

    /// The RAM section's own end, and the footer.
    pub(crate) fn eos(&mut self, id: u32) -> &mut Self {
        self.be64(0x10).footer(id)
    }

    /// A page of `fill` that names its block.
    pub(crate) fn page(&mut self, block: &str, page: u64, fill: u8) -> &mut Self {
        self.be64((page << 12) | PAGE).str8(block).put(&[fill; 4096])
    }

    pub(crate) fn next_page(&mut self, page: u64, fill: u8) -> &mut Self {
        self.be64((page << 12) | PAGE | CONTINUE).put(&[fill; 4096])
    }

    pub(crate) fn zero(&mut self, block: &str, page: u64) -> &mut Self {
        self.be64((page << 12) | ZERO).str8(block).put(&[0])
    }

    pub(crate) fn next_zero(&mut self, page: u64) -> &mut Self {
        self.be64((page << 12) | ZERO | CONTINUE).put(&[0])
    }

    pub(crate) fn device_state(&mut self) -> &mut Self {
        self.put(&[4]).be32(9).str8("cpu").be32(0).be32(12);
        self.put(&[0x5a; 300]).footer(9).put(&[0, 6]).be32(2).put(b"{}")
    }
}

pub(crate) fn options(target: usize) -> TokenizerOptions {
    TokenizerOptions {
        generation: 7,
        target,
        ..TokenizerOptions::default()
    }
}

/// Takes `stream` apart in slices of the lengths that `slices` gives.
pub(crate) fn taken_apart(
    stream: &[u8],
    target: usize,
    mut slice: impl FnMut() -> usize,
) -> (Tokenizer, Vec<Part>) {
    let mut tokenizer = Tokenizer::new(&options(target));
    let mut parts = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(slice().clamp(1, rest.len()));
        tokenizer.push(now);
        parts.extend(std::iter::from_fn(|| tokenizer.next_part()));
        rest = later;
    }
    tokenizer.finish();
    parts.extend(std::iter::from_fn(|| tokenizer.cut()));
    assert_eq!(tokenizer.pending(), 0);
    (tokenizer, parts)
}

/// Puts parts together, which come in any order.
pub(crate) fn put_together<'a>(parts: impl IntoIterator<Item = &'a Part>) -> (Rebuilder, Vec<u8>) {
    let mut rebuilder = Rebuilder::new(7, u64::MAX);
    let mut out = Vec::new();
    for part in parts {
        let accepted = rebuilder.accept(&part.header, part.data.clone());
        let accepted = accepted.unwrap_or_else(|error| panic!("{error}"));
        while let Some(chunk) = rebuilder.next_chunk() {
            assert_eq!(accepted, Accepted::Ready);
            out.extend_from_slice(&chunk);
        }
    }
    (rebuilder, out)
}

/// Asserts that `stream` comes out as it went in; gives the tap and its parts.
pub(crate) fn same(stream: &[u8], target: usize, slice: impl FnMut() -> usize) -> (Tokenizer, Vec<Part>) {
    let (tokenizer, parts) = taken_apart(stream, target, slice);
    let (rebuilder, out) = put_together(&parts);
    assert!(out == stream, "the stream is another one");
    assert_eq!(rebuilder.digest(), tokenizer.digest());
    assert_eq!(rebuilder.digest(), Digest::of(stream));
    assert_eq!(rebuilder.received(), tokenizer.position());
    (tokenizer, parts)
}
