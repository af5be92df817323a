//! Damage: every image of the other files with bytes flipped, cut, mixed and drawn at random. Nothing may panic or take long, and
//! no block in use may be skipped.

use std::time::{Duration, Instant};

use longhaul_agent::disk::scan::scan_with;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use super::disk::Disk;
use super::lvm::single;
use super::lvm_image::{Pv, group, linear, lv, striped};
use super::tables::{gpt, mbr};
use super::toy;
use super::volumes::Image;

fn cases() -> u64 {
    std::env::var("LONGHAUL_FILTER_CASES").map_or(300, |text| text.parse().unwrap())
}

/// A generator, its seed printed: a failing test shows how to run it again.
fn rng() -> StdRng {
    let seed =
        std::env::var("LONGHAUL_FILTER_SEED").map_or_else(|_| rand::random(), |text| text.parse().unwrap());
    println!("LONGHAUL_FILTER_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

fn lvm() -> Disk {
    let lvs = [
        lv(
            "root",
            &[(5, "striped", &linear(0, 0)), (4, "striped", &linear(0, 20))],
        ),
        lv("wide", &[(8, "striped", &striped(&[(0, 30), (0, 40)]))]),
        lv("base", &[(4, "striped", &linear(0, 50))]),
        lv(
            "snapshot0",
            &[(4, "snapshot", "origin = \"base\"\ncow_store = \"root\"")],
        ),
    ];
    let mut disk = single(&lvs, &[(5, 15), (24, 6), (34, 6), (44, 6), (54, 9)]);
    let pv = Pv::new(0, disk.bytes.len() as u64);
    let at = pv.extents(30, 1).offset();
    let mut inside = vec![0; 4096];
    inside.copy_from_slice(&{
        let mut header = toy::header(8 << 20, 0, "", &[(65536, 65536), (1 << 20, 1 << 20)]);
        header.resize(4096, 0);
        header
    });
    disk.write(at, &inside);
    // Turn 1 is on the second area; the MiB behind the first is 8 turns on each.
    disk.allow(longhaul_common::extent::Extent::between(
        pv.extents(40, 1).offset(),
        pv.extents(40, 1).offset() + 65536,
    ));
    for area in [30, 40] {
        let start = pv.extents(area, 1).offset() + (512 << 10);
        disk.allow(longhaul_common::extent::Extent::between(
            start,
            start + (512 << 10),
        ));
    }
    disk
}

/// Ranges of an image that hold structures: start, length.
type Places = Vec<(usize, usize)>;

/// Images of every kind.
fn images() -> Vec<(&'static str, Disk, Places)> {
    let (gpt, gpt_parts) = gpt();
    let (mbr, mbr_parts) = mbr();
    let end = gpt.bytes.len();
    let mut gpt_places = vec![(0, 2048), (end - 33 * 512, 1024), (end - 512, 512)];
    gpt_places.extend(gpt_parts.iter().map(|(_, range)| (range.offset() as usize, 600)));
    let mut mbr_places = vec![(440, 72)];
    for (_, range) in &mbr_parts {
        mbr_places.push((range.offset() as usize, 600));
        // The record of a logical partition lies a MiB before it, but for the last.
        mbr_places.push((range.offset() as usize - (1 << 20) + 440, 72));
    }
    let lvm_places = vec![(512, 512), (4096, 512), (4608, 4096)];
    vec![
        ("gpt", gpt, gpt_places),
        ("mbr", mbr, mbr_places),
        ("lvm", lvm(), lvm_places),
    ]
}

#[test]
fn the_images_are_right_before_they_are_damaged() {
    for (name, disk, _) in images() {
        assert!(disk.scan_exactly(&name).free.free_bytes() > 8 << 20, "{name}");
    }
}

/// Every byte of every structure, each with a bit or two flipped.
#[test]
fn no_flipped_byte_makes_a_used_block_free() {
    let mut rng = rng();
    for (name, mut disk, places) in images() {
        for (start, len) in places {
            let step = (len as u64 / cases()).max(1) as usize;
            for at in (start..start + len).step_by(step) {
                let mask = rng.random_range(1..=255u8);
                disk.bytes[at] ^= mask;
                disk.scan_safely(&format!("{name}: byte {at} ^ {mask:#x}"));
                disk.bytes[at] ^= mask;
            }
        }
    }
}

#[test]
fn no_cut_or_torn_image_makes_a_used_block_free() {
    let mut rng = rng();
    for (name, disk, places) in images() {
        for _ in 0..cases() / 4 {
            let mut torn = disk.clone();
            for _ in 0..rng.random_range(1..4) {
                let (start, len) = places[rng.random_range(0..places.len())];
                let at = (start + rng.random_range(0..len)).min(torn.bytes.len() - 1);
                let len = rng.random_range(1..600).min(torn.bytes.len() - at);
                match rng.random_range(0..3) {
                    0 => torn.bytes[at..at + len].fill(0),
                    1 => rng.fill_bytes(&mut torn.bytes[at..at + len]),
                    _ => torn.bytes.truncate(at.max(4096)),
                }
            }
            torn.free.truncate(torn.bytes.len().div_ceil(4096));
            torn.scan_safely(&name);
        }
    }
}

/// Numbers in the LVM text changed, and its checksums made right again: as a hostile guest would.
#[test]
fn no_text_with_good_checksums_ends_in_a_panic() {
    let mut rng = rng();
    let size = 64 << 20;
    let pv = Pv::new(0, size);
    let lvs = [
        lv(
            "root",
            &[(5, "striped", &linear(0, 0)), (4, "striped", &linear(0, 20))],
        ),
        lv("wide", &[(8, "striped", &striped(&[(0, 30), (0, 40)]))]),
    ];
    let text = group(std::slice::from_ref(&pv), &lvs);
    let numbers = [
        "0",
        "1",
        "-1",
        "7",
        "63",
        "64",
        "4294967295",
        "9223372036854775807",
        "18446744073709551616",
        "1.5",
        "[]",
        "\"\"",
    ];
    let places: Vec<usize> = text.match_indices("= ").map(|(at, _)| at + 2).collect();
    let mut disk = Disk::new(size as usize);
    disk.free.fill(true);
    for _ in 0..cases() {
        let mut text = text.clone();
        for _ in 0..rng.random_range(1..3) {
            let at = places[rng.random_range(0..places.len())];
            // A change before may have moved what stood here.
            let Some(rest) = text.get(at..) else { continue };
            let end = rest.find('\n').map_or(text.len(), |len| at + len);
            text.replace_range(at..end, numbers[rng.random_range(0..numbers.len())]);
        }
        pv.write(&mut disk.bytes, &text, 0);
        disk.scan_safely(&text);
    }
}

#[test]
fn absurd_texts_take_no_time() {
    let size = 64u64 << 20;
    let pv = Pv::new(0, size);
    let many: Vec<String> = (0..1500)
        .map(|i| lv(&format!("l{i}"), &[(1, "error", "")]))
        .collect();
    let texts = [
        "a {".repeat(300_000),
        "a = [ ".repeat(150_000),
        "x = 1 ".repeat(150_000),
        "#".repeat(1 << 20),
        "\"".repeat(900_000),
        group(std::slice::from_ref(&pv), &many),
        group(
            std::slice::from_ref(&pv),
            &[format!("{}}}", "root { ".repeat(100_000))],
        ),
    ];
    for text in texts {
        let mut disk = Disk::new(size as usize);
        let text = &text[..text.len().min((1 << 20) - 8192)];
        pv.write(&mut disk.bytes, text, 0);
        disk.free.fill(true);
        let start = Instant::now();
        disk.scan_safely(&&text[..40]);
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{:?} for {}",
            start.elapsed(),
            &text[..40]
        );
    }
}

#[test]
fn garbage_is_copied() {
    let mut rng = rng();
    for _ in 0..cases() / 10 {
        let mut bytes = vec![0; rng.random_range(0..300_000)];
        rng.fill_bytes(&mut bytes);
        if bytes.len() > 600 && rng.random() {
            bytes[510..520].copy_from_slice(b"\x55\xaaEFI PART");
            bytes[446] &= 0x80;
            bytes[462] &= 0x80;
            bytes[478] &= 0x80;
            bytes[494] &= 0x80;
        }
        assert_eq!(scan_with(&bytes, toy::PROBES).free.free_bytes(), 0);
    }
}

/// As many partitions as a table may have, each to be looked into.
#[test]
fn a_table_full_of_partitions_takes_no_time() {
    use std::os::unix::fs::FileExt;
    const COUNT: u64 = 8192;
    let mut array = vec![0; COUNT as usize * 128];
    for (entry, number) in array.chunks_exact_mut(128).zip(1..) {
        entry[0] = 1;
        entry[32..40].copy_from_slice(&(number * 4096u64).to_le_bytes());
        entry[40..48].copy_from_slice(&(number * 4096u64 + 4095).to_le_bytes());
    }
    let (mut table, _) = gpt();
    let head = &mut table.bytes[512..604];
    head[80..84].copy_from_slice(&(COUNT as u32).to_le_bytes());
    head[88..92].copy_from_slice(&crc32fast::hash(&array).to_le_bytes());
    head[16..20].fill(0);
    let sum = crc32fast::hash(head);
    head[16..20].copy_from_slice(&sum.to_le_bytes());
    let file = tempfile::tempfile().unwrap();
    file.set_len((COUNT + 2) * 4096 * 512).unwrap();
    file.write_all_at(&table.bytes[..1024], 0).unwrap();
    file.write_all_at(&array, 1024).unwrap();
    let start = Instant::now();
    let scan = scan_with(&Image(file), toy::PROBES);
    assert_eq!(scan.parts.len() as u64, COUNT + 2, "{:?}", scan.parts.first());
    println!("{:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}
