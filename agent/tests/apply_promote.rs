//! The names of a copy: temporary, final, taken, forged.

#![allow(clippy::unwrap_used)] // a failed step fails the test

mod apply_model;

use std::ops::ControlFlow::{Break, Continue};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use apply_model::{Leaf, Model, ODD_SIZE, apply, log, options, partial};
use longhaul_agent::disk::apply::{
    Durable, LeafRecord, Piece, Target, TargetError, TargetFormat, TargetOptions, finish_promotion,
};
use longhaul_common::digest::{Digest, DiskDigest, LEAF};
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round};
use rand::SeedableRng;
use rand::rngs::StdRng;

const SIZE: u64 = 3 * LEAF;

fn model() -> Model {
    Model::random(&mut StdRng::seed_from_u64(21), SIZE)
}

fn complete(options: &TargetOptions) -> Target {
    let (target, _) = Target::open(options, SIZE).unwrap();
    model().send(&target, (1, 0), |_| true);
    target
}

fn open_error(options: &TargetOptions) -> TargetError {
    Target::open(options, SIZE).err().unwrap()
}

#[test]
fn owner_mode_and_label_are_set() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), "disk.raw");
    (options.owner, options.mode) = (Some((1234, 4321)), Some(0o640));
    options.label = Some("system_u:object_r:svirt_image_t:s0".into());
    let target = complete(&options);
    assert_eq!(
        partial(&options).metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(!options.path.exists());
    let path = match target.promote() {
        Ok(path) => path,
        // Only root may give files away and label them.
        Err(error) if !rustix::process::getuid().is_root() => {
            assert!(matches!(error, TargetError::Io { .. }) && partial(&options).exists());
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let metadata = path.metadata().unwrap();
    assert_eq!(
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o777),
        (1234, 4321, 0o640)
    );
    let mut label = [0; 64];
    let len = rustix::fs::getxattr(&path, "security.selinux", &mut label[..]).unwrap();
    assert_eq!(&label[..len], b"system_u:object_r:svirt_image_t:s0\0");
    assert!(std::fs::read(path).unwrap() == model().bytes());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_existing_file_is_replaced_only_if_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), "disk.raw");
    std::fs::write(&options.path, b"precious").unwrap();
    assert!(matches!(open_error(&options), TargetError::Exists { .. }));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    // It appears while the copy is written.
    std::fs::remove_file(&options.path).unwrap();
    let target = complete(&options);
    std::fs::write(&options.path, b"precious").unwrap();
    assert!(matches!(
        target.promote().err().unwrap(),
        TargetError::Exists { .. }
    ));
    assert_eq!(std::fs::read(&options.path).unwrap(), b"precious");
    // The work is not lost.
    options.overwrite = true;
    let (target, have) = Target::open(&options, SIZE).unwrap();
    assert_eq!(have.bytes(), SIZE);
    let path = target.promote().unwrap();
    assert!(std::fs::read(path).unwrap() == model().bytes());
}

#[test]
fn an_image_in_use_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), "disk.raw");
    options.overwrite = true;
    std::fs::write(&options.path, vec![0; 1 << 20]).unwrap();
    let mut user = std::process::Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(&options.path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("qemu-io is needed: install the Debian package qemu-utils");
    let mut error = None;
    for _ in 0..200 {
        error = Target::open(&options, SIZE)
            .map(|(target, _)| target.discard().unwrap())
            .err();
        if error.is_some() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    user.kill().unwrap();
    user.wait().unwrap();
    assert!(matches!(error, Some(TargetError::InUse { .. })), "{error:?}");
    Target::open(&options, SIZE).unwrap().0.discard().unwrap();
}

#[test]
fn discarding_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    complete(&options).discard().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn links_and_strange_things_are_never_followed() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let victim = dir.path().join("victim");
    std::fs::write(&victim, b"precious").unwrap();
    for name in [partial(&options), log(&options)] {
        symlink(&victim, &name).unwrap();
        assert!(Target::open(&options, SIZE).is_err());
        std::fs::remove_file(&name).unwrap();
        std::fs::hard_link(&victim, &name).unwrap();
        assert!(Target::open(&options, SIZE).is_err());
        std::fs::remove_file(&name).unwrap();
        std::fs::create_dir(&name).unwrap();
        assert!(Target::open(&options, SIZE).is_err());
        std::fs::remove_dir(&name).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        let _ = std::fs::remove_file(log(&options));
    }
    let real = dir.path().join("real");
    std::fs::create_dir(&real).unwrap();
    symlink(&real, dir.path().join("link")).unwrap();
    let mut linked = options.clone();
    linked.path = dir.path().canonicalize().unwrap().join("link/disk.raw");
    assert!(matches!(open_error(&linked), TargetError::Refused { .. }));
    linked.path = real.join("absent/disk.raw");
    assert!(matches!(open_error(&linked), TargetError::Io { .. }));
    linked.path = "relative.raw".into();
    assert!(matches!(open_error(&linked), TargetError::Refused { .. }));
    symlink(&victim, &options.path).unwrap();
    assert!(matches!(open_error(&options), TargetError::Exists { .. }));
}

#[test]
fn two_sessions_cannot_write_the_same_copy() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let target = complete(&options);
    assert!(matches!(open_error(&options), TargetError::InUse { .. }));
    drop(target);
    // Another disk, and another job with the same short name.
    let other = TargetOptions {
        disk: DiskIndex(1),
        ..options.clone()
    };
    let text = options.job.to_string();
    let twin: JobId = format!("{}{:024x}", &text[..8], 1).parse().unwrap();
    let twin = TargetOptions {
        job: twin,
        ..options.clone()
    };
    for other in [other, twin] {
        assert!(matches!(open_error(&other), TargetError::InUse { .. }));
    }
    assert_eq!(Target::open(&options, SIZE).unwrap().1.bytes(), 0);
}

#[test]
fn a_log_belongs_to_one_very_file() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    complete(&options).flush().unwrap();
    assert_eq!(Target::open(&options, SIZE).unwrap().1.bytes(), SIZE);
    // Another file under the same name, perhaps with the same inode number.
    std::fs::remove_file(partial(&options)).unwrap();
    std::fs::write(partial(&options), vec![0; SIZE as usize]).unwrap();
    assert_eq!(Target::open(&options, SIZE).unwrap().1.bytes(), 0);
    complete(&options).flush().unwrap();
    // Another length.
    std::fs::OpenOptions::new()
        .write(true)
        .open(partial(&options))
        .unwrap()
        .set_len(SIZE - 1)
        .unwrap();
    assert_eq!(Target::open(&options, SIZE).unwrap().1.bytes(), 0);
    complete(&options).flush().unwrap();
    // No file at all.
    std::fs::remove_file(partial(&options)).unwrap();
    assert_eq!(Target::open(&options, SIZE).unwrap().1.bytes(), 0);
    complete(&options).flush().unwrap();
    // A disk of another size, another format.
    let (target, have) = Target::open(&options, SIZE + 1).unwrap();
    assert_eq!(have.bytes(), 0);
    drop((target, have));
    complete(&options).flush().unwrap();
    let qcow2 = TargetOptions {
        format: TargetFormat::Qcow2,
        ..options
    };
    assert_eq!(Target::open(&qcow2, SIZE).unwrap().1.bytes(), 0);
}

#[test]
fn a_file_that_took_the_copys_name_is_not_promoted() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let target = complete(&options);
    std::fs::remove_file(partial(&options)).unwrap();
    std::fs::write(partial(&options), vec![0; SIZE as usize]).unwrap();
    assert!(matches!(
        target.promote().err().unwrap(),
        TargetError::Refused { .. }
    ));
    assert!(!options.path.exists());
}

#[test]
fn a_crash_between_rename_and_the_logs_removal_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    complete(&options).flush().unwrap();
    std::fs::rename(partial(&options), &options.path).unwrap();
    assert!(matches!(
        open_error(&options),
        TargetError::AlreadyPromoted { .. }
    ));
    assert!(!log(&options).exists());
    assert!(matches!(open_error(&options), TargetError::Exists { .. }));
}

#[test]
fn an_incomplete_copy_is_neither_verified_nor_promoted() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let (target, _) = Target::open(&options, ODD_SIZE).unwrap();
    let model = Model::random(&mut StdRng::seed_from_u64(3), ODD_SIZE);
    model.send(&target, (1, 0), |leaf| leaf != 11);
    assert!(matches!(
        target.verify(1, &|_| Continue(())),
        Err(TargetError::Incomplete { leaf: 11 })
    ));
    assert!(matches!(
        target.promote(),
        Err(TargetError::Incomplete { leaf: 11 })
    ));
    assert!(!options.path.exists() && partial(&options).exists());
}

#[test]
fn reading_back_ends_when_nobody_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let target = complete(&options);
    let told = std::cell::Cell::new(0);
    let give_up = |bytes| {
        told.set(bytes);
        Break(())
    };
    assert!(matches!(
        target.verify(1, &give_up),
        Err(TargetError::Stopped { .. })
    ));
    assert_eq!(told.get(), LEAF, "it went on after it was told to end");
    assert_eq!(
        target.verify(2, &|_| Continue(())).unwrap(),
        model().digest(),
        "the copy is as good as before"
    );
}

#[test]
fn a_cut_commit_is_finished_once_and_believes_no_other_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), "disk.raw");
    options.overwrite = true;
    std::fs::write(&options.path, "the old image").unwrap();
    let target = complete(&options);
    target.flush().unwrap();
    let known = target.identity();
    drop(target);
    // The crash came before the rename, then once more after it; the image is in use by then, and was written to.
    finish_promotion(&options, SIZE, &known).unwrap();
    assert_eq!(std::fs::read(&options.path).unwrap(), model().bytes());
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(&options.path);
    file.unwrap().write_all_at(b"booted", 0).unwrap();
    finish_promotion(&options, SIZE, &known).unwrap();
    assert_eq!(&std::fs::read(&options.path).unwrap()[..6], b"booted");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_copy_that_vanished_during_the_commit_is_not_mistaken_for_the_old_image() {
    for damage in ["partial", "log"] {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path(), "disk.raw");
        options.overwrite = true;
        std::fs::write(&options.path, "the old image").unwrap();
        let target = complete(&options);
        target.flush().unwrap();
        let known = target.identity();
        drop(target);
        match damage {
            "partial" => std::fs::remove_file(partial(&options)).unwrap(),
            _ => std::fs::write(log(&options), "").unwrap(),
        }
        assert!(matches!(
            finish_promotion(&options, SIZE, &known),
            Err(TargetError::Refused { .. })
        ));
        assert_eq!(std::fs::read(&options.path).unwrap(), b"the old image");
    }
}

#[test]
fn a_leaf_that_reads_otherwise_is_named() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let target = complete(&options);
    target.verify(2, &|_| Continue(())).unwrap();
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(partial(&options))
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, LEAF + 77).unwrap();
    file.write_all_at(&[byte[0] ^ 1], LEAF + 77).unwrap();
    assert!(matches!(
        target.verify(2, &|_| Continue(())),
        Err(TargetError::Differs { leaf: 1, .. })
    ));
}

#[test]
fn an_empty_disk_and_absurd_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    assert!(Target::open(&options, u64::MAX).is_err());
    let (target, _) = Target::open(&options, 0).unwrap();
    let empty = Model {
        size: 0,
        leaves: Vec::new(),
    };
    assert!(apply(&target, (1, 0), 0, &[]).is_err());
    assert_eq!(target.verify(1, &|_| Continue(())).unwrap(), empty.digest());
    assert_eq!(target.promote().unwrap().metadata().unwrap().len(), 0);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// What costs nothing at the source must cost nothing here.
#[test]
fn a_huge_sparse_disk_is_quick_and_small() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let size = 1 << 40;
    let leaves = size / LEAF;
    let (target, _) = Target::open(&options, size).unwrap();
    let zeros = |first: u64, end: u64| {
        let record = LeafRecord {
            first,
            digests: Vec::new(),
            count: end - first,
        };
        let extent = Extent::between(first * LEAF, end * LEAF);
        target
            .apply(Attempt(1), Round(0), &record, &[Piece::Zero(extent)])
            .unwrap();
    };
    let data = Leaf {
        stretches: vec![LEAF as usize],
        bytes: vec![3; LEAF as usize],
    };
    let places = [0, leaves / 3, leaves - 1];
    zeros(1, places[1]);
    zeros(places[1] + 1, places[2]);
    let mut digest = DiskDigest::new(size);
    for leaf in places {
        apply(&target, (1, 0), leaf, std::slice::from_ref(&data)).unwrap();
        digest.leaf(leaf, Digest::of(&data.bytes)).unwrap();
    }
    digest.zeros(1, places[1] - 1).unwrap();
    digest.zeros(places[1] + 1, places[2] - places[1] - 1).unwrap();
    target.flush().unwrap();
    drop(target);
    let (target, have) = Target::open(&options, size).unwrap();
    let have: Vec<_> = have.map(Result::unwrap).collect();
    assert_eq!(have.len(), 5);
    assert_eq!(
        have[1],
        Durable::Zeros {
            first: 1,
            count: places[1] - 1
        }
    );
    assert_eq!(
        target.verify(2, &|_| Continue(())).unwrap(),
        digest.finish().unwrap()
    );
    let path = target.promote().unwrap();
    assert_eq!(path.metadata().unwrap().len(), size);
    assert!(path.metadata().unwrap().blocks() * 512 < 8 * LEAF);
}
