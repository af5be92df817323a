//! File systems that the kernel itself wrote: used, emptied, grown, unmounted, or copied while they were mounted.
//!
//! Mounting needs root, loop devices and XFS in the kernel. Where one is missing these tests say so and check nothing; `clean`
//! and `dirty` cover the same ground by other means.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use longhaul_agent::disk::fs::Unproven;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::clean::require_exact;
use super::image::{Image, MIB, SMALL, succeed};
use super::volume::{FileVolume, scan};
use super::{each_seed, oracle};

fn can_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    let xfs = fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.contains("\txfs\n"));
    let able = root && xfs && Path::new("/dev/loop-control").exists();
    if !able {
        eprintln!("not run: mounting needs root, /dev/loop-control and XFS in the kernel");
    }
    able
}

/// A mount that ends with the value.
struct Mount {
    at: PathBuf,
}

impl Mount {
    fn new(image: &Path, options: &str) -> Self {
        let at = image.with_extension("mount");
        fs::create_dir_all(&at).expect("a mount point");
        let options = format!("loop,{options}");
        succeed(
            Command::new("mount")
                .args(["-t", "xfs", "-o", &options])
                .arg(image)
                .arg(&at),
        );
        Self { at }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = succeeds_soon(Command::new("umount").arg(&self.at));
        assert!(
            done || std::thread::panicking(),
            "{} cannot be unmounted",
            self.at.display()
        );
    }
}

/// A tool that another test starts in this moment may hold our files for as long as it takes to begin: try again.
fn succeeds_soon(command: &mut Command) -> bool {
    (0..100).any(|_| {
        let done = command.output().is_ok_and(|output| output.status.success());
        if !done {
            std::thread::park_timeout(Duration::from_millis(20));
        }
        done
    })
}

/// Makes, changes and deletes files and directories; ends with many holes in the used space.
fn churn(root: &Path, rng: &mut StdRng, steps: usize) {
    let mut files: Vec<PathBuf> = Vec::new();
    for step in 0..steps {
        let victim = files.choose(rng).cloned();
        match (rng.random_range(0..10), victim) {
            (0..=4, _) | (_, None) => {
                let directory = root.join(format!("d{}", rng.random_range(0..20)));
                fs::create_dir_all(&directory).unwrap();
                let path = directory.join(format!("{step}-{}", "x".repeat(rng.random_range(0..60))));
                let mut content = vec![0; rng.random_range(0..60_000)];
                rng.fill(content.as_mut_slice());
                fs::write(&path, content).unwrap();
                files.push(path);
            }
            (5..=6, Some(path)) => {
                fs::remove_file(&path).unwrap();
                files.retain(|file| *file != path);
            }
            (7, Some(path)) => File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(rng.random_range(0..9_000))
                .unwrap(),
            (8, Some(path)) => {
                let file = File::options().write(true).open(path).unwrap();
                let far = rng.random_range(0..4 * MIB);
                file.write_all_at(b"far away", far).unwrap();
                file.sync_all().unwrap();
            }
            (_, Some(path)) => {
                let copy = root.join(format!("copy-{step}"));
                succeed(Command::new("cp").args(["--reflink=auto"]).arg(&path).arg(&copy));
                files.push(copy);
            }
        }
    }
}

#[test]
fn what_the_kernel_left_behind_is_read_exactly_and_every_file_survives() {
    if !can_mount() {
        return;
    }
    each_seed("mounted file systems", 2, |rng| {
        let meta = [
            "rmapbt=1,reflink=1",
            "rmapbt=0,reflink=1",
            "rmapbt=1,reflink=0,finobt=0,inobtcount=0",
        ];
        let meta = meta.choose(rng).unwrap();
        let block = format!("size={}", [1024, 2048, 4096].choose(rng).unwrap());
        let log = ["version=2", "su=32k", "su=256k"].choose(rng).unwrap();
        eprintln!("mkfs.xfs -m {meta} -b {block} -l {log}");
        let image = Image::fresh(
            SMALL + 100 * MIB,
            &["-m", meta, "-b", &block, "-d", "agcount=3", "-l", log],
        );
        for _ in 0..rng.random_range(1..4) {
            let mount = Mount::new(
                &image.path,
                ["noatime", "discard", "logbsize=256k"].choose(rng).unwrap(),
            );
            let inside = mount.at.join(format!("round-{}", rng.random::<u32>()));
            fs::create_dir(&inside).unwrap();
            churn(&inside, rng, 500);
            if rng.random_bool(0.3) {
                assert!(succeeds_soon(
                    Command::new("mount").args(["-o", "remount,ro"]).arg(&mount.at)
                ));
            }
        }
        let free = require_exact(&image, 0xa5);
        let copy = image.copy_without(&free, 0);
        let (original, copied) = (Mount::new(&image.path, "ro"), Mount::new(&copy, "ro,nouuid"));
        succeed(
            Command::new("diff")
                .args(["-r", "--no-dereference"])
                .arg(&original.at)
                .arg(&copied.at),
        );
    });
}

#[test]
fn a_log_that_went_around_many_times_is_clean_after_the_unmount() {
    if !can_mount() {
        return;
    }
    let image = Image::fresh(SMALL, &["-l", "size=10m"]);
    let mut laps = Vec::new();
    for round in 0..6 {
        {
            let mount = Mount::new(&image.path, "noatime,wsync");
            let mut rng = StdRng::seed_from_u64(round);
            churn(&mount.at.join(format!("round-{round}")), &mut rng, 900);
        }
        // The first block is stamped in each lap, wherever the log ends; behind a record's signature, if one is there.
        let mut words = [0; 8];
        let first = oracle::log(&image).offset;
        File::open(&image.path)
            .unwrap()
            .read_exact_at(&mut words, first)
            .unwrap();
        let stamp = if words.starts_with(&[0xfe, 0xed, 0xba, 0xbe]) {
            4
        } else {
            0
        };
        laps.push(words[stamp + 3]);
        assert_eq!(
            scan(&image.volume()).unwrap().1,
            oracle::free(&image),
            "round {round}"
        );
    }
    assert!(laps.last() >= Some(&2), "the log never went around: {laps:?}");
}

#[test]
fn a_volume_copied_while_it_is_mounted_or_frozen_is_dirty() {
    if !can_mount() {
        return;
    }
    let image = Image::fresh(SMALL, &[]);
    let copy = image.dir.path().join("copy");
    let require_dirty = |what: &str| {
        succeed(
            Command::new("cp")
                .arg("--sparse=always")
                .arg(&image.path)
                .arg(&copy),
        );
        let result = scan(&FileVolume::open(&copy));
        assert!(
            matches!(result, Err(Unproven::NotClean { .. })),
            "{what}: {:?}",
            result.err()
        );
    };
    let mount = Mount::new(&image.path, "noatime");
    let mut file = File::create(mount.at.join("file")).unwrap();
    file.write_all(&[1; 100_000]).unwrap();
    file.sync_all().unwrap();
    require_dirty("mounted");
    succeed(Command::new("xfs_freeze").arg("-f").arg(&mount.at));
    let frozen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| require_dirty("frozen")));
    succeed(Command::new("xfs_freeze").arg("-u").arg(&mount.at));
    frozen.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    drop(file);
    drop(mount);
    require_exact(&image, 0xa5);
    // The copy was taken in the middle: replaying its log makes it clean.
    drop(Mount::new(&copy, "noatime"));
    scan(&FileVolume::open(&copy)).unwrap();
}

#[test]
fn a_volume_that_shut_down_is_dirty() {
    if !can_mount() {
        return;
    }
    let image = Image::fresh(SMALL, &[]);
    {
        let mount = Mount::new(&image.path, "noatime");
        churn(&mount.at.join("churn"), &mut StdRng::seed_from_u64(5), 200);
        succeed(
            Command::new("xfs_io")
                .args(["-x", "-c", "shutdown -f"])
                .arg(&mount.at),
        );
    }
    assert!(matches!(scan(&image.volume()), Err(Unproven::NotClean { .. })));
    drop(Mount::new(&image.path, "noatime"));
    require_exact(&image, 0xa5);
}

#[test]
fn a_grown_volume_is_read_exactly() {
    if !can_mount() {
        return;
    }
    let image = Image::fresh(SMALL, &["-d", "agcount=3"]);
    for grown in [SMALL + 33 * MIB, 3 * SMALL, 4 * SMALL + 12_288] {
        File::options()
            .write(true)
            .open(&image.path)
            .unwrap()
            .set_len(grown)
            .unwrap();
        {
            let mount = Mount::new(&image.path, "noatime");
            succeed(Command::new("xfs_growfs").arg(&mount.at));
            churn(
                &mount.at.join(format!("at-{grown}")),
                &mut StdRng::seed_from_u64(grown),
                100,
            );
        }
        require_exact(&image, 0xa5);
    }
}
