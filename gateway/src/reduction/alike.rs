//! Blocks that are nearly the same as one that is known, wherever that one lies.
//!
//! Owns a block's features and the table that leads from a feature to a slot. Pieces at fixed places are hashed, and the smallest hash of
//! every fourth piece is a feature: two blocks share it as likely as not when half of these pieces are the same (min-wise hashing: Broder,
//! "On the resemblance and containment of documents", 1997). What has moved within its block is not found. So the memory of the second VM
//! of a template finds what the first one's was like, at whatever address. Leaves to `window` what may be referred to, and to
//! `encode` whether a difference is worth it. Promises hints only: a wrong one costs a comparison.
//!
//! Measured on the memory of two VMs of a template (96 MB in blocks that are nowhere in the first one, 30.9 MB under zstd 3): with two
//! features a block it comes to 9.1 MB, with four to 6.9 MB.

use super::layout::BLOCK_LEN;

/// A piece is hashed.
const PIECE: usize = 32;
/// Of so many bytes.
const STRIDE: usize = 128;
const FEATURES: usize = 4;
/// Entries for each slot of the ring. Fewer than features: of a full ring half of them are pushed out, and one is enough.
const SPREAD: u64 = 2;
/// Odd, with their bits spread.
const FACTORS: [u64; 4] = [
    0x9e37_79b9_7f4a_7c15,
    0xc2b2_ae3d_27d4_eb4f,
    0x1656_67b1_9e37_79f9,
    0xd6e8_feb8_6659_fd93,
];

/// What a block has in common with those that are like it. Zero: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features([u64; FEATURES]);

impl Features {
    /// Of one block. A piece that repeats one word says nothing.
    pub fn of(block: &[u8]) -> Self {
        let mut least = [u64::MAX; FEATURES];
        let pieces = block.chunks_exact(STRIDE).take(BLOCK_LEN / STRIDE);
        for (number, piece) in pieces.enumerate() {
            let (words, _) = piece[..PIECE].as_chunks::<8>();
            let words: [u64; PIECE / 8] = std::array::from_fn(|n| u64::from_le_bytes(words[n]));
            if words.iter().all(|word| *word == words[0]) {
                continue;
            }
            let terms = words.iter().zip(FACTORS);
            let hash = mixed(terms.fold(0, |sum: u64, (word, factor)| {
                sum.wrapping_add((word ^ (word >> 32)).wrapping_mul(factor))
            }));
            let least = &mut least[number % FEATURES];
            *least = hash.min(*least);
        }
        // The smallest are near zero: spread again.
        Self(least.map(|least| if least == u64::MAX { 0 } else { mixed(least) }))
    }

    fn known(self) -> impl Iterator<Item = u64> {
        self.0.into_iter().filter(|feature| *feature != 0)
    }
}

/// Every bit of the result depends on every bit (David Stafford's finalizer "Mix13").
fn mixed(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// From features to slots. An entry is 4 bytes: the slot, counted from one, and as much of the feature as there is room for. The newest
/// entry replaces whatever is at its place.
pub(super) struct Alike {
    entries: Vec<u32>,
    slot_bits: u32,
}

impl Alike {
    /// For a ring of `slots` slots, at most 2^32 - 2.
    pub(super) fn new(slots: u64) -> Self {
        Self {
            entries: vec![0; (slots * SPREAD) as usize],
            slot_bits: u64::BITS - slots.leading_zeros(),
        }
    }

    pub(super) fn clear(&mut self) {
        self.entries.fill(0);
    }

    fn entry(&self, feature: u64, slot: u64) -> u32 {
        let part = (feature as u32).checked_shl(self.slot_bits).unwrap_or(0);
        part | (slot as u32).wrapping_add(1)
    }

    fn place(&self, feature: u64) -> usize {
        ((u128::from(feature) * self.entries.len() as u128) >> 64) as usize
    }

    /// A block with these features lies in this slot now.
    pub(super) fn insert(&mut self, features: Features, slot: u64) {
        for feature in features.known() {
            let (at, entry) = (self.place(feature), self.entry(feature, slot));
            if let Some(place) = self.entries.get_mut(at) {
                *place = entry;
            }
        }
    }

    /// Slots that may hold, or have held, a block that shares a feature.
    pub(super) fn find(&self, features: Features) -> impl Iterator<Item = u64> + '_ {
        features.known().filter_map(|feature| {
            let entry = *self.entries.get(self.place(feature))?;
            let mask = 1_u32.checked_shl(self.slot_bits).map_or(u32::MAX, |bit| bit - 1);
            let slot = u64::from((entry & mask).checked_sub(1)?);
            (self.entry(feature, slot) == entry).then_some(slot)
        })
    }

    /// Bytes of memory.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        size_of_val(&self.entries[..])
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn block(random: &mut StdRng) -> Vec<u8> {
        (0..BLOCK_LEN).map(|_| random.random()).collect()
    }

    #[test]
    fn a_block_with_some_small_writes_is_found_and_others_are_not() {
        // A quarter of a ring, and a full one, of which half of the entries are pushed out.
        for (slots, least) in [(8000, 1900), (2000, 1400)] {
            let mut random = StdRng::seed_from_u64(4);
            let mut table = Alike::new(slots);
            let blocks: Vec<_> = (0..2000).map(|_| block(&mut random)).collect();
            for (slot, block) in (0..).zip(&blocks) {
                table.insert(Features::of(block), slot);
            }
            let (mut found, mut wrong) = (0, 0);
            for (slot, block) in (0..).zip(&blocks) {
                let mut changed = block.clone();
                for _ in 0..7 {
                    let at = random.random_range(0..BLOCK_LEN / 16) * 16;
                    random.fill(&mut changed[at..at + 16]);
                }
                let slots: Vec<u64> = table.find(Features::of(&changed)).collect();
                found += u32::from(slots.contains(&slot));
                wrong += slots.iter().filter(|other| **other != slot).count();
            }
            assert!(found > least, "{found} of 2000");
            assert!(wrong < 10, "{wrong}");
            let strangers =
                (0..2000).filter(|_| table.find(Features::of(&block(&mut random))).next().is_some());
            assert!(strangers.count() < 10);
        }
    }

    #[test]
    fn what_repeats_one_word_is_like_nothing() {
        let mut table = Alike::new(64);
        for byte in [0, 0x5a, 0xff] {
            let features = Features::of(&[byte; BLOCK_LEN]);
            assert_eq!(features, Features::default());
            table.insert(features, 7);
            assert_eq!(table.find(features).count(), 0);
        }
    }

    #[test]
    fn every_slot_can_be_named_and_the_newest_is() {
        let features = Features([3, 0, u64::MAX - 5, 0]);
        // The larger the ring, the less of a feature is kept; of the largest, nothing.
        for slots in [1_u64, 7, 1 << 10, (1 << 20) + 1] {
            let mut table = Alike::new(slots);
            for slot in [0, slots / 2, slots - 1] {
                table.insert(features, slot);
                assert_eq!(table.find(features).collect::<Vec<_>>(), [slot, slot], "{slots}");
            }
            table.clear();
            assert_eq!(table.find(features).count(), 0);
        }
        let largest = Alike {
            entries: Vec::new(),
            slot_bits: 32,
        };
        assert_eq!(largest.entry(u64::MAX, (1 << 31) - 1), 1 << 31);
    }
}
