//! Which blocks of a disk are proven free, and by which proof.
//!
//! Owns one bit for each 4 KiB block of the disk (32 MiB for a TiB). Leaves alone who sets it. Promises that a block is free only
//! if every byte of it was given as free: extents are shrunk to whole blocks.

use longhaul_common::extent::{BLOCK, Extent};

/// One bit per block; set where the block is proven free.
#[derive(Clone)]
pub struct FreeMap {
    size: u64,
    words: Vec<u64>,
}

impl FreeMap {
    /// For a disk of `size` bytes, nothing free. A disk beyond [`FreeMap::LARGEST`] never has a free block.
    pub fn new(size: u64) -> Self {
        let words = match size <= Self::LARGEST {
            true => size.div_ceil(BLOCK).div_ceil(64),
            false => 0,
        };
        Self {
            size,
            words: vec![0; usize::try_from(words).unwrap_or(0)],
        }
    }

    /// 256 TiB: 8 GiB of bits, of which the system only provides the pages in which a bit is set. A sparse file can claim more.
    pub const LARGEST: u64 = 1 << 48;

    /// Marks every whole block inside `extent` as free. Returns how many bytes were not free before.
    pub fn mark(&mut self, extent: &Extent) -> u64 {
        let mut fresh = 0;
        self.change(extent.shrink_to(BLOCK), |word, mask| {
            fresh += u64::from((mask & !*word).count_ones());
            *word |= mask;
        });
        fresh * BLOCK
    }

    /// Takes back every block that `extent` touches.
    pub fn clear(&mut self, extent: &Extent) {
        let start = extent.offset() / BLOCK * BLOCK;
        let end = extent.end().div_ceil(BLOCK).saturating_mul(BLOCK);
        self.change(Some(Extent::between(start, end)), |word, mask| *word &= !mask);
    }

    fn change(&mut self, blocks: Option<Extent>, mut apply: impl FnMut(&mut u64, u64)) {
        let whole = Extent::between(0, self.words.len() as u64 * 64 * BLOCK);
        let Some(blocks) = blocks.and_then(|blocks| blocks.intersect(&whole)) else {
            return;
        };
        let (mut at, end) = (blocks.offset() / BLOCK, blocks.end() / BLOCK);
        while at < end {
            let (word, bit) = ((at / 64) as usize, at % 64);
            let count = (64 - bit).min(end - at);
            let mask = if count == 64 {
                u64::MAX
            } else {
                ((1 << count) - 1) << bit
            };
            apply(&mut self.words[word], mask);
            at += count;
        }
    }

    /// Whether the block that holds byte `offset` is proven free.
    pub fn is_free(&self, offset: u64) -> bool {
        let block = offset / BLOCK;
        self.words
            .get((block / 64) as usize)
            .is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Bytes proven free.
    pub fn free_bytes(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum::<u64>()
            * BLOCK
    }

    /// The longest run from `offset` on, within `[offset, end)`, that is free or not free throughout: (free, run). `offset` must
    /// lie before `end` and `end` within the disk.
    pub fn run(&self, offset: u64, end: u64) -> (bool, Extent) {
        let free = self.is_free(offset);
        let flip = if free { u64::MAX } else { 0 };
        let last = end.min(self.size).div_ceil(BLOCK);
        let mut block = offset / BLOCK;
        while block < last {
            let word = self.words.get((block / 64) as usize).copied().unwrap_or(0) ^ flip;
            let rest = word >> (block % 64);
            if rest != 0 {
                block += u64::from(rest.trailing_zeros());
                break;
            }
            block = (block / 64 + 1) * 64;
        }
        (
            free,
            Extent::between(offset, (block.saturating_mul(BLOCK)).min(end)),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_agree_with_a_plain_bool_per_block(
            marks in prop::collection::vec((0u64..2_000_000, 0u64..300_000, any::<bool>()), 0..20),
        ) {
            let size = 1_500_000;
            let mut map = FreeMap::new(size);
            let blocks = size.div_ceil(BLOCK);
            let mut plain = vec![false; blocks as usize];
            for (offset, len, mark) in marks {
                let extent = Extent::new(offset, len).unwrap();
                let before = map.free_bytes();
                if mark {
                    prop_assert_eq!(map.mark(&extent), map.free_bytes() - before);
                } else {
                    map.clear(&extent);
                }
                for block in 0..blocks {
                    let whole = Extent::new(block * BLOCK, BLOCK).unwrap();
                    match mark {
                        true if whole.offset() >= offset && whole.end() <= extent.end() => plain[block as usize] = true,
                        false if whole.intersect(&extent).is_some() => plain[block as usize] = false,
                        _ => {}
                    }
                }
            }
            let mut at = 0;
            while at < size {
                let (free, run) = map.run(at, size);
                prop_assert!(!run.is_empty());
                for block in run.offset() / BLOCK..run.end().div_ceil(BLOCK) {
                    prop_assert_eq!(plain[block as usize], free);
                }
                at = run.end();
                if at < size {
                    prop_assert_ne!(map.is_free(at), free);
                }
            }
        }
    }

    #[test]
    fn a_disk_of_absurd_size_costs_nothing_and_has_no_free_block() {
        let mut map = FreeMap::new(u64::MAX);
        assert_eq!(map.mark(&Extent::between(0, u64::MAX)), 0);
        assert_eq!(map.run(0, 1 << 20), (false, Extent::between(0, 1 << 20)));
    }
}
