//! Which bytes of a disk are read together, in offset order.
//!
//! Owns the cut of a disk into spans: whole leaves, at most one batch of data each. Leaves reading to `reader`. Promises that the
//! spans cover the disk exactly once, that only blocks that are neither hole nor proven free are read, and that a hole of any
//! length costs one step.

use std::io;

use longhaul_common::digest::{LEAF, leaf_count};
use longhaul_common::extent::{BLOCK, Extent};
use longhaul_common::wire::batch::{Content, Piece, RAW_MAX};

use super::free_map::FreeMap;
use super::image::{Allocation, Run};

/// Planned pieces of one span; zero detection may split each of its at most 256 data blocks off, which stays within `PIECES_MAX`.
const PLANNED_PIECES_MAX: usize = 480;
/// Leaves with data in one span.
const DATA_LEAVES_MAX: usize = 256;
/// How much of the image's allocation is asked for at once.
const LOOK_AHEAD: u64 = 1 << 30;

/// Whole leaves, and what is to be read of them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// First leaf.
    pub first: u64,
    /// Number of leaves, at least one.
    pub count: u64,
    /// Covers the leaves without gap; `Zero` does not occur yet.
    pub pieces: Vec<Piece>,
}

impl Span {
    /// Bytes to be read.
    pub(crate) fn data_len(&self) -> u64 {
        self.pieces
            .iter()
            .filter(|piece| piece.content == Content::Data)
            .map(|piece| piece.extent.len())
            .sum()
    }
}

/// Asks an image what a range holds, as runs that cover it in order.
pub(crate) type AskAllocation<'a> = &'a (dyn Fn(Extent) -> io::Result<Vec<Run>> + Sync);

/// The cut in progress: a cursor over the disk.
pub(crate) struct Spans {
    size: u64,
    at: u64,
    /// What is known of the image from `at` on, nearest last.
    runs: Vec<Run>,
}

impl Spans {
    /// For a disk of `size` bytes, from its start.
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            at: 0,
            runs: Vec::new(),
        }
    }

    /// The next span; `None` behind the last.
    pub(crate) fn next(&mut self, free: &FreeMap, ask: AskAllocation<'_>) -> io::Result<Option<Span>> {
        if self.at >= self.size {
            return Ok(None);
        }
        let first = self.at / LEAF;
        let mut building = Building::default();
        while self.at < self.size {
            let resume = self.at;
            let leaf_end = (self.at / LEAF + 1).saturating_mul(LEAF).min(self.size);
            let mark = building.mark();
            self.fill_leaf(leaf_end, &mut building, free, ask)?;
            if building.is_over_limit() && resume > first * LEAF {
                building.back_to(mark);
                self.at = resume;
                self.runs.clear();
                break;
            }
            if building.data as usize >= RAW_MAX {
                break;
            }
        }
        let end = if self.at == self.size {
            leaf_count(self.size)
        } else {
            self.at / LEAF
        };
        Ok(Some(Span {
            first,
            count: end - first,
            pieces: building.pieces,
        }))
    }

    /// Adds pieces up to `leaf_end`, or up to a later leaf's end where nothing in between is read.
    fn fill_leaf(
        &mut self,
        leaf_end: u64,
        building: &mut Building,
        free: &FreeMap,
        ask: AskAllocation<'_>,
    ) -> io::Result<()> {
        let mut has_data = false;
        while self.at < leaf_end {
            let piece = self.piece(free, ask)?;
            let mut end = piece.extent.end();
            if piece.content == Content::Data || !self.at.is_multiple_of(LEAF) || end < leaf_end {
                end = end.min(leaf_end);
            } else if end < self.size {
                end = end / LEAF * LEAF;
            }
            has_data |= piece.content == Content::Data;
            building.push(Piece {
                extent: Extent::between(self.at, end),
                content: piece.content,
            });
            self.at = end;
        }
        building.data_leaves += usize::from(has_data);
        Ok(())
    }

    /// The longest piece of one content from the cursor on, as far as is known.
    fn piece(&mut self, free: &FreeMap, ask: AskAllocation<'_>) -> io::Result<Piece> {
        let at = self.at;
        while self.runs.last().is_some_and(|run| run.extent.end() <= at) {
            self.runs.pop();
        }
        if self.runs.is_empty() {
            self.runs = joined(ask(Extent::between(
                at,
                at.saturating_add(LOOK_AHEAD).min(self.size),
            ))?);
            self.runs.reverse();
        }
        let known = self
            .runs
            .last()
            .copied()
            .filter(|run| run.extent.offset() <= at && run.extent.end() > at);
        let known = known.ok_or_else(|| io::Error::other("the image's allocation map has a gap"))?;
        let hole = match known.state {
            Allocation::Data => None,
            // Only whole blocks count as holes: a block that is partly data is read.
            Allocation::Hole | Allocation::Zero => hole_blocks(at, known.extent.end(), self.size),
        };
        if let Some(extent) = hole {
            return Ok(Piece {
                extent,
                content: Content::Hole,
            });
        }
        let limit = known
            .extent
            .end()
            .checked_next_multiple_of(BLOCK)
            .unwrap_or(self.size)
            .min(self.size);
        let (is_free, extent) = free.run(at, limit);
        Ok(Piece {
            extent,
            content: if is_free { Content::Free } else { Content::Data },
        })
    }
}

/// The runs without empty ones, neighbours that read as zeros joined: a block may be half hole, half zero cluster.
fn joined(runs: Vec<Run>) -> Vec<Run> {
    let mut all: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs.into_iter().filter(|run| !run.extent.is_empty()) {
        match all.last_mut() {
            Some(last) if (last.state == Allocation::Data) == (run.state == Allocation::Data) => {
                last.extent = Extent::between(last.extent.offset(), run.extent.end());
            }
            _ => all.push(run),
        }
    }
    all
}

/// The whole blocks from `at` (a block's start) up to `end`; the disk's last, short block counts as whole.
fn hole_blocks(at: u64, end: u64, size: u64) -> Option<Extent> {
    let end = if end >= size { size } else { end / BLOCK * BLOCK };
    (end > at).then(|| Extent::between(at, end))
}

#[derive(Default)]
struct Building {
    pieces: Vec<Piece>,
    data: u64,
    data_leaves: usize,
}

impl Building {
    fn push(&mut self, piece: Piece) {
        if piece.content == Content::Data {
            self.data += piece.extent.len();
        }
        match self.pieces.last_mut() {
            // Data is kept apart at leaf boundaries: each leaf is read and hashed by itself.
            Some(last) if last.content == piece.content && !starts_leaf_with_data(&piece) => {
                last.extent = Extent::between(last.extent.offset(), piece.extent.end());
            }
            _ => self.pieces.push(piece),
        }
    }

    fn mark(&self) -> (usize, Option<Piece>, u64, usize) {
        (
            self.pieces.len(),
            self.pieces.last().copied(),
            self.data,
            self.data_leaves,
        )
    }

    fn back_to(&mut self, (len, last, data, data_leaves): (usize, Option<Piece>, u64, usize)) {
        self.pieces.truncate(len);
        if let (Some(slot), Some(last)) = (self.pieces.last_mut(), last) {
            *slot = last;
        }
        (self.data, self.data_leaves) = (data, data_leaves);
    }

    fn is_over_limit(&self) -> bool {
        self.data as usize > RAW_MAX
            || self.pieces.len() > PLANNED_PIECES_MAX
            || self.data_leaves > DATA_LEAVES_MAX
    }
}

fn starts_leaf_with_data(piece: &Piece) -> bool {
    piece.content == Content::Data && piece.extent.offset().is_multiple_of(LEAF)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every span of a disk, with the promises of the header checked on the way.
    fn cut(size: u64, runs: &[Run], free: &FreeMap) -> Vec<Span> {
        let ask = |range: Extent| {
            let inside = runs.iter().filter_map(|run| {
                run.extent.intersect(&range).map(|extent| Run {
                    extent,
                    state: run.state,
                })
            });
            Ok(inside.collect())
        };
        let mut spans = Spans::new(size);
        let mut all = Vec::new();
        let mut at = 0;
        while let Some(span) = spans.next(free, &ask).unwrap() {
            assert_eq!(span.first * LEAF, at);
            for piece in &span.pieces {
                assert_eq!(piece.extent.offset(), at, "no gap");
                at = piece.extent.end();
            }
            assert_eq!(at, ((span.first + span.count) * LEAF).min(size));
            let data = span.pieces.iter().filter(|piece| piece.content == Content::Data);
            assert!(data.map(|piece| piece.extent.len()).sum::<u64>() <= RAW_MAX as u64);
            assert!(span.pieces.len() <= PLANNED_PIECES_MAX + 257);
            all.push(span);
        }
        assert_eq!(at, size);
        all
    }

    fn runs_of(size: u64, cuts: &[(u64, bool)]) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut at = 0;
        for (len, data) in cuts.iter().copied().chain([(u64::MAX, true)]) {
            let end = at + len.min(size - at);
            if end > at {
                let state = if data { Allocation::Data } else { Allocation::Hole };
                runs.push(Run {
                    extent: Extent::between(at, end),
                    state,
                });
            }
            at = end;
        }
        runs
    }

    proptest! {
        #[test]
        fn spans_cover_the_disk_and_read_exactly_what_they_must(
            size in 1u64..40_000_000,
            cuts in prop::collection::vec((prop_oneof![1u64..10_000, 1u64..9_000_000], any::<bool>()), 0..12),
            freed in prop::collection::vec((0u64..40_000_000, 0u64..6_000_000), 0..8),
        ) {
            let runs = runs_of(size, &cuts);
            let mut free = FreeMap::new(size);
            for (offset, len) in freed {
                if let Some(extent) = Extent::between(offset, offset + len).intersect(&Extent::between(0, size)) {
                    free.mark(&extent);
                }
            }
            for span in cut(size, &runs, &free) {
                for piece in span.pieces {
                    let all_hole = |block: Extent| runs.iter().all(|run| {
                        run.state != Allocation::Data || run.extent.intersect(&block).is_none()
                    });
                    let mut at = piece.extent.offset();
                    while at < piece.extent.end() {
                        let block = Extent::between(at, (at + BLOCK).min(size));
                        let expected = if all_hole(block) { Content::Hole }
                            else if free.is_free(at) { Content::Free } else { Content::Data };
                        // A block that is half hole, half data counts as data or free, never as a hole.
                        prop_assert_eq!(piece.content, expected, "block at {}", at);
                        at += BLOCK;
                    }
                }
            }
        }
    }

    #[test]
    fn a_sparse_tebibyte_is_few_spans() {
        let size = 1 << 40;
        let runs = runs_of(
            size,
            &[(4096, true), (1 << 39, false), (4096, true), (1 << 40, false)],
        );
        assert!(cut(size, &runs, &FreeMap::new(size)).len() < 5);
    }

    #[test]
    fn one_used_block_in_each_leaf_shares_batches() {
        let size = 512 * LEAF;
        let runs = runs_of(size, &[(u64::MAX, true)]);
        let mut free = FreeMap::new(size);
        for leaf in 0..512 {
            free.mark(&Extent::between(leaf * LEAF + BLOCK, (leaf + 1) * LEAF));
        }
        let spans = cut(size, &runs, &free);
        assert!(spans.len() <= 4, "{} spans for 512 used blocks", spans.len());
    }
}
