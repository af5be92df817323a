//! A TiB with half of its groups initialised and fragmented: scanned far within 10 s, in a few MiB.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use longhaul_agent::disk::fs::ext;

use crate::image::{FileVolume, Image};

const TIB_IN_KIB: u64 = 1 << 30;
const BLOCK: u64 = 4096;
/// Set in a second run of this program, which then only measures.
const CHILD: &str = "LONGHAUL_FILTER_LARGE";

/// CRC-32C and CRC-16 as ext4 wants them, by the definition.
fn crc(mut crc: u32, polynomial: u32, bytes: &[u8]) -> u32 {
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ polynomial
            } else {
                crc >> 1
            };
        }
    }
    crc
}

const CRC32C: u32 = 0x82F6_3B78;
const CRC16: u32 = 0xA001;

fn read(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut raw = vec![0; len];
    file.read_exact_at(&mut raw, at).unwrap();
    raw
}

fn le32(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(raw[at..at + 4].try_into().unwrap())
}

/// Marks every other block of every other group that was never written as in use: what a long-lived file system looks like.
/// Gives the number of blocks that were taken.
fn fragment(path: &Path, checksums: bool) -> u64 {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut superblock = read(&file, 1024, 1024);
    let uuid = superblock[0x68..0x78].to_vec();
    let size = if checksums { 64 } else { 32 };
    let groups = (TIB_IN_KIB << 10).div_ceil(BLOCK * 32768);
    let table = read(&file, BLOCK, groups as usize * size);
    let bitmap = vec![0x55; BLOCK as usize];
    let bitmap_sum = crc(crc(u32::MAX, CRC32C, &uuid), CRC32C, &bitmap);
    let mut taken = 0u64;
    for group in (0..groups).step_by(2) {
        let at = group as usize * size;
        let mut raw = table[at..at + size].to_vec();
        // Only groups that are empty altogether.
        if le32(&raw, 0xC) & 0xFFFF != 32768 || raw[0x12] & 2 == 0 {
            continue;
        }
        raw[0x12] &= !2;
        raw[0xC..0xE].copy_from_slice(&16384u16.to_le_bytes());
        let number = (group as u32).to_le_bytes();
        raw[0x1E..0x20].fill(0);
        let sum = if checksums {
            raw[0x18..0x1A].copy_from_slice(&bitmap_sum.to_le_bytes()[..2]);
            raw[0x38..0x3A].copy_from_slice(&bitmap_sum.to_le_bytes()[2..]);
            crc(crc(crc(u32::MAX, CRC32C, &uuid), CRC32C, &number), CRC32C, &raw)
        } else {
            let sum = crc(crc(0xFFFF, CRC16, &uuid), CRC16, &number);
            crc(sum, CRC16, &raw[..0x1E])
        };
        raw[0x1E..0x20].copy_from_slice(&sum.to_le_bytes()[..2]);
        file.write_all_at(&bitmap, u64::from(le32(&raw, 0)) * BLOCK)
            .unwrap();
        file.write_all_at(&raw, BLOCK + at as u64).unwrap();
        taken += 16384;
    }
    let free = u64::from(le32(&superblock, 0xC)) - taken;
    superblock[0xC..0x10].copy_from_slice(&(free as u32).to_le_bytes());
    let sum = crc(u32::MAX, CRC32C, &superblock[..0x3FC]);
    if checksums {
        superblock[0x3FC..].copy_from_slice(&sum.to_le_bytes());
    }
    file.write_all_at(&superblock, 1024).unwrap();
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

fn check_large(test: &str, options: &str, checksums: bool) {
    if let Ok(path) = std::env::var(CHILD) {
        return measure(&path);
    }
    let image = Image::make(TIB_IN_KIB, options, 6);
    let before: u64 = image.oracle().iter().map(|range| range.end - range.start).sum();
    let taken = fragment(&image.path(), checksums);
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
    check_large(
        test,
        "-t ext4 -b 4096 -E lazy_itable_init=1,lazy_journal_init=1",
        true,
    );
}

#[test]
fn a_tebibyte_with_a_walk_is_scanned_within_seconds_and_a_few_mib() {
    let test = "large::a_tebibyte_with_a_walk_is_scanned_within_seconds_and_a_few_mib";
    let options =
        "-t ext4 -b 4096 -O ^metadata_csum,uninit_bg,^64bit -E lazy_itable_init=1,lazy_journal_init=1";
    check_large(test, options, false);
}
