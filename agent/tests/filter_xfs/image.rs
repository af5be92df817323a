//! XFS images made by the tools of the package `xfsprogs`, without a mount: mkfs with a protofile writes files, and files are
//! deleted by spoiling their inodes, which makes `xfs_repair` free their blocks and rebuild the trees.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rand::Rng;
use rand::rngs::StdRng;
use tempfile::TempDir;

use super::volume::{FileVolume, FreeSet};

pub(crate) const MIB: u64 = 1 << 20;
/// Room for a few groups and thousands of small files.
pub(crate) const SMALL: u64 = 300 * MIB;

/// An image file, perhaps of a single group, which the tool would not trust by itself.
const REPAIR: [&str; 3] = ["-f", "-o", "force_geometry"];

pub(crate) struct Image {
    pub(crate) dir: TempDir,
    pub(crate) path: PathBuf,
}

impl Image {
    /// A fresh file system, as mkfs leaves it.
    pub(crate) fn fresh(size: u64, options: &[&str]) -> Self {
        Self::make(size, options, None)
    }

    /// With `files` files of random sizes up to `len_max` bytes.
    pub(crate) fn filled(
        size: u64,
        options: &[&str],
        files: usize,
        len_max: usize,
        rng: &mut StdRng,
    ) -> Self {
        Self::make(size, options, Some((files, len_max, rng)))
    }

    fn make(size: u64, options: &[&str], content: Option<(usize, usize, &mut StdRng)>) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("longhaul-xfs-")
            .tempdir()
            .expect("a directory");
        let path = dir.path().join("volume");
        File::create(&path)
            .and_then(|file| file.set_len(size))
            .expect("a sparse file");
        let mut command = Command::new("mkfs.xfs");
        command.arg("-q").args(options);
        // What the tools' own test suite sets, so that mkfs makes small logs, small volumes and single groups.
        command.envs([("TEST_DIR", "1"), ("TEST_DEV", "1"), ("QA_CHECK_FS", "1")]);
        if let Some((files, len_max, rng)) = content {
            command.arg("-p").arg(prototype(dir.path(), files, len_max, rng));
        }
        succeed(command.arg(&path));
        Self { dir, path }
    }

    /// Deletes each file with the given chance. Afterwards free space is in as many pieces as that leaves.
    pub(crate) fn delete_some(&self, chance: f64, rng: &mut StdRng) {
        let listing = self.db(&["sb 0", "addr rootino", "ls"]);
        let inodes = listing.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            (fields.get(2) == Some(&"regular")).then(|| fields[1].to_owned())
        });
        let doomed = inodes.filter(|_| rng.random_bool(chance));
        let commands: String = doomed
            .map(|inode| format!("inode {inode}\nwrite core.mode 0\n"))
            .collect();
        let mut command = Command::new("xfs_db");
        let mut child = command
            .arg("-x")
            .arg(&self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| missing("xfs_db", &error));
        let mut stdin = child.stdin.take().expect("its input is a pipe");
        stdin
            .write_all(commands.as_bytes())
            .expect("xfs_db reads commands");
        drop(stdin);
        assert!(child.wait().expect("xfs_db ends").success());
        succeed(Command::new("xfs_repair").args(REPAIR).arg(&self.path));
    }

    pub(crate) fn volume(&self) -> FileVolume {
        FileVolume::open(&self.path)
    }

    /// What `xfs_db` prints for these commands, read-only.
    pub(crate) fn db(&self, commands: &[&str]) -> String {
        let mut command = Command::new("xfs_db");
        command.arg("-r");
        for line in commands {
            command.arg("-c").arg(line);
        }
        let output = succeed(command.arg(&self.path));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// One number of the primary superblock.
    pub(crate) fn superblock(&self, field: &str) -> u64 {
        let text = self.db(&["sb 0", &format!("print {field}")]);
        let value = text.split_whitespace().last().expect("a value");
        let hexadecimal = value
            .strip_prefix("0x")
            .map(|digits| u64::from_str_radix(digits, 16));
        hexadecimal.unwrap_or_else(|| value.parse()).expect("a number")
    }

    /// Whether `xfs_repair` finds nothing to repair.
    pub(crate) fn require_whole(&self) {
        require_whole(&self.path);
    }

    /// A copy in which every free byte is `fill`; as a target would have it where `fill` is 0.
    pub(crate) fn copy_without(&self, free: &FreeSet, fill: u8) -> PathBuf {
        let copy = self.dir.path().join(format!("copy-{fill}"));
        succeed(
            Command::new("cp")
                .arg("--sparse=always")
                .arg(&self.path)
                .arg(&copy),
        );
        let file = File::options().write(true).open(&copy).expect("the copy opens");
        let chunk = vec![fill; MIB as usize];
        for (start, end) in free {
            let mut at = *start;
            while at < *end {
                let len = (end - at).min(MIB);
                // Far inside a long extent, nothing is to be seen that its ends do not show.
                if at < start + 4 * MIB || at + 4 * MIB > *end || fill == 0 {
                    write_unless_hole(&file, &chunk[..len as usize], at);
                }
                at += len;
            }
        }
        copy
    }
}

/// Writes, but leaves what reads as the same alone, so that zeros keep the copy sparse.
fn write_unless_hole(file: &File, bytes: &[u8], at: u64) {
    if bytes[0] == 0 {
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, at, bytes.len() as u64).expect("holes can be punched");
    } else {
        file.write_all_at(bytes, at).expect("the copy can be written");
    }
}

/// `xfs_repair -n`: exit status 0 means that there is nothing to repair.
pub(crate) fn require_whole(path: &Path) {
    succeed(Command::new("xfs_repair").arg("-n").args(REPAIR).arg(path));
}

/// Runs a tool that must succeed.
pub(crate) fn succeed(command: &mut Command) -> Output {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().unwrap_or_else(|error| missing(&name, &error));
    assert!(
        output.status.success(),
        "{command:?} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn missing(tool: &str, error: &std::io::Error) -> ! {
    panic!("{tool} does not start ({error}): install the Debian package xfsprogs")
}

/// A protofile: one directory with files whose content is random.
fn prototype(dir: &Path, files: usize, len_max: usize, rng: &mut StdRng) -> PathBuf {
    let sources: Vec<PathBuf> = (0..16)
        .map(|index| {
            let mut content = vec![0; rng.random_range(0..=len_max)];
            rng.fill(content.as_mut_slice());
            let path = dir.join(format!("source-{index}"));
            fs::write(&path, content).expect("a source file");
            path
        })
        .collect();
    let mut text = String::from("/dev/null\n0 0\nd--755 0 0\n");
    for index in 0..files {
        let source = sources[rng.random_range(0..sources.len())].display();
        text.push_str(&format!("f{index} ---644 0 0 {source}\n"));
    }
    text.push_str("$\n");
    let path = dir.join("prototype");
    fs::write(&path, text).expect("a protofile");
    path
}
