//! A TiB with half of its groups initialised and fragmented: scanned far within 10 s, in a few MiB.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use longhaul_agent::disk::fs::ext;

use crate::image::{FileVolume, Image};
use crate::sealed::{Tables, le16, le32};

const TIB_IN_KIB: u64 = 1 << 30;
const BLOCK: u64 = 4096;
/// Set in a second run of this program, which then only measures.
const CHILD: &str = "LONGHAUL_FILTER_LARGE";

/// Marks every other block of every other group that was never written as in use: what a long-lived file system looks like.
/// Gives the number of blocks that were taken.
fn fragment(path: &Path) -> u64 {
    let mut tables = Tables::load(path);
    let bitmap = vec![0x55; BLOCK as usize];
    let sum = tables.bitmap_checksum(&bitmap).to_le_bytes();
    let mut taken = 0;
    for group in (0..tables.groups).step_by(2) {
        let raw = tables.descriptor(group);
        // Only groups that are empty altogether and were never written.
        if le16(raw, 0xC) != 32768 || raw[0x12] & 2 == 0 {
            continue;
        }
        raw[0x12] &= !2;
        raw[0xC..0xE].copy_from_slice(&16384u16.to_le_bytes());
        if raw.len() >= 64 {
            raw[0x18..0x1A].copy_from_slice(&sum[..2]);
            raw[0x38..0x3A].copy_from_slice(&sum[2..]);
        }
        let block = le32(raw, 0);
        tables.seal(group);
        tables.write_block(block, &bitmap);
        taken += 16384;
    }
    let free = le32(&tables.superblock, 0xC) - taken as u32;
    tables.superblock[0xC..0x10].copy_from_slice(&free.to_le_bytes());
    tables.store();
    taken
}

/// Peak resident memory of this process, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Scans the image and prints what it took.
fn measure(path: &str) {
    let volume = FileVolume::open(Path::new(path));
    let before = peak();
    let begin = Instant::now();
    let (mut free, mut extents) = (0, 0u64);
    let found = ext::probe(&volume).unwrap().unwrap();
    let summary = found.scan(&volume, &mut |extent| {
        free += extent.len();
        extents += 1;
    });
    assert_eq!(summary.unwrap().free, free);
    println!(
        "measured {} {} {free} {extents}",
        begin.elapsed().as_millis(),
        peak() - before
    );
}

fn check_large(test: &str, options: &str) {
    if let Ok(path) = std::env::var(CHILD) {
        return measure(&path);
    }
    let image = Image::make(TIB_IN_KIB, options, 6);
    let before: u64 = image.oracle().iter().map(|range| range.end - range.start).sum();
    let taken = fragment(&image.path());
    assert!(
        taken > 3_500 * 16384,
        "only {} groups were fragmented",
        taken / 16384
    );
    // In a process of its own, where no other test uses memory.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, image.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.split_once("measured "));
    let numbers: Vec<u64> = line
        .unwrap()
        .1
        .split(' ')
        .map(|word| word.parse().unwrap())
        .collect();
    let [millis, memory, free, extents] = numbers[..] else {
        panic!("{text}")
    };
    println!(
        "{test}: {millis} ms, {} KiB beyond the process's own, {extents} extents",
        memory >> 10
    );
    assert_eq!(free, before - taken * BLOCK);
    assert!(
        Duration::from_millis(millis) < Duration::from_secs(10),
        "{millis} ms"
    );
    assert!(memory < 8 << 20, "{memory} bytes");
}

#[test]
fn a_tebibyte_with_checksums_is_scanned_within_seconds_and_a_few_mib() {
    let test = "large::a_tebibyte_with_checksums_is_scanned_within_seconds_and_a_few_mib";
    check_large(test, "-t ext4 -b 4096 -E lazy_itable_init=1,lazy_journal_init=1");
}

#[test]
fn a_tebibyte_with_a_walk_is_scanned_within_seconds_and_a_few_mib() {
    let test = "large::a_tebibyte_with_a_walk_is_scanned_within_seconds_and_a_few_mib";
    let options =
        "-t ext4 -b 4096 -O ^metadata_csum,uninit_bg,^64bit -E lazy_itable_init=1,lazy_journal_init=1";
    check_large(test, options);
}
