//! Block devices as targets: old content never shows through, what is in use is refused. Uses loop devices, so it needs root.

#![allow(clippy::unwrap_used)] // a failed step fails the test

mod apply_model;

use std::io::Write;
use std::ops::ControlFlow::Continue;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use apply_model::{Leaf, Model, options};
use longhaul_agent::disk::apply::{Target, TargetError, TargetFormat, TargetOptions, finish_promotion};
use longhaul_common::digest::LEAF;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// A loop device over a temporary file, gone when dropped.
struct Loop {
    device: PathBuf,
    backing: tempfile::NamedTempFile,
}

impl Loop {
    /// Full of old content. `None` where this process may not make loop devices.
    fn full(size: u64) -> Option<Self> {
        Self::over(&vec![0xa5; size as usize])
    }

    fn over(content: &[u8]) -> Option<Self> {
        let mut backing = tempfile::NamedTempFile::new().unwrap();
        backing.write_all(content).unwrap();
        backing.as_file().sync_all().unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(backing.path())
            .output();
        let output = output.expect("losetup is needed: install the Debian package mount");
        if !output.status.success() {
            assert!(
                !rustix::process::getuid().is_root(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            println!("skipped: loop devices need root");
            return None;
        }
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Some(Self { device, backing })
    }

    fn options(&self, state_dir: &Path) -> TargetOptions {
        TargetOptions {
            path: self.device.clone(),
            ..options(state_dir, "unused")
        }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.backing.path()).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

#[test]
fn skipped_ranges_read_as_zeros_over_old_content() {
    for preallocate in [false, true] {
        let state = tempfile::tempdir().unwrap();
        // Larger than the disk, whose size is no whole number of sectors.
        let size = 6 * LEAF + 1234;
        let Some(device) = Loop::full(8 * LEAF) else {
            return;
        };
        let mut options = TargetOptions {
            preallocate,
            ..device.options(state.path())
        };
        assert!(matches!(
            Target::open(&options, size),
            Err(TargetError::Refused { .. })
        ));
        assert!(std::fs::read_dir(state.path()).unwrap().next().is_none());
        options.overwrite = true;
        let (target, have) = Target::open(&options, size).unwrap();
        assert_eq!((have.bytes(), target.notes().len()), (0, 1));
        let mut model = Model::random(&mut StdRng::seed_from_u64(51), size);
        model.leaves[1] = Leaf::zeros(LEAF as usize);
        model.leaves[6] = Leaf::zeros(1234);
        model.send(&target, (1, 0), |leaf| leaf < 4);
        target.flush().unwrap();
        assert!(matches!(
            Target::open(&options, size),
            Err(TargetError::InUse { .. })
        ));
        drop(target);
        // Resumed, without being told to overwrite again.
        options.overwrite = false;
        let (target, have) = Target::open(&options, size).unwrap();
        assert_eq!(have.bytes(), 4 * LEAF);
        model.send(&target, (2, 0), |leaf| leaf >= 4);
        assert_eq!(target.verify(2, &|_| Continue(())).unwrap(), model.digest());
        // The commit is cut, before and after this device was done: it is not blank now, and need not be.
        let known = target.identity();
        drop(target);
        finish_promotion(&options, size, &known).unwrap();
        finish_promotion(&options, size, &known).unwrap();
        let content = device.content();
        assert!(content[..size as usize] == model.bytes());
        assert!(
            content[size as usize..].iter().all(|byte| *byte == 0xa5),
            "the rest is left alone"
        );
        assert!(std::fs::read_dir(state.path()).unwrap().next().is_none());
    }
}

#[test]
fn what_is_in_use_or_too_small_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let Some(device) = Loop::over(&vec![0; 16 << 20]) else {
        return;
    };
    let options = TargetOptions {
        overwrite: true,
        ..device.options(state.path())
    };
    let error = Target::open(&options, (16 << 20) + 1).err().unwrap();
    assert!(matches!(error, TargetError::TooSmall { .. }), "{error}");
    let qcow2 = TargetOptions {
        format: TargetFormat::Qcow2,
        ..options.clone()
    };
    assert!(matches!(
        Target::open(&qcow2, LEAF),
        Err(TargetError::Refused { .. })
    ));
    // QEMU has it open. It leaves where it meets our lock while it starts: then it is asked again.
    let qemu = || {
        Command::new("qemu-io")
            .args(["-f", "raw"])
            .arg(&device.device)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("qemu-io is needed: install the Debian package qemu-utils")
    };
    let mut user = qemu();
    let mut error = None;
    for _ in 0..300 {
        error = Target::open(&options, LEAF)
            .map(|(target, _)| target.discard().unwrap())
            .err();
        if error.is_some() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        if user.try_wait().unwrap().is_some() {
            user = qemu();
        }
    }
    user.kill().unwrap();
    user.wait().unwrap();
    assert!(matches!(error, Some(TargetError::InUse { .. })), "{error:?}");
}

#[test]
fn a_device_with_a_file_system_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let Some(device) = Loop::over(&vec![0; 16 << 20]) else {
        return;
    };
    let options = TargetOptions {
        overwrite: true,
        ..device.options(state.path())
    };
    // Mounted.
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&device.device)
        .status();
    assert!(
        made.expect("mkfs.ext4 is needed: install the Debian package e2fsprogs")
            .success()
    );
    let place = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .arg(&device.device)
        .arg(place.path())
        .status()
        .unwrap()
        .success();
    let error = Target::open(&options, LEAF).err();
    let _ = Command::new("umount").arg(place.path()).status();
    assert!(mounted);
    let error = error.unwrap().to_string();
    assert!(
        error.contains("in use") && error.contains(place.path().to_str().unwrap()),
        "{error}"
    );
    // A device that holds a file system is refused unless overwriting is allowed, a blank one is not.
    let careful = TargetOptions {
        overwrite: false,
        ..options
    };
    assert!(matches!(
        Target::open(&careful, LEAF),
        Err(TargetError::Refused { .. })
    ));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&device.device)
        .unwrap();
    file.write_all_at(&vec![0; 16 << 20], 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let (target, have) = Target::open(&careful, LEAF).unwrap();
    assert_eq!(have.bytes(), 0);
    target.discard().unwrap();
    assert!(std::fs::read_dir(state.path()).unwrap().next().is_none());
}
