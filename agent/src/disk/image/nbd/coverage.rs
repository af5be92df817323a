//! Which bytes of a read have arrived: a read is whole when each byte came exactly once.
//!
//! Owns that account for one request. Promises bounded memory: a server that scatters a reply into very many
//! islands is refused.

use super::decode::WireError;

/// Most separate islands of one reply. Servers send in order, so that one island grows; this leaves room for
/// striping.
const ISLANDS_MAX: usize = 1024;

/// The bytes of `[start, end)` that have arrived.
#[derive(Debug)]
pub(super) struct Coverage {
    start: u64,
    end: u64,
    /// Sorted, apart from each other, none empty.
    islands: Vec<(u64, u64)>,
}

impl Coverage {
    pub(super) const fn new(start: u64, end: u64) -> Self {
        Self {
            start,
            end,
            islands: Vec::new(),
        }
    }

    /// Notes that `len` bytes from `offset` on have come, and gives where they stand in the read's buffer.
    pub(super) fn add(&mut self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, WireError> {
        let outside = WireError::Contradiction("a chunk lies outside of the range that was asked for");
        let end = offset.checked_add(len).ok_or_else(|| outside.clone())?;
        if len == 0 || offset < self.start || end > self.end {
            return Err(outside);
        }
        let place = self.islands.partition_point(|island| island.1 < offset);
        // Everything before `place` ends before `offset`; islands that touch are merged below.
        let mut merged = (offset, end);
        let mut until = place;
        while let Some(island) = self.islands.get(until).filter(|island| island.0 <= end) {
            if island.0 < end && offset < island.1 {
                return Err(WireError::Contradiction("the same bytes were sent twice"));
            }
            merged = (merged.0.min(island.0), merged.1.max(island.1));
            until += 1;
        }
        self.islands.splice(place..until, [merged]);
        if self.islands.len() > ISLANDS_MAX {
            return Err(WireError::Contradiction(
                "a reply is scattered into too many pieces",
            ));
        }
        // In range: both ends lie between start and end, whose distance is a buffer's length.
        Ok((offset - self.start) as usize..(end - self.start) as usize)
    }

    pub(super) fn is_whole(&self) -> bool {
        self.start == self.end || self.islands == [(self.start, self.end)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_bitmap(chunks in proptest::collection::vec((0u64..40, 0u64..12), 1..20)) {
            let mut coverage = Coverage::new(4, 36);
            let mut bits = [false; 52];
            for (offset, len) in chunks {
                let range = offset as usize..(offset + len) as usize;
                let inside = len > 0 && offset >= 4 && offset + len <= 36;
                let valid = inside && !bits[range.clone()].contains(&true);
                let got = coverage.add(offset, len);
                prop_assert_eq!(got.is_ok(), valid);
                if valid {
                    prop_assert_eq!(got.unwrap(), range.start - 4..range.end - 4);
                    bits[range].fill(true);
                }
                prop_assert_eq!(coverage.is_whole(), bits[4..36].iter().all(|&bit| bit));
            }
        }
    }

    #[test]
    fn scattering_is_bounded() {
        let mut coverage = Coverage::new(0, 1 << 20);
        let refused = (0..2000).find(|i| coverage.add(i * 2, 1).is_err());
        assert_eq!(refused, Some(ISLANDS_MAX as u64));
    }
}
