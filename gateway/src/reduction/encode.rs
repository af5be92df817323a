//! From a batch's data to its payload.
//!
//! Owns what becomes of each block, cheapest first: zeros; the content of a slot; the content of an earlier block of the batch; the
//! difference to what this place held before, or to a block that is nearly the same; content. Leaves slots to `window`, and how it is written to `plan` and `codec`.
//! Promises a payload that any gateway with the same window restores, at most [`OVERHEAD`] bytes larger than the data.
//!
//! ```text
//! flags u8 | epoch u64 LE | [epoch of the other direction u64 LE] | first position | fates
//!   | [codec u8, length, residues of XOR or changed blocks] | [codec u8, length, plain blocks and loose bytes] | [raw blocks]
//! ```

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;
use longhaul_common::wire::batch::BatchHeader;

use super::alike::Features;
use super::block::{self, BlockDigest};
use super::codec::{self, Codec, Level};
use super::layout::{BLOCK_LEN, Layout, Vm, together};
use super::pair::Pair;
use super::plan::{self, Fate};
use super::window::{BATCH_BLOCKS, Found, Read, Receipt, Ring, Window};
use super::{Encoding, Kept, Method, OVERHEAD, Payload, Reduced, ReductionCounts};

/// The payload's blocks take positions from the first one on.
pub(super) const STORES: u8 = 1;
/// It refers to the other direction, whose epoch follows.
pub(super) const THEIRS: u8 = 2;

/// Changed blocks are content that continues their bases, not differences.
pub(super) const PATCHED: u8 = 4;

/// A difference of more bytes than this is not worth it: the content itself compresses as well.
const DIFFERING_MAX: usize = BLOCK_LEN / 3;
/// The same for content that does not compress.
const DIFFERING_NOISE_MAX: usize = BLOCK_LEN / 4 * 3;

/// Reduces the data of one batch. CPU-bound: call it on [`super::workers`].
pub fn reduce(raw: &Bytes, header: &BatchHeader, vm: Vm, pair: Option<&Pair>, method: Method) -> Reduced {
    let windowed = match pair {
        Some(pair) if method.dedup || method.xor => Draft::new(raw, header, vm).write(pair, method),
        _ => None,
    };
    windowed.unwrap_or_else(|| reduce_plainly(raw, method.level))
}

/// Reduces without any window.
pub fn reduce_plainly(raw: &Bytes, level: Level) -> Reduced {
    let mut counts = ReductionCounts::default();
    let len = raw.len() as u64;
    let payload = match codec::compress(raw, level) {
        Some((codec, smaller)) => {
            counts.compressed = len;
            Payload {
                encoding: if codec == Codec::Zstd {
                    Encoding::Zstd
                } else {
                    Encoding::Lz4
                },
                bytes: smaller.into(),
            }
        }
        None => {
            counts.raw = len;
            Payload {
                encoding: Encoding::Raw,
                bytes: raw.clone(),
            }
        }
    };
    counts.payload = payload.bytes.len() as u64;
    Reduced {
        payload,
        counts,
        kept: Kept::default(),
    }
}

/// A batch on its way to become a payload.
struct Draft<'a> {
    raw: &'a [u8],
    layout: Layout,
    secret: bool,
    fates: Vec<Fate>,
    digests: Vec<BlockDigest>,
    features: Vec<Features>,
    /// What stands at a block's place so far, for those that are to be sent as a difference.
    bases: Vec<u8>,
    /// The blocks themselves, where zstd finds the difference; empty where XOR makes it.
    changed: Vec<u8>,
    /// Blocks whose base stood somewhere else, by their number.
    elsewhere: Vec<usize>,
    /// Blocks whose base is read from a file first: where in `bases`, which window, what.
    in_file: Vec<(usize, bool, Found)>,
}

impl<'a> Draft<'a> {
    fn new(raw: &'a [u8], header: &BatchHeader, vm: Vm) -> Self {
        let layout = Layout::of(header, vm);
        let blocks = layout.blocks.len();
        Self {
            raw,
            layout,
            secret: header.ram.is_some(),
            fates: Vec::with_capacity(blocks),
            digests: Vec::with_capacity(blocks),
            features: Vec::with_capacity(blocks),
            bases: Vec::new(),
            changed: Vec::new(),
            elsewhere: Vec::new(),
            in_file: Vec::new(),
        }
    }

    fn block(&self, index: usize) -> &'a [u8] {
        let at = self.layout.blocks.get(index).map_or(0, |block| block.at);
        &self.raw[at..at + BLOCK_LEN]
    }

    /// The payload, or `None` where there is no window to speak of.
    fn write(mut self, pair: &Pair, method: Method) -> Option<Reduced> {
        let own = &pair.outgoing;
        // Nothing is looked at where nothing comes of it.
        if !own.ring().agreed
            || self.layout.blocks.is_empty()
            || self.layout.blocks.len() as u64 > BATCH_BLOCKS
        {
            return None;
        }
        self.look_alone(own);
        let incoming = pair.incoming();
        let (receipt, head, theirs) = self.look_up(own, incoming.as_deref(), method)?;
        self.read_bases(own, incoming.as_deref());
        self.keep_in_file(own, &receipt);
        let patch = self.differ(method.level);
        let mut out = Vec::with_capacity(self.raw.len() / 2);
        let flags = if receipt.count > 0 { STORES } else { 0 }
            | if theirs.is_some() { THEIRS } else { 0 }
            | if patch { PATCHED } else { 0 };
        out.push(flags);
        out.extend(receipt.epoch.to_le_bytes());
        out.extend(theirs.into_iter().flat_map(u64::to_le_bytes));
        plan::put(head, &mut out);
        plan::encode(&self.fates, head, &mut out);
        let counts = self.add_sections(method.level, &mut out);
        if out.len() > self.raw.len() + OVERHEAD {
            own.settle(&receipt, false);
            return None;
        }
        let needs_window = self.fates.iter().any(|fate| fate.is_reference());
        Some(Reduced {
            payload: Payload {
                encoding: Encoding::Blocks,
                bytes: out.into(),
            },
            counts,
            kept: Kept {
                receipt: Some(receipt),
                needs_window,
            },
        })
    }

    /// What can be said of each block without the window.
    fn look_alone(&mut self, own: &Window) {
        let mut first: HashMap<BlockDigest, u64> = HashMap::with_capacity(self.layout.blocks.len());
        for index in 0..self.layout.blocks.len() {
            let block = self.block(index);
            if block::is_zero(block) {
                self.digests.push(BlockDigest::default());
                self.features.push(Features::default());
                self.fates.push(Fate::Zero);
                continue;
            }
            let digest = own.key.digest(block);
            let earlier = *first.entry(digest).or_insert(index as u64);
            self.digests.push(digest);
            self.features.push(Features::of(block));
            self.fates.push(if earlier < index as u64 {
                Fate::Same(earlier)
            } else {
                Fate::Plain
            });
        }
    }

    /// Finds references and bases, and takes positions for what is new; gives the receipt, the position that references are near to, and
    /// the other direction's epoch where it is needed.
    fn look_up(
        &mut self,
        own: &Window,
        incoming: Option<&Window>,
        method: Method,
    ) -> Option<(Receipt, u64, Option<u64>)> {
        let mut ring = own.ring();
        // Always in this order: the sender's own direction first.
        let theirs = incoming.map(Window::ring);
        if !ring.agreed {
            return None;
        }
        for index in 0..self.fates.len() {
            if self.fates[index] == Fate::Plain {
                self.fates[index] = self.find(index, &ring, theirs.as_deref(), method);
            }
        }
        let used = self
            .fates
            .iter()
            .any(|fate| matches!(fate, Fate::Theirs(_) | Fate::XorTheirs(_)));
        let their_epoch = theirs.as_deref().filter(|_| used).map(|theirs| theirs.epoch);
        drop(theirs);
        let own_position = |fate: &Fate| match fate {
            Fate::Own(at) | Fate::XorOwn(at) => Some(*at),
            _ => None,
        };
        let mut receipt = Receipt {
            epoch: ring.epoch,
            oldest: self.fates.iter().filter_map(own_position).min(),
            ..Receipt::default()
        };
        if let Some(oldest) = receipt.oldest {
            ring.pin(oldest);
        }
        let head = ring.head;
        let new = self.fates.iter().filter(|fate| fate.is_stored()).count() as u64;
        if let Some(first) = ring.reserve(new) {
            (receipt.first, receipt.count) = (first, new);
        }
        self.store(&mut ring, &mut receipt);
        Some((receipt, head, their_epoch))
    }

    /// The cheapest fate that the windows give a block.
    fn find(&mut self, index: usize, own: &Ring, theirs: Option<&Ring>, method: Method) -> Fate {
        let digest = &self.digests[index];
        let margin = |ring: &Ring| ring.len() / 8;
        if method.dedup {
            if let Some(at) = own.same(digest, BATCH_BLOCKS) {
                return Fate::Own(at);
            }
            if let Some(at) = theirs.and_then(|ring| ring.same(digest, margin(ring))) {
                return Fate::Theirs(at);
            }
        }
        let place = self.layout.blocks[index].place;
        if !method.xor {
            return Fate::Plain;
        }
        let found = own.at_place(place, BATCH_BLOCKS).map(|at| (own, at, false));
        let found =
            found.or_else(|| theirs.and_then(|ring| Some((ring, ring.at_place(place, margin(ring))?, true))));
        let alike = || own.alike(self.features[index], BATCH_BLOCKS);
        let is_elsewhere = found.is_none();
        let found = found.or_else(|| Some((own, alike()?, false)));
        let Some((ring, at, of_theirs)) = found else {
            return Fate::Plain;
        };
        if is_elsewhere {
            self.elsewhere.push(index);
        }
        let start = self.bases.len();
        self.bases.resize(start + BLOCK_LEN, 0);
        match ring.read(at, &mut self.bases[start..]) {
            Read::Done => {}
            Read::InFile(found) => self.in_file.push((start, of_theirs, found)),
            Read::Gone => {
                self.bases.truncate(start);
                return Fate::Plain;
            }
        }
        if of_theirs {
            Fate::XorTheirs(at)
        } else {
            Fate::XorOwn(at)
        }
    }

    /// Puts what is new into this end's ring, and notes where each place's content is.
    fn store(&self, ring: &mut Ring, receipt: &mut Receipt) {
        let mut next = receipt.first;
        let mut positions: Vec<Option<u64>> = Vec::with_capacity(self.fates.len());
        for (index, fate) in self.fates.iter().enumerate() {
            let position = match fate {
                Fate::Own(at) => Some(*at),
                Fate::Same(earlier) => positions.get(*earlier as usize).copied().flatten(),
                fate if fate.is_stored() && receipt.count > 0 => {
                    ring.write(next, self.secret, self.digests[index], self.block(index));
                    receipt.features.push(self.features[index]);
                    next += 1;
                    Some(next - 1)
                }
                _ => None,
            };
            positions.push(position);
            receipt
                .places
                .extend(position.map(|position| (self.layout.blocks[index].place, position)));
        }
    }

    /// Reads bases that are only in a file; one that cannot be read becomes zeros, and so of no help.
    fn read_bases(&mut self, own: &Window, incoming: Option<&Window>) {
        for (start, of_theirs, found) in std::mem::take(&mut self.in_file) {
            let window = if of_theirs { incoming } else { Some(own) };
            let base = &mut self.bases[start..start + BLOCK_LEN];
            if !window.is_some_and(|window| window.read_file(&found, base)) {
                base.fill(0);
                self.in_file.push((start, of_theirs, found));
            }
        }
    }

    fn keep_in_file(&self, own: &Window, receipt: &Receipt) {
        let Some(file) = own.file.as_ref().filter(|_| receipt.count > 0) else {
            return;
        };
        let stored = (0..self.fates.len()).filter(|index| self.fates[*index].is_stored());
        let mut blocks = Vec::with_capacity(receipt.count as usize * BLOCK_LEN);
        stored.for_each(|index| blocks.extend_from_slice(self.block(index)));
        file.write(receipt.first, self.secret, &mut blocks);
    }

    /// How many bytes of each changed block differ from its base, in order; all of them where that cannot be read.
    fn differing(&self) -> Vec<usize> {
        let unread: Vec<_> = self.in_file.iter().map(|(start, ..)| *start).collect();
        let changed = (0..self.fates.len()).filter(|index| self.fates[*index].is_difference());
        let bases = self.bases.chunks(BLOCK_LEN).enumerate();
        let differing = changed.zip(bases).map(|(index, (number, base))| {
            let is_unread = unread.contains(&(number * BLOCK_LEN));
            if is_unread {
                BLOCK_LEN
            } else {
                block::differing(self.block(index), base)
            }
        });
        differing.collect()
    }

    /// Makes differences of those bases that help; the others' blocks are sent as content. `true`: zstd is to find them, in the old content.
    ///
    /// Measured on the memory of a busy guest (`codec`'s test says how): where little differs XOR comes to 8 % less than what zstd finds, and takes
    /// less time; where more does, and at level 3 and above, zstd finds what has moved, too.
    fn differ(&mut self, level: Level) -> bool {
        let differing = self.differing();
        let is_more = |bytes: &usize| (DIFFERING_MAX + 1..BLOCK_LEN).contains(bytes);
        let patch = level >= Level::Zstd3 && differing.iter().any(is_more);
        let mut differing = differing.into_iter();
        let (mut from, mut to) = (0, 0);
        for index in 0..self.fates.len() {
            let block = self.block(index);
            if self.fates[index].is_difference() {
                let most = if block::is_noise(block) {
                    DIFFERING_NOISE_MAX
                } else if patch {
                    BLOCK_LEN - 1
                } else {
                    DIFFERING_MAX
                };
                if differing.next().is_some_and(|bytes| bytes <= most) {
                    if to < from {
                        self.bases.copy_within(from..from + BLOCK_LEN, to);
                    }
                    if patch {
                        self.changed.extend_from_slice(block);
                    } else {
                        block::xor(&mut self.bases[to..to + BLOCK_LEN], block);
                    }
                    to += BLOCK_LEN;
                } else {
                    self.fates[index] = Fate::Plain;
                }
                from += BLOCK_LEN;
            }
            if self.fates[index] == Fate::Plain && block::is_noise(block) {
                self.fates[index] = Fate::Raw;
            }
        }
        self.bases.truncate(to);
        patch
    }

    /// All blocks of one fate, in order, and `loose` bytes behind them; copied only where they do not lie together as they are.
    fn together(&self, fate: Fate, loose: &[Range<usize>]) -> Cow<'a, [u8]> {
        let blocks = self
            .layout
            .ranges(|index| self.fates.get(index).is_some_and(|of| *of == fate));
        let parts = || blocks.clone().chain(loose.iter().cloned());
        if let Some(range) = together(parts()) {
            return Cow::Borrowed(&self.raw[range]);
        }
        let mut content = Vec::with_capacity(parts().map(|part| part.len()).sum());
        parts().for_each(|part| content.extend_from_slice(&self.raw[part]));
        Cow::Owned(content)
    }

    /// Adds residues, content and what does not shrink, and counts.
    fn add_sections(&self, level: Level, out: &mut Vec<u8>) -> ReductionCounts {
        let mut counts = ReductionCounts::default();
        for fate in &self.fates {
            let len = BLOCK_LEN as u64;
            match fate {
                Fate::Zero => counts.zero += len,
                Fate::Own(_) | Fate::Theirs(_) | Fate::Same(_) => counts.reference += len,
                Fate::XorOwn(_) | Fate::XorTheirs(_) => counts.xor += len,
                Fate::Plain | Fate::Raw => {}
            }
        }
        let plain = self.together(Fate::Plain, &self.layout.loose);
        let raw = self.together(Fate::Raw, &[]);
        let before = out.len();
        if self.changed.is_empty() {
            // A difference is mostly zeros: zstd 1 is as fast as LZ4 there, and a quarter smaller; beyond level 3 nothing is gained.
            add_section(&self.bases, level.clamp(Level::Zstd1, Level::Zstd3), out);
        } else {
            add_patch(&self.changed, &self.bases, level, out);
        }
        counts.xor_payload = (out.len() - before) as u64;
        if !self
            .elsewhere
            .iter()
            .any(|index| self.fates[*index].is_difference())
        {
            (counts.rewritten, counts.rewritten_payload) = (counts.xor, counts.xor_payload);
        }
        if add_section(&plain, level, out) {
            counts.compressed += plain.len() as u64;
        } else {
            counts.raw += plain.len() as u64;
        }
        counts.raw += raw.len() as u64;
        out.extend_from_slice(&raw);
        counts.payload = out.len() as u64;
        counts
    }
}

/// Adds a section, unless it is empty; tells whether it was compressed.
fn add_section(content: &[u8], level: Level, out: &mut Vec<u8>) -> bool {
    if content.is_empty() {
        return false;
    }
    let mut add = |codec: Codec, bytes: &[u8]| {
        out.push(codec as u8);
        plan::put(bytes.len() as u64, out);
        out.extend_from_slice(bytes);
    };
    let compressed = codec::compress_then(content, level, &mut add).is_some();
    if !compressed {
        add(Codec::Raw, content);
    }
    compressed
}

/// Adds changed blocks as what follows their bases.
fn add_patch(changed: &[u8], bases: &[u8], level: Level, out: &mut Vec<u8>) {
    match codec::compress_against(changed, bases, level) {
        Some(small) => {
            out.push(Codec::Patch as u8);
            plan::put(small.len() as u64, out);
            out.extend_from_slice(&small);
        }
        None => drop(add_section(changed, level, out)),
    }
}
