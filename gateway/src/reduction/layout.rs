//! Where the blocks of a batch lie, in its data and in the VM.
//!
//! Owns cutting a batch's data into blocks of 4 KiB and loose bytes. Both gateways cut by the same checked header, so nothing of it
//! crosses the WAN. Promises that blocks and loose bytes together are the whole data, each byte once.

use std::ops::Range;

use longhaul_common::extent::BLOCK;
use longhaul_common::wire::batch::{BatchHeader, Content};

/// Bytes of a block.
pub(super) const BLOCK_LEN: usize = BLOCK as usize;

/// Whose blocks these are, stable over the jobs of a VM: the same disk or RAM of the same VM has the same number every time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vm(u64);

impl Vm {
    /// By the VM's name, as both gateways know it from the job.
    pub fn named(name: &str) -> Self {
        let hash = blake3::hash(name.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hash.as_bytes()[..8]);
        Self(u64::from_le_bytes(first))
    }
}

/// A block of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockAt {
    /// Where its content stands in the batch's data.
    pub at: usize,
    /// Stands for its place in the VM.
    pub place: u64,
}

/// A batch's data, cut.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub blocks: Vec<BlockAt>,
    /// What is no whole block, in order.
    pub loose: Vec<Range<usize>>,
}

impl Layout {
    /// Of a batch whose header was checked, so that its data is at most a MiB.
    pub(super) fn of(header: &BatchHeader, vm: Vm) -> Self {
        let mut layout = Self {
            blocks: Vec::with_capacity(header.data_len() as usize / BLOCK_LEN),
            loose: Vec::new(),
        };
        match &header.ram {
            Some(ram) => {
                let page = |page: longhaul_common::wire::ram::PageAt| BlockAt {
                    at: page.at,
                    place: mix(vm.0 ^ (1 << 32 | u64::from(page.block)), page.page),
                };
                layout.blocks.extend(ram.pages().map(page));
                layout.add_loose(ram.pages_len() as usize..ram.data_len() as usize);
            }
            None => layout.add_pieces(header, vm),
        }
        layout
    }

    fn add_pieces(&mut self, header: &BatchHeader, vm: Vm) {
        let device = vm.0 ^ (2 << 32 | u64::from(header.disk.0));
        let mut at = 0;
        for piece in header
            .pieces
            .iter()
            .filter(|piece| piece.content == Content::Data)
        {
            let (offset, end) = (piece.extent.offset(), piece.extent.end());
            let before = |byte: u64| at + (byte - offset) as usize;
            let whole = piece.extent.shrink_to(BLOCK);
            let (first, last) = whole.map_or((end, end), |whole| (whole.offset(), whole.end()));
            self.add_loose(before(offset)..before(first));
            for block in first / BLOCK..last / BLOCK {
                self.blocks.push(BlockAt {
                    at: before(block * BLOCK),
                    place: mix(device, block),
                });
            }
            self.add_loose(before(last)..before(end));
            at = before(end);
        }
    }

    fn add_loose(&mut self, range: Range<usize>) {
        if !range.is_empty() {
            self.loose.push(range);
        }
    }

    /// Where those blocks lie whose number `is` holds for.
    pub(super) fn ranges(
        &self,
        is: impl Fn(usize) -> bool + Clone,
    ) -> impl Iterator<Item = Range<usize>> + Clone {
        let blocks = self.blocks.iter().enumerate();
        let blocks = blocks.filter(move |(index, _)| is(*index));
        blocks.map(|(_, block)| block.at..block.at + BLOCK_LEN)
    }

    /// Bytes that are in no block.
    pub(super) fn loose_len(&self) -> usize {
        self.loose.iter().map(ExactSizeIterator::len).sum()
    }
}

/// The one range that these make, if each begins where the one before it ends.
pub(super) fn together(mut ranges: impl Iterator<Item = Range<usize>>) -> Option<Range<usize>> {
    let first = ranges.next().unwrap_or(0..0);
    ranges.try_fold(first, |all, next| {
        (next.start == all.end).then_some(all.start..next.end)
    })
}

/// A number that is spread evenly, whatever device and block are.
fn mix(device: u64, block: u64) -> u64 {
    let mut x = device.rotate_left(17) ^ block.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use longhaul_common::digest::Digest;
    use longhaul_common::extent::Extent;
    use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
    use longhaul_common::wire::batch::{Leaves, Piece};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_together_only_in_order_and_without_a_gap() {
        let all = |ranges: &[Range<usize>]| together(ranges.iter().cloned());
        assert_eq!(all(&[]), Some(0..0));
        assert_eq!(together(std::iter::once(8..12)), Some(8..12));
        assert_eq!(all(&[8..12, 12..20, 20..21]), Some(8..21));
        assert_eq!(all(&[8..12, 13..20]), None);
        assert_eq!(all(&[12..20, 8..12]), None);
    }

    fn header(extents: &[(u64, u64)]) -> BatchHeader {
        let piece = |(offset, len): &(u64, u64)| Piece {
            extent: Extent::new(*offset, *len).unwrap(),
            content: Content::Data,
        };
        BatchHeader {
            job: JobId::random(),
            attempt: Attempt(1),
            disk: DiskIndex(0),
            round: Round(0),
            sequence: Sequence(7),
            pieces: extents.iter().map(piece).collect(),
            leaves: Leaves::default(),
            ram: None,
            urgent: false,
            digest: Digest([0; 32]),
        }
    }

    proptest! {
        #[test]
        fn every_byte_lies_in_exactly_one_part(gaps in prop::collection::vec((0u64..9000, 1u64..20_000), 1..20)) {
            let mut at = 0;
            let extents: Vec<_> = gaps.iter().map(|(gap, len)| {
                let extent = (at + gap, *len);
                at += gap + len;
                extent
            }).collect();
            let header = header(&extents);
            let layout = Layout::of(&header, Vm::named("vm"));
            let mut covered = vec![0_u8; header.data_len() as usize];
            let blocks = layout.blocks.iter().map(|block| block.at..block.at + BLOCK_LEN);
            for range in blocks.chain(layout.loose.iter().cloned()) {
                covered[range].iter_mut().for_each(|count| *count += 1);
            }
            prop_assert!(covered.iter().all(|count| *count == 1));
        }
    }

    #[test]
    fn a_block_keeps_its_place_wherever_its_batch_begins() {
        let (one, two) = (header(&[(4096, 8192)]), header(&[(100, 3996), (8192, 4096)]));
        let (one, two) = (Layout::of(&one, Vm::named("a")), Layout::of(&two, Vm::named("a")));
        assert_eq!(one.blocks[1].place, two.blocks[0].place);
        let other = Layout::of(&header(&[(8192, 4096)]), Vm::named("b"));
        assert_ne!(one.blocks[1].place, other.blocks[0].place);
    }

    #[test]
    fn an_extent_at_the_end_of_64_bits_is_cut_soundly() {
        let layout = Layout::of(&header(&[(u64::MAX - 5000, 5000)]), Vm::named("a"));
        assert_eq!(layout.blocks.len() * BLOCK_LEN + layout.loose_len(), 5000);
    }
}
