//! qcow2 targets: equal to the raw copy, resumed after a crash, sparse where zero. Needs the Debian package qemu-utils.

#![allow(clippy::unwrap_used)] // a failed step fails the test

mod apply_model;

use std::ops::ControlFlow::Continue;
use std::process::Command;

use apply_model::{Leaf, Model, ODD_SIZE, log, options, partial};
use longhaul_agent::disk::apply::{Target, TargetError, TargetFormat, TargetOptions};
use longhaul_common::digest::LEAF;
use rand::SeedableRng;
use rand::rngs::StdRng;

fn qcow2(dir: &std::path::Path, name: &str) -> TargetOptions {
    TargetOptions {
        format: TargetFormat::Qcow2,
        ..options(dir, name)
    }
}

fn qemu_img(args: &[&str]) -> (bool, String) {
    let output = Command::new("qemu-img").args(args).output();
    let output = output.expect("qemu-img is needed: install the Debian package qemu-utils");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

#[test]
fn it_equals_the_raw_copy() {
    for preallocate in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let size = 20 * LEAF + 512;
        let mut model = Model::random(&mut StdRng::seed_from_u64(11), size);
        model.leaves[7] = Leaf::zeros(LEAF as usize);
        let raw = options(dir.path(), "disk.raw");
        let qcow2 = TargetOptions {
            preallocate,
            ..qcow2(dir.path(), "disk.qcow2")
        };
        let mut paths = Vec::new();
        for options in [raw, qcow2] {
            let (target, _) = Target::open(&options, size).unwrap();
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let (target, model) = (&target, &model);
                    scope.spawn(move || model.send(target, (1, 0), |leaf| leaf % 3 == thread));
                }
            });
            // Over old content: zeros must be zeros.
            model.leaves[3] = Leaf::zeros(LEAF as usize);
            model.send(&target, (1, 1), |leaf| leaf == 3 || leaf == 7);
            assert_eq!(target.verify(2, &|_| Continue(())).unwrap(), model.digest());
            paths.push(target.promote().unwrap());
            assert!(!partial(&options).exists() && !log(&options).exists());
        }
        let (raw, qcow2) = (paths[0].to_str().unwrap(), paths[1].to_str().unwrap());
        let (equal, said) = qemu_img(&["compare", "-s", "-f", "raw", "-F", "qcow2", raw, qcow2]);
        // Strict comparison also compares what is allocated; that holds where nothing was reserved.
        assert!(
            equal || preallocate || qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw, qcow2]).0,
            "{said}"
        );
        let (plain, said) = qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw, qcow2]);
        assert!(plain, "{said}");
        let (sound, said) = qemu_img(&["check", "-f", "qcow2", qcow2]);
        assert!(sound, "{said}");
    }
}

#[test]
fn it_is_resumed_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let options = qcow2(dir.path(), "disk.qcow2");
    let model = Model::random(&mut StdRng::seed_from_u64(12), ODD_SIZE);
    let (target, _) = Target::open(&options, ODD_SIZE).unwrap();
    model.send(&target, (1, 0), |leaf| leaf < 5);
    target.flush().unwrap();
    model.send(&target, (1, 0), |leaf| (5..8).contains(&leaf));
    drop(target);
    let (target, have) = Target::open(&options, ODD_SIZE).unwrap();
    assert_eq!(have.bytes(), 5 * LEAF);
    model.send(&target, (2, 0), |leaf| leaf >= 5);
    assert_eq!(target.verify(2, &|_| Continue(())).unwrap(), model.digest());
    let path = target.promote().unwrap();
    let (sound, said) = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(sound, "{said}");
    // An odd size is rounded up to whole sectors.
    assert!(
        qemu_img(&["info", path.to_str().unwrap()])
            .1
            .contains(&format!("({} bytes)", ODD_SIZE.next_multiple_of(512)))
    );
}

#[test]
fn a_killed_server_costs_no_durable_leaf() {
    let dir = tempfile::tempdir().unwrap();
    let options = qcow2(dir.path(), "disk.qcow2");
    let model = Model::random(&mut StdRng::seed_from_u64(13), ODD_SIZE);
    let (target, _) = Target::open(&options, ODD_SIZE).unwrap();
    model.send(&target, (1, 0), |leaf| leaf < 9);
    target.flush().unwrap();
    model.send(&target, (1, 0), |leaf| leaf == 9);
    let pid_file = std::fs::read_dir(dir.path())
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let pid_file = pid_file
        .filter(|path| path.extension().is_some_and(|end| end == "pid"))
        .last()
        .unwrap();
    let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    assert!(matches!(target.flush(), Err(TargetError::Io { .. })));
    assert!(matches!(target.flush(), Err(TargetError::Failed { .. })));
    drop(target);
    let (target, have) = Target::open(&options, ODD_SIZE).unwrap();
    assert_eq!(have.bytes(), 9 * LEAF);
    model.send(&target, (2, 0), |leaf| leaf >= 9);
    assert_eq!(target.verify(2, &|_| Continue(())).unwrap(), model.digest());
    let path = target.promote().unwrap();
    let (sound, said) = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(sound, "{said}");
}

#[test]
fn a_missing_program_is_named_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    for missing in ["qemu-img", "qemu-nbd"] {
        let mut options = qcow2(dir.path(), "disk.qcow2");
        match missing {
            "qemu-img" => options.qemu_img = "/none/qemu-img".into(),
            _ => options.qemu_nbd = "/none/qemu-nbd".into(),
        }
        let error = Target::open(&options, LEAF).err().unwrap().to_string();
        assert!(error.contains(missing) && error.contains("qemu-utils"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
