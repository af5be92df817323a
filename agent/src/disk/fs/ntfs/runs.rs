//! Mapping pairs: the compressed list of clusters in which an attribute lies.
//!
//! Owns the decoding. Leaves alone which attribute it is. Promises that every run it gives lies inside the volume, that lengths are
//! positive, and that a list without its end mark is an error.

use super::inconsistent;
use crate::disk::fs::Unproven;

/// One run of clusters; `lcn` is `None` for a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) lcn: Option<u64>,
    /// Clusters.
    pub(super) len: u64,
}

/// The runs of one mapping-pairs array, one after the other.
pub(super) struct Runs<'a> {
    rest: &'a [u8],
    /// Where the next delta counts from.
    lcn: i64,
    clusters: u64,
    done: bool,
}

impl<'a> Runs<'a> {
    /// Over `pairs`, on a volume of `clusters` clusters.
    pub(super) fn new(pairs: &'a [u8], clusters: u64) -> Self {
        Self {
            rest: pairs,
            lcn: 0,
            clusters,
            done: false,
        }
    }

    fn decode(&mut self) -> Result<Option<Run>, Unproven> {
        let broken = || inconsistent("a list of runs does not decode");
        let (&head, rest) = self.rest.split_first().ok_or_else(broken)?;
        if head == 0 {
            return Ok(None);
        }
        let (len_bytes, lcn_bytes) = (usize::from(head & 15), usize::from(head >> 4));
        if !(1..=8).contains(&len_bytes) || lcn_bytes > 8 || rest.len() < len_bytes + lcn_bytes {
            return Err(broken());
        }
        let (len, rest) = rest.split_at(len_bytes);
        let (delta, rest) = rest.split_at(lcn_bytes);
        self.rest = rest;
        let len = u64::try_from(signed(len)).map_err(|_| broken())?;
        if len == 0 || len >= 1 << 48 {
            return Err(broken());
        }
        if delta.is_empty() {
            return Ok(Some(Run { lcn: None, len }));
        }
        self.lcn = self.lcn.checked_add(signed(delta)).ok_or_else(broken)?;
        let lcn = u64::try_from(self.lcn).map_err(|_| broken())?;
        match lcn.checked_add(len) {
            Some(end) if end <= self.clusters => Ok(Some(Run { lcn: Some(lcn), len })),
            _ => Err(inconsistent("a run reaches beyond the volume")),
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run, Unproven>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let run = self.decode().transpose();
        self.done = !matches!(run, Some(Ok(_)));
        run
    }
}

/// A little-endian two's complement number of 1 to 8 bytes.
fn signed(bytes: &[u8]) -> i64 {
    let fill = if bytes.last().is_some_and(|top| top & 0x80 != 0) {
        0xff
    } else {
        0
    };
    let mut all = [fill; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(pairs: &[u8]) -> Option<Vec<(Option<u64>, u64)>> {
        Runs::new(pairs, 0x10_0000)
            .map(|run| run.ok().map(|run| (run.lcn, run.len)))
            .collect()
    }

    #[test]
    fn deltas_count_from_the_last_run_that_is_no_hole() {
        let pairs = [0x21, 0x18, 0x34, 0x56, 0x01, 0x10, 0x11, 0x08, 0xf0, 0x00];
        assert_eq!(
            all(&pairs).unwrap(),
            [(Some(0x5634), 0x18), (None, 0x10), (Some(0x5624), 8)]
        );
    }

    #[test]
    fn lists_that_lie_are_refused() {
        for pairs in [
            &[][..],
            &[0x11, 0x10, 0x10],                      // no end mark
            &[0x11, 0x80, 0x10, 0],                   // negative length
            &[0x11, 0x00, 0x10, 0],                   // empty run
            &[0x11, 0x01, 0x80, 0],                   // before the volume
            &[0x41, 0x01, 0xff, 0xff, 0xff, 0x7f, 0], // behind it
            &[0x09, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],    // a length of nine bytes
            &[0x10, 0x01, 0],                         // no length at all
        ] {
            assert_eq!(all(pairs), None, "{pairs:x?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_runs_inside_the_volume(pairs in prop::collection::vec(any::<u8>(), 0..64)) {
            for run in Runs::new(&pairs, 1000).flatten() {
                prop_assert!(run.len > 0 && run.lcn.is_none_or(|lcn| lcn + run.len <= 1000));
            }
        }
    }
}
