//! Which pages were in the stream already: what makes a page a re-sent one.
//!
//! Owns one bit for each page of each RAM block. Leaves what follows from it to convergence. Promises never to hold more memory than
//! it was given; blocks that do not fit are not followed, and it says so.

use super::grammar::{Block, PAGE};

/// Pages that were sent.
pub(super) struct Sent {
    blocks: Vec<Option<Vec<u64>>>,
    /// Bytes of bitmaps that may still be made.
    left: u64,
}

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Before {
    Never,
    Sent,
    /// Its block is not followed.
    Unknown,
}

impl Sent {
    pub(super) fn new(memory_max: u64) -> Self {
        Self {
            blocks: Vec::new(),
            left: memory_max,
        }
    }

    /// Marks a page and says whether it was marked. Blocks not seen before are taken in, in their order.
    pub(super) fn mark(&mut self, blocks: &[Block], block: u16, page: u64) -> Before {
        while self.blocks.len() < blocks.len() {
            let words = (blocks[self.blocks.len()].used_length / PAGE).div_ceil(64);
            let bitmap = words.checked_mul(8).filter(|bytes| *bytes <= self.left);
            self.left -= bitmap.unwrap_or(0);
            self.blocks.push(bitmap.map(|_| vec![0; words as usize]));
        }
        let bitmap = self.blocks.get_mut(usize::from(block)).and_then(Option::as_mut);
        let word = bitmap.and_then(|bitmap| bitmap.get_mut(usize::try_from(page / 64).ok()?));
        let Some(word) = word else {
            return Before::Unknown;
        };
        let bit = 1 << (page % 64);
        let before = *word & bit != 0;
        *word |= bit;
        if before { Before::Sent } else { Before::Never }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(pages: u64) -> Block {
        Block {
            name: b"ram".to_vec(),
            used_length: pages * PAGE,
        }
    }

    #[test]
    fn a_page_is_new_once() {
        let mut sent = Sent::new(1024);
        let blocks = [block(100), block(1)];
        assert_eq!(sent.mark(&blocks, 0, 99), Before::Never);
        assert_eq!(sent.mark(&blocks, 0, 99), Before::Sent);
        assert_eq!(sent.mark(&blocks, 0, 98), Before::Never);
        assert_eq!(sent.mark(&blocks, 1, 0), Before::Never);
        assert_eq!(sent.mark(&blocks, 1, 64), Before::Unknown);
        assert_eq!(sent.mark(&blocks, 2, 0), Before::Unknown);
    }

    #[test]
    fn memory_has_an_end() {
        let mut sent = Sent::new(16);
        let blocks = [block(u64::MAX / PAGE), block(65), block(1)];
        assert_eq!(sent.mark(&blocks, 0, 0), Before::Unknown);
        assert_eq!(sent.mark(&blocks, 1, 64), Before::Never);
        assert_eq!(sent.mark(&blocks, 2, 0), Before::Unknown);
    }
}
