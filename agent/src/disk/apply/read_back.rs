//! Reading leaves back while others are still to come, so that little is left to read for the proof at the end.
//!
//! Owns which durable leaves read as they were written, since nothing was written to them. Leaves when to read to the session, and the
//! proof itself to `verify`. Promises that a leaf counts only if it was read from the device after its flush and has not been written to since:
//! whoever writes says so before and after, for reading may have begun in between. What differs or cannot be read does not count here;
//! the proof reads it once more and says so.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use longhaul_common::digest::{Digest, LEAF, leaf_extent};

use super::record::Record;
use super::target::Target;

/// Leaves that wait to be read; what comes beyond is left to the proof. 40 bytes each.
const WAITING_MAX: usize = 1 << 14;

/// What is known of one copy.
#[derive(Default)]
pub(crate) struct ReadBack(Mutex<State>);

#[derive(Default)]
struct State {
    /// One bit for each leaf up to the last that counts.
    proven: Vec<u64>,
    waiting: VecDeque<(u64, Digest)>,
    reading: BTreeSet<u64>,
}

impl ReadBack {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These leaves are written to, or were just now.
    pub(crate) fn forget(&self, runs: &[Range<u64>]) {
        let mut state = self.state();
        let known = state.proven.len() as u64 * 64;
        for run in runs {
            // A batch of zeros may cover terabytes; nothing counts behind what is known.
            (run.start..run.end.min(known)).for_each(|leaf| state.set(leaf, false));
            state.reading.retain(|leaf| !run.contains(leaf));
            // What memory holds of the new content must not pass for the device's, even where it is the old content once more.
            state.waiting.retain(|(leaf, _)| !run.contains(leaf));
        }
    }

    /// These records are durable now, and what the page cache held of them is dropped.
    pub(crate) fn offer(&self, records: &[Record]) {
        let mut state = self.state();
        for entry in records.iter().flat_map(|record| &record.digests) {
            if state.waiting.len() < WAITING_MAX {
                state.waiting.push_back(*entry);
            }
        }
    }

    /// Whether the leaf reads as the log says.
    pub(crate) fn is_proven(&self, leaf: u64) -> bool {
        let state = self.state();
        let word = state.proven.get((leaf / 64) as usize);
        word.is_some_and(|word| word >> (leaf % 64) & 1 == 1)
    }

    fn begin(&self) -> Option<(u64, Digest)> {
        let mut state = self.state();
        let next = state.waiting.pop_front()?;
        state.reading.insert(next.0);
        Some(next)
    }

    fn end(&self, leaf: u64, is_equal: bool) {
        let mut state = self.state();
        if state.reading.remove(&leaf) && is_equal {
            state.set(leaf, true);
        }
    }
}

impl State {
    fn set(&mut self, leaf: u64, is_proven: bool) {
        let (word, bit) = ((leaf / 64) as usize, 1 << (leaf % 64));
        if is_proven && word >= self.proven.len() {
            self.proven.resize(word + 1, 0);
        }
        if let Some(word) = self.proven.get_mut(word) {
            *word = if is_proven { *word | bit } else { *word & !bit };
        }
    }
}

impl Target {
    /// Reads one durable leaf back, if there is one that was not. Blocks; one thread at a time is enough, and `false` means that nothing
    /// waits.
    pub fn read_back(&self) -> bool {
        let Some((leaf, written)) = self.read_back.begin() else {
            return false;
        };
        let extent = leaf_extent(leaf, self.size);
        let mut content = vec![0; LEAF.min(extent.len()) as usize];
        let read = self.store.read_at(&mut content, extent.offset());
        self.read_back
            .end(leaf, read.is_ok() && Digest::of(&content) == written);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn durable(leaf: u64) -> Record {
        Record {
            kind: super::super::record::Kind::Written,
            version: super::super::record::Version::default(),
            leaves: leaf..leaf + 1,
            digests: vec![(leaf, Digest([leaf as u8; 32]))],
        }
    }

    #[test]
    fn what_is_written_while_it_is_read_does_not_count() {
        let known = ReadBack::default();
        known.offer(&[durable(3), durable(70)]);
        assert_eq!(known.begin().map(|(leaf, _)| leaf), Some(3));
        known.forget(std::slice::from_ref(&(3..4)));
        known.end(3, true);
        assert_eq!(known.begin().map(|(leaf, _)| leaf), Some(70));
        known.end(70, true);
        assert!(!known.is_proven(3) && known.is_proven(70) && !known.is_proven(6));
        known.offer(&[durable(70)]);
        known.forget(std::slice::from_ref(&(64..200)));
        assert!(!known.is_proven(70) && known.begin().is_none());
    }

    #[test]
    fn what_differs_does_not_count_and_what_waits_has_a_bound() {
        let known = ReadBack::default();
        (0..WAITING_MAX as u64 + 9).for_each(|leaf| known.offer(&[durable(leaf)]));
        let mut count = 0;
        while let Some((leaf, _)) = known.begin() {
            known.end(leaf, leaf % 2 == 0);
            count += 1;
        }
        assert_eq!(count, WAITING_MAX);
        assert!(known.is_proven(0) && !known.is_proven(1) && known.is_proven(64));
    }
}
