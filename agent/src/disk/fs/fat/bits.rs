//! One bit each for the clusters or sectors of a FAT volume.
//!
//! Promises that a number beyond the set is never in it.

pub(super) struct Bits {
    words: Vec<u64>,
}

impl Bits {
    /// `count` bits, all clear.
    pub(super) fn new(count: u64) -> Self {
        Self {
            words: vec![0; count.div_ceil(64) as usize],
        }
    }

    pub(super) fn set(&mut self, number: u64) {
        if let Some(word) = self.words.get_mut((number / 64) as usize) {
            *word |= 1 << (number % 64);
        }
    }

    pub(super) fn clear(&mut self, number: u64) {
        if let Some(word) = self.words.get_mut((number / 64) as usize) {
            *word &= !(1 << (number % 64));
        }
    }

    pub(super) fn has(&self, number: u64) -> bool {
        let word = self.words.get((number / 64) as usize);
        word.is_some_and(|word| word >> (number % 64) & 1 == 1)
    }
}
