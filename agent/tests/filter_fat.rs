//! The FAT part of the free-block filter against dosfstools and mtools.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "filter_fat/bench.rs"]
mod bench;
#[path = "filter_fat/volume.rs"]
mod volume;

use longhaul_agent::disk::fs::{Unproven, fat};
use longhaul_common::extent::Extent;
use rand::SeedableRng;
use rand::rngs::StdRng;

use self::bench::{flip, maul, scan, seeded};
use self::volume::{Volume, plain};

/// Scans an intact volume and compares with both other readings and with the copy: at least 99.9 % of the free bytes are given, but
/// that a tree which fits clusters of any size puts up to 128 sectors for each used one and at the volume's end in doubt.
fn check(volume: &Volume) {
    let image = volume.image();
    let plain = plain(&image);
    let (summary, free) = scan(fat::probe, &image)
        .unwrap_or_else(|error| panic!("{error} {:?}", volume.options))
        .expect("a FAT volume is recognised");
    assert_eq!(free.beyond(&plain.free), [], "{:?}", volume.options);
    assert_eq!(
        volume.used() * plain.cluster,
        plain.clusters * plain.cluster - plain.free.bytes()
    );
    assert_eq!(u64::from(summary.block_size), plain.cluster);
    volume.same_in(&free.copy_of(&image));
    if summary.kind == "fat32" {
        assert_eq!(free, plain.free);
    }
    let missing = plain.free.bytes() - free.bytes();
    println!(
        "{missing} of {} free bytes kept, {:?}",
        plain.free.bytes(),
        volume.options
    );
    let sector = u64::from(u16::from_le_bytes([image[11], image[12]]));
    // The root directory of FAT12 and FAT16 lies before all clusters, and the first cluster begins at the same place whatever its
    // size: only a second directory, which lies behind that, is sure to say how long they are where files are short.
    let excused = match volume.directories() {
        0 | 1 => 128 * sector * (volume.used() + 1),
        _ => 0,
    };
    assert!(
        missing <= plain.free.bytes() / 1000 + excused,
        "{} files",
        volume.files.len()
    );
}

#[test]
fn volumes_made_with_random_options_give_their_free_clusters() {
    seeded(10, |rng| {
        if let Some(mut volume) = Volume::random(rng) {
            check(&volume);
            volume.stir(rng, 40, 200_000);
            check(&volume);
        }
    });
}

#[test]
fn one_changed_byte_never_frees_a_used_cluster() {
    let kinds: [(u64, &[&str]); 8] = [
        (1440 << 10, &["-F", "12"]),
        (1440 << 10, &["-F", "12", "-f", "1"]),
        (4 << 20, &["-F", "12", "-s", "4", "-r", "64"]),
        (9 << 20, &["-F", "16", "-s", "2"]),
        (9 << 20, &["-F", "16", "-s", "2", "-f", "1", "-r", "1024"]),
        (5 << 20, &["-F", "16", "-s", "1", "-a"]),
        (34 << 20, &["-F", "32", "-s", "1"]),
        (34 << 20, &["-F", "32", "-s", "1", "-f", "1"]),
    ];
    let mut kind = 0;
    seeded(16, |rng| {
        let (len, options) = kinds[kind % kinds.len()];
        let mut volume = Volume::new(len, options);
        // In every third round there is no directory, which is the harder case for a geometry without a backup.
        if kind / kinds.len() % 3 == 1 {
            volume.write("a.bin", &[1; 9000]);
            volume.write("b.bin", &[2; 700]);
        } else {
            volume.stir(rng, 30, 60_000);
        }
        kind += 1;
        let image = volume.image();
        let plain = plain(&image);
        let boot = Extent::between(11, 64);
        let used_tables = Extent::between(512, plain.tables.end().min(40_000));
        let root = if plain.root.is_empty() {
            plain.tables
        } else {
            plain.root
        };
        let refused = [boot, used_tables, plain.tables, root].map(|place| {
            let refused = flip(fat::probe, rng, (&image, &plain.free), &[place], 25);
            format!("{refused}/25")
        });
        println!("{options:?}: refused {refused:?}");
    });
}

#[test]
fn every_byte_of_the_parameter_block_in_many_values() {
    for (len, options) in [(1440 << 10, ["-F", "12"]), (9 << 20, ["-F", "16"])] {
        let mut volume = Volume::new(len, &options);
        volume.write("only.bin", &[7; 3000]);
        volume.write("other.bin", &[9; 600]);
        let image = volume.image();
        let (_, pristine) = scan(fat::probe, &image).unwrap().unwrap();
        for at in 11..36 {
            // One value of a few, others at each place.
            let step = if options[1] == "12" { 3 } else { 7 };
            for value in (at as u8 % step..=u8::MAX).step_by(step.into()) {
                let patches = vec![(at, value)];
                if let Ok(Some((_, free))) = scan(
                    fat::probe,
                    &bench::Patched {
                        base: &image,
                        patches,
                    },
                ) {
                    for lost in free.beyond(&pristine) {
                        let lost_bytes = &image[lost.offset() as usize..lost.end() as usize];
                        assert!(
                            lost_bytes.iter().all(|byte| *byte == 0),
                            "{lost:?} by {value:#x} at {at}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_volume_that_was_not_closed_gives_nothing() {
    let volume = Volume::new(9 << 20, &["-F", "16"]);
    let image = volume.image();
    let table = plain(&image).tables.offset() as usize + usize::from(image[14]) * 512;
    let copy = table + usize::from(image[22]) * 512;
    for flag in [0x80, 0x40] {
        let mut open = image.clone();
        open[table + 3] &= !flag;
        open[copy + 3] &= !flag;
        assert!(matches!(scan(fat::probe, &open), Err(Unproven::NotClean { .. })));
    }
    let mut mounted = image;
    mounted[0x25] |= 1;
    assert!(matches!(
        scan(fat::probe, &mounted),
        Err(Unproven::NotClean { .. })
    ));

    let volume = Volume::new(34 << 20, &["-F", "32", "-s", "1"]);
    let image = volume.image();
    let table = usize::from(image[14]) * 512;
    for flag in [8, 4] {
        let mut open = image.clone();
        open[table + 7] &= !flag;
        assert!(matches!(scan(fat::probe, &open), Err(Unproven::NotClean { .. })));
    }
    let mut mounted = image.clone();
    mounted[0x41] |= 1;
    assert!(matches!(
        scan(fat::probe, &mounted),
        Err(Unproven::NotClean { .. })
    ));
    let mut unmirrored = image;
    unmirrored[0x28] |= 0x80;
    unmirrored[6 * 512 + 0x28] |= 0x80;
    assert!(matches!(
        scan(fat::probe, &unmirrored),
        Err(Unproven::UnknownFeature { .. })
    ));
}

#[test]
fn bad_clusters_are_not_free() {
    let volume = Volume::new(9 << 20, &["-F", "16", "-s", "2"]);
    let mut image = volume.image();
    let (_, before) = scan(fat::probe, &image).unwrap().unwrap();
    let table = usize::from(image[14]) * 512;
    let copy = table + usize::from(image[22]) * 512;
    for at in [table, copy] {
        image[at + 200..at + 202].copy_from_slice(&[0xf7, 0xff]);
    }
    let (_, after) = scan(fat::probe, &image).unwrap().unwrap();
    let bad = plain(&image);
    assert_eq!(bad.free.bytes(), plain(&volume.image()).free.bytes() - 1024);
    assert_eq!(after.beyond(&bad.free), []);
    assert!(before.bytes() - after.bytes() < 16 << 10);
}

#[test]
fn other_volumes_are_not_recognised() {
    let volume = Volume::new(4 << 20, &["-F", "12"]);
    let image = volume.image();
    let mut exfat = image.clone();
    exfat[3..11].copy_from_slice(b"EXFAT   ");
    let mut unsigned = image.clone();
    unsigned[511] = 0;
    for other in [
        exfat,
        unsigned,
        vec![0; 1 << 20],
        Vec::new(),
        image[..511].to_vec(),
    ] {
        assert!(scan(fat::probe, &other).unwrap().is_none());
    }
    let cut = image[..image.len() - 4096].to_vec();
    assert!(matches!(scan(fat::probe, &cut), Err(Unproven::Truncated { .. })));
}

#[test]
fn hostile_bytes_end_in_an_answer() {
    let mut rng = StdRng::seed_from_u64(7);
    for (len, options) in [
        (4 << 20, ["-F", "12"]),
        (9 << 20, ["-F", "16"]),
        (34 << 20, ["-F", "32"]),
    ] {
        let mut volume = Volume::new(len, &options);
        volume.stir(&mut rng, 20, 50_000);
        maul(fat::probe, &mut rng, &volume.image(), 150);
    }
}
