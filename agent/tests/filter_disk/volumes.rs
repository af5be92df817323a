//! What a single volume may hold: one file system and nothing else, or it is copied whole.

use longhaul_agent::disk::scan::{Part, Proof, scan, scan_with};
use longhaul_common::extent::Extent;

use super::disk::{Disk, part, reason};
use super::tables::gpt;
use super::toy;

const SIZE: usize = 64 << 20;

fn whole() -> Disk {
    let mut disk = Disk::new(SIZE);
    disk.toy(Extent::between(0, SIZE as u64), "root", 7);
    disk
}

#[test]
fn a_file_system_on_the_whole_disk() {
    let disk = whole();
    let scan = disk.scan_exactly(&"whole disk");
    assert_eq!(scan.parts.len(), 1);
    assert_eq!(scan.parts[0].name, "whole disk: toy 'root'");
    assert_eq!(scan.needs, SIZE as u64);
    // A boot sector with the signature of a table but without an entry is none.
    let mut boot = disk;
    boot.bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    toy::reseal(&mut boot.bytes);
    boot.scan_exactly(&"boot sector");
    // The entry that mkfs.fat can write over its own volume: partition 1 is everything from sector 0 on.
    boot.bytes[450] = 0x0c;
    boot.bytes[458..462].copy_from_slice(&(SIZE as u32 / 512).to_le_bytes());
    toy::reseal(&mut boot.bytes);
    let scan = boot.scan_exactly(&"self-describing boot sector");
    assert_eq!(scan.parts.len(), 1);
}

#[test]
fn a_block_is_skipped_only_if_all_of_it_is_free() {
    let mut disk = Disk::new(SIZE);
    let free = [
        (10_000, 1000),
        (20_000, 10_000),
        (30_000, 4096),
        (50_001, 8190),
        (65_536, 512),
        (66_048, 3584),
    ];
    disk.write(0, &toy::header(SIZE as u64, 0, "", &free));
    disk.allow(Extent::between(20_000, 34_096));
    disk.allow(Extent::between(50_001, 58_191));
    disk.allow(Extent::between(65_536, 69_632));
    disk.scan_exactly(&"unaligned");
}

#[test]
fn nothing_remains_of_a_file_system_that_fails_halfway() {
    for (flags, why) in [
        (toy::DIRTY, "not cleanly unmounted"),
        (toy::STRAY, "beyond its own end"),
    ] {
        let mut disk = Disk::new(SIZE);
        disk.write(
            0,
            &toy::header(SIZE as u64, flags, "", &[(8192, 1 << 20), (2 << 20, 1 << 20)]),
        );
        let scan = disk.scan_safely(&why);
        assert!(reason(&scan, "whole disk").contains(why), "{:?}", scan.parts);
        assert_eq!(scan.parts[0].proof, None);
    }
}

#[test]
fn failing_in_one_partition_leaves_its_neighbours_alone() {
    let (mut disk, parts) = gpt();
    let range = parts[1].1;
    disk.free[(range.offset() / 4096) as usize..(range.end() / 4096) as usize].fill(false);
    disk.write(
        range.offset(),
        &toy::header(range.len(), toy::DIRTY, "", &[(0, range.len())]),
    );
    // Blocks that a partition shares with its neighbour belong to none.
    let scan = disk.scan_exactly(&"middle");
    assert!(reason(&scan, "partition 2").contains("not cleanly"));
}

#[test]
fn a_file_system_larger_than_its_volume_is_copied_and_the_need_named() {
    let (mut disk, parts) = gpt();
    let range = parts[0].1;
    let blocks = (range.offset() / 4096) as usize..(range.end() / 4096) as usize;
    disk.free[blocks].fill(false);
    disk.write(
        range.offset(),
        &toy::header(range.len() + 512, 0, "", &[(8192, 8192)]),
    );
    let scan = disk.scan_exactly(&"larger than its partition");
    assert!(
        reason(&scan, "partition 1").contains("but its volume has"),
        "{:?}",
        scan.parts
    );
    assert!(scan.shortfalls.is_empty());
    disk.write(range.offset(), &toy::header(1 << 40, 0, "", &[(8192, 8192)]));
    let scan = disk.scan_exactly(&"larger than the disk");
    assert_eq!(scan.needs, (1 << 40) + range.offset());
    assert_eq!(scan.shortfalls.len(), 1);
    disk.write(range.offset(), &toy::header(u64::MAX, 0, "", &[(8192, 8192)]));
    assert_eq!(disk.scan_exactly(&"absurd").needs, u64::MAX);
}

#[test]
fn a_volume_that_two_claim_is_copied() {
    let disk = whole();
    let end = SIZE as u64;
    let zfs = b"\x0c\xb1\xba\0\0\0\0\0";
    let claims: [(u64, &[u8], &str); 16] = [
        (4096, b"\xfc\x4e\x2b\xa9", "md RAID superblock 1.2"),
        (end - 8192, b"\xfc\x4e\x2b\xa9", "md RAID superblock 1.0"),
        (end - 65536, b"\xfc\x4e\x2b\xa9", "md RAID superblock 0.90"),
        (end - 65536, b"\xa9\x2b\x4e\xfc", "md RAID superblock 0.90"),
        (end - 512, b"\xde\x11\xde\x11", "firmware RAID"),
        (end - 4096 + 60, b"\x83\x74\x02\x6b", "DRBD"),
        (131_072, zfs, "ZFS"),
        (262_144 + 131_072 + 1024, zfs, "ZFS"),
        (end - 524_288 + 131_072 + 2048, zfs, "ZFS"),
        (end - 1024, zfs, "ZFS"),
        (4086, b"SWAPSPACE2", "swap"),
        (4086, b"LINHIB0001", "hibernated"),
        (16384, b"SKUL\xba\xbe", "LUKS2"),
        (
            4120,
            b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
            "bcache",
        ),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (1536, b"LABELONE", "LVM2"),
    ];
    for (at, magic, name) in claims {
        let mut disk = disk.clone();
        disk.write(at, magic);
        toy::reseal(&mut disk.bytes);
        let scan = disk.scan_safely(&name);
        let why = reason(&scan, "whole disk");
        assert!(
            why.contains("second signature") && why.contains(name),
            "{name}: {why}"
        );
        assert_eq!(scan.free.free_bytes(), 0);
    }
    let mut twin = whole();
    toy::add_twin(&mut twin.bytes);
    let scan = twin.scan_safely(&"twin");
    assert!(
        reason(&scan, "whole disk").starts_with("several file systems claim it: toy; twin"),
        "{:?}",
        scan.parts
    );
    let mut hashed = Disk::new(SIZE);
    hashed.write(0, &toy::header(8 << 20, 0, "", &[(8192, 1 << 20)]));
    hashed.write(8 << 20, b"verity\0\0");
    assert!(reason(&hashed.scan_safely(&"verity"), "whole disk").contains("dm-verity"));
}

#[test]
fn what_is_not_a_file_system_is_copied_and_named() {
    for (at, magic, kind) in [
        (0u64, &b"LUKS\xba\xbe\0\x02"[..], "luks"),
        (4086, b"SWAPSPACE2", "swap"),
        (0, b"XFSB", "xfs"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (4096, b"\xfc\x4e\x2b\xa9", "md"),
        (0, b"something else", "unknown"),
    ] {
        let (mut disk, parts) = gpt();
        let range = parts[1].1;
        disk.free[(range.offset() / 4096) as usize..(range.end() / 4096) as usize].fill(false);
        disk.write(range.offset(), &[0; 4096]);
        disk.write(range.offset() + at, magic);
        let scan = disk.scan_exactly(&kind);
        let line = part(&scan, "partition 2");
        assert_eq!((line.kind.as_str(), line.proof), (kind, None));
        assert_eq!(line.name, format!("partition 2: {kind}"));
        assert!(line.reason.is_some());
    }
}

#[test]
fn a_disk_inside_a_partition_is_copied() {
    let (inner, _) = gpt();
    let (mut disk, parts) = gpt();
    let range = parts[0].1;
    disk.free[(range.offset() / 4096) as usize..(range.end() / 4096) as usize].fill(false);
    disk.write(range.offset(), &inner.bytes[..65536]);
    let scan = disk.scan_exactly(&"nested GPT");
    assert_eq!(part(&scan, "partition 1").kind, "table");
    disk.bytes[range.offset() as usize + 512..][..512].fill(0);
    disk.bytes[range.offset() as usize + 446..][..16]
        .copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 64, 0, 0, 0]);
    assert_eq!(
        part(&disk.scan_exactly(&"nested MBR"), "partition 1").kind,
        "table"
    );
}

#[test]
fn disks_of_any_small_size_are_scanned() {
    for size in [0, 1, 511, 512, 513, 4095, 4096, 4097, 65536, 70_000] {
        let disk = vec![0; size];
        let found = scan(&disk);
        assert_eq!((found.free.free_bytes(), found.shortfalls.len()), (0, 0));
        assert_eq!(found.parts.len(), 1, "{:?}", found.parts);
    }
}

#[test]
fn lines_survive_their_way_through_the_report() {
    let parts = whole().scan().parts;
    let json = serde_json::to_string(&parts).unwrap();
    assert!(json.contains("\"proof\":\"unmounted\""), "{json}");
    assert_eq!(serde_json::from_str::<Vec<Part>>(&json).unwrap(), parts);
    assert_eq!(
        serde_json::to_string(&Proof::FreeExtents).unwrap(),
        "\"free_extents\""
    );
}

#[test]
fn labels_cannot_break_a_line() {
    let mut disk = Disk::new(SIZE);
    disk.write(0, &toy::header(SIZE as u64, 0, "a\n\x1b[2Jb'", &[]));
    assert_eq!(disk.scan().parts[0].name, "whole disk: toy 'a??[2Jb?'");
}

/// A TiB of holes: only what is read costs, whatever the size.
#[test]
fn a_sparse_tebibyte_is_scanned_at_once() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 40).unwrap();
    use std::os::unix::fs::FileExt;
    let free = [(8192, (1 << 39) - 8192), ((1 << 39) + 4096, (1 << 38))];
    file.write_all_at(&toy::header(1 << 40, 0, "", &free), 0).unwrap();
    let start = std::time::Instant::now();
    let scan = scan_with(&Image(file), toy::PROBES);
    assert_eq!(scan.free.free_bytes(), free[0].1 + free[1].1);
    assert!(start.elapsed().as_secs() < 3, "{:?}", start.elapsed());
}

/// A file as a disk.
pub(crate) struct Image(pub(crate) std::fs::File);

impl longhaul_agent::disk::ReadAt for Image {
    fn size(&self) -> u64 {
        self.0.metadata().map_or(0, |meta| meta.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.0, buf, offset)
    }
}
