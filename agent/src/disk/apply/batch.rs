//! Whether a batch is what it says: pieces that tile its leaves, data only where a digest is stated.
//!
//! Owns the check before anything is written. Leaves the digests themselves to the session (batch digest) and to `verify`.

use std::ops::Range;

use longhaul_common::digest::{LEAF, leaf_count, leaf_extent};
use longhaul_common::extent::Extent;

use super::record::ENTRIES_MAX;
use super::{LeafRecord, Piece, TargetError};

/// Refuses a batch that does not cover its leaves exactly, in ascending order. Gives the leaves.
pub(crate) fn check(record: &LeafRecord, pieces: &[Piece<'_>], size: u64) -> Result<Range<u64>, TargetError> {
    let malformed = |what: &str| TargetError::Malformed(what.to_owned());
    let end = record
        .first
        .checked_add(record.count)
        .filter(|end| *end <= leaf_count(size));
    let leaves = record.first..end.ok_or_else(|| malformed("its leaves lie beyond the disk"))?;
    if leaves.is_empty() {
        return Err(malformed("it covers no leaf"));
    }
    if record.digests.len() > ENTRIES_MAX {
        return Err(malformed("it states too many digests"));
    }
    let ascending = record.digests.windows(2).all(|pair| pair[0].0 < pair[1].0);
    if !ascending || !record.digests.iter().all(|(leaf, _)| leaves.contains(leaf)) {
        return Err(malformed(
            "its digests are out of order or belong to other leaves",
        ));
    }
    let mut next = leaf_extent(leaves.start, size).offset();
    for piece in pieces {
        let extent = piece.extent();
        if extent.offset() != next {
            return Err(malformed("its pieces leave a gap, overlap or are out of order"));
        }
        next = extent.end();
        if matches!(piece, Piece::Data { .. }) && !has_digests(record, extent) {
            return Err(malformed("a leaf with data has no digest"));
        }
    }
    if next != leaf_extent(leaves.end - 1, size).end() {
        return Err(malformed("its pieces do not cover its leaves exactly"));
    }
    Ok(leaves)
}

/// Whether a digest is stated for every leaf that `data` touches.
fn has_digests(record: &LeafRecord, data: Extent) -> bool {
    let mut leaves = data.offset() / LEAF..data.end().div_ceil(LEAF);
    leaves.all(|leaf| {
        record
            .digests
            .binary_search_by_key(&leaf, |(leaf, _)| *leaf)
            .is_ok()
    })
}

#[cfg(test)]
mod tests {
    use longhaul_common::digest::Digest;

    use super::*;

    fn zero(start: u64, end: u64) -> Piece<'static> {
        Piece::Zero(Extent::between(start, end))
    }

    #[test]
    fn only_whole_leaves_pass() {
        let size = 2 * LEAF + 10;
        let bytes = [1; 10];
        let digest = Digest::of(b"");
        let data = |offset| Piece::Data {
            offset,
            bytes: &bytes,
        };
        let run = |first, count, digests: &[u64], pieces: &[Piece<'_>]| {
            let digests = digests.iter().map(|leaf| (*leaf, digest)).collect();
            check(
                &LeafRecord {
                    first,
                    digests,
                    count,
                },
                pieces,
                size,
            )
            .is_ok()
        };
        assert!(run(0, 3, &[], &[zero(0, size)]));
        assert!(run(2, 1, &[2], &[data(2 * LEAF)]));
        assert!(run(0, 1, &[0], &[data(0), zero(10, LEAF)]));
        assert!(!run(0, 1, &[], &[data(0), zero(10, LEAF)]));
        assert!(!run(0, 1, &[0], &[zero(10, LEAF), data(0)]));
        assert!(!run(0, 1, &[0], &[data(0), zero(11, LEAF)]));
        assert!(!run(0, 1, &[0], &[data(0), zero(9, LEAF)]));
        assert!(!run(0, 1, &[0], &[data(0), zero(10, LEAF - 1)]));
        assert!(!run(0, 1, &[0, 0], &[zero(0, LEAF)]));
        assert!(!run(0, 1, &[1], &[zero(0, LEAF)]));
        assert!(!run(0, 2, &[1, 0], &[zero(0, 2 * LEAF)]));
        assert!(!run(2, 2, &[], &[zero(2 * LEAF, 4 * LEAF)]));
        assert!(!run(u64::MAX, 2, &[], &[]));
        assert!(!run(0, 0, &[], &[]));
        assert!(!run(
            2,
            1,
            &[2],
            &[
                data(2 * LEAF),
                Piece::Data {
                    offset: u64::MAX,
                    bytes: &bytes
                }
            ]
        ));
    }
}
