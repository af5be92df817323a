//! A part of a running VM's RAM stream, as it stands in a batch's header.
//!
//! Owns the tokens from which the target makes QEMU's stream again, byte for byte, and their limits. Leaves taking the stream apart and
//! putting it together to the agents. Promises that a part that passes [`RamPart::check`] stands for exactly `len` bytes of the stream
//! and for no more data than a batch may carry.
//!
//! The batch's data is: the contents of all pages in the order of the tokens (4 KiB each, so that they lie aligned for the gateways),
//! then all raw bytes in the order of the tokens. What a page record looks like is QEMU's migration stream, version 3 (QEMU 7.2 to 10).

use serde::{Deserialize, Serialize};

use super::batch::{BatchError, RAW_MAX};
use crate::extent::BLOCK;

/// Most tokens in one part.
pub const TOKENS_MAX: usize = 4096;
/// Most RAM blocks of one VM.
pub const BLOCKS_MAX: u16 = 1024;
/// Longest name of a RAM block, in bytes: QEMU states its length in one byte.
pub const NAME_MAX: usize = 255;

/// Stretch of the stream of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamPart {
    /// Which try to migrate: a new one starts a new stream.
    pub generation: u32,
    /// Place of the first byte in the stream.
    pub offset: u64,
    /// Bytes of the stream that this part stands for.
    pub len: u64,
    pub tokens: Vec<Token>,
}

/// What stands next in the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Token {
    /// So many bytes, verbatim.
    Raw(u32),
    /// `index` stands for the RAM block of this name; adds nothing to the stream. A part names each block itself before the first
    /// record that is not `continued`, so that it can be checked alone; an index means the same block in all parts of a generation.
    Block {
        index: u16,
        /// As QEMU writes it, byte for byte.
        name: Vec<u8>,
    },
    /// Records of pages with content: 8 bytes and the content each; the first one also names its block unless `continued`.
    Pages(Records),
    /// Records of zero pages: 9 bytes each; the first one also names its block unless `continued`.
    Zeros(Records),
}

/// Records of `count` pages one after the other, from page `first` of a RAM block on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    pub block: u16,
    /// In pages of 4 KiB from the block's start.
    pub first: u64,
    pub count: u32,
    /// The first record says "the same block as before"; all others always do.
    pub continued: bool,
}

/// A page with content, as gateways see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAt {
    pub block: u16,
    pub page: u64,
    /// Where its content stands in the batch's data.
    pub at: usize,
}

impl RamPart {
    /// Bytes of data that belong to this part. Saturates where a hostile part says more than 64 bits.
    pub fn data_len(&self) -> u64 {
        let of = |token: &Token| match token {
            Token::Raw(bytes) => u64::from(*bytes),
            Token::Pages(records) => u64::from(records.count) * BLOCK,
            Token::Block { .. } | Token::Zeros(_) => 0,
        };
        self.tokens.iter().map(of).fold(0, u64::saturating_add)
    }

    /// Bytes of page contents at the front of the data.
    pub fn pages_len(&self) -> u64 {
        let of = |token: &Token| match token {
            Token::Pages(records) => u64::from(records.count) * BLOCK,
            _ => 0,
        };
        self.tokens.iter().map(of).fold(0, u64::saturating_add)
    }

    /// Every page with content, in the order of the data.
    pub fn pages(&self) -> impl Iterator<Item = PageAt> + '_ {
        let runs = self.tokens.iter().filter_map(|token| match token {
            Token::Pages(records) => Some(*records),
            _ => None,
        });
        let pages = runs
            .flat_map(|run| (0..u64::from(run.count)).map(move |n| (run.block, run.first.saturating_add(n))));
        pages.enumerate().map(|(index, (block, page))| PageAt {
            block,
            page,
            at: index * BLOCK as usize,
        })
    }

    /// Checks every limit that does not depend on the VM.
    ///
    /// # Errors
    /// Too many tokens, too much data, an empty run, or a page beyond 64 bits.
    pub fn check(&self) -> Result<(), BatchError> {
        if self.tokens.len() > TOKENS_MAX {
            return Err(BatchError::TooManyTokens {
                tokens: self.tokens.len(),
            });
        }
        let sound = self.tokens.iter().all(|token| match token {
            Token::Raw(bytes) => *bytes > 0,
            Token::Block { index, name } => *index < BLOCKS_MAX && (1..=NAME_MAX).contains(&name.len()),
            Token::Pages(records) | Token::Zeros(records) => records.is_sound(),
        });
        if !sound || self.offset.checked_add(self.len).is_none() {
            return Err(BatchError::Malformed);
        }
        match self.data_len() {
            bytes if bytes > RAW_MAX as u64 => Err(BatchError::TooMuchData { bytes }),
            _ => Ok(()),
        }
    }
}

impl Records {
    fn is_sound(&self) -> bool {
        let end = self.first.checked_add(u64::from(self.count));
        let end = end.and_then(|end| end.checked_mul(BLOCK));
        self.block < BLOCKS_MAX && self.count > 0 && end.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(tokens: Vec<Token>) -> RamPart {
        RamPart {
            generation: 1,
            offset: 0,
            len: 0,
            tokens,
        }
    }

    fn records(first: u64, count: u32) -> Records {
        Records {
            block: 0,
            first,
            count,
            continued: true,
        }
    }

    #[test]
    fn pages_stand_before_raw_bytes() {
        let part = part(vec![
            Token::Raw(5),
            Token::Pages(records(7, 2)),
            Token::Zeros(records(9, 100)),
            Token::Pages(records(3, 1)),
        ]);
        part.check().unwrap();
        assert_eq!((part.data_len(), part.pages_len()), (3 * 4096 + 5, 3 * 4096));
        let pages: Vec<_> = part.pages().map(|page| (page.page, page.at)).collect();
        assert_eq!(pages, [(7, 0), (8, 4096), (3, 8192)]);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(part(vec![Token::Raw(0)]).check().is_err());
        assert!(part(vec![Token::Pages(records(0, 0))]).check().is_err());
        assert!(part(vec![Token::Zeros(records(u64::MAX, 2))]).check().is_err());
        assert!(part(vec![Token::Zeros(records(1 << 53, 1))]).check().is_err());
        assert!(part(vec![Token::Pages(records(0, u32::MAX))]).check().is_err());
        assert!(part(vec![Token::Raw(1); TOKENS_MAX + 1]).check().is_err());
    }
}
