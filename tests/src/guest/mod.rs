//! Guests: disks with a real Debian on them that prove themselves when booted.
//!
//! Owns the recipes (shell scripts, kept beside this file), the cache of what they made, and booting a copy.
//! Leaves alone how a disk is moved. Promises that a cached disk is what the recipe of this build makes, that
//! two labs never build the same disk at once, and that a half-made disk is never found in the cache.

pub mod boot;
pub mod load;
pub mod workload;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::ValueEnum;

const KERNEL_RECIPE: &str = include_str!("kernel.sh");
const ROOT_RECIPE: &str = include_str!("root.sh");
const DISK_RECIPE: &str = include_str!("disk.sh");
const TINY_RECIPE: &str = include_str!("tiny.sh");
const TINY_XFS_RECIPE: &str = include_str!("tiny-xfs.sh");
const TINY_NTFS_RECIPE: &str = include_str!("tiny-ntfs.sh");

/// What a recipe mounts goes away with it, however it ends: a cache is never cleared through a mount.
const PRIVATE_MOUNTS: [&str; 4] = ["unshare", "--mount", "--propagation", "private"];

/// Which disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// 1 GiB with 60 MB of files and 250 MB of deleted ones and no system: for guests that only run a
    /// workload
    Tiny,
    /// 1 GiB with a minimal Debian and about 500 MB of deleted files
    Small,
    /// 4 GiB with python3, redis, git and perl, 1.1 GB of deleted files and duplicates: the disk of the
    /// standard run
    Standard,
}

impl Kind {
    fn packages(self) -> &'static str {
        match self {
            Self::Tiny | Self::Small => "",
            Self::Standard => "python3,redis-server,git,perl",
        }
    }

    fn size_mib(self) -> u32 {
        match self {
            Self::Tiny | Self::Small => 1024,
            Self::Standard => 4096,
        }
    }

    fn deleted_copies(self) -> u32 {
        match self {
            Self::Tiny => 0,
            Self::Small => 4,
            Self::Standard => 5,
        }
    }
}

/// The file system of a guest's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Fs {
    #[default]
    Ext4,
    /// For the tiny disk only
    Xfs,
    /// For the tiny disk only; mounted with ntfs-3g, and so without a journal and without a freeze
    Ntfs,
}

impl Fs {
    /// As mount(8) calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Ntfs => "ntfs",
        }
    }
}

/// A kernel and an initial RAM disk that boot such disks.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub vmlinuz: PathBuf,
    pub initrd: PathBuf,
}

/// The disk of a kind, from the cache or made now; `say` hears what is being done.
///
/// # Errors
/// A sentence with the last words of the recipe that failed.
pub fn disk(kind: Kind, say: &dyn Fn(&str)) -> io::Result<PathBuf> {
    if kind == Kind::Tiny {
        return tiny(Fs::Ext4, say);
    }
    let packages = kind.packages();
    let root = cached(
        "root.tar",
        &key(&[ROOT_RECIPE, packages]),
        say,
        "a small Debian root",
        |out, work| {
            let words = [&PRIVATE_MOUNTS[..], &["sh", "-c", ROOT_RECIPE, "root.sh"]].concat();
            recipe(&words, &[out.as_os_str(), work.as_os_str(), packages.as_ref()])
        },
    )?;
    let (size, copies) = (kind.size_mib().to_string(), kind.deleted_copies().to_string());
    let key = key(&[ROOT_RECIPE, packages, DISK_RECIPE, &size, &copies]);
    cached(
        "disk.raw",
        &key,
        say,
        "its disk, with files written and deleted",
        |out, work| {
            let words = [&PRIVATE_MOUNTS[..], &["sh", "-c", DISK_RECIPE, "disk.sh"]].concat();
            let (out, work) = (out.as_os_str(), work.as_os_str());
            recipe(
                &words,
                &[out, work, root.as_os_str(), size.as_ref(), copies.as_ref()],
            )
        },
    )
}

/// The tiny disk with this file system, from the cache or made now.
///
/// # Errors
/// A sentence with the last words of the recipe that failed.
pub fn tiny(fs: Fs, say: &dyn Fn(&str)) -> io::Result<PathBuf> {
    let (text, name) = match fs {
        Fs::Ext4 => (TINY_RECIPE, "tiny.sh"),
        Fs::Xfs => (TINY_XFS_RECIPE, "tiny-xfs.sh"),
        Fs::Ntfs => (TINY_NTFS_RECIPE, "tiny-ntfs.sh"),
    };
    cached(
        "tiny.raw",
        &key(&[text]),
        say,
        "a tiny disk with files written and deleted",
        |out, work| recipe(&["sh", "-c", text, name], &[out.as_os_str(), work.as_os_str()]),
    )
}

/// The kernel for such disks, from the cache or unpacked now.
///
/// # Errors
/// A sentence with the last words of the recipe that failed.
pub fn kernel(say: &dyn Fn(&str)) -> io::Result<Kernel> {
    let directory = cached(
        "kernel",
        &key(&[KERNEL_RECIPE]),
        say,
        "Debian's cloud kernel",
        |out, work| {
            fs::create_dir(out)?;
            recipe(
                &["sh", "-c", KERNEL_RECIPE, "kernel.sh"],
                &[out.as_os_str(), work.as_os_str()],
            )
        },
    )?;
    Ok(Kernel {
        vmlinuz: directory.join("vmlinuz"),
        initrd: directory.join("initrd"),
    })
}

/// Copies a disk, holes as holes.
///
/// # Errors
/// When `cp` cannot be run or fails.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    recipe(
        &["cp", "--sparse=always", "--reflink=auto"],
        &[from.as_os_str(), to.as_os_str()],
    )
}

fn key(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher
            .update(&(part.len() as u64).to_le_bytes())
            .update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// What `make` made under this name and key, now or at an earlier time.
fn cached(
    name: &str,
    key: &str,
    say: &dyn Fn(&str),
    what: &str,
    make: impl FnOnce(&Path, &Path) -> io::Result<()>,
) -> io::Result<PathBuf> {
    let cache = cache_directory();
    fs::create_dir_all(&cache)?;
    let made = cache.join(format!("{key}-{name}"));
    // Held while it is made: a second lab waits here and then finds it.
    let lock = File::create(cache.join(format!("{key}-{name}.lock")))?;
    lock.lock()?;
    if !made.exists() {
        say(&format!("making {what}"));
        let making = fresh(&cache.join(format!("{key}-{name}.making")))?;
        let half = making.join("made");
        make(&half, &fresh(&making.join("work"))?)?;
        fs::rename(half, &made)?;
        fs::remove_dir_all(&making)?;
    }
    Ok(made)
}

/// An empty directory, whatever a builder that was killed has left of it.
fn fresh(directory: &Path) -> io::Result<PathBuf> {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    fs::create_dir(directory)?;
    directory.canonicalize()
}

/// `LONGHAUL_LAB_CACHE`, or `.lab/cache` in the repository that the lab is run from.
fn cache_directory() -> PathBuf {
    let directory = match std::env::var_os("LONGHAUL_LAB_CACHE") {
        Some(directory) => PathBuf::from(directory),
        None => crate::repository().unwrap_or_default().join(".lab/cache"),
    };
    // What is started elsewhere is told of it, too.
    std::path::absolute(&directory).unwrap_or(directory)
}

fn recipe(words: &[&str], arguments: &[&std::ffi::OsStr]) -> io::Result<()> {
    let output = Command::new(words[0])
        .args(&words[1..])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot run {}: {error}", words[0])))?;
    if output.status.success() {
        return Ok(());
    }
    let cause = String::from_utf8_lossy(&output.stderr);
    let last: Vec<_> = cause.trim().lines().rev().take(5).collect();
    let name = words.last().unwrap_or(&"recipe");
    let last = last.into_iter().rev().collect::<Vec<_>>().join("; ");
    Err(io::Error::other(format!(
        "{name} failed ({}): {last}",
        output.status
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_recipes_apart_and_their_parts_too() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_ne!(key(&["a"]), key(&["a", ""]));
    }
}
