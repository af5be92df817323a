//! Sets of batch sequence numbers, as runs.
//!
//! Owns the set by which acknowledgements are collected, compared and sent. Promises that a set costs memory for each gap, not for
//! each number: batches are acknowledged nearly in order, so a set is a few runs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::Sequence;

/// A set of sequence numbers; on the wire a list of (first, count).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct Sequences {
    /// First number of each run -> first number behind it. Runs neither touch nor overlap.
    runs: BTreeMap<u64, u64>,
}

impl Sequences {
    /// Adds one; false where it was there already.
    pub fn insert(&mut self, sequence: Sequence) -> bool {
        let number = sequence.0;
        if self.contains(sequence) || number == u64::MAX {
            return false;
        }
        let end = self.runs.remove(&(number + 1)).unwrap_or(number + 1);
        match self.runs.range_mut(..number).next_back() {
            Some((_, before)) if *before == number => *before = end,
            _ => drop(self.runs.insert(number, end)),
        }
        true
    }

    /// Whether it is there.
    pub fn contains(&self, sequence: Sequence) -> bool {
        self.runs
            .range(..=sequence.0)
            .next_back()
            .is_some_and(|(_, end)| *end > sequence.0)
    }

    /// Every number, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Sequence> {
        self.runs
            .iter()
            .flat_map(|(first, end)| (*first..*end).map(Sequence))
    }

    /// Those of `known` that are in the set, in no order. Costs what the smaller of both costs: a peer may name 2^64 numbers in a
    /// few bytes, so nobody counts through its set.
    pub fn among(&self, known: impl ExactSizeIterator<Item = Sequence>) -> Vec<Sequence> {
        if self.len() <= known.len() as u64 {
            return self.iter().collect();
        }
        known.filter(|sequence| self.contains(*sequence)).collect()
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|(first, end)| end - first).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

/// Runs that do not ascend, are empty or too many.
#[derive(Debug, thiserror::Error)]
#[error("a list of sequence numbers is not in ascending, separate runs")]
pub struct NotSequences;

impl TryFrom<Vec<(u64, u64)>> for Sequences {
    type Error = NotSequences;

    fn try_from(list: Vec<(u64, u64)>) -> Result<Self, NotSequences> {
        let mut runs = BTreeMap::new();
        let mut behind = None;
        for (first, count) in list {
            let end = first.checked_add(count).ok_or(NotSequences)?;
            if count == 0 || behind.is_some_and(|behind| first <= behind) {
                return Err(NotSequences);
            }
            behind = Some(end);
            runs.insert(first, end);
        }
        Ok(Self { runs })
    }
}

impl From<Sequences> for Vec<(u64, u64)> {
    fn from(set: Sequences) -> Self {
        set.runs
            .into_iter()
            .map(|(first, end)| (first, end - first))
            .collect()
    }
}

impl Extend<Sequence> for Sequences {
    fn extend<I: IntoIterator<Item = Sequence>>(&mut self, numbers: I) {
        for number in numbers {
            self.insert(number);
        }
    }
}

impl FromIterator<Sequence> for Sequences {
    fn from_iter<I: IntoIterator<Item = Sequence>>(numbers: I) -> Self {
        let mut set = Self::default();
        set.extend(numbers);
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(numbers in prop::collection::vec(0u64..60, 0..80)) {
            let mut set = Sequences::default();
            let mut plain = BTreeSet::new();
            for number in numbers {
                prop_assert_eq!(set.insert(Sequence(number)), plain.insert(number));
            }
            prop_assert_eq!(set.len(), plain.len() as u64);
            prop_assert!(set.iter().map(|s| s.0).eq(plain.iter().copied()));
            let list: Vec<_> = set.clone().into();
            prop_assert_eq!(Sequences::try_from(list).unwrap(), set);
        }

        #[test]
        fn a_set_without_end_names_only_what_is_known(numbers in prop::collection::btree_set(any::<u64>(), 0..40)) {
            let all = Sequences::try_from(vec![(0, u64::MAX)]).unwrap();
            let mut named: Vec<_> = all.among(numbers.iter().copied().map(Sequence)).iter().map(|s| s.0).collect();
            named.sort_unstable();
            prop_assert!(named.into_iter().eq(numbers.into_iter().filter(|n| *n != u64::MAX)));
        }

        #[test]
        fn hostile_lists_are_refused_or_sound(list in prop::collection::vec(any::<(u64, u64)>(), 0..6)) {
            if let Ok(set) = Sequences::try_from(list.clone()) {
                prop_assert_eq!(Vec::from(set), list);
            }
        }
    }
}
