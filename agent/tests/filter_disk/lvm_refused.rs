//! LVM2 groups that must not be judged, or only in part: written here, since LVM's tools make most of them only where
//! device-mapper runs, and some never.

use longhaul_agent::disk::scan::Scan;
use longhaul_common::extent::Extent;

use super::disk::{Disk, part, reason};
use super::lvm::{SIZE, single, written};
use super::lvm_image::{Pv, group, group_with, linear, lv, lv_with, striped};
use super::toy;

const MIB: u64 = 1 << 20;

fn put_toy(disk: &mut Disk, first: u64, count: u64) {
    let range = Pv::new(0, SIZE).extents(first, count);
    disk.write(
        range.offset(),
        &toy::header(range.len(), 0, "", &[(8192, range.len() - 8192)]),
    );
}

/// Three extents each, from the first one given on. All hold a toy that would be skipped if they were plain.
const TOYS: [(u64, &str); 8] = [
    (0, "origin"),
    (3, "cow"),
    (6, "pool_tdata"),
    (9, "r_rimage_0"),
    (12, "m_mimage_0"),
    (15, "odd"),
    (18, "locked"),
    (21, "plain"),
];

/// The toys, and volumes of every kind that stand on them.
fn stacked() -> Vec<String> {
    let hidden = "\"READ\", \"WRITE\"";
    let toy = |(first, name): (u64, &str)| {
        let segments = [(3, "striped", &*linear(0, first))];
        match name {
            "odd" => lv_with(name, "\"READ\", \"VISIBLE\"", "new_setting = 1", &segments),
            "locked" => lv_with(name, "\"READ\", \"VISIBLE\", \"LOCKED\"", "", &segments),
            _ => lv(name, &segments),
        }
    };
    let mut lvs: Vec<String> = TOYS.into_iter().map(toy).collect();
    let snapshot = "chunk_size = 8\norigin = \"origin\"\ncow_store = \"cow\"";
    lvs.push(lv_with("snapshot0", hidden, "", &[(3, "snapshot", snapshot)]));
    let pool = "metadata = \"pool_tmeta\"\npool = \"pool_tdata\"\ntransaction_id = 1";
    lvs.push(lv("pool", &[(3, "thin-pool", pool)]));
    lvs.push(lv_with(
        "pool_tmeta",
        hidden,
        "",
        &[(1, "striped", &linear(0, 24))],
    ));
    let thin = "thin_pool = \"pool\"\ntransaction_id = 0\ndevice_id = 1";
    lvs.push(lv("thin", &[(900, "thin", thin)]));
    let raid = "device_count = 1\nraids = [ \"r_rmeta_0\", \"r_rimage_0\" ]";
    lvs.push(lv("r", &[(3, "raid1", raid)]));
    let mirror = "mirror_count = 1\nmirrors = [ \"m_mimage_0\", 0 ]";
    lvs.push(lv("m", &[(3, "mirror", mirror)]));
    let stack = "stripe_count = 1\nstripes = [ \"plain2\", 0 ]";
    lvs.push(lv("stack", &[(2, "striped", stack)]));
    lvs.push(lv("plain2", &[(2, "striped", &linear(0, 26))]));
    lvs
}

#[test]
fn volumes_that_others_stand_on_are_copied() {
    let mut disk = single(&stacked(), &[(25, 1), (28, 35)]);
    for (first, _) in TOYS {
        put_toy(&mut disk, first, 3);
    }
    let plain = Pv::new(0, SIZE).extents(21, 3);
    disk.allow(Extent::between(plain.offset() + 8192, plain.end()));
    let scan = disk.scan_exactly(&"stacked");
    let referred = [
        "origin",
        "cow",
        "pool_tdata",
        "pool_tmeta",
        "r_rimage_0",
        "m_mimage_0",
        "plain2",
    ];
    for name in referred {
        let why = reason(&scan, &format!("logical volume vg0/{name}"));
        assert!(
            why.contains("another logical volume refers to it"),
            "{name}: {why}"
        );
    }
    assert!(reason(&scan, "logical volume vg0/odd").contains("new_setting"));
    assert!(reason(&scan, "logical volume vg0/locked").contains("LOCKED"));
    assert_eq!(part(&scan, "logical volume vg0/plain").reason, None);
}

fn refused(text: &str, why: &str) -> Scan {
    let mut disk = written(text, &[]);
    put_toy(&mut disk, 0, 3);
    let scan = disk.scan_exactly(&why);
    assert!(
        reason(&scan, "whole disk").contains(why),
        "{why}: {:?}",
        scan.parts
    );
    scan
}

#[test]
fn groups_with_anything_unknown_are_copied_whole() {
    let pv = [Pv::new(0, SIZE)];
    let root = || lv("root", &[(3, "striped", &linear(0, 0))]);
    let with = |other: String| group(&pv, &[root(), other]);
    refused(
        &group_with("status = [\"EXPORTED\", \"READ\"]\nflags = []", &pv, &[root()]),
        "EXPORTED",
    );
    refused(
        &group_with("status = [\"PARTIAL_VG\"]\nflags = []", &pv, &[root()]),
        "PARTIAL_VG",
    );
    refused(
        &group_with("status = [\"READ\"]\nflags = [\"NEW\"]", &pv, &[root()]),
        "NEW",
    );
    refused(
        &group_with("lock_type = \"sanlock\"", &pv, &[root()]),
        "lock_type",
    );
    refused(
        &group(&pv, &[root()]).replace("flags = []\ndev_size", "flags = [\"MISSING\"]\ndev_size"),
        "MISSING",
    );
    refused(
        &with(lv("x", &[(3, "futuristic", "new = \"root\"")])),
        "futuristic",
    );
    refused(
        &with(lv("x", &[(3, "striped+NEW", &linear(0, 9))])),
        "striped+NEW",
    );
    refused(
        &with(lv("x", &[(3, "striped", &format!("{}\nnew = 1", linear(0, 9)))])),
        "setting new",
    );
    refused(
        &with(lv("x", &[(3, "mirror", "mirrors = [ \"pv0\", 9 ]")])),
        "unusual use",
    );
    let moving = "\"READ\", \"WRITE\", \"PVMOVE\", \"LOCKED\"";
    refused(
        &with(lv_with(
            "pvmove0",
            moving,
            "",
            &[(3, "mirror", "mirrors = [ \"pv0\", 9 ]")],
        )),
        "pvmove",
    );
    refused(
        &group(&pv, &[root()]).replace("version = 1", "version = 2"),
        "format",
    );
    refused(&group(&pv, &[root()]).replace("\"lvm2\"", "\"lvm9\""), "format");
}

#[test]
fn groups_that_contradict_themselves_are_copied_whole() {
    let pv = [Pv::new(0, SIZE)];
    let with = |segments: &[(u64, &str, &str)]| group(&pv, &[lv("root", segments)]);
    refused(
        &with(&[(3, "striped", &linear(0, 0)), (3, "striped", &linear(0, 2))]),
        "share an extent",
    );
    refused(&with(&[(3, "striped", &linear(0, 61))]), "beyond the end");
    refused(
        &with(&[(3, "striped", &linear(0, u64::MAX >> 1))]),
        "beyond the end",
    );
    refused(
        &with(&[(u64::MAX >> 1, "striped", &linear(0, u64::MAX >> 1))]),
        "beyond",
    );
    refused(&with(&[(0, "striped", &linear(0, 0))]), "do not follow");
    refused(&with(&[]), "wrong number of segments");
    refused(
        &with(&[(3, "striped", &striped(&[(0, 0), (0, 3)]))]),
        "wrong number of stripes",
    );
    refused(
        &with(&[(4, "striped", &striped(&[(0, 0), (0, 3)]).replace("128", "0"))]),
        "stripe size",
    );
    refused(
        &with(&[(4, "striped", &striped(&[(0, 0), (0, 3)]).replace("128", "4095"))]),
        "stripe size",
    );
    refused(
        &with(&[(
            4,
            "striped",
            &striped(&[(0, 0), (0, 3)]).replace("count = 2", "count = 1"),
        )]),
        "stripes",
    );
    refused(
        &with(&[(3, "striped", "stripe_count = 1\nstripes = [ 0, \"pv0\" ]")]),
        "a name and a number",
    );
    refused(
        &with(&[(3, "striped", "stripe_count = 1\nstripes = [ \"pv0\", -1 ]")]),
        "before the first",
    );
}

#[test]
fn groups_that_contradict_their_headers_are_copied_whole() {
    let root = lv("root", &[(3, "striped", &linear(0, 0))]);
    let text = group(&[Pv::new(0, SIZE)], &[root]);
    refused(&text.replace("pe_start = 2048", "pe_start = 2040"), "disagree");
    refused(&text.replace("pe_start = 2048", "pe_start = 2056"), "needs");
    refused(
        &text.replace("extent_size = 2048", "extent_size = 0"),
        "no extent size",
    );
    refused(
        &text.replace("-000001\"\ndevice", "-000009\"\ndevice"),
        "not in the group",
    );
    refused(
        &text.replace("start_extent = 0", "start_extent = 1"),
        "do not follow",
    );
    refused(
        &text.replace("segment_count = 1", "segment_count = 2"),
        "wrong number of segments",
    );
    refused(
        &text.replace("logical_volumes {", "logical_volumes {\nlogical_volumes {"),
        "",
    );
}

#[test]
fn extents_over_metadata_areas_are_copied() {
    // Extents over the metadata areas.
    let mut low = Pv::new(0, SIZE);
    low.start = 64 * 1024;
    let mut disk = Disk::new(SIZE as usize);
    low.write(&mut disk.bytes, &group(&[low.clone()], &[]), 0);
    assert!(reason(&disk.scan_exactly(&"low"), "whole disk").contains("disagree"));
}

#[test]
fn a_physical_volume_larger_than_the_image_is_a_shortfall() {
    let text = group(&[Pv::new(0, SIZE)], &[]);
    let mut disk = written(&text, &[]);
    disk.bytes.truncate(SIZE as usize / 2);
    disk.free.truncate(disk.free.len() / 2);
    let scan = disk.scan_exactly(&"cut");
    assert_eq!((scan.needs, scan.shortfalls.len()), (SIZE, 1));
    let long = text.replace("pe_count = 63", "pe_count = 630");
    let scan = refused(&long, "needs");
    assert_eq!((scan.needs, scan.shortfalls.len()), (631 * MIB, 1));
}
