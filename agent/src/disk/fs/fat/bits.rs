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

    /// Adds what `these` have and `others` lack; all sets begin at the same number.
    pub(super) fn add_missing(&mut self, these: &Self, others: &Self) {
        let others = others.words.iter().copied().chain(std::iter::repeat(0));
        for ((word, this), other) in self.words.iter_mut().zip(&these.words).zip(others) {
            *word |= this & !other;
        }
    }

    pub(super) fn has(&self, number: u64) -> bool {
        let word = self.words.get((number / 64) as usize);
        word.is_some_and(|word| word >> (number % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shorter_set_lacks_is_added_too() {
        let (mut added, mut these, mut others) = (Bits::new(200), Bits::new(200), Bits::new(70));
        [3, 64, 69, 150].into_iter().for_each(|number| these.set(number));
        others.set(64);
        added.add_missing(&these, &others);
        added.clear(3);
        let numbers: Vec<_> = (0..300).filter(|number| added.has(*number)).collect();
        assert_eq!(numbers, [69, 150]);
    }
}
