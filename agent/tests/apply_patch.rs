//! Rounds after the first: parts of leaves over a whole copy, crashes between, and the way to the final name with a QEMU on it.

#![allow(clippy::unwrap_used)] // a failed step fails the test

mod apply_model;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use apply_model::{Model, ODD_SIZE, options, partial, seed};
use longhaul_agent::disk::apply::{Piece, Target, TargetError, TargetFormat, TargetOptions};
use longhaul_common::digest::{LEAF, leaf_count};
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, Round};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const BLOCK: u64 = 64 << 10;

/// A whole copy of a random disk, and the same disk in memory.
fn whole(options: &TargetOptions, rng: &mut StdRng) -> (Target, Vec<u8>) {
    let model = Model::random(rng, ODD_SIZE);
    let (target, _) = Target::open(options, ODD_SIZE).unwrap();
    model.send(&target, (1, 0), |_| true);
    target.flush().unwrap();
    let disk = model.bytes();
    (target, disk)
}

/// Patches random blocks in one round; `disk` follows.
fn patch(target: &Target, disk: &mut [u8], version: (u32, u32), rng: &mut StdRng) {
    let mut blocks: Vec<u64> = (0..rng.random_range(1..9))
        .map(|_| rng.random_range(0..ODD_SIZE.div_ceil(BLOCK)))
        .collect();
    blocks.sort_unstable();
    blocks.dedup();
    let contents: Vec<_> = blocks
        .iter()
        .map(|block| {
            let extent = Extent::between(block * BLOCK, ((block + 1) * BLOCK).min(ODD_SIZE));
            let zero = rng.random_bool(0.3);
            let bytes: Vec<u8> = (0..extent.len())
                .map(|_| if zero { 0 } else { rng.random() })
                .collect();
            disk[extent.offset() as usize..extent.end() as usize].copy_from_slice(&bytes);
            (extent, zero, bytes)
        })
        .collect();
    let pieces: Vec<_> = contents
        .iter()
        .map(|(extent, zero, bytes)| match zero {
            true => Piece::Zero(*extent),
            false => Piece::Data {
                offset: extent.offset(),
                bytes,
            },
        })
        .collect();
    target
        .patch(Attempt(version.0), Round(version.1), &pieces)
        .unwrap();
}

#[test]
fn patched_copies_equal_the_disk_whatever_crashes() {
    let mut rng = StdRng::seed_from_u64(seed("LONGHAUL_PATCH_SEED"));
    for format in [TargetFormat::Raw, TargetFormat::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let options = TargetOptions {
            format,
            ..options(dir.path(), "disk.img")
        };
        let (target, mut disk) = whole(&options, &mut rng);
        for round in 1..6 {
            patch(&target, &mut disk, (1, round), &mut rng);
        }
        target.seal().unwrap();
        drop(target);
        let (target, have) = Target::open(&options, ODD_SIZE).unwrap();
        assert_eq!(have.bytes(), ODD_SIZE, "sealed leaves are known again");
        patch(&target, &mut disk, (2, 0), &mut rng);
        target.flush().unwrap();
        drop(target);
        let (target, have) = Target::open(&options, ODD_SIZE).unwrap();
        assert!(
            have.bytes() < ODD_SIZE,
            "a patched leaf without a digest is missing after a crash"
        );
        assert!(matches!(
            target.place().map(drop),
            Err(TargetError::Incomplete { .. })
        ));
    }
}

#[test]
fn the_final_name_leads_to_the_copy_before_and_is_the_copy_after() {
    let mut rng = StdRng::seed_from_u64(7);
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "web.img");
    let (target, mut disk) = whole(&options, &mut rng);
    let path = target.link().unwrap();
    let early = std::fs::File::open(&path).unwrap();
    patch(&target, &mut disk, (1, 1), &mut rng);
    let mut placed = target.place().unwrap();
    assert!(std::fs::symlink_metadata(&path).unwrap().is_symlink());
    assert_eq!(placed.promote().unwrap(), path);
    assert!(std::fs::symlink_metadata(&path).unwrap().is_file() && !partial(&options).exists());
    placed.promote().unwrap();
    let mut read = vec![0; disk.len()];
    early.read_exact_at(&mut read, 0).unwrap();
    assert!(read == disk, "the file that was opened early is the copy");
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "nothing else is left"
    );
}

#[test]
fn a_taken_name_is_not_linked_over_and_a_given_up_copy_leaves_nothing() {
    let mut rng = StdRng::seed_from_u64(8);
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "web.img");
    let (target, _) = whole(&options, &mut rng);
    std::fs::write(&options.path, "somebody's").unwrap();
    assert!(matches!(target.link(), Err(TargetError::Exists { .. })));
    std::fs::remove_file(&options.path).unwrap();
    target.link().unwrap();
    target.link().unwrap();
    let mut placed = target.place().unwrap();
    placed.discard().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_patched_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "web.img");
    let model = Model::random(&mut StdRng::seed_from_u64(9), ODD_SIZE);
    let (target, _) = Target::open(&options, ODD_SIZE).unwrap();
    model.send(&target, (1, 0), |leaf| leaf < 3);
    let zero = |offset, len| Piece::Zero(Extent::new(offset, len).unwrap());
    let refused = |pieces: &[Piece<'_>]| target.patch(Attempt(1), Round(1), pieces);
    let missing = refused(&[zero(3 * LEAF, 4096)]);
    assert!(
        matches!(&missing, Err(TargetError::Malformed(text)) if text.contains("leaf 3")),
        "{missing:?}"
    );
    for pieces in [
        vec![],
        vec![zero(8192, 4096), zero(4096, 4096)],
        vec![zero(0, 8192), zero(4096, 4096)],
        vec![zero(leaf_count(ODD_SIZE) * LEAF, 4096)],
    ] {
        assert!(
            matches!(refused(&pieces), Err(TargetError::Malformed(_))),
            "{pieces:?}"
        );
    }
    assert!(matches!(
        target.place().map(drop),
        Err(TargetError::Incomplete { .. })
    ));
}

/// A round that was given up may have batches on their way when the next one begins, which has all of it. They were an error once, which
/// ended the job.
#[test]
fn what_comes_late_of_a_round_that_was_given_up_is_left_out() {
    let mut rng = StdRng::seed_from_u64(12);
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "web.img");
    let (target, mut disk) = whole(&options, &mut rng);
    let (older, newer): (&[u8], &[u8]) = (&[1; 4096], &[2; 4096]);
    let piece = |leaf: u64, bytes: &'static [u8]| Piece::Data {
        offset: leaf * LEAF + 8192,
        bytes,
    };
    let patch = |round, pieces: &[Piece<'_>]| target.patch(Attempt(1), Round(round), pieces).unwrap();

    assert_eq!(patch(3, &[piece(1, newer)]).stale_leaves, 0);
    let all_late = patch(2, &[piece(1, older)]);
    assert_eq!(all_late.stale_leaves, 1);
    let half_late = patch(2, &[piece(1, older), piece(2, older)]);
    assert_eq!(half_late.stale_leaves, 1);
    // Whoever waits for one of them to be durable does not wait for ever.
    assert!(target.flush().unwrap().through >= half_late.ticket);
    assert!(half_late.ticket > all_late.ticket);

    for (leaf, bytes) in [(1, newer), (2, older)] {
        let at = (leaf * LEAF + 8192) as usize;
        disk[at..at + 4096].copy_from_slice(bytes);
    }
    assert!(std::fs::read(partial(&options)).unwrap() == disk);
}

/// Bytes of a file that are in the page cache.
fn cached(path: &Path) -> u64 {
    let told = Command::new("fincore")
        .args(["-b", "-n", "-o", "RES"])
        .arg(path)
        .output();
    let told = String::from_utf8(told.unwrap().stdout).unwrap();
    told.trim().parse().unwrap()
}

/// QEMU drops an image's pages when it starts the VM that has arrived, while its users wait.
#[test]
fn what_is_flushed_leaves_the_page_cache() {
    let parent = env!("CARGO_TARGET_TMPDIR");
    let kind = Command::new("stat")
        .args(["-f", "-c", "%T", parent])
        .output()
        .unwrap();
    if kind.stdout.starts_with(b"tmpfs") {
        return eprintln!("SKIPPED: {parent} is memory, and so nothing but cache");
    }
    let mut rng = StdRng::seed_from_u64(11);
    for format in [TargetFormat::Raw, TargetFormat::Qcow2] {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let options = TargetOptions {
            format,
            ..options(dir.path(), "disk.img")
        };
        let (target, mut disk) = whole(&options, &mut rng);
        let (copied, file) = (cached(&partial(&options)), partial(&options));
        patch(&target, &mut disk, (1, 1), &mut rng);
        let patched = cached(&file);
        target.flush().unwrap();
        let flushed = cached(&file);
        assert!(
            copied < ODD_SIZE / 8 && flushed < ODD_SIZE / 8,
            "{copied}, {flushed}"
        );
        assert!(patched > copied, "nothing was ever cached: {patched}");
    }
}
