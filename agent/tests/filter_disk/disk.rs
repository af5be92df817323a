//! A disk image in memory that knows which of its blocks may be skipped.

use longhaul_agent::disk::scan::{Part, Scan, scan_with};
use longhaul_common::extent::{BLOCK, Extent};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::toy;

/// Image and truth.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) bytes: Vec<u8>,
    /// One for each block: nobody keeps anything in it.
    pub(crate) free: Vec<bool>,
}

impl Disk {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            bytes: vec![0; size],
            free: vec![false; size.div_ceil(BLOCK as usize)],
        }
    }

    /// Around an image that a tool made.
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        Self {
            free: vec![false; bytes.len().div_ceil(BLOCK as usize)],
            bytes,
        }
    }

    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Notes that `extent` may be skipped, as far as it is whole blocks.
    pub(crate) fn allow(&mut self, extent: Extent) {
        if let Some(inner) = extent.shrink_to(BLOCK) {
            self.free[(inner.offset() / BLOCK) as usize..(inner.end() / BLOCK) as usize].fill(true);
        }
    }

    /// Makes a toy file system in `range` of the disk, half of it free in random runs.
    pub(crate) fn toy(&mut self, range: Extent, label: &str, seed: u64) {
        let free = random_runs(range.len(), seed);
        self.write(range.offset(), &toy::header(range.len(), 0, label, &free));
        for (at, len) in free {
            let start = range.offset() + at;
            self.allow(Extent::between(start, start + len));
        }
    }

    pub(crate) fn scan(&self) -> Scan {
        scan_with(&self.bytes, toy::PROBES)
    }

    /// Scans, and checks that no block is skipped that must not be.
    pub(crate) fn scan_safely(&self, context: &dyn std::fmt::Display) -> Scan {
        let scan = self.scan();
        for (block, allowed) in self.free.iter().enumerate() {
            let skipped = scan.free.is_free(block as u64 * BLOCK);
            assert!(
                !skipped || *allowed,
                "{context}: used block {block} is skipped\n{:#?}",
                scan.parts
            );
        }
        let told: u64 = scan.parts.iter().map(|part| part.free_bytes).sum();
        assert_eq!(told, scan.free.free_bytes(), "{context}: {:#?}", scan.parts);
        scan
    }

    /// Scans, and checks that just the blocks are skipped that may be.
    pub(crate) fn scan_exactly(&self, context: &dyn std::fmt::Display) -> Scan {
        let scan = self.scan_safely(context);
        for (block, allowed) in self.free.iter().enumerate() {
            let skipped = scan.free.is_free(block as u64 * BLOCK);
            assert!(
                skipped || !*allowed,
                "{context}: free block {block} is copied\n{:#?}",
                scan.parts
            );
        }
        scan
    }
}

/// Runs of blocks behind the first, about half of all, at most as many as a toy can list.
pub(crate) fn random_runs(size: u64, seed: u64) -> Vec<(u64, u64)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let blocks = size / BLOCK;
    let longest = (blocks / 60).max(2);
    let (mut runs, mut at) = (Vec::new(), 2);
    while runs.len() < 200 {
        let len = rng.random_range(1..=longest);
        if at + len > blocks {
            break;
        }
        runs.push((at * BLOCK, len * BLOCK));
        at += len + rng.random_range(1..=longest);
    }
    runs
}

pub(crate) fn part<'a>(scan: &'a Scan, name: &str) -> &'a Part {
    let found = scan.parts.iter().find(|part| part.name.starts_with(name));
    found.unwrap_or_else(|| panic!("no line {name}: {:#?}", scan.parts))
}

pub(crate) fn reason<'a>(scan: &'a Scan, name: &str) -> &'a str {
    part(scan, name).reason.as_deref().unwrap_or_default()
}
