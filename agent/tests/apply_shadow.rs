//! Copies that begin with a shadow: what is known of it, what is not, and what becomes of it when the copy is given up.

#![allow(clippy::unwrap_used)] // a failed step fails the test

mod apply_model;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use apply_model::{options, partial};
use longhaul_agent::disk::apply::{
    Durable, Have, LeafRecord, Left, Piece, Seal, Shadow, Target, TargetError, TargetFormat, TargetOptions,
};
use longhaul_common::digest::{Digest, LEAF};
use longhaul_common::ids::{Attempt, Round};

const SIZE: u64 = 5 * LEAF + 4096;
const NAME: &str = "disk.img.longhaul-01234567.moved";

/// A disk with data in leaves 0, 2 and 5, as bytes.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    for leaf in [0, 2] {
        let start = (leaf * LEAF) as usize;
        disk[start..start + LEAF as usize].fill(0x40 + leaf as u8);
    }
    disk[(5 * LEAF) as usize..].fill(0x77);
    disk
}

fn shadow(dir: &Path, disk: &[u8], free: &[(u64, u64)], changes_known: bool) -> Shadow {
    let path = dir.join(NAME);
    fs::write(&path, disk).unwrap();
    Shadow {
        name: NAME.into(),
        left: Some(Left {
            seal: Seal::of(&File::open(path).unwrap()).unwrap(),
            free: free.to_vec(),
        }),
        changes_known,
    }
}

/// Which leaves are as the shadow was left, and which have digests (none: zeros).
fn held(have: Have) -> (Vec<u64>, Vec<(u64, Option<Digest>)>) {
    let (mut left, mut known) = (Vec::new(), Vec::new());
    for durable in have {
        match durable.unwrap() {
            Durable::Shadow { first, count } => left.extend(first..first + count),
            Durable::Zeros { first, count } => known.extend((first..first + count).map(|leaf| (leaf, None))),
            Durable::Data { leaf, digest } => known.push((leaf, Some(digest))),
        }
    }
    (left, known)
}

fn patch(target: &Target, version: (u32, u32), offset: u64, bytes: &[u8]) {
    let pieces = [Piece::Data { offset, bytes }];
    target
        .patch(Attempt(version.0), Round(version.1), &pieces)
        .unwrap();
}

#[test]
fn an_untouched_shadow_is_held_unread_and_patched_to_what_changed() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.img");
    let mut expected = disk();
    // Free when the VM left, so zeros where it went.
    let free = [(2 * LEAF, 8192), (5 * LEAF, 4096)];
    let shadow = shadow(dir.path(), &expected, &free, true);
    for (offset, len) in free {
        expected[offset as usize..(offset + len) as usize].fill(0);
    }
    let (target, have) = Target::open_with(&options, SIZE, Some(&shadow)).unwrap();
    assert!(target.began_with_shadow() && have.has_shadow());
    assert_eq!(have.bytes(), SIZE);
    assert_eq!(held(have), ((0..6).collect(), vec![]));
    assert!(!dir.path().join(NAME).exists(), "it is the copy now");

    patch(&target, (1, 1), 4096, &[9; 4096]);
    patch(&target, (1, 2), 3 * LEAF, &[8; 4096]);
    expected[4096..8192].fill(9);
    expected[(3 * LEAF) as usize..(3 * LEAF) as usize + 4096].fill(8);
    target.flush().unwrap();
    drop(target);
    // A crash: what was patched has to be sent anew, the rest is still as it was left.
    let (target, have) = Target::open_with(&options, SIZE, Some(&shadow)).unwrap();
    assert!(!target.began_with_shadow());
    assert_eq!(held(have), (vec![1, 2, 4, 5], vec![]));
    for leaf in [0, 3] {
        let bytes = &expected[(leaf * LEAF) as usize..((leaf + 1) * LEAF) as usize];
        let leaves = LeafRecord {
            first: leaf,
            count: 1,
            digests: vec![(leaf, Digest::of(bytes))],
        };
        let pieces = [Piece::Data {
            offset: leaf * LEAF,
            bytes,
        }];
        target.apply(Attempt(2), Round(0), &leaves, &pieces).unwrap();
    }
    target.flush().unwrap();
    target.place().unwrap().promote().unwrap();
    assert!(fs::read(&options.path).unwrap() == expected);
}

#[test]
fn a_shadow_whose_changes_are_unknown_is_read_leaf_by_leaf() {
    for touched in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path(), "disk.img");
        let disk = disk();
        // Where somebody touched it, what is said of it does not count, and nothing is cleared in it.
        let shadow = shadow(dir.path(), &disk, &[(2 * LEAF, LEAF)], touched);
        if touched {
            let file = File::options().write(true).open(dir.path().join(NAME)).unwrap();
            file.write_all_at(&[0x40], 7).unwrap();
        }
        let (target, have) = Target::open_with(&options, SIZE, Some(&shadow)).unwrap();
        assert!(target.began_with_shadow() && !have.has_shadow());
        let leaf = |n: u64| {
            let end = ((n + 1) * LEAF).min(SIZE) as usize;
            Some(Digest::of(&disk[(n * LEAF) as usize..end]))
        };
        let second = if touched { leaf(2) } else { None };
        let known = vec![
            (0, leaf(0)),
            (1, None),
            (2, second),
            (3, None),
            (4, None),
            (5, leaf(5)),
        ];
        assert_eq!(held(have), (vec![], known.clone()));
        drop(target);
        let (target, have) = Target::open(&options, SIZE).unwrap();
        assert_eq!(held(have), (vec![], known), "the log says so after a crash, too");
        drop(target);
    }
}

#[test]
fn a_copy_that_is_given_up_is_a_shadow_again() {
    for format in [TargetFormat::Raw, TargetFormat::Qcow2] {
        for written in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let options = TargetOptions {
                format,
                ..options(dir.path(), "disk.img")
            };
            let mut shadow = shadow(dir.path(), &disk(), &[(0, 4096)], true);
            if format == TargetFormat::Qcow2 {
                let raw = dir.path().join("raw");
                fs::rename(dir.path().join(NAME), &raw).unwrap();
                let made = std::process::Command::new("qemu-img")
                    .args(["convert", "-f", "raw", "-O", "qcow2"])
                    .args([&raw, &dir.path().join(NAME)])
                    .status()
                    .unwrap();
                assert!(made.success());
                let seal = Seal::of(&File::open(dir.path().join(NAME)).unwrap()).unwrap();
                shadow.left = Some(Left {
                    seal,
                    free: vec![(0, 4096)],
                });
            }
            let (target, have) = Target::open_with(&options, SIZE, Some(&shadow)).unwrap();
            assert!(have.has_shadow(), "{format:?}");
            if written {
                patch(&target, (1, 1), LEAF, &[1; 4096]);
            }
            let returned = target.give_back(NAME.as_ref()).unwrap();
            let path = dir.path().join(NAME);
            assert_eq!(returned.untouched.is_some(), !written);
            assert!(!partial(&options).exists() && path.exists());
            if let Some(seal) = returned.untouched {
                assert_eq!(seal, Seal::of(&File::open(&path).unwrap()).unwrap());
                let left = Some(Left { seal, free: vec![] });
                let (_, have) = Target::open_with(&options, SIZE, Some(&Shadow { left, ..shadow })).unwrap();
                assert!(have.has_shadow());
            }
        }
    }
}

#[test]
fn what_cannot_be_a_copy_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.img");
    let shadow = shadow(dir.path(), &disk(), &[], true);
    // Another size.
    let (target, have) = Target::open_with(&options, SIZE + LEAF, Some(&shadow)).unwrap();
    assert!(!target.began_with_shadow() && have.bytes() == 0 && dir.path().join(NAME).exists());
    target.discard().unwrap();
    // A second name: writing it would change what somebody else has.
    fs::hard_link(dir.path().join(NAME), dir.path().join("other")).unwrap();
    let refused = Target::open_with(&options, SIZE, Some(&shadow))
        .map(drop)
        .unwrap_err();
    assert!(refused.to_string().contains("one name only"), "{refused}");
    fs::remove_file(dir.path().join("other")).unwrap();
    // Its name is a link.
    fs::rename(dir.path().join(NAME), dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", dir.path().join(NAME)).unwrap();
    let refused = Target::open_with(&options, SIZE, Some(&shadow)).map(drop);
    assert!(matches!(refused, Err(TargetError::Refused { .. })));
    fs::remove_file(dir.path().join(NAME)).unwrap();
    // A qcow2 image that leans on another one.
    let qcow2 = TargetOptions {
        format: TargetFormat::Qcow2,
        path: dir.path().join("second.img"),
        ..options
    };
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-f", "qcow2", "-F", "raw", "-b"])
        .args([dir.path().join("elsewhere"), dir.path().join(NAME)])
        .output()
        .unwrap();
    assert!(made.status.success());
    let size = SIZE.next_multiple_of(512);
    let (target, have) = Target::open_with(&qcow2, size, Some(&shadow)).unwrap();
    assert!(!target.began_with_shadow() && have.bytes() == 0);
}
