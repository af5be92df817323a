//! Which blocks of a disk are proven free, and by which proof.
//!
//! Owns one bit for each 4 KiB block of the disk, in chunks of 128 MiB of disk. A chunk that is free or used throughout costs 16
//! bytes, any other 4 KiB (32 MiB for a TiB of them), and copies of a map share the chunks in which they do not differ. Leaves
//! alone who sets a bit. Promises that a block is free only if every byte of it was given as free: extents are shrunk to whole
//! blocks.

use std::sync::Arc;

use longhaul_common::extent::{BLOCK, Extent};

/// Words of a chunk.
const WORDS: usize = 512;
/// Bytes of disk that a word stands for.
const WORD: u64 = 64 * BLOCK;
/// Bytes of disk that a chunk stands for: 128 MiB, one block group of ext4 with blocks of 4 KiB.
const CHUNK: u64 = WORDS as u64 * WORD;

/// One bit per block; set where the block is proven free.
#[derive(Clone)]
pub struct FreeMap {
    size: u64,
    /// From the disk's start on; behind the last one nothing is free.
    chunks: Vec<Chunk>,
}

#[derive(Clone, PartialEq, Eq)]
enum Chunk {
    Used,
    Free,
    Mixed(Arc<[u64; WORDS]>),
}

impl Chunk {
    fn free_bytes(&self) -> u64 {
        match self {
            Self::Used => 0,
            Self::Free => CHUNK,
            Self::Mixed(words) => words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() * BLOCK,
        }
    }

    /// Sets or clears the blocks within `[start, end)`, bytes of the chunk. Returns how many bytes were changed.
    fn set(&mut self, start: u64, end: u64, free: bool) -> u64 {
        let full = if free { Self::Free } else { Self::Used };
        if *self == full {
            return 0;
        }
        if end - start == CHUNK {
            let before = self.free_bytes();
            *self = full;
            return if free { CHUNK - before } else { before };
        }
        let words = self.words();
        let mut changed = 0;
        let mut at = start;
        while at < end {
            let (index, bit) = ((at / WORD) as usize, at % WORD / BLOCK);
            let count = (64 - bit).min((end - at) / BLOCK);
            let mask = (u64::MAX >> (64 - count)) << bit;
            let before = words[index];
            words[index] = if free { before | mask } else { before & !mask };
            changed += u64::from((before ^ words[index]).count_ones());
            at += count * BLOCK;
        }
        // Extents mostly come in the disk's order: the one that reaches the end may have been the last that was missing.
        let uniform = if free { u64::MAX } else { 0 };
        if end == CHUNK && words.iter().all(|word| *word == uniform) {
            *self = full;
        }
        changed * BLOCK
    }

    /// The words of this copy alone.
    fn words(&mut self) -> &mut [u64; WORDS] {
        let uniform = if *self == Self::Free { u64::MAX } else { 0 };
        if !matches!(self, Self::Mixed(_)) {
            *self = Self::Mixed(Arc::new([uniform; WORDS]));
        }
        match self {
            Self::Mixed(words) => Arc::make_mut(words),
            Self::Used | Self::Free => unreachable!("it was made a mixed one"),
        }
    }
}

impl FreeMap {
    /// For a disk of `size` bytes, nothing free. A disk beyond [`FreeMap::LARGEST`] never has a free block.
    pub const fn new(size: u64) -> Self {
        let chunks = Vec::new();
        Self { size, chunks }
    }

    /// 256 TiB: 32 MiB of chunks. A sparse file can claim more.
    pub const LARGEST: u64 = 1 << 48;

    /// Marks every whole block inside `extent` as free. Returns how many bytes were not free before.
    pub fn mark(&mut self, extent: &Extent) -> u64 {
        let Some(blocks) = extent.shrink_to(BLOCK).and_then(|blocks| self.within(&blocks)) else {
            return 0;
        };
        self.reach(blocks.end());
        self.set(&blocks, true)
    }

    /// Has a chunk for each byte before `end`.
    fn reach(&mut self, end: u64) {
        let needed = end.div_ceil(CHUNK) as usize;
        if self.chunks.len() < needed {
            self.chunks.resize(needed, Chunk::Used);
        }
    }

    /// Takes back every block that `extent` touches.
    pub fn clear(&mut self, extent: &Extent) {
        let start = extent.offset() / BLOCK * BLOCK;
        let end = extent.end().div_ceil(BLOCK).saturating_mul(BLOCK);
        let blocks = self.within(&Extent::between(start, end));
        if let Some(blocks) = blocks.filter(|_| !extent.is_empty()) {
            self.set(&blocks, false);
        }
    }

    /// Takes over what `from`, of the same disk, says of the blocks that lie within `range`; those that it only touches are not
    /// free. Returns how many bytes of it are free.
    pub fn take(&mut self, from: &Self, range: &Extent) -> u64 {
        self.clear(range);
        let Some(blocks) = range.shrink_to(BLOCK).and_then(|blocks| self.within(&blocks)) else {
            return 0;
        };
        let (mut free, mut at) = (0, blocks.offset());
        while at < blocks.end() {
            let index = (at / CHUNK) as usize;
            let piece = Extent::between(at, blocks.end().min((index as u64 + 1) * CHUNK));
            at = piece.end();
            match from.chunks.get(index) {
                None => break,
                Some(chunk) if piece.len() == CHUNK => {
                    free += chunk.free_bytes();
                    self.reach(piece.end());
                    self.chunks[index] = chunk.clone();
                }
                // A run ends with the disk, perhaps within its last block.
                Some(_) => from.each_run(&piece, &mut |run| {
                    free += self.mark(&Extent::between(run.offset(), run.end().next_multiple_of(BLOCK)));
                }),
            }
        }
        free
    }

    /// Shares the chunks that `with` holds alike; nothing that this map says is changed.
    pub fn share(&mut self, with: &Self) {
        for (mine, other) in self.chunks.iter_mut().zip(&with.chunks) {
            if mine == other {
                *mine = other.clone();
            }
        }
    }

    /// The part of `extent` that lies on the disk, to the end of its last block.
    fn within(&self, extent: &Extent) -> Option<Extent> {
        let known = if self.size <= Self::LARGEST { self.size } else { 0 };
        extent.intersect(&Extent::between(0, known.div_ceil(BLOCK) * BLOCK))
    }

    /// Sets or clears whole blocks, as far as there are chunks. Returns how many bytes were changed.
    fn set(&mut self, blocks: &Extent, free: bool) -> u64 {
        let first = (blocks.offset() / CHUNK) as usize;
        let mut changed = 0;
        for (index, chunk) in self.chunks.iter_mut().enumerate().skip(first) {
            let base = index as u64 * CHUNK;
            if base >= blocks.end() {
                break;
            }
            let start = blocks.offset().saturating_sub(base);
            changed += chunk.set(start, (blocks.end() - base).min(CHUNK), free);
        }
        changed
    }

    /// Whether the block that holds byte `offset` is proven free.
    pub fn is_free(&self, offset: u64) -> bool {
        match self.chunks.get((offset / CHUNK) as usize) {
            None | Some(Chunk::Used) => false,
            Some(Chunk::Free) => true,
            Some(Chunk::Mixed(words)) => {
                words[(offset % CHUNK / WORD) as usize] >> (offset % WORD / BLOCK) & 1 == 1
            }
        }
    }

    /// Bytes proven free.
    pub fn free_bytes(&self) -> u64 {
        self.chunks.iter().map(Chunk::free_bytes).sum()
    }

    /// The longest run from `offset` on, within `[offset, end)`, that is free or not free throughout: (free, run). `offset` must
    /// lie before `end` and `end` within the disk.
    pub fn run(&self, offset: u64, end: u64) -> (bool, Extent) {
        let (free, end) = (self.is_free(offset), end.min(self.size));
        let mut at = offset / BLOCK * BLOCK;
        while at < end {
            let step = match self.chunks.get((at / CHUNK) as usize) {
                None if free => break,
                None => end - at,
                Some(Chunk::Used) if free => break,
                Some(Chunk::Free) if !free => break,
                Some(Chunk::Used | Chunk::Free) => CHUNK - at % CHUNK,
                Some(Chunk::Mixed(words)) => {
                    let word = words[(at % CHUNK / WORD) as usize];
                    let others = (if free { !word } else { word }) >> (at % WORD / BLOCK);
                    if others != 0 {
                        at += u64::from(others.trailing_zeros()) * BLOCK;
                        break;
                    }
                    WORD - at % WORD
                }
            };
            at = at.saturating_add(step);
        }
        (free, Extent::between(offset, at.min(end)))
    }

    /// Gives each run of blocks inside `range` that is free.
    pub fn each_run(&self, range: &Extent, give: &mut dyn FnMut(Extent)) {
        let mut at = range.offset();
        while at < range.end() {
            let (free, run) = self.run(at, range.end());
            if run.is_empty() {
                return; // The range lies beyond the disk.
            }
            if free {
                give(run);
            }
            at = run.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two chunks and a piece that ends within a block.
    const SIZE: u64 = 2 * CHUNK + 1_500_000;

    /// Ends near those of blocks and chunks, and anywhere.
    fn offset() -> impl Strategy<Value = u64> {
        let near = (0u64..4, 0u64..3).prop_map(|(chunk, block)| chunk * CHUNK + block * BLOCK);
        prop_oneof![0u64..SIZE + CHUNK, near, Just(SIZE), 0u64..300_000]
    }

    fn extent() -> impl Strategy<Value = Extent> {
        (offset(), offset()).prop_map(|(a, b)| Extent::between(a.min(b), a.max(b)))
    }

    /// One bool for each block.
    fn plain(changes: &[(Extent, bool)]) -> Vec<bool> {
        let mut plain = vec![false; SIZE.div_ceil(BLOCK) as usize];
        for (extent, mark) in changes.iter().filter(|(extent, _)| !extent.is_empty()) {
            let (start, end) = match mark {
                true => (extent.offset().div_ceil(BLOCK), extent.end() / BLOCK),
                false => (extent.offset() / BLOCK, extent.end().div_ceil(BLOCK)),
            };
            let end = end.min(plain.len() as u64);
            if start < end {
                plain[start as usize..end as usize].fill(*mark);
            }
        }
        plain
    }

    fn map(changes: &[(Extent, bool)]) -> FreeMap {
        let mut map = FreeMap::new(SIZE);
        for (extent, mark) in changes {
            let before = map.free_bytes();
            match mark {
                true => assert_eq!(map.mark(extent), map.free_bytes() - before),
                false => map.clear(extent),
            }
        }
        map
    }

    /// Runs cover the disk, each of them as long as can be.
    fn said(map: &FreeMap) -> Vec<bool> {
        let (mut said, mut at) = (Vec::new(), 0);
        while at < SIZE {
            let (free, run) = map.run(at, SIZE);
            assert!(!run.is_empty() && run.offset() == at);
            assert_eq!(free, map.is_free(at));
            at = run.end();
            assert!(at == SIZE || map.is_free(at) != free);
            said.resize(at.div_ceil(BLOCK) as usize, free);
        }
        said
    }

    proptest! {
        #[test]
        fn runs_agree_with_a_plain_bool_per_block(
            changes in prop::collection::vec((extent(), any::<bool>()), 0..20),
            within in extent(),
        ) {
            let map = map(&changes);
            let plain = plain(&changes);
            prop_assert!(said(&map) == plain);
            prop_assert_eq!(map.free_bytes(), plain.iter().filter(|free| **free).count() as u64 * BLOCK);
            let mut given = vec![false; plain.len()];
            map.each_run(&within, &mut |run| {
                let end = run.end().div_ceil(BLOCK) as usize;
                given[(run.offset() / BLOCK) as usize..end].fill(true);
            });
            let touched = |index: usize| {
                let whole = Extent::between(index as u64 * BLOCK, (index as u64 + 1) * BLOCK);
                whole.intersect(&within).is_some_and(|part| part.offset() < SIZE)
            };
            prop_assert!(given.iter().zip(&plain).enumerate().all(|(at, (given, free))| *given == (*free && touched(at))));
        }

        #[test]
        fn what_is_taken_over_is_what_the_other_says_there(
            mine in prop::collection::vec((extent(), any::<bool>()), 0..6),
            other in prop::collection::vec((extent(), any::<bool>()), 0..6),
            range in extent(),
        ) {
            let (mut map, other_map) = (map(&mine), map(&other));
            let copy = map.clone();
            let free = map.take(&other_map, &range);
            let (mut expected, theirs) = (plain(&mine), plain(&other));
            let mut bytes = 0;
            for (index, block) in expected.iter_mut().enumerate() {
                let whole = Extent::between(index as u64 * BLOCK, (index as u64 + 1) * BLOCK);
                if whole.intersect(&range).is_some() {
                    *block = theirs[index] && range.offset() <= whole.offset() && whole.end() <= range.end();
                    bytes += u64::from(*block) * BLOCK;
                }
            }
            prop_assert!(said(&map) == expected);
            prop_assert_eq!(free, bytes);
            prop_assert!(said(&copy) == plain(&mine));
        }
    }

    #[test]
    fn copies_share_what_they_hold_alike_and_nothing_else() {
        let pages = [
            (Extent::between(BLOCK, 5 * BLOCK), true),
            (Extent::between(CHUNK + BLOCK, CHUNK + 9 * BLOCK), true),
        ];
        let first = map(&pages);
        let mut second = map(&pages);
        second.clear(&Extent::between(CHUNK + BLOCK, CHUNK + 2 * BLOCK));
        let before = said(&second);
        second.share(&first);
        assert!(said(&second) == before);
        let shared = |second: &FreeMap, index: usize| match (&first.chunks[index], &second.chunks[index]) {
            (Chunk::Mixed(mine), Chunk::Mixed(other)) => Arc::ptr_eq(mine, other),
            _ => false,
        };
        assert!(shared(&second, 0) && !shared(&second, 1));
        second.mark(&Extent::between(0, BLOCK));
        assert!(!shared(&second, 0) && said(&first) == plain(&pages));
    }

    #[test]
    fn a_chunk_that_is_free_or_used_throughout_takes_no_words() {
        let mut map = FreeMap::new(SIZE);
        map.mark(&Extent::between(0, CHUNK / 2));
        map.mark(&Extent::between(CHUNK / 2, CHUNK));
        assert!(map.chunks[0] == Chunk::Free);
        map.clear(&Extent::between(0, 1));
        map.clear(&Extent::between(1, CHUNK));
        assert!(map.chunks[0] == Chunk::Used);
    }

    #[test]
    fn a_disk_of_absurd_size_costs_nothing_and_has_no_free_block() {
        let mut map = FreeMap::new(u64::MAX);
        assert_eq!(map.mark(&Extent::between(0, u64::MAX)), 0);
        assert_eq!(map.run(0, 1 << 20), (false, Extent::between(0, 1 << 20)));
        assert_eq!(map.run(0, u64::MAX).1, Extent::between(0, u64::MAX));
    }
}
