//! The two-way comparison of what the MFT refers to with what `$Bitmap` calls allocated.
//!
//! Owns a sum for each stretch of the volume: every cluster adds a well-mixed 64-bit number once for each reference to it and takes it
//! away where its bit is set. A sum is zero exactly where both sides name the same clusters, each once, but for a chance of 2^-64:
//! neither a lost bit, nor a cluster with two owners, nor a bitmap read from the wrong place goes unseen. Leaves alone who refers
//! and why. Promises at most 65,536 stretches (1 MiB), and that free clusters are given only from stretches whose sum is zero.

use longhaul_common::extent::Extent;

use super::content::Content;
use super::inconsistent;
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

/// Clusters of the shortest stretch; its bits are one sector of `$Bitmap`.
const STRETCH_MIN: u64 = 4096;
const STRETCHES_MAX: u64 = 1 << 16;

/// Bytes of `$Bitmap` read at once; a multiple of every stretch's.
const PIECE: usize = 256 << 10;

#[derive(Clone, Default)]
struct Sum {
    mixed: u64,
    references: u64,
}

pub(super) struct Tally {
    clusters: u64,
    /// Clusters of a stretch, a power of two.
    stretch: u64,
    sums: Vec<Sum>,
    references: u64,
}

impl Tally {
    /// For a volume of `clusters` clusters, fewer than 2^32.
    pub(super) fn new(clusters: u64) -> Self {
        let stretch = clusters
            .div_ceil(STRETCHES_MAX)
            .next_power_of_two()
            .max(STRETCH_MIN);
        Self {
            clusters,
            stretch,
            sums: vec![Sum::default(); clusters.div_ceil(stretch) as usize],
            references: 0,
        }
    }

    /// Notes a reference to `len` clusters from `lcn` on, which lie inside the volume.
    pub(super) fn refer(&mut self, lcn: u64, len: u64) -> Result<(), Unproven> {
        self.references = self.references.saturating_add(len);
        if self.references > self.clusters {
            return Err(inconsistent("the MFT refers to more clusters than there are"));
        }
        let (mut at, end) = (lcn, lcn + len);
        while at < end {
            let stop = end.min((at / self.stretch + 1) * self.stretch);
            let sum = &mut self.sums[(at / self.stretch) as usize];
            sum.references += stop - at;
            sum.mixed = (at..stop).fold(sum.mixed, |mixed, cluster| mixed.wrapping_add(mix(cluster)));
            at = stop;
        }
        Ok(())
    }

    /// Compares with `bitmap` and gives the free extents of a volume of `cluster` bytes per cluster; returns their bytes.
    pub(super) fn settle(
        &self,
        reader: &Reader<'_>,
        bitmap: &Content,
        cluster: u32,
        free: &mut dyn FnMut(Extent),
    ) -> Result<u64, Unproven> {
        let mut given = Given {
            cluster: cluster.into(),
            start: 0,
            end: 0,
            bytes: 0,
            free,
        };
        let mut buf = vec![0; PIECE];
        let stretch_bytes = (self.stretch / 8) as usize;
        let total = self.clusters.div_ceil(8);
        let mut sums = self.sums.iter().zip((0..).step_by(self.stretch as usize));
        let mut offset = 0;
        while offset < total {
            let piece = (total - offset).min(PIECE as u64) as usize;
            bitmap.read(reader, &mut buf[..piece], offset)?;
            // `sums` must come second: zip would drop one of its items at the end of each piece.
            for (bits, (sum, first)) in buf[..piece].chunks(stretch_bytes).zip(sums.by_ref()) {
                let clusters = self.stretch.min(self.clusters - first);
                if sum.agrees(bits, first, clusters)? {
                    given.stretch(bits, first, clusters);
                }
            }
            offset += piece as u64;
        }
        Ok(given.finish())
    }
}

impl Sum {
    /// Whether `bits` call exactly the clusters allocated that were referred to. More allocated than referred to may be a leak of
    /// an old crash; anything else is an error.
    fn agrees(&self, bits: &[u8], first: u64, clusters: u64) -> Result<bool, Unproven> {
        let (mut mixed, mut allocated) = (self.mixed, 0);
        each_set(bits, clusters, |cluster| {
            mixed = mixed.wrapping_sub(mix(first + cluster));
            allocated += 1;
        });
        if mixed == 0 && allocated == self.references {
            return Ok(true);
        }
        if allocated <= self.references {
            return Err(inconsistent(
                "the MFT refers to clusters that $Bitmap calls free, or twice to one",
            ));
        }
        Ok(false)
    }
}

/// Joins free clusters to extents as they come.
struct Given<'a> {
    cluster: u64,
    start: u64,
    end: u64,
    bytes: u64,
    free: &'a mut dyn FnMut(Extent),
}

impl Given<'_> {
    fn stretch(&mut self, bits: &[u8], first: u64, clusters: u64) {
        let mut next = 0;
        each_set(bits, clusters, |cluster| {
            self.run(first + next, first + cluster);
            next = cluster + 1;
        });
        self.run(first + next, first + clusters);
    }

    fn run(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        if start != self.end {
            self.flush();
            self.start = start;
        }
        self.end = end;
    }

    fn flush(&mut self) {
        let extent = Extent::between(self.start * self.cluster, self.end * self.cluster);
        if !extent.is_empty() {
            self.bytes += extent.len();
            (self.free)(extent);
        }
    }

    fn finish(mut self) -> u64 {
        self.flush();
        self.bytes
    }
}

/// The numbers of the set bits among the first `count`.
fn each_set(bits: &[u8], count: u64, mut set: impl FnMut(u64)) {
    for (index, word) in bits.chunks(8).enumerate() {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        let mut word = u64::from_le_bytes(bytes);
        while word != 0 {
            let bit = index as u64 * 64 + u64::from(word.trailing_zeros());
            if bit < count {
                set(bit);
            }
            word &= word - 1;
        }
    }
}

/// The finaliser of splitmix64: a bijection whose sums do not cancel by accident.
fn mix(cluster: u64) -> u64 {
    let mut x = cluster.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settle(clusters: u64, runs: &[(u64, u64)], bits: Vec<u8>) -> Result<Vec<Extent>, Unproven> {
        let mut tally = Tally::new(clusters);
        for (lcn, len) in runs {
            tally.refer(*lcn, *len)?;
        }
        let (mut extents, volume) = (Vec::new(), Vec::new());
        let bytes = tally.settle(
            &Reader::new(&volume, "ntfs"),
            &Content::Resident(bits),
            512,
            &mut |extent| {
                extents.push(extent);
            },
        )?;
        assert_eq!(bytes, extents.iter().map(Extent::len).sum::<u64>());
        Ok(extents)
    }

    fn bits(clusters: u64, runs: &[(u64, u64)]) -> Vec<u8> {
        let mut bits = vec![0; clusters.div_ceil(8) as usize];
        for cluster in runs.iter().flat_map(|(lcn, len)| *lcn..lcn + len) {
            bits[cluster as usize / 8] |= 1 << (cluster % 8);
        }
        bits
    }

    #[test]
    fn a_leak_costs_its_stretch_only_and_a_contradiction_everything() {
        let runs = [(0, 10), (5000, 10)];
        let intact = settle(10_000, &runs, bits(10_000, &runs)).unwrap();
        assert_eq!(
            intact,
            [
                Extent::between(10 * 512, 5000 * 512),
                Extent::between(5010 * 512, 10_000 * 512)
            ]
        );
        let leak = settle(10_000, &runs, bits(10_000, &[(0, 10), (5000, 11)])).unwrap();
        assert_eq!(
            leak,
            [
                Extent::between(10 * 512, 4096 * 512),
                Extent::between(8192 * 512, 10_000 * 512)
            ]
        );
        assert!(settle(10_000, &runs, bits(10_000, &[(0, 10), (5000, 9)])).is_err());
        assert!(settle(10_000, &runs, bits(10_000, &[(0, 10), (5001, 10)])).is_err());
        assert!(settle(10_000, &[(0, 10), (9, 1)], bits(10_000, &[(0, 10)])).is_err());
        assert!(settle(10, &[(0, 10), (0, 10)], bits(10, &[(0, 10)])).is_err());
    }

    proptest! {
        #[test]
        fn what_is_free_is_what_has_no_bit(
            clusters in 1u64..40_000,
            cuts in prop::collection::btree_set(0u64..40_000, 0..40),
        ) {
            let cuts: Vec<u64> = cuts.into_iter().filter(|cut| *cut <= clusters).collect();
            let runs: Vec<_> = cuts.chunks_exact(2).map(|cut| (cut[0], cut[1] - cut[0])).collect();
            let mut bits = bits(clusters, &runs);
            if clusters % 8 != 0 {
                *bits.last_mut().unwrap() |= 0xff << (clusters % 8);
            }
            let mut expected = Vec::new();
            let mut at = 0;
            for (lcn, len) in runs.iter().copied().chain([(clusters, 0)]) {
                expected.push(Extent::between(at * 512, lcn * 512));
                at = lcn + len;
            }
            expected.retain(|extent| !extent.is_empty());
            prop_assert_eq!(settle(clusters, &runs, bits).unwrap(), expected);
        }
    }
}
