//! What proves that two disks hold the same content.
//!
//! Owns the leaf digest (BLAKE3 of 1 MiB of content), the tree over the leaves, and the digest of a disk. Leaves alone where
//! the content comes from. Promises: equal digests mean equal content and equal size; a disk of zeros costs the same whether it
//! is a gibibyte or a pebibyte.
//!
//! ```text
//! leaf   = BLAKE3(content of the leaf)                     the last leaf may be shorter
//! node   = BLAKE3-keyed(NODE_KEY, left ‖ right)            an odd node is carried up unchanged
//! digest = BLAKE3-keyed(DISK_KEY, size as u64 LE ‖ top node)
//! ```
//! Anyone can repeat it: `longhaul digest FILE`.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::extent::Extent;

/// Bytes under one leaf.
pub const LEAF: u64 = 1 << 20;

/// A 256-bit digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The BLAKE3 digest of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The digest of what was seen so far of bytes that pass by.
#[derive(Clone, Debug, Default)]
pub struct Running(blake3::Hasher);

impl Running {
    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Equals [`Digest::of`] of all bytes so far, however they were cut.
    pub fn digest(&self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

fn key(name: &str) -> [u8; 32] {
    blake3::derive_key("longhaul disk digest v1", name.as_bytes())
}

/// How many leaves a disk of `size` bytes has.
pub const fn leaf_count(size: u64) -> u64 {
    size.div_ceil(LEAF)
}

/// The bytes of leaf number `index` of a disk of `size` bytes.
pub fn leaf_extent(index: u64, size: u64) -> Extent {
    Extent::between(
        index.saturating_mul(LEAF).min(size),
        index.saturating_add(1).saturating_mul(LEAF).min(size),
    )
}

/// Digests of subtrees that hold only zeros, by height: `zero[0]` is a whole zero leaf.
struct ZeroNodes {
    node_key: [u8; 32],
    full: Vec<Digest>,
}

impl ZeroNodes {
    fn new() -> Self {
        let node_key = key("node");
        let mut full = vec![Digest::of(&vec![0; LEAF as usize])];
        for height in 0..44 {
            let below: Digest = full[height];
            full.push(join(&node_key, &below, &below));
        }
        Self { node_key, full }
    }
}

fn join(node_key: &[u8; 32], left: &Digest, right: &Digest) -> Digest {
    let mut hasher = blake3::Hasher::new_keyed(node_key);
    hasher.update(&left.0).update(&right.0);
    Digest(*hasher.finalize().as_bytes())
}

/// The digest of a disk in the making: leaves in any order, ranges of zeros at once.
///
/// Memory: 32 bytes for each leaf that is neither zero nor joined to its neighbours yet; joined subtrees collapse, so leaves
/// that arrive nearly in order cost nearly nothing.
pub struct DiskDigest {
    size: u64,
    zero: ZeroNodes,
    /// Complete subtrees by (first leaf, height), never both children of one parent.
    nodes: BTreeMap<u64, (u32, Digest)>,
}

/// Why a digest cannot be stated.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    #[error("leaf {index} was given twice or lies beyond the disk's {leaves} leaves")]
    Unexpected { index: u64, leaves: u64 },
    #[error("leaf {first_missing} of the disk was never given")]
    Incomplete { first_missing: u64 },
}

impl DiskDigest {
    /// For a disk of `size` bytes, no leaf known yet.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            zero: ZeroNodes::new(),
            nodes: BTreeMap::new(),
        }
    }

    /// Takes one leaf's digest.
    pub fn leaf(&mut self, index: u64, digest: Digest) -> Result<(), DigestError> {
        self.check_new(index, 1)?;
        self.insert(index, 0, digest);
        Ok(())
    }

    /// Takes `count` leaves of zeros at once.
    pub fn zeros(&mut self, first: u64, count: u64) -> Result<(), DigestError> {
        if count == 0 {
            return Ok(());
        }
        self.check_new(first, count)?;
        let end = first + count;
        let mut at = first;
        while at < end {
            let last = leaf_extent(at, self.size);
            if last.len() < LEAF {
                self.insert(at, 0, Digest::of(&vec![0; last.len() as usize]));
                at += 1;
                continue;
            }
            let whole = if end == leaf_count(self.size) && !self.size.is_multiple_of(LEAF) {
                end - 1
            } else {
                end
            };
            let fits = (whole - at).ilog2();
            let height = if at == 0 {
                fits
            } else {
                fits.min(at.trailing_zeros())
            };
            let digest = self.zero.full[height as usize];
            self.insert(at, height, digest);
            at += 1 << height;
        }
        Ok(())
    }

    fn check_new(&self, first: u64, count: u64) -> Result<(), DigestError> {
        let leaves = leaf_count(self.size);
        let inside = first.checked_add(count).is_some_and(|end| end <= leaves);
        let before = self.nodes.range(..=first).next_back();
        let overlaps_before = before.is_some_and(|(start, (height, _))| start + (1 << height) > first);
        let overlaps_after = inside && self.nodes.range(first..first + count).next().is_some();
        if inside && !overlaps_before && !overlaps_after {
            return Ok(());
        }
        Err(DigestError::Unexpected { index: first, leaves })
    }

    /// Adds a complete subtree, and joins it with its sibling as long as there is one.
    fn insert(&mut self, mut first: u64, mut height: u32, mut digest: Digest) {
        loop {
            let sibling = first ^ (1 << height);
            match self.nodes.get(&sibling) {
                Some((h, other)) if *h == height => {
                    let (left, right) = if sibling < first {
                        (other, &digest)
                    } else {
                        (&digest, other)
                    };
                    digest = join(&self.zero.node_key, left, right);
                    self.nodes.remove(&sibling);
                    first = first.min(sibling);
                    height += 1;
                }
                _ => break,
            }
        }
        self.nodes.insert(first, (height, digest));
    }

    /// The disk's digest, once every leaf was given.
    pub fn finish(&self) -> Result<Digest, DigestError> {
        let leaves = leaf_count(self.size);
        let mut next = 0;
        for (first, (height, _)) in &self.nodes {
            if *first != next {
                break;
            }
            next += 1 << height;
        }
        if next != leaves {
            return Err(DigestError::Incomplete { first_missing: next });
        }
        // What is left are the left-to-right peaks, higher ones first; an odd node is carried up, so they fold from the right.
        let top = self.nodes.values().rev().map(|(_, digest)| *digest);
        let top = top.reduce(|right, left| join(&self.zero.node_key, &left, &right));
        let mut hasher = blake3::Hasher::new_keyed(&key("disk"));
        hasher.update(&self.size.to_le_bytes());
        if let Some(top) = top {
            hasher.update(&top.0);
        }
        Ok(Digest(*hasher.finalize().as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition in the header, written as naively as it reads.
    fn plain(size: u64, leaves: &[Digest]) -> Digest {
        let mut level = leaves.to_vec();
        while level.len() > 1 {
            let pair = |pair: &[Digest]| match pair {
                [left, right] => join(&key("node"), left, right),
                one => one[0],
            };
            level = level.chunks(2).map(pair).collect();
        }
        let mut hasher = blake3::Hasher::new_keyed(&key("disk"));
        hasher.update(&size.to_le_bytes());
        level.first().map(|top| hasher.update(&top.0));
        Digest(*hasher.finalize().as_bytes())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_order_and_any_zero_runs_give_the_plain_tree(
            zero in prop::collection::vec(any::<bool>(), 0..70), tail in 0..LEAF, order in any::<u64>(),
        ) {
            let size = match zero.len() as u64 { 0 => 0, n => n * LEAF - tail };
            let content = |i: u64| Digest::of(&i.to_le_bytes());
            let zeros = |i: u64| Digest::of(&vec![0; leaf_extent(i, size).len() as usize]);
            let leaves: Vec<_> =
                (0u64..).zip(&zero).map(|(i, zero)| if *zero { zeros(i) } else { content(i) }).collect();
            let mut steps = Vec::new();
            let mut at = 0;
            while at < zero.len() {
                let run = if zero[at] { zero[at..].iter().take_while(|z| **z).count() } else { 1 };
                steps.push((at as u64, run as u64, zero[at]));
                at += run;
            }
            steps.sort_by_key(|(at, ..)| blake3::hash(&(at ^ order).to_le_bytes()).as_bytes()[0]);
            let mut digest = DiskDigest::new(size);
            for (at, run, zero) in steps {
                if zero { digest.zeros(at, run).unwrap() } else { digest.leaf(at, content(at)).unwrap() }
            }
            prop_assert_eq!(digest.finish().unwrap(), plain(size, &leaves));
        }
    }

    #[test]
    fn a_pebibyte_of_zeros_costs_nothing() {
        let mut digest = DiskDigest::new(1 << 50);
        digest.zeros(0, 1 << 30).unwrap();
        assert!(digest.finish().is_ok());
    }

    #[test]
    fn a_missing_or_repeated_leaf_is_named() {
        let mut digest = DiskDigest::new(4 * LEAF);
        digest.leaf(0, Digest::of(b"a")).unwrap();
        digest.leaf(2, Digest::of(b"b")).unwrap();
        assert_eq!(digest.finish(), Err(DigestError::Incomplete { first_missing: 1 }));
        assert!(digest.leaf(2, Digest::of(b"b")).is_err());
        assert!(digest.zeros(1, 2).is_err());
        assert!(digest.leaf(4, Digest::of(b"b")).is_err());
        assert!(digest.zeros(u64::MAX, 2).is_err());
    }
}
