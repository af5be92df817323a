//! File systems made for a test: mke2fs, debugfs, resize2fs and e2fsck on a file of their own, never mounted.
//!
//! Owns running those tools, the content they write, and reading the result through the filter. Everything lies in a temporary
//! directory that goes with the [`Image`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::{FsSummary, Unproven, ext};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tempfile::TempDir;

/// A file as a volume.
pub(crate) struct FileVolume {
    file: File,
    size: u64,
}

impl FileVolume {
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        Self { file, size }
    }
}

impl ReadAt for FileVolume {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

/// What the filter says of a volume: free byte ranges in order, none touching the next.
pub(crate) struct Free {
    pub(crate) summary: FsSummary,
    pub(crate) ranges: Vec<Range<u64>>,
}

/// Runs the filter as its caller does; `None` where it recognises nothing.
pub(crate) fn scan(volume: &dyn ReadAt) -> Result<Option<Free>, Unproven> {
    let Some(found) = ext::probe(volume)? else {
        return Ok(None);
    };
    let mut given = Vec::new();
    let summary = found.scan(volume, &mut |extent| given.push(extent.offset()..extent.end()))?;
    assert_eq!(found.kind(), summary.kind);
    assert_eq!(found.size(), summary.size);
    assert!(summary.size <= volume.size());
    assert_eq!(
        summary.free,
        given.iter().map(|range| range.end - range.start).sum::<u64>()
    );
    let count = given.len();
    let ranges = merged(given);
    assert_eq!(
        ranges.len(),
        count,
        "touching extents are merged, none is given twice"
    );
    assert!(ranges.last().is_none_or(|range| range.end <= summary.size));
    Ok(Some(Free { summary, ranges }))
}

/// Sorted, and joined where two ranges touch; ranges that overlap fail the test.
pub(crate) fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            Some(last) => {
                assert!(last.end < range.start, "{last:?} and {range:?} overlap");
                out.push(range);
            }
            None => out.push(range),
        }
    }
    out
}

/// The first part of `ranges` that `within` does not hold.
pub(crate) fn beyond(ranges: &[Range<u64>], within: &[Range<u64>]) -> Option<Range<u64>> {
    ranges
        .iter()
        .find(|range| {
            let at = within.partition_point(|other| other.end <= range.start);
            !within
                .get(at)
                .is_some_and(|other| other.start <= range.start && range.end <= other.end)
        })
        .cloned()
}

/// Runs a program of e2fsprogs; its exit code must be one of `codes`.
pub(crate) fn run(program: &str, args: &[&str], codes: &[i32]) -> Output {
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap_or_else(|error| {
            panic!("{program} cannot run ({error}): install the Debian package e2fsprogs")
        });
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| codes.contains(&code)),
        "{program} {args:?} ended with {code:?}:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output
}

/// How many random cases a test runs.
pub(crate) fn cases(default: u64) -> u64 {
    std::env::var("LONGHAUL_FILTER_CASES").map_or(default, |text| text.parse().unwrap())
}

/// The seed of a test's random cases, printed so that a failure can be replayed.
pub(crate) fn seed(test: &str) -> u64 {
    let seed = match std::env::var("LONGHAUL_FILTER_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => rand::rng().random(),
    };
    println!("{test}: LONGHAUL_FILTER_SEED={seed}");
    seed
}

/// One file system in a file.
pub(crate) struct Image {
    dir: TempDir,
    rng: StdRng,
    files: Vec<String>,
    next: u32,
}

impl Image {
    /// Makes an empty file system of `kib` KiB with mke2fs's `options`.
    pub(crate) fn make(kib: u64, options: &str, seed: u64) -> Self {
        Self::try_make(kib, options, seed).unwrap_or_else(|why| panic!("mke2fs {options} {kib}k: {why}"))
    }

    /// The same, where mke2fs may refuse the options.
    pub(crate) fn try_make(kib: u64, options: &str, seed: u64) -> Result<Self, String> {
        let image = Self {
            dir: tempfile::Builder::new()
                .prefix("longhaul-ext-")
                .tempdir()
                .unwrap(),
            rng: StdRng::seed_from_u64(seed),
            files: Vec::new(),
            next: 0,
        };
        File::create(image.path()).unwrap().set_len(kib << 10).unwrap();
        let path = image.path();
        let mut args = vec!["-q", "-F"];
        args.extend(options.split_whitespace());
        args.push(path.to_str().unwrap());
        let output = run("mke2fs", &args, &[0, 1]);
        match output.status.success() {
            true => Ok(image),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub(crate) fn volume(&self) -> FileVolume {
        FileVolume::open(&self.path())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    /// Names of the files that are in it now.
    pub(crate) fn files(&self) -> &[String] {
        &self.files
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Runs debugfs commands that write.
    pub(crate) fn debugfs(&self, script: &str) -> String {
        let file = self.dir.path().join("script");
        std::fs::write(&file, script).unwrap();
        let path = self.path();
        let args = ["-w", "-f", file.to_str().unwrap(), path.to_str().unwrap()];
        let output = run("debugfs", &args, &[0]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Writes `count` files of up to `size_max` bytes each, and some links and directories.
    pub(crate) fn fill(&mut self, count: u32, size_max: usize) {
        let mut script = String::new();
        for _ in 0..count {
            self.next += 1;
            let number = self.next;
            let size = self.rng.random_range(0..=size_max);
            let mut content = vec![0; size];
            self.rng.fill_bytes(&mut content);
            // A hole in the middle of some.
            if self.rng.random_bool(0.3) {
                content[size / 3..size / 2].fill(0);
            }
            let source = self.dir.path().join(format!("source-{number}"));
            std::fs::write(&source, content).unwrap();
            script += &format!("write {} file-{number}\n", source.display());
            self.files.push(format!("file-{number}"));
            match number % 8 {
                0 => script += &format!("mkdir dir-{number}\n"),
                1 => script += &format!("symlink short-{number} file-{number}\n"),
                2 => script += &format!("symlink long-{number} {}\n", "x".repeat(200)),
                3 => script += &format!("mknod pipe-{number} p\n"),
                _ => {}
            }
        }
        self.debugfs(&script);
        for number in self.next - count + 1..=self.next {
            std::fs::remove_file(self.dir.path().join(format!("source-{number}"))).unwrap();
        }
    }

    /// Deletes about `share` of the files.
    pub(crate) fn delete(&mut self, share: f64) {
        let rng = &mut self.rng;
        let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.files)
            .into_iter()
            .partition(|_| rng.random_bool(share));
        self.files = kept;
        self.debugfs(&gone.iter().map(|name| format!("rm {name}\n")).collect::<String>());
    }

    /// Fills, makes holes, and fills again with larger files, which come out fragmented.
    pub(crate) fn age(&mut self, files: u32, size_max: usize) {
        self.fill(files, size_max);
        self.delete(0.5);
        self.fill(files / 4 + 1, size_max * 6);
        self.delete(0.15);
    }

    /// Lets e2fsck repair what debugfs left undone (files that did not fit), and makes sure that nothing remains.
    pub(crate) fn settle(&mut self) {
        let path = self.path();
        run("e2fsck", &["-f", "-y", path.to_str().unwrap()], &[0, 1]);
        self.check();
    }

    /// e2fsck finds nothing to repair.
    pub(crate) fn check(&self) {
        let path = self.path();
        run("e2fsck", &["-f", "-n", path.to_str().unwrap()], &[0]);
    }

    /// Grows or shrinks to `kib`; `false` where resize2fs cannot.
    pub(crate) fn resize(&mut self, kib: u64) -> bool {
        let path = self.path();
        let file = File::options().write(true).open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        file.set_len(size.max(kib << 10)).unwrap();
        let args = [path.to_str().unwrap(), &format!("{kib}K")];
        run("resize2fs", &args, &[0, 1]).status.success()
    }

    /// Free blocks as dumpe2fs lists them, in bytes.
    pub(crate) fn oracle(&self) -> Vec<Range<u64>> {
        oracle_of(&self.path())
    }
}

/// Free blocks of the file system in `path`, as dumpe2fs lists them, in bytes.
pub(crate) fn oracle_of(path: &Path) -> Vec<Range<u64>> {
    let output = run("dumpe2fs", &[path.to_str().unwrap()], &[0]);
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
    let runs = lists
        .flat_map(|list| list.split(", "))
        .filter(|run| !run.is_empty());
    merged(
        runs.map(|run| {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
            first * block..(last + cluster).min(blocks) * block
        })
        .collect(),
    )
}
