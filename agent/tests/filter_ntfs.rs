//! The NTFS part of the free-block filter against ntfsprogs and ntfs-3g.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "filter_fat/bench.rs"]
mod bench;
#[path = "filter_ntfs/volume.rs"]
mod volume;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use std::{fs, io};

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::{Unproven, ntfs};
use longhaul_common::extent::Extent;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use self::bench::{Free, flip, maul, scan, seeded};
use self::volume::Volume;

/// Scans an intact volume: exactly the clusters that `$Bitmap` calls free, and a copy without them that is the same.
fn check(volume: &Volume) -> Free {
    let image = volume.image();
    let (summary, free) = scan(ntfs::probe, &image)
        .unwrap_or_else(|error| panic!("{error} {:?}", volume.options))
        .expect("an NTFS volume is recognised");
    let expected = volume.free();
    assert_eq!(free.beyond(&expected), [], "{:?}", volume.options);
    assert_eq!(expected.beyond(&free), [], "{:?}", volume.options);
    assert_eq!(summary.kind, "ntfs");
    volume.same_in(&free.copy_of(&image));
    free
}

fn refusal(volume: &Volume) -> String {
    match scan(ntfs::probe, &volume.image()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("the volume was not refused"),
    }
}

#[test]
fn volumes_made_with_random_options_give_their_free_clusters() {
    seeded(8, |rng| {
        let mut volume = Volume::random(rng);
        println!("{:?}", volume.options);
        check(&volume);
        volume.stir(rng, 150, 150_000);
        check(&volume);
        let len = volume.image().len() as u64;
        volume.resize(len * rng.random_range(9..20) / 10 / 4096 * 4096);
        check(&volume);
        volume.stir(rng, 60, 300_000);
        check(&volume);
    });
}

#[test]
fn a_table_in_many_pieces_is_followed_through_its_attribute_list() {
    let mut volume = Volume::new(8 << 20, &["-c", "512", "-z", "1"]);
    let mount = volume.mount();
    let mut count = 0;
    while fs::write(mount.path().join(format!("piece {count}")), [7; 900]).is_ok() {
        count += 1;
    }
    let _ = fs::remove_file(mount.path().join(format!("piece {count}")));
    for number in (0..count).step_by(2) {
        fs::remove_file(mount.path().join(format!("piece {number}"))).unwrap();
    }
    for number in 0..count {
        if fs::write(mount.path().join(format!("small {number}")), []).is_err() {
            break;
        }
    }
    volume.files = mount.files();
    drop(mount);
    let image = volume.image();
    let record = usize::try_from(u64::from_le_bytes(image[0x30..0x38].try_into().unwrap())).unwrap() * 512;
    let list = image[record..record + 1024]
        .windows(4)
        .any(|kind| kind == [0x20, 0, 0, 0]);
    println!(
        "{count} pieces, attribute list: {list}, {:?}",
        volume.extents(0).get("$DATA").map(Vec::len)
    );
    check(&volume);
}

#[test]
fn one_changed_byte_never_frees_a_used_cluster() {
    let mut round = 0;
    seeded(4, |rng| {
        let cluster = ["4096", "512", "1024", "65536"][round % 4];
        round += 1;
        let mut volume = Volume::new(9 << 20, &["-c", cluster]);
        volume.stir(rng, 150, 100_000);
        let image = volume.image();
        let (_, intact) = scan(ntfs::probe, &image).unwrap().unwrap();
        let places = structures(&volume, &image);
        for (name, place) in places {
            let refused = flip(ntfs::probe, rng, (&image, &intact), &place, 150);
            println!("{cluster} {name}: refused {refused}/150");
        }
    });
}

/// Every structure that the filter reads, by name.
fn structures(volume: &Volume, image: &[u8]) -> Vec<(&'static str, Vec<Extent>)> {
    let end = image.len() as u64;
    let cluster = 512 * u64::from(image[13]);
    let bytes = |record: u32, kind: &str| volume.extents(record).remove(kind).unwrap_or_default();
    let table = bytes(0, "$DATA");
    let bitmap = bytes(6, "$DATA")[0];
    let first = table[0].offset();
    let records = |number: u64, count: u64| {
        let extent = Extent::new(first + number * 1024, count * 1024).unwrap();
        vec![extent.intersect(&table[0]).unwrap()]
    };
    // The part of each record that is mostly filled.
    let heads = table.iter().flat_map(|run| {
        let starts = (run.offset()..run.end()).step_by(1024);
        starts.map(|start| Extent::between(start, start + 400))
    });
    let mut places = vec![
        ("boot sector", vec![Extent::between(0, 0x54)]),
        ("backup", vec![Extent::between(end - 512, end - 512 + 0x54)]),
        ("record 0", records(0, 1)),
        ("records 2 and 3", records(2, 2)),
        ("record 5", records(5, 1)),
        ("record 6", records(6, 1)),
        ("other records", heads.collect()),
        ("mirror", bytes(1, "$DATA")),
        (
            "bitmap",
            vec![Extent::new(bitmap.offset(), end.div_ceil(cluster * 8)).unwrap()],
        ),
        ("log", bytes(2, "$DATA")),
        ("root index", bytes(5, "$INDEX_ALLOCATION")),
    ];
    places.retain(|(_, place)| !place.is_empty());
    places
}

#[test]
fn every_byte_that_says_where_the_bitmap_is_in_several_values() {
    let mut volume = Volume::new(8 << 20, &["-c", "4096"]);
    volume.stir(&mut StdRng::seed_from_u64(9), 60, 100_000);
    let image = volume.image();
    let (_, pristine) = scan(ntfs::probe, &image).unwrap().unwrap();
    let places = structures(&volume, &image);
    let watched = ["record 0", "record 6", "bitmap"];
    let bytes = places
        .iter()
        .filter(|(name, _)| watched.contains(name))
        .flat_map(|(_, place)| place);
    for at in bytes.flat_map(|place| place.offset()..place.end()) {
        let old = image[at as usize];
        for new in [
            0,
            0xff,
            old ^ 1,
            old ^ 0x80,
            old.wrapping_add(1),
            old.wrapping_sub(1),
            old ^ 0x10,
        ] {
            let patches = vec![(at, new)];
            if let Ok(Some((_, free))) = scan(
                ntfs::probe,
                &bench::Patched {
                    base: &image,
                    patches,
                },
            ) {
                assert_eq!(
                    free.beyond(&pristine),
                    [],
                    "lost by {old:#x} -> {new:#x} at {at:#x}"
                );
            }
        }
    }
}

#[test]
fn a_terabyte_is_scanned_in_seconds() {
    let volume = Volume::sparse(1 << 40, &["-c", "4096"]);
    let image = Sparse(fs::File::open(volume.path()).unwrap(), 1 << 40);
    let start = Instant::now();
    let (summary, free) = scan(ntfs::probe, &image).unwrap().unwrap();
    println!(
        "{} extents, {} bytes free, {:?}",
        free.0.len(),
        summary.free,
        start.elapsed()
    );
    assert!(summary.free > (1 << 40) / 1000 * 999);
    assert!(start.elapsed() < Duration::from_secs(10));
}

/// A file that is too large for memory.
struct Sparse(fs::File, u64);

impl ReadAt for Sparse {
    fn size(&self) -> u64 {
        self.1
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}

#[test]
fn a_hibernated_volume_gives_nothing() {
    let header = |magic: &[u8]| [magic, &vec![0; 60_000 - magic.len()]].concat();
    let cases: [(&str, Vec<u8>, bool); 8] = [
        ("hiberfil.sys", header(b"HIBR"), false),
        ("hiberfil.sys", header(b"hibr"), false),
        ("HiberFil.SYS", header(b"HIBR"), false),
        ("hiberfil.sys", b"HIBR".to_vec(), false),
        ("hiberfil.sys", header(b"\x81\x81xpress"), false),
        ("hiberfil.sys", header(b"WAKE"), true),
        ("hiberfil.sys", header(b""), true),
        ("hiberfil.sys.old", header(b"HIBR"), true),
    ];
    for (name, bytes, proven) in cases {
        let volume = Volume::new(8 << 20, &[]);
        volume.put(name, &bytes);
        match scan(ntfs::probe, &volume.image()) {
            Ok(_) => assert!(proven, "{name} was overlooked"),
            Err(error) => assert!(
                !proven && matches!(error, Unproven::NotClean { .. }),
                "{name}: {error}"
            ),
        }
    }
}

#[test]
fn a_hibernation_file_does_not_hide_behind_one_changed_byte() {
    let mut volume = Volume::new(9 << 20, &[]);
    volume.put("hiberfil.sys", &[b"HIBR".as_slice(), &[3; 20_000]].concat());
    volume.stir(&mut StdRng::seed_from_u64(3), 60, 20_000);
    let image = volume.image();
    seeded(1, |rng| {
        let places: Vec<_> = structures(&volume, &image)
            .into_iter()
            .map(|(_, place)| place)
            .collect();
        for _ in 0..1500 {
            let place = &places[rng.random_range(0..places.len())];
            let place = place[rng.random_range(0..place.len())];
            let patches = vec![(rng.random_range(place.offset()..place.end()), rng.random())];
            let patched = bench::Patched {
                base: &image,
                patches,
            };
            let hidden = scan(ntfs::probe, &patched).is_ok_and(|found| found.is_some());
            assert!(!hidden, "hidden by {:x?}", patched.patches);
        }
    });
}

#[test]
fn a_dirty_volume_gives_nothing() {
    let volume = Volume::new(8 << 20, &[]);
    bench::must("ntfsfix", "ntfs-3g", &[bench::text(&volume.path())]);
    assert_eq!(
        refusal(&volume),
        "ntfs was not cleanly unmounted (its dirty flag is set)"
    );
}

#[test]
fn an_open_journal_gives_nothing() {
    let volume = Volume::new(8 << 20, &[]);
    let log = volume.extents(2)["$DATA"][0].offset() as usize;
    let pristine = volume.image();
    let judge = |first: &[u8], second: &[u8]| {
        let mut image = pristine.clone();
        image[log..log + 4096].copy_from_slice(first);
        image[log + 4096..log + 8192].copy_from_slice(second);
        scan(ntfs::probe, &image)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let (closed, open) = (restart(1, 9, 0xffff, 0), restart(1, 9, 0, 0));
    assert!(judge(&closed, &closed).is_ok());
    assert!(judge(&restart(1, 9, 0, 2), &closed).is_ok());
    assert!(judge(&open, &open).is_err());
    assert!(
        judge(&restart(1, 10, 0, 0), &closed).is_err(),
        "the newer page counts"
    );
    assert!(judge(&restart(1, 8, 0, 0), &closed).is_ok());
    assert!(
        judge(&restart(2, 9, 0xffff, 2), &restart(2, 9, 0xffff, 2)).is_err(),
        "kept by a fast shutdown"
    );
    assert!(judge(&closed, &[0; 4096]).is_err());
    assert!(judge(&[0xff; 4096], &closed).is_err());
    let mut checked = closed.clone();
    checked[..4].copy_from_slice(b"CHKD");
    assert!(judge(&checked, &closed).is_err());
    let mut torn = closed.clone();
    torn[4095] ^= 1;
    assert!(judge(&torn, &closed).is_err());
}

/// A restart page of 4 KiB.
fn restart(major: u8, lsn: u8, clients: u16, flags: u8) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[..8].copy_from_slice(&[b'R', b'S', b'T', b'R', 0x1e, 0, 9, 0]);
    page[0x10..0x1e].copy_from_slice(&[0, 0x10, 0, 0, 0, 0x10, 0, 0, 0x30, 0, major & 1, 0, major, 0]);
    page[0x1e] = 5;
    page[0x30] = lsn;
    page[0x3c..0x3e].copy_from_slice(&clients.to_le_bytes());
    page[0x3e] = flags;
    page.chunks_exact_mut(512).for_each(|sector| sector[510] = 5);
    page
}

#[test]
fn shadow_copies_keep_every_block() {
    let volume = Volume::new(8 << 20, &[]);
    let mount = volume.mount();
    let dir = mount.path().join("System Volume Information");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("{aaaa}{3808876B-C176-4e48-b7ae-04046e6cc752}"), b"store").unwrap();
    drop(mount);
    assert!(refusal(&volume).contains("shadow copies"), "{}", refusal(&volume));

    let volume = Volume::new(8 << 20, &[]);
    let mut image = volume.image();
    image[0x1e00..0x1e10].copy_from_slice(&[
        0x6b, 0x87, 0x08, 0x38, 0x76, 0xc1, 0x48, 0x4e, 0xb7, 0xae, 0x04, 0x04, 0x6e, 0x6c, 0xc7, 0x52,
    ]);
    assert!(matches!(
        scan(ntfs::probe, &image),
        Err(Unproven::UnknownFeature { .. })
    ));
}

#[test]
fn a_copy_of_a_mounted_volume_loses_nothing_that_was_there() {
    let mut rng = StdRng::seed_from_u64(11);
    let mut volume = Volume::new(12 << 20, &[]);
    let mount = volume.mount();
    let mut proven = 0;
    for _ in 0..8 {
        volume.stir_in(&mount, &mut rng, 25, 60_000);
        let image = volume.image();
        let Ok(Some((_, free))) = scan(ntfs::probe, &image) else {
            continue;
        };
        proven += 1;
        let other = Volume::new(12 << 20, &[]);
        fs::write(other.path(), &image).unwrap();
        let before = other.mount().files();
        fs::write(other.path(), free.copy_of(&image)).unwrap();
        assert!(other.mount().files() == before);
    }
    println!("{proven} of 8 copies were whole");
}

#[test]
fn leaked_clusters_are_kept_and_cost_little() {
    let volume = Volume::new(48 << 20, &["-c", "512"]);
    let bitmap = volume.extents(6)["$DATA"][0].offset();
    let (mut image, before) = (volume.image(), check(&volume));
    let free = before.0.iter().max_by_key(|extent| extent.len()).unwrap();
    let lcn = (free.offset() + free.len() / 2) / 512;
    image[(bitmap + lcn / 8) as usize] |= 0xff;
    let (_, after) = scan(ntfs::probe, &image).unwrap().unwrap();
    assert_eq!(after.beyond(&before), []);
    assert_eq!(before.bytes() - after.bytes(), 4096 * 512);
}

#[test]
fn other_volumes_are_not_recognised() {
    let volume = Volume::new(8 << 20, &[]);
    let image = volume.image();
    let mut encrypted = image.clone();
    encrypted[3..11].copy_from_slice(b"-FVE-FS-");
    for other in [encrypted, vec![0; 1 << 20], Vec::new(), image[..511].to_vec()] {
        assert!(scan(ntfs::probe, &other).unwrap().is_none());
    }
    let cut = image[..image.len() - 512].to_vec();
    assert!(matches!(scan(ntfs::probe, &cut), Err(Unproven::Truncated { .. })));
    let longer = [image.clone(), vec![0; 100_000]].concat();
    let (intact, longer) = (scan(ntfs::probe, &image), scan(ntfs::probe, &longer));
    assert_eq!(intact.unwrap().unwrap(), longer.unwrap().unwrap());
}

#[test]
fn hostile_bytes_end_in_an_answer() {
    let mut rng = StdRng::seed_from_u64(5);
    for cluster in ["512", "4096"] {
        let mut volume = Volume::new(8 << 20, &["-c", cluster]);
        volume.stir(&mut rng, 80, 50_000);
        maul(ntfs::probe, &mut rng, &volume.image(), 400);
    }
}
