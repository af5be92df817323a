//! What every leaf of the target holds at present, and which leaves are being written right now.
//!
//! Owns the rule that an older (attempt, round) never lands on a newer one, also when threads race: whoever writes leaves has them
//! for itself from the comparison to the end of the write. Leaves alone what is durable (the log). Memory: 8 bytes per leaf,
//! and 16 bytes per 1,024 leaves where these are alike.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::record::Version;

const CHUNK: u64 = 1024;

/// A leaf's newest version, and two facts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeafState(u64);

impl LeafState {
    /// The log says what the leaf holds, or will with the next flush.
    const CLAIMED: u64 = 1;
    /// The store may hold something but zeros there.
    const TOUCHED: u64 = 2;

    pub(crate) fn new(version: Version, claimed: bool, touched: bool) -> Self {
        Self(version.bits() << 2 | u64::from(touched) << 1 | u64::from(claimed))
    }

    pub(crate) fn version(self) -> Version {
        Version::from_bits(self.0 >> 2)
    }

    pub(crate) fn claimed(self) -> bool {
        self.0 & Self::CLAIMED != 0
    }

    pub(crate) fn touched(self) -> bool {
        self.0 & Self::TOUCHED != 0
    }
}

#[derive(Clone)]
enum Chunk {
    Same(LeafState),
    Each(Box<[LeafState]>),
}

/// The states of all leaves, alike neighbours stored once.
pub(crate) struct LeafStates {
    chunks: Vec<Chunk>,
    leaves: u64,
}

impl LeafStates {
    pub(crate) fn new(leaves: u64, all: LeafState) -> Self {
        Self {
            chunks: vec![Chunk::Same(all); leaves.div_ceil(CHUNK) as usize],
            leaves,
        }
    }

    /// The state of a leaf, which must lie on the disk.
    pub(crate) fn get(&self, leaf: u64) -> LeafState {
        match &self.chunks[(leaf / CHUNK) as usize] {
            Chunk::Same(state) => *state,
            Chunk::Each(states) => states[(leaf % CHUNK) as usize],
        }
    }

    /// Sets all leaves of `range`, which must lie on the disk.
    pub(crate) fn set(&mut self, range: Range<u64>, state: LeafState) {
        let mut at = range.start;
        while at < range.end {
            let base = at / CHUNK * CHUNK;
            let end = range.end.min(base + CHUNK);
            let chunk = &mut self.chunks[(at / CHUNK) as usize];
            match chunk {
                _ if at == base && end == (base + CHUNK).min(self.leaves) => *chunk = Chunk::Same(state),
                Chunk::Same(same) if *same == state => {}
                Chunk::Same(same) => {
                    let mut each = vec![*same; CHUNK as usize].into_boxed_slice();
                    each[(at - base) as usize..(end - base) as usize].fill(state);
                    *chunk = Chunk::Each(each);
                }
                Chunk::Each(each) => each[(at - base) as usize..(end - base) as usize].fill(state),
            }
            at = end;
        }
    }

    /// Stretches of `range` with one state each, in order; neighbours in different chunks may be alike.
    pub(crate) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, LeafState)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            if start >= range.end {
                return None;
            }
            let state = self.get(start);
            let end = range.end.min((start / CHUNK + 1) * CHUNK);
            at = match &self.chunks[(start / CHUNK) as usize] {
                Chunk::Same(_) => end,
                Chunk::Each(_) => (start..end).find(|leaf| self.get(*leaf) != state).unwrap_or(end),
            };
            Some((start..at, state))
        })
    }
}

struct State {
    leaves: LeafStates,
    /// Ranges that threads are writing now; as many as there are writer threads at most.
    busy: Vec<Range<u64>>,
}

/// The states of a disk's leaves, shared by its writer threads.
pub(crate) struct Board {
    state: Mutex<State>,
    left: Condvar,
}

/// Leaves that the holder alone may write, until this is dropped.
pub(crate) struct Entered<'a> {
    board: &'a Board,
    range: Range<u64>,
    /// Those with nothing newer, in order, neighbours joined.
    pub(crate) admitted: Vec<Range<u64>>,
    /// Those of the admitted that the log speaks of.
    pub(crate) claimed: Vec<Range<u64>>,
    /// Those of the admitted where the store may hold something but zeros.
    pub(crate) touched: Vec<Range<u64>>,
    /// Those of the claimed that hold this very version.
    pub(crate) repeated: Vec<Range<u64>>,
}

/// Adds a range to a list in ascending order, joined with its neighbour.
pub(crate) fn push_joined(list: &mut Vec<Range<u64>>, range: Range<u64>) {
    match list.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => list.push(range),
    }
}

impl Board {
    pub(crate) fn new(leaves: LeafStates) -> Self {
        Self {
            state: Mutex::new(State {
                leaves,
                busy: Vec::new(),
            }),
            left: Condvar::new(),
        }
    }

    /// No holder leaves the state half changed, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody writes any of `range`, and sorts its leaves by what `version` may do to them.
    pub(crate) fn enter(&self, range: Range<u64>, version: Version) -> Entered<'_> {
        let overlaps = |busy: &Range<u64>| busy.start < range.end && range.start < busy.end;
        let mut state = self.lock();
        while state.busy.iter().any(overlaps) {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.busy.push(range.clone());
        let mut entered = Entered {
            board: self,
            range: range.clone(),
            admitted: Vec::new(),
            claimed: Vec::new(),
            touched: Vec::new(),
            repeated: Vec::new(),
        };
        for (run, leaf) in state
            .leaves
            .runs(range)
            .filter(|(_, leaf)| leaf.version() <= version)
        {
            if leaf.claimed() {
                push_joined(&mut entered.claimed, run.clone());
            }
            if leaf.claimed() && leaf.version() == version {
                push_joined(&mut entered.repeated, run.clone());
            }
            if leaf.touched() {
                push_joined(&mut entered.touched, run.clone());
            }
            push_joined(&mut entered.admitted, run);
        }
        entered
    }

    /// The first leaf that nobody has written completely.
    pub(crate) fn first_unclaimed(&self) -> Option<u64> {
        self.first_unclaimed_but(|_| false)
    }

    /// The first leaf that nobody has written completely, those aside that `known` knows.
    pub(crate) fn first_unclaimed_but(&self, known: impl Fn(u64) -> bool) -> Option<u64> {
        let state = self.lock();
        let runs = state.leaves.runs(0..state.leaves.leaves);
        let unclaimed = runs.filter(|(_, leaf)| !leaf.claimed());
        unclaimed.flat_map(|(run, _)| run).find(|leaf| !known(*leaf))
    }

    /// The newest version that a leaf holds.
    pub(crate) fn version(&self, leaf: u64) -> Version {
        self.lock().leaves.get(leaf).version()
    }

    /// The log speaks of this leaf again.
    pub(crate) fn claim(&self, leaf: u64) {
        let mut state = self.lock();
        let known = state.leaves.get(leaf);
        let claimed = LeafState::new(known.version(), true, known.touched());
        state.leaves.set(leaf..leaf + 1, claimed);
    }
}

/// The part of `list` outside of `holes`; both ascending.
fn without(list: &[Range<u64>], holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    for range in list {
        let mut at = range.start;
        let first = holes.partition_point(|hole| hole.end <= range.start);
        for hole in holes[first..].iter().take_while(|hole| hole.start < range.end) {
            left.extend((at < hole.start).then_some(at..hole.start));
            at = hole.end;
        }
        left.extend((at < range.end).then_some(at..range.end));
    }
    left
}

impl Entered<'_> {
    /// Lets the repeated leaves be: they hold what they should.
    pub(crate) fn leave_repeated(&mut self) {
        self.admitted = without(&self.admitted, &self.repeated);
        self.claimed = without(&self.claimed, &self.repeated);
        self.touched = without(&self.touched, &self.repeated);
    }

    /// The same leaves, each as if it may hold something but zeros. The holder stays the holder.
    pub(crate) fn touch_all(&mut self) {
        self.touched = self.admitted.clone();
    }

    /// Before the first byte: these leaves hold neither the old nor yet the new content. `data` are those that get some.
    pub(crate) fn begin(&self, version: Version, data: impl Iterator<Item = u64>) {
        let mut state = self.board.lock();
        for run in &self.admitted {
            state
                .leaves
                .set(run.clone(), LeafState::new(version, false, false));
        }
        for run in &self.touched {
            state
                .leaves
                .set(run.clone(), LeafState::new(version, false, true));
        }
        for leaf in data {
            state
                .leaves
                .set(leaf..leaf + 1, LeafState::new(version, false, true));
        }
    }

    /// After the last byte: these leaves hold `version`, and all but `data` are zero.
    pub(crate) fn finish(&self, version: Version, data: impl Iterator<Item = u64>) {
        let mut state = self.board.lock();
        for run in &self.admitted {
            state
                .leaves
                .set(run.clone(), LeafState::new(version, true, false));
        }
        for leaf in data {
            state
                .leaves
                .set(leaf..leaf + 1, LeafState::new(version, true, true));
        }
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut state = self.board.lock();
        if let Some(at) = state.busy.iter().position(|busy| *busy == self.range) {
            state.busy.swap_remove(at);
        }
        drop(state);
        self.board.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use longhaul_common::ids::{Attempt, Round};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn states_equal_a_plain_list(
            leaves in 1u64..5000, sets in prop::collection::vec((any::<u64>(), any::<u64>(), 0u64..4), 0..20),
        ) {
            let mut states = LeafStates::new(leaves, LeafState(2));
            let mut plain = vec![LeafState(2); leaves as usize];
            for (start, len, state) in sets {
                let start = start % leaves;
                let end = start + 1 + len % (leaves - start);
                states.set(start..end, LeafState(state));
                plain[start as usize..end as usize].fill(LeafState(state));
            }
            let mut at = 0;
            for (run, state) in states.runs(0..leaves) {
                prop_assert_eq!(run.start, at);
                prop_assert!(plain[run.start as usize..run.end as usize].iter().all(|plain| *plain == state));
                at = run.end;
            }
            prop_assert_eq!(at, leaves);
        }
    }

    #[test]
    fn a_pebibyte_costs_little_and_old_versions_stay_out() {
        let version = |round| Version::new(Attempt(1), Round(round)).unwrap();
        let board = Board::new(LeafStates::new(1 << 30, LeafState::default()));
        let all = board.enter(0..1 << 30, version(1));
        assert_eq!(
            all.admitted,
            [Range {
                start: 0,
                end: 1 << 30
            }]
        );
        assert!(all.claimed.is_empty() && all.touched.is_empty());
        all.begin(version(1), [5].into_iter());
        all.finish(version(1), [5].into_iter());
        drop(all);
        let newer = board.enter(7..8, version(2));
        newer.begin(version(2), std::iter::empty());
        drop(newer);
        assert_eq!(board.first_unclaimed(), Some(7));
        let old = board.enter(0..10, version(1));
        assert_eq!(old.admitted, [0..7, 8..10]);
        assert_eq!(old.claimed, [0..7, 8..10]);
        assert_eq!(old.touched, [Range { start: 5, end: 6 }]);
    }

    #[test]
    fn what_is_left_without_holes() {
        let ranges = |list: &[(u64, u64)]| list.iter().map(|(start, end)| *start..*end).collect::<Vec<_>>();
        let holes = ranges(&[(0, 2), (4, 6), (8, 20)]);
        assert_eq!(
            without(&ranges(&[(1, 5), (5, 7), (9, 12)]), &holes),
            ranges(&[(2, 4), (6, 7)])
        );
        assert_eq!(
            without(&ranges(&[(3, 21)]), &holes),
            ranges(&[(3, 4), (6, 8), (20, 21)])
        );
        assert_eq!(without(&ranges(&[(3, 4)]), &[]), ranges(&[(3, 4)]));
    }

    #[test]
    fn overlapping_writers_wait_for_each_other() {
        let version = Version::new(Attempt(1), Round(0)).unwrap();
        let board = Board::new(LeafStates::new(100, LeafState::default()));
        let inside = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (board, inside) = (&board, &inside);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let entered = board.enter(thread..thread + 3, version);
                        if thread == 2 || thread == 0 {
                            // Leaf 2 belongs to the ranges of threads 0, 1 and 2; two of them must never meet.
                            assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                            std::thread::yield_now();
                            inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        }
                        drop(entered);
                    }
                });
            }
        });
    }
}
