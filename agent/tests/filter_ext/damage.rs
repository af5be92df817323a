//! Damaged and hostile file systems: never a used block that is called free, never a panic, never a hang.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::Unproven;
use proptest::prelude::*;
use proptest::sample::Index;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use crate::image::{Image, beyond, cases, run, scan, seed};

/// A volume with a few bytes changed.
struct Damaged<'a> {
    pristine: &'a [u8],
    changes: Vec<(u64, u8)>,
}

impl ReadAt for Damaged<'_> {
    fn size(&self) -> u64 {
        self.pristine.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.pristine.read_exact_at(buf, offset)?;
        for (at, byte) in &self.changes {
            if (offset..offset + buf.len() as u64).contains(at) {
                buf[(at - offset) as usize] = *byte;
            }
        }
        Ok(())
    }
}

/// A small file system in memory, and where its metadata lies.
struct Specimen {
    options: &'static str,
    bytes: Vec<u8>,
    free: Vec<Range<u64>>,
    groups: usize,
    /// Bytes of each structure, by name.
    structures: Vec<(&'static str, Vec<Range<u64>>)>,
}

impl Specimen {
    fn make(kib: u64, options: &'static str) -> Self {
        let mut image = Image::make(kib, options, 11);
        image.age(50, 60_000);
        image.settle();
        let free = scan(&image.volume()).unwrap().unwrap().ranges;
        assert_eq!(free, image.oracle());
        let structures = structures(&image);
        let groups = structures.iter().find(|(name, _)| *name == "block bitmap");
        Self {
            options,
            bytes: image.bytes(),
            free,
            groups: groups.map_or(0, |(_, ranges)| ranges.len()),
            structures,
        }
    }

    /// Scans with `changes` made; what comes out as free must be free in truth.
    fn check(&self, name: &str, changes: Vec<(u64, u8)>) -> Result<(), Unproven> {
        let damaged = Damaged {
            pristine: &self.bytes,
            changes,
        };
        let Some(found) = scan(&damaged)? else {
            return Ok(());
        };
        if let Some(range) = beyond(&found.ranges, &self.free) {
            let (options, changes) = (self.options, damaged.changes);
            panic!("{options}: damage {changes:x?} in {name} makes {range:x?} free");
        }
        Ok(())
    }
}

/// Where a file system's metadata lies, as dumpe2fs and debugfs tell it.
fn structures(image: &Image) -> Vec<(&'static str, Vec<Range<u64>>)> {
    let path = image.path();
    let path = path.to_str().unwrap();
    let text = String::from_utf8(run("dumpe2fs", &[path], &[0]).stdout).unwrap();
    let block: u64 = number_after(&text, "Block size:").unwrap();
    let bytes = |range: Range<u64>| range.start * block..range.end * block;
    let places = |name: &str| -> Vec<Range<u64>> {
        let found = text.match_indices(name).map(|(at, _)| &text[at + name.len()..]);
        found.filter_map(first_range).map(bytes).collect()
    };
    let mut structures = vec![
        ("superblock", std::iter::once(1024..2048).collect()),
        ("copy of the superblock", places("Backup superblock at ")),
        ("group descriptors", places("roup descriptors at ")),
        ("meta_bg descriptors", places("roup descriptor at ")),
        ("block bitmap", places("Block bitmap at ")),
        ("inode bitmap", places("Inode bitmap at ")),
        ("inode table", places("Inode table at ")),
    ];
    let stats: String = image
        .files()
        .iter()
        .map(|name| format!("stat {name}\n"))
        .collect();
    let maps = image.debugfs(&format!("{stats}stat <8>\nstat <7>\nstat <2>\n"));
    for (name, tag) in [
        ("extent tree", "(ETB0):"),
        ("indirect block", "(IND):"),
        ("double indirect block", "(DIND):"),
    ] {
        let found = maps.match_indices(tag).map(|(at, _)| &maps[at + tag.len()..]);
        structures.push((name, found.filter_map(first_range).map(bytes).collect()));
    }
    let journal = image.debugfs("bmap <8> 0\n");
    if let Some(start) = journal
        .lines()
        .last()
        .and_then(|line| line.parse::<u64>().ok())
        .filter(|at| *at > 0)
    {
        structures.push(("journal", vec![bytes(start..start + 1)]));
    }
    structures.retain(|(_, ranges)| !ranges.is_empty());
    structures
}

fn number_after(text: &str, name: &str) -> Option<u64> {
    let rest = &text[text.find(name)? + name.len()..];
    let rest = rest.trim_start();
    rest[..rest.find(|c: char| !c.is_ascii_digit())?].parse().ok()
}

/// `N` or `N-M` at the front of `text`.
fn first_range(text: &str) -> Option<Range<u64>> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '-')
        .unwrap_or(text.len());
    let (first, last) = text[..end]
        .split_once('-')
        .unwrap_or((&text[..end], &text[..end]));
    let first: u64 = first.parse().ok()?;
    let last: u64 = if last.is_empty() {
        first
    } else {
        last.parse().ok()?
    };
    Some(first..last + 1)
}

const SPECIMENS: [(u64, &str); 12] = [
    (20 << 10, "-t ext2 -b 1024 -N 600"),
    (4 << 10, "-t ext2 -b 1024 -N 200"),
    (16 << 10, "-t ext2 -b 1024 -O none -N 600"),
    (30 << 10, "-t ext3 -b 1024 -N 600"),
    (24 << 10, "-t ext4 -b 1024 -N 600 -O ^metadata_csum,uninit_bg"),
    (24 << 10, "-t ext4 -b 1024 -N 600 -O ^metadata_csum,^uninit_bg"),
    (24 << 10, "-t ext4 -b 1024 -N 600"),
    (24 << 10, "-t ext4 -b 1024 -N 600 -O ^64bit"),
    (
        24 << 10,
        "-t ext4 -b 1024 -N 600 -O ^metadata_csum,uninit_bg,meta_bg,^resize_inode",
    ),
    (
        60 << 10,
        "-t ext4 -b 1024 -N 600 -O ^metadata_csum,uninit_bg,bigalloc -C 4096 -g 8192",
    ),
    (24 << 10, "-t ext4 -b 4096 -N 600 -O ^metadata_csum,uninit_bg"),
    (
        24 << 10,
        "-t ext4 -b 1024 -N 600 -O ^metadata_csum,uninit_bg,sparse_super2,^resize_inode",
    ),
];

fn specimens() -> &'static [Specimen] {
    static MADE: OnceLock<Vec<Specimen>> = OnceLock::new();
    MADE.get_or_init(|| {
        SPECIMENS
            .iter()
            .map(|(kib, options)| Specimen::make(*kib, options))
            .collect()
    })
}

/// Another value for a byte; half of the time one with as many bits set, which counts cannot tell apart.
fn other(byte: u8, rng: &mut StdRng) -> u8 {
    let alike = rng.random_bool(0.5);
    loop {
        let other: u8 = rng.random();
        let same_count = other.count_ones() == byte.count_ones();
        if other != byte && (!alike || same_count || byte == 0 || byte == 0xFF) {
            return other;
        }
    }
}

#[test]
fn no_damaged_byte_of_any_structure_makes_a_used_block_free() {
    let seed = seed("no_damaged_byte_of_any_structure_makes_a_used_block_free");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut seen = std::collections::BTreeSet::new();
    for specimen in specimens() {
        for (name, ranges) in &specimen.structures {
            seen.insert(*name);
            for _ in 0..cases(150) {
                let range = &ranges[rng.random_range(0..ranges.len())];
                let at = rng.random_range(range.clone());
                let byte = other(specimen.bytes[at as usize], &mut rng);
                let result = specimen.check(name, vec![(at, byte)]);
                if specimen.groups > 1 && matches!(result, Err(Unproven::Truncated { .. })) {
                    panic!(
                        "{}: damage {byte:x} at {at:x} passes for a truncated image",
                        specimen.options
                    );
                }
            }
        }
    }
    assert_eq!(seen.len(), 11, "not every structure was found: {seen:?}");
}

#[test]
fn no_damaged_byte_of_the_superblock_makes_a_used_block_free() {
    let mut rng = StdRng::seed_from_u64(seed("no_damaged_byte_of_the_superblock_makes_a_used_block_free"));
    for specimen in specimens() {
        for at in 1024..2048u64 {
            let byte = specimen.bytes[at as usize];
            let bit = byte ^ 1 << rng.random_range(0..8);
            for changed in [bit, other(byte, &mut rng)] {
                // Whatever comes out is proven, or refused.
                let _ = specimen.check("superblock", vec![(at, changed)]);
            }
        }
    }
}

/// Every byte of the block bitmaps, changed so that the number of free blocks stays what it was.
#[test]
fn bits_that_change_places_in_a_block_bitmap_are_noticed() {
    let mut rng = StdRng::seed_from_u64(seed("bits_that_change_places_in_a_block_bitmap_are_noticed"));
    for specimen in specimens() {
        let (_, bitmaps) = specimen
            .structures
            .iter()
            .find(|(name, _)| *name == "block bitmap")
            .unwrap();
        let mut noticed = 0;
        for at in bitmaps.iter().cloned().flatten() {
            let byte = specimen.bytes[at as usize];
            if byte == 0 || byte == 0xFF {
                continue;
            }
            let changed = byte.rotate_left(rng.random_range(1..8));
            if changed != byte {
                noticed += u32::from(specimen.check("block bitmap", vec![(at, changed)]).is_err());
            }
        }
        assert!(
            noticed > 0,
            "{}: no byte with both kinds of bits",
            specimen.options
        );
    }
}

#[test]
fn an_image_cut_anywhere_is_told_as_truncated() {
    let mut rng = StdRng::seed_from_u64(seed("an_image_cut_anywhere_is_told_as_truncated"));
    for specimen in specimens() {
        let whole = specimen.bytes.len() as u64;
        let edges = [0, 1, 1023, 1024, 1080, 2047, 2048, whole - 1];
        let random: Vec<u64> = (0..100).map(|_| rng.random_range(2048..whole)).collect();
        for size in edges.into_iter().chain(random) {
            let cut = Damaged {
                pristine: &specimen.bytes[..size as usize],
                changes: Vec::new(),
            };
            match scan(&cut) {
                Ok(None) => assert!(size < 2048),
                Err(Unproven::Truncated {
                    needed, size: has, ..
                }) => assert!(needed == whole && has == size),
                Ok(Some(_)) => panic!("{}: {size} of {whole} bytes pass", specimen.options),
                Err(why) => panic!("{}: {size} of {whole} bytes: {why}", specimen.options),
            }
        }
    }
}

#[test]
fn trailing_space_behind_the_file_system_is_not_its_own() {
    let specimen = &specimens()[0];
    let mut longer = specimen.bytes.clone();
    longer.resize(longer.len() + 5_000_000, 0);
    assert_eq!(scan(&longer).unwrap().unwrap().ranges, specimen.free);
}

#[test]
fn garbage_behind_a_magic_number_is_refused() {
    let seed = seed("garbage_behind_a_magic_number_is_refused");
    let mut rng = StdRng::seed_from_u64(seed);
    for case in 0..cases(2_000) {
        let mut bytes = vec![0; rng.random_range(2048..200_000)];
        match case % 3 {
            0 => rng.fill_bytes(&mut bytes),
            1 => rng.fill_bytes(&mut bytes[1024..2048]),
            // A real superblock before garbage.
            _ => {
                rng.fill_bytes(&mut bytes);
                let specimen = &specimens()[rng.random_range(0..SPECIMENS.len())];
                bytes.resize(specimen.bytes.len(), 0x5A);
                bytes[1024..2048].copy_from_slice(&specimen.bytes[1024..2048]);
            }
        }
        bytes[1024 + 0x38..1024 + 0x3A].copy_from_slice(&[0x53, 0xEF]);
        assert!(scan(&bytes).is_err(), "seed {seed}, case {case}");
    }
}

/// A scan of `bytes` ends, and soon.
fn ends_soon(bytes: &dyn ReadAt) {
    let begin = Instant::now();
    let _ = scan(bytes);
    assert!(begin.elapsed() < Duration::from_secs(20));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(400) as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Many bytes changed at once, in the metadata: anything may come out, but it comes out.
    #[test]
    fn many_changed_bytes_neither_panic_nor_hang(
        which in 0..SPECIMENS.len(),
        changes in prop::collection::vec(any::<(Index, Index, Index, u8)>(), 1..40),
    ) {
        let specimen = &specimens()[which];
        let changes = changes
            .into_iter()
            .map(|(structure, range, at, byte)| {
                let (_, ranges) = &specimen.structures[structure.index(specimen.structures.len())];
                let range = &ranges[range.index(ranges.len())];
                (range.start + at.index((range.end - range.start) as usize) as u64, byte)
            })
            .collect();
        ends_soon(&Damaged { pristine: &specimen.bytes, changes });
    }
}
