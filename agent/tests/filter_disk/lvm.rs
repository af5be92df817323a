//! LVM2 as it should be: images by LVM's own tools with `pvs` as the oracle, and images written here.

use longhaul_agent::disk::scan::Proof;
use longhaul_common::extent::{BLOCK, Extent};

use super::disk::{Disk, part, random_runs, reason};
use super::lvm_image::{EXTENT, Pv, group, linear, lv, striped};
use super::tools::{Lvm, sfdisk};
use super::toy;

const MIB: u64 = 1 << 20;
pub(crate) const SIZE: u64 = 64 * MIB;

/// Marks what `pvs` calls free on device `i`, whose extents of `extent` bytes begin at `start`.
fn allow_free(disk: &mut Disk, lvm: &Lvm, i: usize, start: u64, extent: u64) {
    for (device, first, count, lv, _) in lvm.segments() {
        if device == lvm.node(i) && lv.is_empty() {
            disk.allow(Extent::between(
                start + first * extent,
                start + (first + count) * extent,
            ));
        }
    }
}

/// Puts a toy of `size` bytes on the ranges of `disk` that hold a logical volume; `place` maps volume to disk.
fn toy_on(disk: &mut Disk, size: u64, seed: u64, place: &dyn Fn(u64) -> u64) {
    let free = random_runs(size, seed);
    let header = toy::header(size, 0, "lv", &free);
    disk.write(place(0), &header);
    for (at, len) in free {
        for block in (at..at + len).step_by(BLOCK as usize) {
            let start = place(block);
            disk.allow(Extent::between(start, start + BLOCK));
        }
    }
}

#[test]
fn linear_and_free_extents_by_lvms_own_tools() {
    let lvm = Lvm::new(&[vec![0; SIZE as usize]]);
    lvm.run("pvcreate --metadatacopies 2 {0}");
    lvm.run("vgcreate -s 1m vg0 {0}");
    lvm.run("lvcreate -an -Zn -Wn -n root -l 10 vg0");
    lvm.run("lvcreate -an -Zn -Wn -n gone -l 7 vg0");
    lvm.run("lvcreate -an -Zn -Wn -n data -l 9 vg0");
    lvm.run("lvremove -y vg0/gone");
    // root grows behind data: two segments.
    lvm.run("lvextend -n --alloc cling_by_tags -l +20 vg0/root");
    let mut disk = Disk::of(lvm.images().remove(0));
    let start: u64 = lvm
        .run("pvs --noheadings --nosuffix --units b -o pe_start {0}")
        .trim()
        .parse()
        .unwrap();
    allow_free(&mut disk, &lvm, 0, start, MIB);
    let mut root = Vec::new();
    for (_, first, count, name, _) in lvm.segments() {
        if name == "root" {
            root.extend(first..first + count);
        }
    }
    assert_eq!(root.len(), 30);
    let first = root[0];
    assert!(
        root.iter().enumerate().any(|(i, pe)| *pe != first + i as u64),
        "one segment only: {root:?}"
    );
    // `pvs` lists segments by place on the device; root's own order is that of its creation: extents 0-9 first.
    let mut order: Vec<u64> = root.iter().copied().filter(|pe| *pe < 10).collect();
    order.extend(segment_order(&lvm, "root"));
    toy_on(&mut disk, 30 * MIB, 5, &|at| {
        start + order[(at / MIB) as usize] * MIB + at % MIB
    });
    let scan = disk.scan_exactly(&"linear");
    let line = part(&scan, "whole disk: LVM physical volume of vg0");
    assert_eq!(line.proof, Some(Proof::FreeExtents));
    assert_eq!(
        part(&scan, "logical volume vg0/root: toy 'lv'").proof,
        Some(Proof::Unmounted)
    );
    assert_eq!(part(&scan, "logical volume vg0/data: unknown").free_bytes, 0);
    assert_eq!(scan.needs, SIZE);
}

/// Physical extents of `lv` behind its first ten, in the order of the logical volume.
fn segment_order(lvm: &Lvm, lv: &str) -> Vec<u64> {
    let text = lvm.run(&format!(
        "lvs --noheadings --segments -o seg_start_pe,seg_pe_ranges vg0/{lv}"
    ));
    let mut rows: Vec<(u64, u64, u64)> = text
        .lines()
        .map(|row| {
            let mut words = row.split_whitespace();
            let at = words.next().unwrap().parse().unwrap();
            let (_, range) = words.next().unwrap().rsplit_once(':').unwrap();
            let (first, last) = range.split_once('-').unwrap();
            (at, first.parse().unwrap(), last.parse().unwrap())
        })
        .collect();
    rows.sort_unstable();
    rows.iter()
        .flat_map(|(_, first, last)| *first..=*last)
        .skip(10)
        .collect()
}

#[test]
fn two_physical_volumes_on_two_disks_and_a_striped_volume() {
    let lvm = Lvm::new(&[vec![0; SIZE as usize], vec![0; SIZE as usize]]);
    lvm.run("pvcreate {0}");
    lvm.run("pvcreate {1}");
    lvm.run("vgcreate -s 4m vg0 {0} {1}");
    lvm.run("lvcreate -an -Zn -Wn -n wide -i 2 -I 64k -l 8 vg0");
    lvm.run("lvcreate -an -Zn -Wn -n own -l 3 vg0 {0}");
    for (i, image) in lvm.images().into_iter().enumerate() {
        let mut disk = Disk::of(image);
        allow_free(&mut disk, &lvm, i, MIB, 4 * MIB);
        if i == 0 {
            let place = |at: u64| MIB + 16 * MIB + at;
            toy_on(&mut disk, 12 * MIB, 8, &place);
        }
        let scan = disk.scan_exactly(&i);
        assert_eq!(
            reason(&scan, "logical volume vg0/wide"),
            "a part of it lies on another disk"
        );
        assert_eq!(scan.parts.len(), 3 - i);
    }
}

#[test]
fn two_partitions_of_one_disk_make_a_group_whole() {
    let (bytes, parts) = sfdisk(2 * SIZE, "label: gpt\nsize=40M\nsize=50M\n");
    let [first, second] = [parts[0].1, parts[1].1];
    let cut = |range: Extent| bytes[range.offset() as usize..range.end() as usize].to_vec();
    let lvm = Lvm::new(&[cut(first), cut(second)]);
    lvm.run("vgcreate -s 1m vg0 {0} {1}");
    lvm.run("lvcreate -an -Zn -Wn -n wide -i 2 -I 64k -l 20 vg0");
    let mut disk = Disk::of(bytes);
    for (i, (image, range)) in lvm.images().iter().zip([first, second]).enumerate() {
        disk.write(range.offset(), image);
        allow_free(&mut disk, &lvm, i, range.offset() + MIB, MIB);
    }
    let bases = [first.offset() + MIB, second.offset() + MIB];
    toy_on(&mut disk, 20 * MIB, 3, &|at| {
        let turn = at / 65536;
        bases[(turn % 2) as usize] + turn / 2 * 65536 + at % 65536
    });
    let scan = disk.scan_exactly(&"two partitions");
    assert!(part(&scan, "logical volume vg0/wide: toy").free_bytes > 5 * MIB);
    assert!(part(&scan, "partition 2: LVM physical volume of vg0").free_bytes > 30 * MIB);
    // A copy of a partition claims to be the same physical volume: no saying which is meant.
    let mut twins = disk.clone();
    twins.free.fill(false);
    let mut grown = cut_from(&disk, first);
    grown.resize(second.len() as usize, 0);
    twins.write(second.offset(), &grown);
    let scan = twins.scan_exactly(&"twins");
    assert!(
        reason(&scan, "partition 1").contains("claim to be the same"),
        "{:?}",
        scan.parts
    );
}

fn cut_from(disk: &Disk, range: Extent) -> Vec<u8> {
    disk.bytes[range.offset() as usize..range.end() as usize].to_vec()
}

/// One physical volume over a disk of `SIZE` bytes, with `lvs`; the extents `free` may be skipped.
pub(crate) fn single(lvs: &[String], free: &[(u64, u64)]) -> Disk {
    written(&group(&[Pv::new(0, SIZE)], lvs), free)
}

/// The same with a metadata text as given.
pub(crate) fn written(text: &str, free: &[(u64, u64)]) -> Disk {
    let pv = Pv::new(0, SIZE);
    let mut disk = Disk::new(SIZE as usize);
    pv.write(&mut disk.bytes, text, 0);
    for (first, count) in free {
        disk.allow(pv.extents(*first, *count));
    }
    disk
}

#[test]
fn images_written_here_are_what_lvm_reads() {
    let lvs = [
        lv(
            "root",
            &[(5, "striped", &linear(0, 0)), (4, "striped", &linear(0, 20))],
        ),
        lv("wide", &[(8, "striped", &striped(&[(0, 30), (0, 40)]))]),
    ];
    let mut disk = single(&lvs, &[]);
    let lvm = Lvm::new(&[disk.bytes.clone()]);
    let used: u64 = lvm
        .segments()
        .iter()
        .filter(|row| !row.3.is_empty())
        .map(|row| row.2)
        .sum();
    assert_eq!(used, 17, "{:?}", lvm.segments());
    allow_free(&mut disk, &lvm, 0, MIB, MIB);
    disk.scan_exactly(&"written here");
    assert_eq!(disk.scan().free.free_bytes(), (63 - 17) * EXTENT);
}

#[test]
fn a_text_that_goes_around_the_ring_and_a_second_area_at_the_end() {
    let mut pv = Pv::new(0, SIZE);
    pv.count -= 1;
    pv.areas.push(Extent::between(SIZE - MIB, SIZE));
    let text = group(&[pv.clone()], &[lv("root", &[(3, "striped", &linear(0, 2))])]);
    let mut disk = Disk::new(SIZE as usize);
    pv.write(&mut disk.bytes, &text, MIB - 4096 - 512 - 100);
    disk.allow(pv.extents(0, 2));
    disk.allow(pv.extents(5, 57));
    disk.scan_exactly(&"ring");
    // The copies differ: nobody knows which is the last.
    let older = text.replace("seqno = 5", "seqno = 4");
    let mut half = disk.clone();
    let mut other = pv.clone();
    other.write(&mut half.bytes, &older, 0);
    other.areas.remove(0);
    other.areas[0] = pv.areas[1];
    let backup = disk.bytes[(SIZE - MIB) as usize..].to_vec();
    half.write(SIZE - MIB, &backup);
    let scan = half.scan_safely(&"differ");
    assert!(
        reason(&scan, "whole disk").contains("copies differ"),
        "{:?}",
        scan.parts
    );
    assert_eq!(scan.free.free_bytes(), 0);
}

#[test]
fn a_physical_volume_without_a_group_or_without_metadata_is_copied() {
    let lvm = Lvm::new(&[
        vec![0; SIZE as usize],
        vec![0; SIZE as usize],
        vec![0; SIZE as usize],
    ]);
    lvm.run("pvcreate {0}");
    lvm.run("pvcreate --metadatacopies 0 {1}");
    lvm.run("pvcreate --metadataignore y {2}");
    for (image, why) in
        lvm.images()
            .into_iter()
            .zip(["no volume group", "no metadata area", "no metadata area"])
    {
        let scan = Disk::of(image).scan_exactly(&why);
        assert!(
            reason(&scan, "whole disk").contains(why),
            "{why}: {:?}",
            scan.parts
        );
    }
}

#[test]
fn what_a_logical_volume_holds_may_be_another_disk_or_volume() {
    let lvs = [
        lv("pv", &[(8, "striped", &linear(0, 0))]),
        lv("disk", &[(8, "striped", &linear(0, 8))]),
    ];
    let mut disk = single(&lvs, &[(16, 47)]);
    let outer = Pv::new(0, SIZE);
    let inner = Pv::new(1, 8 * MIB);
    let mut image = vec![0; 8 << 20];
    inner.write(&mut image, &group(std::slice::from_ref(&inner), &[]), 0);
    disk.write(outer.extents(0, 8).offset(), &image);
    let (table, _) = sfdisk(8 * MIB, "label: dos\nsize=4M\n");
    disk.write(outer.extents(8, 8).offset(), &table);
    let scan = disk.scan_exactly(&"nested");
    assert!(reason(&scan, "logical volume vg0/pv").contains("inside a logical one"));
    assert!(reason(&scan, "logical volume vg0/disk").contains("a partition table"));
}
