//! What the filter calls free is what dumpe2fs calls free, block for block.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::image::{Image, beyond, cases, scan, seed};

/// The filter and dumpe2fs agree on every block.
fn compare(image: &Image, what: &str) {
    let expected = image.oracle();
    let found = match scan(&image.volume()) {
        Ok(Some(found)) => found,
        Ok(None) => panic!("{what}: not recognised"),
        Err(why) => panic!("{what}: {why}"),
    };
    if found.ranges != expected {
        panic!(
            "{what}: wrongly free {:?}, missed {:?}",
            beyond(&found.ranges, &expected),
            beyond(&expected, &found.ranges)
        );
    }
}

fn check_options(kib: u64, options: &str, kind: &str) {
    let mut image = Image::make(kib, options, 1);
    compare(&image, "empty");
    assert_eq!(scan(&image.volume()).unwrap().unwrap().summary.kind, kind);
    let size_max = ((kib << 10) as usize / 600).min(200_000);
    image.age(60, size_max);
    image.settle();
    compare(&image, "aged");
    image.delete(1.0);
    image.settle();
    compare(&image, "emptied");
}

macro_rules! options {
    ($($name:ident: $kib:expr, $options:expr, $kind:expr;)*) => {
        $(#[test] fn $name() { check_options($kib, $options, $kind) })*
    };
}

options! {
    ext2_1k: 40 << 10, "-t ext2 -b 1024", "ext2";
    ext2_4k: 200 << 10, "-t ext2 -b 4096", "ext2";
    ext2_of_the_first_revision: 30 << 10, "-t ext2 -r 0 -b 1024", "ext2";
    ext2_without_any_feature: 30 << 10, "-t ext2 -O none -b 1024", "ext2";
    ext3_1k: 60 << 10, "-t ext3 -b 1024", "ext3";
    ext3_2k: 100 << 10, "-t ext3 -b 2048", "ext3";
    ext4_1k: 100 << 10, "-t ext4 -b 1024", "ext4";
    ext4_2k: 100 << 10, "-t ext4 -b 2048", "ext4";
    ext4_4k: 700 << 10, "-t ext4 -b 4096", "ext4";
    ext4_16k: 700 << 10, "-t ext4 -b 16384", "ext4";
    ext4_64k: 900 << 10, "-t ext4 -b 65536", "ext4";
    ext4_64k_two_groups: 5 << 20, "-t ext4 -b 65536", "ext4";
    ext4_uninit_bg: 100 << 10, "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg", "ext4";
    ext4_uninit_bg_32bit: 700 << 10, "-t ext4 -b 4096 -O ^metadata_csum,uninit_bg,^64bit", "ext4";
    ext4_without_checksums: 100 << 10, "-t ext4 -b 1024 -O ^metadata_csum,^uninit_bg", "ext4";
    ext4_32bit_with_half_checksums: 100 << 10, "-t ext4 -b 1024 -O metadata_csum,^64bit", "ext4";
    ext4_checksum_seed: 100 << 10, "-t ext4 -b 1024 -O metadata_csum_seed", "ext4";
    ext4_bigalloc: 300 << 10, "-t ext4 -O bigalloc -b 4096 -C 65536", "ext4";
    ext4_bigalloc_1k: 100 << 10, "-t ext4 -O bigalloc -b 1024 -C 16384", "ext4";
    ext4_bigalloc_1k_with_a_resize_inode: 58_551,
        "-t ext4 -b 1024 -C 2048 -O bigalloc,^metadata_csum,uninit_bg", "ext4";
    ext4_bigalloc_with_a_cut_cluster: (200 << 10) + 20, "-t ext4 -O bigalloc -b 4096 -C 32768", "ext4";
    ext4_bigalloc_without_checksums: 100 << 10, "-t ext4 -O bigalloc,^metadata_csum,uninit_bg -b 1024 -C 8192", "ext4";
    ext4_meta_bg: 300 << 10, "-t ext4 -b 1024 -O meta_bg,^resize_inode", "ext4";
    ext4_meta_bg_uninit_bg: 300 << 10, "-t ext4 -b 1024 -O meta_bg,^resize_inode,^metadata_csum,uninit_bg", "ext4";
    ext4_meta_bg_without_flex_bg: 300 << 10, "-t ext4 -b 1024 -O meta_bg,^resize_inode,^flex_bg", "ext4";
    ext4_without_flex_bg: 100 << 10, "-t ext4 -b 1024 -O ^flex_bg", "ext4";
    ext4_large_flex_groups: 300 << 10, "-t ext4 -b 1024 -G 64", "ext4";
    ext4_sparse_super2: 200 << 10, "-t ext4 -b 1024 -O sparse_super2,^resize_inode", "ext4";
    ext4_sparse_super2_one_copy: 200 << 10, "-t ext4 -b 1024 -O sparse_super2 -E num_backup_sb=1", "ext4";
    ext4_without_sparse_super: 200 << 10, "-t ext4 -b 1024 -O ^sparse_super,^resize_inode", "ext4";
    ext4_without_resize_inode: 100 << 10, "-t ext4 -b 1024 -O ^resize_inode", "ext4";
    ext4_without_journal: 100 << 10, "-t ext4 -b 1024 -O ^has_journal", "ext4";
    ext4_many_features: 200 << 10,
        "-t ext4 -b 1024 -I 512 -O inline_data,quota,project,casefold,encrypt,verity,large_dir,ea_inode,fast_commit",
        "ext4";
    ext4_orphan_file: 100 << 10, "-t ext4 -b 1024 -O orphan_file", "ext4";
    ext4_small_groups: 60 << 10, "-t ext4 -b 1024 -g 1024", "ext4";
    ext4_packed_metadata: 200 << 10, "-t ext4 -b 1024 -E packed_meta_blocks=1", "ext4";
    ext4_tiny: 2 << 10, "-t ext4 -b 1024 -O ^has_journal", "ext4";
    ext4_odd_size: 77_777, "-t ext4 -b 1024 -N 3333", "ext4";
    ext4_huge_inodes: 77_777, "-t ext4 -b 4096 -I 4096 -N 500", "ext4";
}

/// mke2fs options drawn at random: sizes, block sizes, features for and against.
fn draw(rng: &mut StdRng) -> (u64, String) {
    let block: u64 = *[1024, 1024, 1024, 2048, 4096, 8192, 65536].choose(rng).unwrap();
    let kib = rng.random_range(3_000..60_000) * (block / 1024).min(6);
    let mut options = format!(
        "-t {} -b {block}",
        ["ext2", "ext3", "ext4", "ext4"].choose(rng).unwrap()
    );
    let mut features = Vec::new();
    for feature in [
        "metadata_csum",
        "uninit_bg",
        "64bit",
        "flex_bg",
        "meta_bg",
        "sparse_super",
        "sparse_super2",
        "resize_inode",
        "has_journal",
        "extent",
        "inline_data",
        "quota",
        "orphan_file",
        "bigalloc",
    ] {
        if rng.random_bool(0.25) {
            let on = rng.random_bool(if feature == "bigalloc" { 0.4 } else { 0.5 });
            features.push(format!("{}{feature}", if on { "" } else { "^" }));
        }
    }
    let resize_conflicts = ["meta_bg", "^sparse_super"];
    if features
        .iter()
        .any(|feature| resize_conflicts.contains(&feature.as_str()))
    {
        features.push("^resize_inode".into());
    }
    if features.iter().any(|feature| feature == "bigalloc") {
        features.push("extent".into());
        options += &format!(" -C {}", block << rng.random_range(1..6));
    } else if rng.random_bool(0.3) {
        options += &format!(" -g {}", rng.random_range(32..=block.min(8190)) * 8);
    }
    if !features.is_empty() {
        options += &format!(" -O {}", features.join(","));
    }
    if rng.random_bool(0.3)
        && options.contains("ext4")
        && !features.iter().any(|feature| feature == "^flex_bg")
    {
        options += &format!(" -G {}", 1 << rng.random_range(0..7));
    }
    if rng.random_bool(0.3) {
        options += &format!(" -I {}", [128, 256, 512, 1024].choose(rng).unwrap());
    }
    if rng.random_bool(0.3) {
        options += &format!(" -N {}", rng.random_range(16..5_000));
    }
    (kib, options)
}

#[test]
fn file_systems_drawn_at_random_agree_with_dumpe2fs() {
    let seed = seed("file_systems_drawn_at_random_agree_with_dumpe2fs");
    let mut made = 0;
    for case in 0..cases(24) {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(case));
        let (kib, options) = draw(&mut rng);
        let Ok(mut image) = Image::try_make(kib, &options, rng.random()) else {
            continue; // mke2fs refuses some combinations.
        };
        made += 1;
        let name = |step: &str| format!("seed {} ({options}, {kib}k) {step}", seed.wrapping_add(case));
        compare(&image, &name("empty"));
        for step in 0..3 {
            match rng.random_range(0..4) {
                0 => {
                    image.settle();
                    image.resize(kib * rng.random_range(60..200) / 100);
                }
                1 => image.delete(rng.random()),
                _ => image.age(rng.random_range(1..60), rng.random_range(100..kib as usize * 4)),
            }
            image.settle();
            compare(&image, &name(&format!("after step {step}")));
        }
    }
    println!("mke2fs took the options of {made} of {} cases", cases(24));
    assert!(made > 0, "mke2fs took none of the options");
}

#[test]
fn grown_and_shrunk_file_systems_agree_with_dumpe2fs() {
    for options in [
        "-t ext4 -b 1024",
        "-t ext3 -b 1024",
        "-t ext4 -b 1024 -O ^resize_inode,meta_bg",
        "-t ext4 -b 1024 -O ^flex_bg",
    ] {
        let mut image = Image::make(60 << 10, options, 2);
        image.age(40, 100_000);
        image.settle();
        for kib in [300 << 10, 90_001, 700 << 10] {
            assert!(image.resize(kib), "{options}: resize2fs to {kib}k");
            image.settle();
            compare(&image, &format!("{options} resized to {kib}k"));
        }
    }
}

#[test]
fn a_content_directory_written_by_mke2fs_agrees_with_dumpe2fs() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..50 {
        std::fs::write(
            dir.path().join(format!("file-{number}")),
            vec![number; usize::from(number) * 5_000],
        )
        .unwrap();
    }
    for options in ["-t ext4 -b 4096", "-t ext2 -b 1024"] {
        let options = format!("{options} -d {}", dir.path().display());
        let image = Image::make(64 << 10, &options, 3);
        compare(&image, &options);
    }
}

#[test]
fn converting_between_widths_and_checksums_agrees_with_dumpe2fs() {
    use crate::image::run;
    let mut image = Image::make(100 << 10, "-t ext4 -b 1024 -O ^64bit,^metadata_csum,uninit_bg", 4);
    image.age(40, 100_000);
    image.settle();
    let path = image.path();
    let path = path.to_str().unwrap();
    for (program, args) in [
        ("resize2fs", &["-b"][..]),
        ("tune2fs", &["-O", "metadata_csum"]),
        ("tune2fs", &["-O", "metadata_csum_seed"]),
        ("tune2fs", &["-U", "random"]),
        ("tune2fs", &["-O", "^metadata_csum_seed"]),
        ("tune2fs", &["-O", "^metadata_csum"]),
        ("tune2fs", &["-O", "^uninit_bg"]),
        ("resize2fs", &["-s"]),
        ("tune2fs", &["-I", "512"]),
    ] {
        let args: Vec<&str> = args.iter().copied().chain([path]).collect();
        run(program, &args, &[0, 1]);
        image.settle();
        compare(&image, &format!("after {program} {args:?}"));
    }
}
