//! Damaged logs and full disks: never more is claimed than is there, and the work goes on once the cause is gone.

#![allow(clippy::unwrap_used)] // a failed step fails the test

mod apply_model;

use std::fs::OpenOptions;
use std::ops::ControlFlow::Continue;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use apply_model::{Leaf, Model, apply, log, options, partial};
use longhaul_agent::disk::apply::{
    Durable, LeafRecord, Piece, Target, TargetError, TargetFormat, TargetOptions,
};
use longhaul_common::digest::{Digest, LEAF, leaf_count, leaf_extent};
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, Round};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Small, so that every byte of its log can be damaged in turn; its last leaf is short.
const SIZE: u64 = 3 * LEAF + 4096;

/// A partial copy whose log holds several flushes, a batch that was written again, and one whose rewriting was never flushed.
fn partial_copy(options: &TargetOptions) -> Model {
    let mut rng = StdRng::seed_from_u64(31);
    let mut model = Model::random(&mut rng, SIZE);
    model.leaves[0] = Leaf {
        stretches: vec![LEAF as usize],
        bytes: vec![5; LEAF as usize],
    };
    model.leaves[1] = Leaf::zeros(LEAF as usize);
    let (target, _) = Target::open(options, SIZE).unwrap();
    for leaf in [2, 0, 3, 1] {
        model.send(&target, (1, 0), |number| number == leaf);
        target.flush().unwrap();
    }
    model.leaves[2] = Leaf {
        stretches: vec![LEAF as usize],
        bytes: vec![6; LEAF as usize],
    };
    model.send(&target, (1, 1), |leaf| leaf == 2);
    target.flush().unwrap();
    model.leaves[0] = Leaf {
        stretches: vec![LEAF as usize],
        bytes: vec![7; LEAF as usize],
    };
    model.send(&target, (1, 2), |leaf| leaf == 0);
    model
}

/// Opens the copy and checks every claim against the file's content; gives the bytes that are durable.
fn check_claims(options: &TargetOptions, content: &[u8]) -> u64 {
    let (_target, have) = Target::open(options, SIZE).unwrap();
    let bytes = have.bytes();
    let content_of = |leaf| {
        let extent = leaf_extent(leaf, SIZE);
        &content[extent.offset() as usize..extent.end() as usize]
    };
    for durable in have {
        match durable.unwrap() {
            Durable::Data { leaf, digest } => assert_eq!(digest, Digest::of(content_of(leaf))),
            Durable::Shadow { first, .. } => panic!("leaf {first} is a shadow's, and there is none"),
            Durable::Zeros { first, count } => {
                assert!((first..first + count).all(|leaf| content_of(leaf).iter().all(|byte| *byte == 0)));
            }
        }
    }
    bytes
}

fn put(path: &Path, content: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    file.write_all_at(content, 0).unwrap();
}

#[test]
fn a_log_damaged_at_any_byte_claims_only_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    partial_copy(&options);
    let (log, content) = (log(&options), std::fs::read(partial(&options)).unwrap());
    let mut intact = std::fs::read(&log).unwrap();
    assert_eq!(check_claims(&options, &content), SIZE - LEAF);
    for at in 0..intact.len() {
        let mut damaged = intact.clone();
        damaged[at] ^= 1 << (at % 8);
        // The bytes behind the header's checksum mean nothing.
        let meaningless = (92..96).contains(&at);
        put(&log, &damaged);
        let durable = check_claims(&options, &content);
        assert!(
            durable <= SIZE - LEAF && (!meaningless || durable == SIZE - LEAF),
            "byte {at}"
        );
        if at < 92 {
            // The header was damaged: a clean copy was begun. Make the old one again.
            assert_eq!(durable, 0, "byte {at}");
            std::fs::remove_file(partial(&options)).unwrap();
            std::fs::remove_file(&log).unwrap();
            partial_copy(&options);
            assert!(std::fs::read(partial(&options)).unwrap() == content);
            // The new file's log has a header of its own; the records are the same.
            let fresh = std::fs::read(&log).unwrap();
            assert!(intact[96..] == fresh[96..]);
            intact = fresh;
        }
    }
}

#[test]
fn a_log_cut_at_any_byte_or_grown_claims_only_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let mut model = Model::random(&mut StdRng::seed_from_u64(32), SIZE);
    model.leaves[1] = Leaf::zeros(LEAF as usize);
    let (target, _) = Target::open(&options, SIZE).unwrap();
    for leaf in [2, 0, 3, 1] {
        model.send(&target, (1, 0), |number| number == leaf);
        target.flush().unwrap();
    }
    drop(target);
    let (log, content) = (log(&options), std::fs::read(partial(&options)).unwrap());
    let intact = std::fs::read(&log).unwrap();
    let mut before = SIZE;
    for len in (96..=intact.len()).rev() {
        put(&log, &intact[..len]);
        let durable = check_claims(&options, &content);
        assert!(durable <= before, "cut at {len}");
        before = durable;
    }
    assert_eq!(before, 0);
    let mut rng = StdRng::seed_from_u64(33);
    for _ in 0..50 {
        let mut grown = intact.clone();
        grown
            .extend((0..rng.random_range(1..300)).map(|_| if rng.random() { 0 } else { rng.random::<u8>() }));
        put(&log, &grown);
        assert_eq!(check_claims(&options, &content), SIZE);
        // It was written anew, without what could not be read.
        assert!(std::fs::metadata(&log).unwrap().len() <= intact.len() as u64);
    }
}

#[test]
fn many_rewrites_keep_the_log_short() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let (leaves, rounds) = (2000u64, 60);
    let (target, _) = Target::open(&options, leaves * LEAF).unwrap();
    let digest = |leaf: u64, round: u32| Digest::of(format!("{leaf} {round}").as_bytes());
    let mut longest = 0;
    for round in 0..rounds {
        // Every third leaf changes; the digests are invented, nobody reads back here.
        for first in (0..leaves).step_by(100) {
            let record = LeafRecord {
                first,
                digests: (first..first + 100)
                    .step_by(3)
                    .map(|leaf| (leaf, digest(leaf, round)))
                    .collect(),
                count: 100,
            };
            let mut pieces = Vec::new();
            for (leaf, _) in &record.digests {
                let end = (first + 100).min(leaf + 3) * LEAF;
                pieces.push(Piece::Data {
                    offset: leaf * LEAF,
                    bytes: &[1; 512],
                });
                pieces.push(Piece::Zero(Extent::between(leaf * LEAF + 512, end)));
            }
            target.apply(Attempt(1), Round(round), &record, &pieces).unwrap();
        }
        target.flush().unwrap();
        longest = longest.max(std::fs::metadata(log(&options)).unwrap().len());
    }
    println!("longest log: {longest} bytes");
    // 680 entries of 40 bytes are alive; dead ones may add 1 MiB, and what one round adds.
    assert!(longest > 1 << 20 && longest < (1 << 20) + 200_000, "{longest}");
    drop(target);
    let (_, have) = Target::open(&options, leaves * LEAF).unwrap();
    assert_eq!(have.bytes(), leaves * LEAF);
    for durable in have {
        if let Durable::Data { leaf, digest: found } = durable.unwrap() {
            assert_eq!(found, digest(leaf, rounds - 1));
        }
    }
}

/// A small file system, gone when dropped. A ballast file leaves 8 MiB of it free, about.
struct Small {
    path: PathBuf,
    #[expect(dead_code, reason = "held so that it is removed when dropped")]
    dir: tempfile::TempDir,
}

impl Small {
    /// `None` where this process may not mount.
    fn mount(kind: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("mounted");
        std::fs::create_dir(&path).unwrap();
        let mut command = Command::new("mount");
        if kind == "ext4" {
            let device = dir.path().join("device");
            std::fs::File::create(&device).unwrap().set_len(64 << 20).unwrap();
            let made = Command::new("mkfs.ext4")
                .args(["-q", "-m", "0"])
                .arg(&device)
                .status();
            assert!(
                made.expect("mkfs.ext4 is needed: install the Debian package e2fsprogs")
                    .success()
            );
            command.args(["-o", "loop"]).arg(&device);
        } else {
            command.args(["-t", "tmpfs", "-o", "size=56m", "none"]);
        }
        let mounted = command.arg(&path).output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            assert!(!rustix::process::getuid().is_root(), "root may mount");
            println!("skipped: mounting needs root");
            return None;
        }
        let small = Self { path, dir };
        let free = rustix::fs::statvfs(&small.path).unwrap();
        let ballast = free.f_bavail * free.f_frsize - (8 << 20);
        std::fs::write(small.path.join("ballast"), vec![1; ballast as usize]).unwrap();
        Some(small)
    }

    fn make_room(&self) {
        std::fs::remove_file(self.path.join("ballast")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

fn incompressible(size: u64) -> Model {
    let mut rng = StdRng::seed_from_u64(41);
    let leaves = (0..leaf_count(size)).map(|_| {
        let mut bytes = vec![0; LEAF as usize];
        rng.fill(&mut bytes[..]);
        Leaf {
            bytes,
            stretches: vec![LEAF as usize],
        }
    });
    Model {
        size,
        leaves: leaves.collect(),
    }
}

#[test]
fn a_full_disk_waits_for_room_and_loses_nothing() {
    for (kind, format) in [
        ("tmpfs", TargetFormat::Raw),
        ("ext4", TargetFormat::Raw),
        ("tmpfs", TargetFormat::Qcow2),
        ("ext4", TargetFormat::Qcow2),
    ] {
        println!("{kind} {format:?}");
        let Some(small) = Small::mount(kind) else { return };
        let run_dir = tempfile::tempdir().unwrap();
        let mut options = TargetOptions {
            format,
            ..options(&small.path, "disk.img")
        };
        options.run_dir = run_dir.path().canonicalize().unwrap();
        let size = 12 * LEAF;
        let model = incompressible(size);
        let (target, _) = Target::open(&options, size).unwrap();
        let mut durable = 0;
        let full_at = (0..12).find(|leaf| {
            match apply(
                &target,
                (1, 0),
                *leaf,
                std::slice::from_ref(&model.leaves[*leaf as usize]),
            ) {
                Ok(_) => {
                    durable += u64::from(target.flush().is_ok());
                    false
                }
                Err(error) => {
                    assert!(matches!(error, TargetError::NoSpace { .. }), "{error}");
                    true
                }
            }
        });
        let full_at = full_at.unwrap();
        assert!((5..9).contains(&full_at), "{full_at}");
        // Somebody makes room: the same target goes on with the same batch.
        small.make_room();
        let mut next = durable;
        if target.flush().is_ok() {
            model.send(&target, (1, 0), |leaf| (full_at..10).contains(&leaf));
            target.flush().unwrap();
            next = 10;
        }
        assert!(next == 10 || format == TargetFormat::Qcow2);
        drop(target);
        let (target, have) = Target::open(&options, size).unwrap();
        assert_eq!(have.bytes(), next * LEAF);
        drop(have);
        model.send(&target, (2, 0), |leaf| leaf >= next);
        assert_eq!(target.verify(2, &|_| Continue(())).unwrap(), model.digest());
        target.promote().unwrap();
    }
}

#[test]
fn no_room_for_a_reserved_copy_leaves_nothing() {
    let Some(small) = Small::mount("tmpfs") else {
        return;
    };
    let run_dir = tempfile::tempdir().unwrap();
    for format in [TargetFormat::Raw, TargetFormat::Qcow2] {
        let mut options = TargetOptions {
            format,
            preallocate: true,
            ..options(&small.path, "disk.img")
        };
        options.run_dir = run_dir.path().canonicalize().unwrap();
        let error = Target::open(&options, 64 << 20).err().unwrap();
        assert!(matches!(error, TargetError::NoSpace { .. }), "{error:?}");
        assert_eq!(std::fs::read_dir(&small.path).unwrap().count(), 1);
    }
}

#[test]
fn what_was_read_back_is_proven_until_it_is_written_to_again() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let mut model = Model::random(&mut StdRng::seed_from_u64(33), SIZE);
    let whole = |byte| Leaf {
        stretches: vec![LEAF as usize],
        bytes: vec![byte; LEAF as usize],
    };
    (0..3).for_each(|leaf| model.leaves[leaf] = whole(leaf as u8 + 1));
    let (target, _) = Target::open(&options, SIZE).unwrap();
    model.send(&target, (1, 0), |leaf| leaf < 3);
    assert!(!target.read_back(), "nothing is durable yet");
    target.flush().unwrap();
    let read = |target: &Target| (0..).take_while(|_| target.read_back()).count();
    assert_eq!(read(&target), 3);
    // The last one was never read back, and the second is written again.
    model.leaves[1] = whole(9);
    model.send(&target, (1, 1), |leaf| leaf == 1 || leaf == 3);
    target.flush().unwrap();
    let digest = target.verify(2, &|_| Continue(())).unwrap();
    assert_eq!(digest, model.digest());
    let file = OpenOptions::new().write(true).open(partial(&options)).unwrap();
    file.write_all_at(&[0xAA], LEAF + 7).unwrap();
    let differs = |target: &Target| match target.verify(2, &|_| Continue(())) {
        Err(TargetError::Differs { leaf, .. }) => leaf,
        other => panic!("it was not found: {other:?}"),
    };
    assert_eq!(differs(&target), 1, "its first content was proven, not this");
    // Reading it back finds no proof, and the end says why.
    assert!(read(&target) > 0);
    assert_eq!(differs(&target), 1);
}
