//! Partition tables as tools make them, and as they are found after half of them was lost.

use longhaul_agent::disk::scan::Proof;
use longhaul_common::extent::Extent;

use super::disk::{Disk, part, reason};
use super::tools::{fdisk_4096, sfdisk};

const MIB: u64 = 1 << 20;

/// A toy in each partition.
pub(crate) fn fill(bytes: Vec<u8>, parts: &[(String, Extent)]) -> Disk {
    let mut disk = Disk::of(bytes);
    for (i, (name, extent)) in parts.iter().enumerate() {
        disk.toy(*extent, name, i as u64);
    }
    disk
}

pub(crate) fn gpt() -> (Disk, Vec<(String, Extent)>) {
    let script = "label: gpt\nstart=2048, size=16384\nsize=20001\nstart=80000, size=8192, name=third\n";
    let (bytes, parts) = sfdisk(64 * MIB, script);
    assert_eq!(parts.len(), 3);
    (fill(bytes, &parts), parts)
}

pub(crate) fn mbr() -> (Disk, Vec<(String, Extent)>) {
    let script = "label: dos\nstart=2048, size=16384\nstart=20480, size=65536, type=5\nstart=22528, size=8192\n\
        start=32768, size=8192, type=82\nstart=50000, size=1000\nstart=90112, size=8192\n";
    let (bytes, mut parts) = sfdisk(64 * MIB, script);
    parts.retain(|(name, _)| name != "partition 2");
    assert_eq!(parts.len(), 5);
    (fill(bytes, &parts), parts)
}

fn check(disk: &Disk, parts: &[(String, Extent)]) {
    let scan = disk.scan_exactly(&"clean");
    for (name, extent) in parts {
        let line = part(&scan, &format!("{name}:"));
        assert_eq!(line.extent, *extent);
        assert_eq!(line.proof, Some(Proof::Unmounted));
        assert_eq!(line.name, format!("{name}: toy '{name}'"));
    }
    let sum: u64 = parts.iter().map(|(_, extent)| extent.len()).sum();
    let outside = disk.bytes.len() as u64 - sum;
    assert!(
        reason(&scan, "outside").starts_with(&format!("{outside} bytes")),
        "{:?}",
        scan.parts
    );
    assert_eq!(
        scan.needs,
        parts.iter().map(|(_, extent)| extent.end()).max().unwrap()
    );
    assert_eq!(scan.shortfalls, [""; 0]);
}

#[test]
fn a_gpt_by_sfdisk() {
    let (disk, parts) = gpt();
    check(&disk, &parts);
}

#[test]
fn a_gpt_of_large_sectors_by_fdisk() {
    let (bytes, parts) = fdisk_4096(64 * MIB, "g\nn\n\n\n+8M\nn\n\n\n+20M\nn\n\n12000\n\nw\n");
    assert_eq!(parts.len(), 3);
    check(&fill(bytes, &parts), &parts);
}

#[test]
fn an_mbr_with_logical_partitions_by_sfdisk() {
    let (disk, parts) = mbr();
    check(&disk, &parts);
}

#[test]
fn one_header_of_a_gpt_is_enough() {
    let (disk, parts) = gpt();
    let last = disk.bytes.len() as u64 - 512;
    for (place, note) in [
        (512, "the primary GPT header is damaged"),
        (1024, "the primary GPT has a wrong entry array checksum"),
        (last, "the backup GPT has a wrong header checksum"),
        (last - 32 * 512, "the backup GPT has a wrong entry array checksum"),
    ] {
        let mut damaged = disk.clone();
        damaged.bytes[place as usize + 60] ^= 0x40;
        let scan = damaged.scan_exactly(&note);
        assert!(
            reason(&scan, "partition table").starts_with(note),
            "{:?}",
            scan.parts
        );
        assert_eq!(scan.parts.len(), parts.len() + 2);
    }
    // Also where the image was cut or grown behind the table.
    let mut grown = disk.clone();
    grown.bytes.resize(grown.bytes.len() + 512, 0);
    grown.scan_exactly(&"grown");
    let mut cut = disk;
    cut.bytes.truncate(last as usize);
    let scan = cut.scan_exactly(&"cut");
    assert_eq!(
        reason(&scan, "partition table"),
        "the backup GPT has no signature"
    );
}

#[test]
fn a_gpt_is_not_believed_where_its_copies_do_not_vouch_for_each_other() {
    let (disk, _) = gpt();
    let (other, _) = sfdisk(disk.bytes.len() as u64, "label: gpt\nstart=4096, size=4096\n");
    let end = disk.bytes.len() - 33 * 512;
    let mut cases: Vec<(Disk, &str)> = Vec::new();
    let mut case = |change: &dyn Fn(&mut Vec<u8>), why| {
        let mut disk = disk.clone();
        change(&mut disk.bytes);
        cases.push((disk, why));
    };
    // An old table at the end of the disk, the present one damaged.
    case(
        &|b| {
            b[end..].copy_from_slice(&other[end..]);
            b[600] ^= 1;
        },
        "the primary GPT header has",
    );
    case(
        &|b| b[end..].copy_from_slice(&other[end..]),
        "the primary and the backup GPT contradict",
    );
    case(
        &|b| {
            b[600] ^= 1;
            b[1100] ^= 1;
        },
        "the primary GPT header has",
    );
    case(&|b| b[450] = 0x83, "there is a GPT, but no protective MBR");
    case(&|b| b[510] = 0, "there is a GPT, but no protective MBR");
    case(&|b| b[512..1024].fill(0), "");
    case(
        &|b| {
            b[512..1024].fill(0);
            b[end..].fill(0);
        },
        "the protective MBR announces a GPT that is not there",
    );
    // A hybrid MBR with a partition of its own, then with one that the GPT has.
    case(
        &|b| {
            b[462 + 4] = 0x83;
            b[462 + 8..462 + 16].copy_from_slice(&[0, 8, 0, 0, 0, 32, 0, 0]);
        },
        "the hybrid MBR has a partition",
    );
    case(
        &|b| {
            b[462 + 4] = 0x83;
            b[462 + 8..462 + 16].copy_from_slice(&[0, 8, 0, 0, 0, 64, 0, 0]);
        },
        "",
    );
    for (disk, why) in cases {
        match why {
            "" => drop(disk.scan_exactly(&"believed")),
            why => {
                let scan = disk.scan_safely(&why);
                assert!(
                    reason(&scan, "whole disk").starts_with(why),
                    "{why}: {:?}",
                    scan.parts
                );
                assert_eq!(scan.free.free_bytes(), 0);
            }
        }
    }
}

/// Both checksums of both headers made right again after `change` to a primary header and array.
pub(crate) fn resealed(bytes: &mut [u8], change: impl Fn(&mut [u8], &mut [u8])) {
    let (head, array) = bytes[512..].split_at_mut(512);
    change(head, &mut array[..16384]);
    let sum = crc32fast::hash(&array[..16384]);
    head[88..92].copy_from_slice(&sum.to_le_bytes());
    head[16..20].fill(0);
    let sum = crc32fast::hash(&head[..92]);
    head[16..20].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn absurd_gpt_fields_with_good_checksums_are_refused() {
    let (disk, _) = gpt();
    let put = |at: usize, value: u64, len: usize| {
        let mut disk = disk.clone();
        let end = disk.bytes.len() - 33 * 512;
        disk.bytes[end..].fill(0);
        resealed(&mut disk.bytes, |head, _| {
            head[at..at + len].copy_from_slice(&value.to_le_bytes()[..len])
        });
        disk
    };
    for (at, value, len) in [
        (80, u32::MAX.into(), 4), // entries
        (80, 1 << 20, 4),
        (84, 0, 4), // bytes of an entry
        (84, 129, 4),
        (84, u32::MAX.into(), 4),
        (12, 600, 4), // bytes of the header
        (12, 0, 4),
        (24, 2, 8),        // own place
        (72, u64::MAX, 8), // place of the array
        (72, 1 << 40, 8),
        (40, u64::MAX, 8), // first usable
        (8, 7, 4),         // revision
    ] {
        let scan = put(at, value, len).scan_safely(&format!("{value} at {at}"));
        assert_eq!(scan.free.free_bytes(), 0, "{value} at {at}");
    }
}

#[test]
fn partitions_that_overlap_or_end_beyond_the_disk_are_copied() {
    let (disk, parts) = gpt();
    let entry = |number: usize, first: u64, last: u64| {
        let mut disk = disk.clone();
        let end = disk.bytes.len() - 33 * 512;
        disk.bytes[end..].fill(0);
        resealed(&mut disk.bytes, |_, array| {
            let entry = &mut array[(number - 1) * 128..];
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
        });
        disk
    };
    let scan = entry(2, 18431, 20000).scan_safely(&"overlap");
    for name in ["partition 1", "partition 2"] {
        assert!(reason(&scan, name).starts_with("it overlaps"), "{:?}", scan.parts);
    }
    assert!(part(&scan, "partition 3").free_bytes > 0);
    let scan = entry(2, 2, 2047).scan_safely(&"inside the table");
    assert!(
        reason(&scan, "partition 2").starts_with("it overlaps"),
        "{:?}",
        scan.parts
    );

    let scan = entry(3, 80000, 140_000).scan_safely(&"beyond");
    assert_eq!(scan.needs, 140_001 * 512);
    assert_eq!(scan.shortfalls.len(), 1, "{:?}", scan.shortfalls);
    assert!(scan.shortfalls[0].starts_with("partition 3 needs an image of 71680512 bytes"));
    assert!(part(&scan, "partition 1").free_bytes > 0);
    let scan = entry(3, 80000, u64::MAX).scan_safely(&"far beyond");
    assert_eq!(scan.needs, u64::MAX);
    let scan = entry(3, 80000, 79999).scan_safely(&"backwards");
    assert_eq!(
        reason(&scan, "whole disk"),
        "the GPT has an entry that ends before it starts"
    );

    // Cut images: what is still there is judged, and the shortfall named.
    let mut cut = disk.clone();
    cut.bytes.truncate(parts[2].1.end() as usize - 4096);
    let scan = cut.scan_safely(&"cut");
    assert!(
        reason(&scan, "partition 3").starts_with("it ends beyond"),
        "{:?}",
        scan.parts
    );
    assert_eq!(scan.needs, parts[2].1.end());
    assert!(part(&scan, "partition 2").free_bytes > 0);
}

#[test]
fn roles_that_must_not_be_judged_are_copied() {
    let script = "label: gpt\nsize=2M, type=21686148-6449-6E6F-744E-656564454649\nsize=8M, type=AF9B60A0-1431-4F62-BC68-3311714A69AD\n\
        size=8M, type=E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D\nsize=8M\n";
    let (bytes, parts) = sfdisk(64 * MIB, script);
    let mut disk = Disk::of(bytes);
    let spread = parts[1].1;
    disk.toy(spread, "stripe", 1);
    disk.free.fill(false);
    disk.toy(parts[3].1, "plain", 2);
    let scan = disk.scan_exactly(&"roles");
    assert_eq!(part(&scan, "partition 1").kind, "BIOS boot area");
    assert_eq!(part(&scan, "partition 2").kind, "dynamic disk");
    assert_eq!(part(&scan, "partition 3").kind, "storage space");

    let (bytes, parts) = sfdisk(64 * MIB, "label: dos\nsize=8M, type=42\n");
    let mut disk = fill(bytes, &parts);
    disk.free.fill(false);
    assert_eq!(
        part(&disk.scan_exactly(&"dynamic"), "partition 1").kind,
        "dynamic disk"
    );
}

#[test]
fn an_mbr_that_may_be_damaged_is_not_believed() {
    let (disk, parts) = mbr();
    let refused = |change: &dyn Fn(&mut Disk), why: &str| {
        let mut disk = disk.clone();
        change(&mut disk);
        let scan = disk.scan_safely(&why);
        assert!(
            reason(&scan, "whole disk").contains(why),
            "{why}: {:?}",
            scan.parts
        );
        assert_eq!(scan.free.free_bytes(), 0);
    };
    // A partition that was moved or dropped by damage leaves a volume in a gap.
    refused(&|d| d.bytes[446 + 4] = 0, "a volume that the MBR does not know");
    refused(&|d| d.bytes[446 + 9] ^= 16, "a volume that the MBR does not know");
    refused(&|d| d.bytes[446 + 4] = 0xee, "announces a GPT");
    refused(&|d| d.bytes[446 + 4] = 5, "more than one extended");
    // Two claims on the whole disk: a RAID superblock at the end, a label from before the table.
    let end = disk.bytes.len() - 65536;
    refused(
        &|d| d.write(end as u64, b"\xfc\x4e\x2b\xa9"),
        "it carries an md RAID superblock 0.90",
    );
    refused(&|d| d.write(512, b"LABELONE"), "it carries an LVM2 label");
    // The same entries, but the first partition starts with a known volume where sectors of 4096 bytes would have it.
    let mut small = Disk::new(256 << 20);
    small.bytes[..512].copy_from_slice(&disk.bytes[..512]);
    small.bytes[462..510].fill(0);
    small.toy(parts[0].1, "small", 3);
    small.scan_exactly(&"small sectors");
    small.write(2048 * 4096, b"XFSB");
    let scan = small.scan_safely(&"large sectors");
    assert!(
        reason(&scan, "whole disk").contains("512 or of 4096"),
        "{:?}",
        scan.parts
    );
}

#[test]
fn a_broken_chain_of_logical_partitions_is_copied_alone() {
    let (disk, parts) = mbr();
    let record = parts[2].1.offset() as usize - 2048 * 512;
    assert_eq!(disk.bytes[record + 510..record + 512], [0x55, 0xaa]);
    type Change<'a> = &'a dyn Fn(&mut Disk);
    let cases: [(Change<'_>, &str); 4] = [
        (&|d| d.bytes[record + 511] = 0, "damaged"),
        (
            &|d| d.bytes[record + 462 + 8..record + 462 + 12].fill(0),
            "does not point forward",
        ),
        (&|d| d.bytes[record + 462 + 10] = 0xff, "points outside"),
        (&|d| d.bytes[record + 478 + 4..record + 494].fill(1), "damaged"),
    ];
    for (change, why) in cases {
        let mut disk = disk.clone();
        change(&mut disk);
        let scan = disk.scan_safely(&why);
        assert!(
            reason(&scan, "partition 2").contains(why),
            "{why}: {:?}",
            scan.parts
        );
        assert!(part(&scan, "partition 1").free_bytes > 0);
        assert!(part(&scan, "partition 3").free_bytes > 0);
    }
}
