//! What the tests of file-system filters share: tools run with a clear complaint, seeds that can be replayed, images in memory,
//! and free sets that can be compared.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::{Command, Output};

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::{FileSystem, FsSummary, Unproven};
use longhaul_common::extent::Extent;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Files by path relative to the root, and what they hold.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// Runs a tool and returns what it said, whatever its exit code.
pub(crate) fn run(tool: &str, package: &str, args: &[&str]) -> Output {
    let mut command = Command::new(tool);
    command
        .args(args)
        .env("MTOOLS_SKIP_CHECK", "1")
        .env("LC_ALL", "C.UTF-8");
    command.env(
        "PATH",
        format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()),
    );
    command.output().unwrap_or_else(|error| {
        panic!("{tool} cannot be run ({error}): install the Debian package {package}")
    })
}

/// Runs a tool that must succeed and returns its standard output.
pub(crate) fn must(tool: &str, package: &str, args: &[&str]) -> Vec<u8> {
    let output = run(tool, package, args);
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{tool} {args:?} failed: {said}");
    output.stdout
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// How many random cases to run: LONGHAUL_FILTER_CASES, or `default`.
pub(crate) fn cases(default: u64) -> u64 {
    let set = std::env::var("LONGHAUL_FILTER_CASES").ok();
    set.map_or(default, |cases| {
        cases.parse().expect("LONGHAUL_FILTER_CASES is a number")
    })
}

/// Runs `case` under seeds that are printed; LONGHAUL_FILTER_SEED replays one.
pub(crate) fn seeded(default: u64, mut case: impl FnMut(&mut StdRng)) {
    let replay = std::env::var("LONGHAUL_FILTER_SEED").ok();
    let seeds: Vec<u64> = match replay {
        Some(seed) => vec![seed.parse().expect("LONGHAUL_FILTER_SEED is a number")],
        None => (0..cases(default)).map(|_| rand::random()).collect(),
    };
    for seed in seeds {
        println!("LONGHAUL_FILTER_SEED={seed}");
        case(&mut StdRng::seed_from_u64(seed));
    }
}

/// Bytes that no compression shortens, of a length that clusters around small files.
pub(crate) fn content(rng: &mut StdRng, max: usize) -> Vec<u8> {
    let len = match rng.random_range(0..10) {
        0 => 0,
        1..6 => rng.random_range(1..3000.min(max)),
        6..9 => rng.random_range(1..max.div_ceil(8).max(2)),
        _ => rng.random_range(1..=max),
    };
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes[..]);
    bytes
}

/// Free extents, sorted and merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Free(pub(crate) Vec<Extent>);

impl Free {
    pub(crate) fn new(mut extents: Vec<Extent>) -> Self {
        extents.sort();
        let mut merged: Vec<Extent> = Vec::new();
        for extent in extents {
            match merged.last_mut() {
                Some(last) if extent.offset() < last.end() => panic!("{extent:?} overlaps {last:?}"),
                Some(last) if extent.offset() == last.end() => {
                    *last = Extent::between(last.offset(), extent.end())
                }
                _ => merged.push(extent),
            }
        }
        Self(merged)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(Extent::len).sum()
    }

    /// The parts of this set that `other` lacks.
    pub(crate) fn beyond(&self, other: &Self) -> Vec<Extent> {
        let mut missing = Vec::new();
        let mut theirs = other.0.iter().peekable();
        for extent in &self.0 {
            let mut at = extent.offset();
            while at < extent.end() {
                while theirs.next_if(|theirs| theirs.end() <= at).is_some() {}
                let (start, end) = theirs
                    .peek()
                    .map_or((u64::MAX, u64::MAX), |their| (their.offset(), their.end()));
                if start > at {
                    missing.push(Extent::between(at, start.min(extent.end())));
                }
                at = end.min(extent.end());
            }
        }
        missing
    }

    /// A copy of `image` that has zeros in place of what is free.
    pub(crate) fn copy_of(&self, image: &[u8]) -> Vec<u8> {
        let mut copy = image.to_vec();
        for extent in &self.0 {
            copy[extent.offset() as usize..extent.end() as usize].fill(0);
        }
        copy
    }
}

pub(crate) type Probe = fn(&dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven>;

/// Probes and scans; `Ok(None)` where nothing is recognised.
pub(crate) fn scan(probe: Probe, volume: &dyn ReadAt) -> Result<Option<(FsSummary, Free)>, Unproven> {
    let Some(fs) = probe(volume)? else {
        return Ok(None);
    };
    let mut extents = Vec::new();
    let summary = fs.scan(volume, &mut |extent| extents.push(extent))?;
    assert!(
        extents
            .iter()
            .all(|extent| !extent.is_empty() && extent.end() <= summary.size)
    );
    let free = Free::new(extents);
    assert_eq!(free.bytes(), summary.free);
    assert_eq!(fs.size(), summary.size);
    Ok(Some((summary, free)))
}

/// Some image with a few bytes of its own.
pub(crate) struct Patched<'a> {
    pub(crate) base: &'a [u8],
    pub(crate) patches: Vec<(u64, u8)>,
}

impl ReadAt for Patched<'_> {
    fn size(&self) -> u64 {
        self.base.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.base.read_exact_at(buf, offset)?;
        for (at, byte) in &self.patches {
            if let Some(place) = at.checked_sub(offset).and_then(|at| buf.get_mut(at as usize)) {
                *place = *byte;
            }
        }
        Ok(())
    }
}

/// Changes one byte of `image` at a place drawn from `places`, `count` times: the scan must refuse, or call nothing free that is not in
/// `truth`, what is free in the intact image, but for bytes that are zero anyway. Returns how often it refused. An intact scan may
/// keep more than that, where another geometry fits as well, and a changed byte may rule that geometry out.
pub(crate) fn flip(
    probe: Probe,
    rng: &mut StdRng,
    (image, truth): (&[u8], &Free),
    places: &[Extent],
    count: u64,
) -> u64 {
    let mut refused = 0;
    for _ in 0..count {
        let place = places[rng.random_range(0..places.len())];
        let at = rng.random_range(place.offset()..place.end());
        let old = image[at as usize];
        let new = match rng.random_range(0..3) {
            0 => old ^ 1 << rng.random_range(0..8),
            1 => rng.random(),
            _ => [0, 0xff, 1, 0x80, old.wrapping_add(1), old.wrapping_sub(1)][rng.random_range(0..6)],
        };
        let patched = Patched {
            base: image,
            patches: vec![(at, new)],
        };
        match scan(probe, &patched) {
            Ok(Some((_, free))) => {
                for lost in free.beyond(truth) {
                    let bytes = &image[lost.offset() as usize..lost.end() as usize];
                    assert!(
                        bytes.iter().all(|byte| *byte == 0),
                        "{lost:?} lost by {old:#x} -> {new:#x} at {at:#x}"
                    );
                }
            }
            _ => refused += 1,
        }
    }
    refused
}

/// Scans `image` cut short at many places and with garbage behind its signature: it must end, without a panic.
pub(crate) fn maul(probe: Probe, rng: &mut StdRng, image: &[u8], count: u64) {
    for _ in 0..count {
        let cut = match rng.random_range(0..3) {
            0 => rng.random_range(0..image.len()),
            1 => rng.random_range(0..image.len().min(20_000)),
            _ => image.len() - rng.random_range(1..5000),
        };
        let _ = scan(probe, &image[..cut].to_vec());
    }
    for _ in 0..count {
        let patches = (0..rng.random_range(1..200))
            .map(|_| {
                let near = rng.random_range(0..3) > 0;
                let at = rng.random_range(
                    0..if near {
                        image.len().min(70_000)
                    } else {
                        image.len()
                    },
                );
                (at as u64, rng.random())
            })
            .collect();
        let _ = scan(probe, &Patched { base: image, patches });
    }
    let mut garbage = vec![0; 200_000];
    for _ in 0..count {
        rng.fill(&mut garbage[..]);
        garbage[..512].copy_from_slice(&image[..512]);
        let _ = scan(probe, &garbage);
    }
}
