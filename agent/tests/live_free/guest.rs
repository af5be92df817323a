//! A file system in use: an image, a loop mount, and threads that create, write, fsync and delete files as fast as they can.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use longhaul_agent::disk::ReadAt;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tempfile::TempDir;

/// Runs a program that must succeed with one of `codes`.
pub(crate) fn run(program: &str, args: &[&str], codes: &[i32]) -> Output {
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap_or_else(|e| {
            panic!("{program} cannot run ({e}): install the Debian packages e2fsprogs, xfsprogs, mount")
        });
    assert!(
        output.status.code().is_some_and(|code| codes.contains(&code)),
        "{program} {args:?} ended with {:?}:\n{}{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output
}

/// Mounts an image. Tests that run at the same time may take the loop device that mount(8) chose: then once more.
fn attach(image: &Path, at: &Path, options: &str) {
    let words = ["-o", options, image.to_str().unwrap(), at.to_str().unwrap()];
    for _ in 0..8 {
        let output = run("mount", &words, &[0, 32]);
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            return;
        }
        assert!(
            why.contains("busy") || why.contains("failed to setup loop"),
            "{why}"
        );
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    panic!("no loop device for {}", image.display());
}

/// A file as a disk.
pub(crate) struct FileDisk {
    file: File,
    size: u64,
}

impl FileDisk {
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        Self { file, size }
    }
}

impl ReadAt for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

/// An image, mounted until it is dropped.
pub(crate) struct Guest {
    dir: TempDir,
    mounted: bool,
    ended: bool,
    is_xfs: bool,
}

impl Guest {
    /// Makes a file system with `mkfs` and its arguments on an image of `mib` MiB, and mounts it.
    pub(crate) fn boot(mkfs: &str, mib: u64, options: &str) -> Self {
        let guest = Self::make(mkfs, mib);
        guest.mount(options)
    }

    pub(crate) fn make(mkfs: &str, mib: u64) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("longhaul-live-")
            .tempdir()
            .unwrap();
        let guest = Self {
            dir,
            mounted: false,
            ended: false,
            is_xfs: mkfs.contains("xfs"),
        };
        File::create(guest.image()).unwrap().set_len(mib << 20).unwrap();
        let image = guest.image();
        let mut words: Vec<&str> = mkfs.split_whitespace().collect();
        words.push(image.to_str().unwrap());
        run(words[0], &words[1..], &[0]);
        fs::create_dir(guest.root()).unwrap();
        guest
    }

    pub(crate) fn mount(mut self, options: &str) -> Self {
        let options = match options {
            "" => "loop".to_owned(),
            more => format!("loop,{more}"),
        };
        let (image, root) = (self.image(), self.root());
        attach(&image, &root, &options);
        self.mounted = true;
        self
    }

    /// The disk; once shut down, what it was at the end.
    pub(crate) fn image(&self) -> PathBuf {
        let name = if self.ended { "image-at-end" } else { "image" };
        self.dir.path().join(name)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub(crate) fn disk(&self) -> FileDisk {
        FileDisk::open(&self.image())
    }

    pub(crate) fn fsfreeze(&self, how: &str) {
        run("fsfreeze", &[how, self.root().to_str().unwrap()], &[0]);
    }

    pub(crate) fn shut_down(&mut self) {
        if std::mem::take(&mut self.mounted) {
            // An unmount is complete only when no other mount namespace of the machine holds a copy of the mount: what counts as
            // the end is a copy from while it is frozen, when everything is in its place.
            // A frozen XFS has a log to replay, so that its image is taken as the unmount leaves it.
            if !self.is_xfs {
                self.fsfreeze("-f");
                fs::copy(self.image(), self.dir.path().join("image-at-end")).unwrap();
                self.fsfreeze("-u");
                self.ended = true;
            }
            let root = self.root();
            let mut tries = 0;
            while !Command::new("umount").arg(&root).status().unwrap().success() {
                tries += 1;
                assert!(tries < 50, "{} cannot be unmounted", root.display());
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }

    /// Starts `threads` threads that create, write, fsync and delete files as fast as they can.
    pub(crate) fn work(&self, seed: u64, threads: u64) -> Load {
        let (stop, syncs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        let work = |n: u64| {
            let dir = self.root().join(format!("worker-{n}"));
            let rng = StdRng::seed_from_u64(seed ^ n << 32);
            let worker = Worker {
                rng,
                stop: stop.clone(),
                syncs: syncs.clone(),
            };
            std::thread::spawn(move || worker.churn(&dir))
        };
        Load {
            threads: (0..threads).map(work).collect(),
            stop,
            syncs,
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg("-l").arg(self.root()).status();
        }
    }
}

/// Threads at work.
pub(crate) struct Load {
    threads: Vec<JoinHandle<u64>>,
    stop: Arc<AtomicBool>,
    syncs: Arc<AtomicBool>,
}

impl Load {
    /// Whether files are fsynced. While they are not, transactions grow old and their data is on the disk long before them.
    pub(crate) fn syncs(&self, on: bool) {
        self.syncs.store(on, Ordering::Relaxed);
    }

    /// Ends the work; how many files were written.
    pub(crate) fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    }
}

struct Worker {
    rng: StdRng,
    stop: Arc<AtomicBool>,
    syncs: Arc<AtomicBool>,
}

impl Worker {
    fn churn(mut self, dir: &Path) -> u64 {
        fs::create_dir_all(dir).unwrap();
        let (mut names, mut next) = (Vec::new(), 0);
        while !self.stop.load(Ordering::Relaxed) {
            let path = dir.join(format!("file-{next}"));
            next += 1;
            if self.write(&path).is_err() {
                // Full: make room.
                let _ = fs::remove_file(&path);
                for path in names.drain(..names.len() / 2) {
                    fs::remove_file(path).unwrap();
                }
                continue;
            }
            names.push(path);
            if names.len() > 120 || self.rng.random_bool(0.35) {
                let gone = names.swap_remove(self.rng.random_range(0..names.len()));
                fs::remove_file(gone).unwrap();
            }
        }
        next
    }

    fn write(&mut self, path: &Path) -> io::Result<()> {
        let rng = &mut self.rng;
        let len = match rng.random_range(0..10) {
            0 => rng.random_range(0..1 << 20),
            1..4 => rng.random_range(0..200_000),
            _ => rng.random_range(0..20_000),
        };
        if rng.random_range(0..3) == 0 {
            return write_past_cache(path, len, rng);
        }
        let mut content = vec![0; len];
        rng.fill_bytes(&mut content);
        let mut file = File::create(path)?;
        file.write_all(&content)?;
        match rng.random_range(0..3) {
            0 if self.syncs.load(Ordering::Relaxed) => file.sync_all(),
            _ => Ok(()),
        }
    }
}

/// The content is on the disk when this returns, while the transaction that allocated its blocks still runs.
fn write_past_cache(path: &Path, len: usize, rng: &mut StdRng) -> io::Result<()> {
    const ALIGN: usize = 4096;
    let len = len.next_multiple_of(ALIGN);
    let mut buffer = vec![0; len + ALIGN];
    let skip = buffer.as_ptr().align_offset(ALIGN);
    rng.fill_bytes(&mut buffer[skip..skip + len]);
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(path)?;
    file.write_all(&buffer[skip..skip + len])
}

/// Free ranges as dumpe2fs lists them, in bytes.
///
/// It ends with an error, after listing them, where a checksum is wrong, as in a copy of a disk in use.
pub(crate) fn dumpe2fs(path: &Path) -> Vec<Range<u64>> {
    let any: Vec<i32> = (0..256).collect();
    let output = run("dumpe2fs", &[path.to_str().unwrap()], &any);
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map(|rest| rest.trim().parse::<u64>().unwrap())
    };
    let (block, blocks) = (value("Block size:").unwrap(), value("Block count:").unwrap());
    // Of a run of clusters, the first block of the first and of the last one are listed.
    let cluster = value("Cluster size:").unwrap_or(block) / block;
    let lists = text
        .lines()
        .filter_map(|line| line.strip_prefix("  Free blocks: "));
    lists
        .flat_map(|list| list.split(", "))
        .filter(|run| !run.is_empty())
        .map(|run| {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
            first * block..(last + cluster).min(blocks) * block
        })
        .collect()
}

/// Mounts two images read-only and compares every file of theirs.
pub(crate) fn same_files(one: &Path, other: &Path, options: &str) {
    let mounts = [one, other].map(|image| {
        let at = image.with_extension("check");
        fs::create_dir_all(&at).unwrap();
        let options = format!("loop,ro{options}");
        attach(image, &at, &options);
        at
    });
    let output = Command::new("diff")
        .arg("-r")
        .arg("--no-dereference")
        .args(&mounts)
        .output()
        .unwrap();
    for at in &mounts {
        run("umount", &[at.to_str().unwrap()], &[0]);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "files differ at the target: {}",
        text.lines().take(5).collect::<String>()
    );
}
