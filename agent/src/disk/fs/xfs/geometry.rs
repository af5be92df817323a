//! Where things lie on an XFS volume: blocks, sectors, allocation groups (AGs).
//!
//! Owns the arithmetic between AG-relative block numbers and bytes. Leaves alone what lies there. Promises that a geometry only
//! exists where every byte of the file system fits in 64 bits, so that nothing computed from it overflows.

use longhaul_common::extent::Extent;

use super::reader::{be16, be32, be64, byte};
use super::{Unproven, inconsistent};

/// Linux refuses AGs outside these bounds; they also bound the number of AGs by the size of the volume.
const AG_BYTES_MIN: u64 = 16 << 20;
const AG_BYTES_MAX: u64 = 1 << 40;
/// The last AG may be shorter than the others, but not shorter than this.
const AG_BLOCKS_MIN: u64 = 64;

/// Shape of the data volume, all of it checked against itself.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    /// Bytes; a power of two from 512 to 65,536.
    pub(super) block_size: u32,
    /// Bytes; a power of two from 512 to 32,768, at most `block_size`.
    pub(super) sector_size: u32,
    /// Blocks of every AG but the last.
    pub(super) ag_blocks: u32,
    pub(super) ag_count: u32,
    /// Bits of an AG-relative block number within a block number of the whole volume.
    pub(super) ag_block_bits: u8,
    /// Blocks of the whole volume.
    pub(super) blocks: u64,
}

impl Geometry {
    /// From the primary superblock.
    pub(super) fn parse(superblock: &[u8]) -> Result<Self, Unproven> {
        let geometry = Self {
            block_size: be32(superblock, 4),
            sector_size: be16(superblock, 102).into(),
            ag_blocks: be32(superblock, 84),
            ag_count: be32(superblock, 88),
            ag_block_bits: byte(superblock, 124),
            blocks: be64(superblock, 8),
        };
        let wrong = geometry.first_contradiction(byte(superblock, 120), byte(superblock, 121));
        match wrong {
            Some(what) => Err(inconsistent(format!("superblock: {what}"))),
            None => Ok(geometry),
        }
    }

    fn first_contradiction(&self, block_log: u8, sector_log: u8) -> Option<&'static str> {
        let power = |size: u32, log: u8, max: u32| {
            size.is_power_of_two() && (512..=max).contains(&size) && size.trailing_zeros() == u32::from(log)
        };
        if !power(self.block_size, block_log, 65_536) {
            return Some("block size is none that exists");
        }
        if !power(self.sector_size, sector_log, 32_768) || self.sector_size > self.block_size {
            return Some("sector size is none that exists");
        }
        let ag_bytes = u64::from(self.ag_blocks) * u64::from(self.block_size);
        if !(AG_BYTES_MIN..=AG_BYTES_MAX).contains(&ag_bytes) {
            return Some("allocation groups are smaller or larger than XFS makes them");
        }
        if u32::from(self.ag_block_bits) != u32::BITS - (self.ag_blocks - 1).leading_zeros() {
            return Some("allocation group size and its logarithm differ");
        }
        let full = u64::from(self.ag_blocks);
        let before_last = full * u64::from(self.ag_count.saturating_sub(1));
        let last = self.blocks.checked_sub(before_last);
        if self.ag_count == 0 || !last.is_some_and(|last| (AG_BLOCKS_MIN..=full).contains(&last)) {
            return Some("allocation groups do not add up to the volume");
        }
        if self.blocks.checked_mul(self.block_size.into()).is_none() {
            return Some("volume ends beyond 64 bits");
        }
        None
    }

    /// Bytes from the volume's start.
    pub(super) fn size(&self) -> u64 {
        self.blocks * u64::from(self.block_size)
    }

    /// Blocks of AG `ag`; 0 where there is no such AG.
    pub(super) fn ag_len(&self, ag: u32) -> u32 {
        let start = u64::from(ag) * u64::from(self.ag_blocks);
        let rest = self.blocks.saturating_sub(start);
        u32::try_from(rest).map_or(self.ag_blocks, |rest| rest.min(self.ag_blocks))
    }

    /// First byte of block `block` of AG `ag`; both must lie inside the volume.
    pub(super) fn offset(&self, ag: u32, block: u32) -> u64 {
        (u64::from(ag) * u64::from(self.ag_blocks) + u64::from(block)) * u64::from(self.block_size)
    }

    /// Bytes of the `len` blocks from `block` of AG `ag` on; all of them must lie inside the AG.
    pub(super) fn extent(&self, ag: u32, block: u32, len: u32) -> Extent {
        let start = self.offset(ag, block);
        Extent::between(start, start + u64::from(len) * u64::from(self.block_size))
    }

    /// Blocks that superblock, AGF, AGI and AGFL take at the start of each AG: a sector each.
    pub(super) fn header_blocks(&self) -> u32 {
        (4 * self.sector_size).div_ceil(self.block_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Geometry {
        Geometry {
            block_size: 4096,
            sector_size: 512,
            ag_blocks: 19_200,
            ag_count: 4,
            ag_block_bits: 15,
            blocks: 3 * 19_200 + 100,
        }
    }

    #[test]
    fn the_last_group_is_as_long_as_what_is_left() {
        let geometry = sample();
        assert_eq!(geometry.first_contradiction(12, 9), None);
        let lens: Vec<u32> = (0..6).map(|ag| geometry.ag_len(ag)).collect();
        assert_eq!(lens, [19_200, 19_200, 19_200, 100, 0, 0]);
        assert_eq!(geometry.header_blocks(), 1);
        assert_eq!(
            geometry.extent(1, 2, 3),
            Extent::new((19_200 + 2) * 4096, 3 * 4096).unwrap()
        );
    }

    #[test]
    fn each_contradiction_is_found() {
        let broken: [fn(&mut Geometry); 9] = [
            |g| g.block_size = 4097,
            |g| g.block_size = 256,
            |g| g.sector_size = 8192,
            |g| g.ag_blocks = 0,
            |g| g.ag_blocks = 100,
            |g| g.ag_block_bits = 16,
            |g| g.ag_count = 0,
            |g| g.blocks = 3 * 19_200 + 63,
            |g| g.blocks = 4 * 19_200 + 1,
        ];
        for (index, change) in broken.iter().enumerate() {
            let mut geometry = sample();
            change(&mut geometry);
            assert!(geometry.first_contradiction(12, 9).is_some(), "case {index}");
        }
        assert!(sample().first_contradiction(13, 9).is_some());
        assert!(sample().first_contradiction(12, 10).is_some());
    }
}
