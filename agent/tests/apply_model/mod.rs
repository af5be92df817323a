//! What the tests of `apply` share: options, batches with known content, and a disk in memory to compare with.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::Path;

use longhaul_agent::disk::apply::{
    Applied, LeafRecord, Piece, Target, TargetError, TargetFormat, TargetOptions,
};
use longhaul_common::digest::{Digest, DiskDigest, LEAF, leaf_count, leaf_extent};
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Options for a raw file `path` inside `dir`.
pub(crate) fn options(dir: &Path, name: &str) -> TargetOptions {
    TargetOptions {
        path: dir.canonicalize().unwrap().join(name),
        format: TargetFormat::Raw,
        preallocate: false,
        overwrite: false,
        owner: None,
        mode: None,
        label: None,
        flush_bytes: 64 << 20,
        run_dir: dir.canonicalize().unwrap(),
        state_dir: dir.canonicalize().unwrap(),
        qemu_img: "qemu-img".into(),
        qemu_nbd: "qemu-nbd".into(),
        job: JobId::random(),
        disk: DiskIndex(0),
    }
}

/// Path of the partial copy.
pub(crate) fn partial(options: &TargetOptions) -> std::path::PathBuf {
    beside(options, "partial")
}

/// Path of the progress log of a file.
pub(crate) fn log(options: &TargetOptions) -> std::path::PathBuf {
    beside(options, "log")
}

fn beside(options: &TargetOptions, what: &str) -> std::path::PathBuf {
    let name = options.path.file_name().unwrap().to_str().unwrap();
    options
        .path
        .with_file_name(format!(".{name}.longhaul-{}.{what}", options.job.short()))
}

/// The seed of a random test: that of the environment, or a new one. Printed, so that a failure can be repeated.
pub(crate) fn seed(variable: &str) -> u64 {
    let given = std::env::var(variable)
        .ok()
        .map(|text| text.parse().expect("a seed is a number"));
    let seed = given.unwrap_or_else(rand::random);
    println!("{variable}={seed}");
    seed
}

/// Content of one leaf: stretches of data and zeros.
#[derive(Clone)]
pub(crate) struct Leaf {
    pub(crate) bytes: Vec<u8>,
    /// Lengths of stretches, data and zeros in turn, data first (possibly of length 0).
    pub(crate) stretches: Vec<usize>,
}

impl Leaf {
    pub(crate) fn is_zero(&self) -> bool {
        self.stretches == [0, self.bytes.len()]
    }

    pub(crate) fn zeros(len: usize) -> Self {
        Self {
            bytes: vec![0; len],
            stretches: vec![0, len],
        }
    }

    /// Random content of one of the kinds that occur: zero, all data, a mixture with odd borders, data that is zero.
    pub(crate) fn random(rng: &mut StdRng, len: usize) -> Self {
        let mut leaf = Self::zeros(len);
        match rng.random_range(0..6) {
            0 | 1 => return leaf,
            2 => leaf.stretches = vec![len],
            _ => {
                leaf.stretches.clear();
                let mut left = len;
                while left > 0 {
                    let most = if rng.random() { 200_000 } else { 5000 };
                    let stretch = rng.random_range(1..=most).min(left);
                    leaf.stretches.push(stretch);
                    left -= stretch;
                }
            }
        }
        let mut at = 0;
        for (index, stretch) in leaf.stretches.iter().enumerate() {
            if index % 2 == 0 {
                let seed = rng.random::<u64>();
                StdRng::seed_from_u64(seed).fill(&mut leaf.bytes[at..at + stretch]);
            }
            at += stretch;
        }
        leaf
    }
}

/// Applies `leaves` from leaf `first` on, as one batch.
pub(crate) fn apply(
    target: &Target,
    at: (u32, u32),
    first: u64,
    leaves: &[Leaf],
) -> Result<Applied, TargetError> {
    let mut record = LeafRecord {
        first,
        digests: Vec::new(),
        count: leaves.len() as u64,
    };
    let mut pieces: Vec<Piece<'_>> = Vec::new();
    let mut offset = leaf_extent(first, target.size()).offset();
    for (number, leaf) in (first..).zip(leaves) {
        if !leaf.is_zero() {
            record.digests.push((number, Digest::of(&leaf.bytes)));
        }
        let mut rest = &leaf.bytes[..];
        for (index, stretch) in leaf
            .stretches
            .iter()
            .enumerate()
            .filter(|(_, stretch)| **stretch > 0)
        {
            let (bytes, behind) = rest.split_at(*stretch);
            let extent = Extent::new(offset, bytes.len() as u64).unwrap();
            match pieces.last_mut() {
                _ if index % 2 == 0 => pieces.push(Piece::Data { offset, bytes }),
                Some(Piece::Zero(before)) => *before = Extent::between(before.offset(), extent.end()),
                _ => pieces.push(Piece::Zero(extent)),
            }
            rest = behind;
            offset = extent.end();
        }
    }
    target.apply(Attempt(at.0), Round(at.1), &record, &pieces)
}

/// A disk in memory.
pub(crate) struct Model {
    pub(crate) size: u64,
    pub(crate) leaves: Vec<Leaf>,
}

impl Model {
    pub(crate) fn random(rng: &mut StdRng, size: u64) -> Self {
        let leaves =
            (0..leaf_count(size)).map(|leaf| Leaf::random(rng, leaf_extent(leaf, size).len() as usize));
        Self {
            size,
            leaves: leaves.collect(),
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.leaves
            .iter()
            .flat_map(|leaf| leaf.bytes.iter().copied())
            .collect()
    }

    pub(crate) fn digest(&self) -> Digest {
        let mut digest = DiskDigest::new(self.size);
        for (number, leaf) in (0..).zip(&self.leaves) {
            digest.leaf(number, Digest::of(&leaf.bytes)).unwrap();
        }
        digest.finish().unwrap()
    }

    /// Applies every leaf for which `missing` holds, one by one.
    pub(crate) fn send(&self, target: &Target, at: (u32, u32), missing: impl Fn(u64) -> bool) {
        for (number, leaf) in (0..).zip(&self.leaves).filter(|(number, _)| missing(*number)) {
            apply(target, at, number, std::slice::from_ref(leaf)).unwrap();
        }
    }
}

/// A number of leaves and a bit.
pub(crate) const ODD_SIZE: u64 = 11 * LEAF + 12_345;
