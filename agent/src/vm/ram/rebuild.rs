//! The tap's inverse: parts in any order in, the identical stream out.
//!
//! Owns what a token stands for, the order of parts and the running digest. Leaves alone whether a batch was damaged on its way: its
//! digest was checked before. Promises that any part, however hostile, is made into exactly the bytes that it says or refused; that
//! early parts hold no more memory than the window; and that every byte comes out once.

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::Bytes;
use longhaul_common::digest::{Digest, Running};
use longhaul_common::extent::BLOCK;
use longhaul_common::wire::batch::BatchError;
use longhaul_common::wire::ram::{RamPart, Records, Token};

use super::part::PART_LEN_MAX;
use super::records::{CONTINUE, PAGE_CONTENT, ZERO};

/// Why a part is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RebuildError {
    #[error("the part belongs to stream {got}, but stream {expected} is being rebuilt")]
    Generation { expected: u32, got: u32 },
    #[error("the part of the RAM stream at {offset} is malformed")]
    Part {
        offset: u64,
        #[source]
        source: BatchError,
    },
    #[error("the part at {offset} carries {got} bytes of data where its tokens ask for {expected}")]
    DataLength { offset: u64, expected: u64, got: u64 },
    #[error(
        "the part at {offset} says {said} bytes of stream, but its tokens make {made}; a part makes 1 to {PART_LEN_MAX}"
    )]
    Length { offset: u64, said: u64, made: u64 },
    #[error("the part at {offset} has a record that names RAM block {block}, whose name it does not give")]
    UnnamedBlock { offset: u64, block: u16 },
    #[error(
        "the part at {offset} overlaps another one; the source cut the stream differently when it sent it again"
    )]
    Overlap { offset: u64 },
    #[error(
        "the part ends at {end}, more than {window} bytes ahead of the {taken} that QEMU was given; the source ignored its credit"
    )]
    TooFar { end: u64, taken: u64, window: u64 },
}

/// What became of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It was the next one: [`Rebuilder::next_chunk`] has something.
    Ready,
    /// Parts before it are missing.
    Held,
    /// It was there before.
    Duplicate,
}

/// Puts a stream together.
pub struct Rebuilder {
    generation: u32,
    window: u64,
    /// Parts that came early, made into the stream's bytes, by offset.
    early: BTreeMap<u64, Bytes>,
    ready: VecDeque<Bytes>,
    /// Stream position up to which nothing is missing.
    received: u64,
    /// Stream position up to which chunks were given out.
    taken: u64,
    digest: Running,
}

impl Rebuilder {
    /// Nothing of stream `generation` is there. A part may end `window` bytes ahead of what was taken.
    pub fn new(generation: u32, window: u64) -> Self {
        Self {
            generation,
            window,
            early: BTreeMap::new(),
            ready: VecDeque::new(),
            received: 0,
            taken: 0,
            digest: Running::default(),
        }
    }

    /// Takes a part in. The next one is always taken, also beyond the window, where no chunk waits.
    ///
    /// # Errors
    /// The part is malformed, of another stream, too far ahead, or overlaps others. Nothing has changed then.
    pub fn accept(&mut self, part: &RamPart, data: Bytes) -> Result<Accepted, RebuildError> {
        let offset = part.offset;
        if part.generation != self.generation {
            return Err(RebuildError::Generation {
                expected: self.generation,
                got: part.generation,
            });
        }
        let len = check(part, &data)?;
        // `check` has seen that the end fits in 64 bits.
        let end = offset + len;
        if self.is_known(offset, end)? {
            return Ok(Accepted::Duplicate);
        }
        let is_next = offset == self.received;
        let waits = self.ready.is_empty();
        if end.saturating_sub(self.taken) > self.window && !(is_next && waits) {
            return Err(RebuildError::TooFar {
                end,
                taken: self.taken,
                window: self.window,
            });
        }
        self.early.insert(offset, rendered(part, len, data));
        if !is_next {
            return Ok(Accepted::Held);
        }
        while let Some(bytes) = self.early.remove(&self.received) {
            self.digest.update(&bytes);
            self.received += bytes.len() as u64;
            self.ready.push_back(bytes);
        }
        Ok(Accepted::Ready)
    }

    /// The next bytes of the stream, up to [`PART_LEN_MAX`].
    pub fn next_chunk(&mut self) -> Option<Bytes> {
        let chunk = self.ready.pop_front()?;
        self.taken += chunk.len() as u64;
        Some(chunk)
    }

    /// Stream position up to which nothing is missing.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Stream position up to which chunks were given out.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Bytes of parts that wait for others before them.
    pub fn held(&self) -> u64 {
        self.early.values().map(|bytes| bytes.len() as u64).sum()
    }

    /// Of all bytes up to [`Self::received`]; at the stream's end it equals the tokenizer's.
    pub fn digest(&self) -> Digest {
        self.digest.digest()
    }

    /// Another window from now on; what is there stays.
    pub fn set_window(&mut self, window: u64) {
        self.window = window;
    }

    /// Whether the part is there already; overlaps are refused.
    fn is_known(&self, offset: u64, end: u64) -> Result<bool, RebuildError> {
        if end <= self.received {
            return Ok(true);
        }
        let before = self.early.range(..end).next_back();
        let before = before.map(|(start, bytes)| (*start, start.saturating_add(bytes.len() as u64)));
        match before {
            Some(known) if known == (offset, end) => Ok(true),
            Some((_, stop)) if stop > offset => Err(RebuildError::Overlap { offset }),
            _ if offset < self.received => Err(RebuildError::Overlap { offset }),
            _ => Ok(false),
        }
    }
}

/// Checks a part alone and gives the number of bytes that it makes.
fn check(part: &RamPart, data: &Bytes) -> Result<u64, RebuildError> {
    let offset = part.offset;
    part.check()
        .map_err(|source| RebuildError::Part { offset, source })?;
    let (expected, got) = (part.data_len(), data.len() as u64);
    if expected != got {
        return Err(RebuildError::DataLength {
            offset,
            expected,
            got,
        });
    }
    let (made, said) = (made(part)?, part.len);
    if made != said || !(1..=PART_LEN_MAX).contains(&made) {
        return Err(RebuildError::Length { offset, said, made });
    }
    Ok(made)
}

/// Names of blocks that a part gives, up to the token that is looked at.
type Names<'a> = HashMap<u16, &'a [u8]>;

/// Bytes of stream that a part makes; every name that is needed is there.
fn made(part: &RamPart) -> Result<u64, RebuildError> {
    let mut names = Names::new();
    let mut sum = 0_u64;
    for token in &part.tokens {
        let bytes = match token {
            Token::Raw(bytes) => u64::from(*bytes),
            Token::Block { index, name } => {
                names.insert(*index, name);
                0
            }
            Token::Pages(run) => u64::from(run.count) * (8 + BLOCK) + name_len(part, &names, run)?,
            Token::Zeros(run) => u64::from(run.count) * 9 + name_len(part, &names, run)?,
        };
        sum = sum.saturating_add(bytes);
    }
    Ok(sum)
}

fn name_len(part: &RamPart, names: &Names<'_>, run: &Records) -> Result<u64, RebuildError> {
    if run.continued {
        return Ok(0);
    }
    let name = names.get(&run.block).ok_or(RebuildError::UnnamedBlock {
        offset: part.offset,
        block: run.block,
    })?;
    Ok(1 + name.len() as u64)
}

/// The bytes that a checked part stands for. Raw bytes alone are not copied.
fn rendered(part: &RamPart, len: u64, data: Bytes) -> Bytes {
    if let [Token::Raw(_)] = part.tokens.as_slice() {
        return data;
    }
    let (mut pages, mut raw) = data.split_at(part.pages_len() as usize);
    let mut names = Names::new();
    let mut out = Vec::with_capacity(len as usize);
    for token in &part.tokens {
        match token {
            Token::Raw(bytes) => {
                let (now, rest) = raw.split_at(*bytes as usize);
                out.extend_from_slice(now);
                raw = rest;
            }
            Token::Block { index, name } => {
                names.insert(*index, name);
            }
            Token::Pages(run) => {
                let (now, rest) = pages.split_at(run.count as usize * BLOCK as usize);
                for (page, content) in (run.first..).zip(now.chunks_exact(BLOCK as usize)) {
                    head(&mut out, run, page, PAGE_CONTENT, &names);
                    out.extend_from_slice(content);
                }
                pages = rest;
            }
            Token::Zeros(run) => {
                for page in run.first..run.first + u64::from(run.count) {
                    head(&mut out, run, page, ZERO, &names);
                    out.push(0);
                }
            }
        }
    }
    out.into()
}

/// A record's word, and the block's name where it is the first of a run that names it.
fn head(out: &mut Vec<u8>, run: &Records, page: u64, kind: u64, names: &Names<'_>) {
    let named = page == run.first && !run.continued;
    let word = (page * BLOCK) | kind | if named { 0 } else { CONTINUE };
    out.extend_from_slice(&word.to_be_bytes());
    if let (true, Some(name)) = (named, names.get(&run.block)) {
        out.push(name.len() as u8);
        out.extend_from_slice(name);
    }
}
