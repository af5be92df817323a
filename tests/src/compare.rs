//! The lab's own comparison of source and target, which trusts no program of Longhaul.
//!
//! Owns reading both disks as raw content and judging every 4 KiB block: equal, or zero at the target where
//! an independent oracle says that the source's file system holds the block free. Leaves alone digests and
//! reports of the programs. Promises that a block the oracle knows to be in use and that differs makes the
//! comparison fail.
//!
//! The oracle is `dumpe2fs`, on whole-disk ext2/3/4 and on every partition that `sfdisk` names. Where no
//! oracle knows a block (other file systems, LVM), a zeroed block passes only within the number of bytes that
//! the job reported as skipped.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

/// Unit of the judgement.
const BLOCK: usize = 4096;
/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// What the comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// Every block is equal, or was proven or reported free and reads as zeros.
    pub equal: bool,
    /// Bytes compared: the source's size, holes included.
    pub bytes: u64,
    /// Bytes that hold data at the source, read as zeros at the target, and are free by the oracle's word.
    pub zeroed_free_bytes: u64,
    /// The same where no oracle could say.
    pub zeroed_unknown_bytes: u64,
    /// Bytes that differ and must not.
    pub wrong_bytes: u64,
    /// Offset of the first of them.
    pub first_wrong: Option<u64>,
    /// File systems that the oracle knew.
    pub oracle: Vec<String>,
}

/// Parts of a disk that an oracle knows: where they are, and what is free in them (sorted).
#[derive(Clone, Debug, Default)]
struct Known {
    parts: Vec<Range<u64>>,
    free: Vec<Range<u64>>,
}

/// Compares two raw files; `skipped` is how many bytes the job says it skipped as free.
///
/// # Errors
/// When a file cannot be read.
pub fn compare(source: &Path, target: &Path, skipped: u64) -> io::Result<Comparison> {
    let (known, oracle) = ask_oracle(source);
    let (source, target) = (File::open(source)?, File::open(target)?);
    let mut found = Comparison {
        bytes: source.metadata()?.len(),
        oracle,
        ..Comparison::default()
    };
    let target_bytes = target.metadata()?.len();
    if target_bytes < found.bytes {
        found.wrong_bytes = found.bytes - target_bytes;
        found.first_wrong = Some(target_bytes);
    }
    let common = found.bytes.min(target_bytes);
    let mut buffers = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < common {
        let length = usize::try_from(common - at).map_or(CHUNK, |left| left.min(CHUNK));
        let next = next_data(&source, at).min(next_data(&target, at));
        if next >= at + length as u64 {
            at = next.min(common) / BLOCK as u64 * BLOCK as u64;
            at = if next >= common { common } else { at };
            continue;
        }
        let (one, two) = (&mut buffers.0[..length], &mut buffers.1[..length]);
        source.read_exact_at(one, at)?;
        target.read_exact_at(two, at)?;
        judge(at, one, two, &known, &mut found);
        at += length as u64;
    }
    found.equal = found.wrong_bytes == 0 && found.zeroed_free_bytes + found.zeroed_unknown_bytes <= skipped;
    Ok(found)
}

fn judge(at: u64, source: &[u8], target: &[u8], known: &Known, found: &mut Comparison) {
    if source == target {
        return;
    }
    for (index, (one, two)) in source.chunks(BLOCK).zip(target.chunks(BLOCK)).enumerate() {
        if one == two {
            continue;
        }
        let offset = at + (index * BLOCK) as u64;
        let range = offset..offset + one.len() as u64;
        let zeroed = two.iter().all(|byte| *byte == 0);
        match known.about(&range) {
            Some(true) if zeroed => found.zeroed_free_bytes += one.len() as u64,
            None if zeroed => found.zeroed_unknown_bytes += one.len() as u64,
            _ => {
                found.wrong_bytes += one.len() as u64;
                found.first_wrong.get_or_insert(offset);
            }
        }
    }
}

impl Known {
    /// Whether this range is free: all of it (yes), not all of it (no), or nobody knows.
    fn about(&self, range: &Range<u64>) -> Option<bool> {
        if !self
            .parts
            .iter()
            .any(|part| part.start < range.end && range.start < part.end)
        {
            return None;
        }
        let index = self.free.partition_point(|free| free.end <= range.start);
        let mut at = range.start;
        for free in &self.free[index..] {
            if free.start > at || at >= range.end {
                break;
            }
            at = free.end;
        }
        Some(at >= range.end)
    }
}

/// Offset of the next byte at or after `at` that is not in a hole.
fn next_data(file: &File, at: u64) -> u64 {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(offset) => offset,
        Err(rustix::io::Errno::NXIO) => u64::MAX,
        Err(_) => at,
    }
}

fn ask_oracle(disk: &Path) -> (Known, Vec<String>) {
    let (mut known, mut names) = (Known::default(), Vec::new());
    for offset in std::iter::once(0).chain(partition_offsets(disk)) {
        let Some((part, free)) = ext_free(disk, offset) else {
            continue;
        };
        names.push(format!("dumpe2fs at offset {offset}"));
        known.parts.push(part);
        known.free.extend(free);
    }
    known.free.sort_unstable_by_key(|free| free.start);
    // Neighbouring runs join, so that one lookup walks few of them.
    known.free.dedup_by(|next, last| {
        last.end == next.start && {
            last.end = next.end;
            true
        }
    });
    (known, names)
}

fn partition_offsets(disk: &Path) -> Vec<u64> {
    let Ok(output) = Command::new("sfdisk")
        .arg("--json")
        .arg(disk)
        .stderr(Stdio::null())
        .output()
    else {
        return Vec::new();
    };
    let table: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let table = &table["partitiontable"];
    let sector = table["sectorsize"].as_u64().unwrap_or(512);
    let partitions = table["partitions"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    partitions
        .iter()
        .filter_map(|partition| partition["start"].as_u64()?.checked_mul(sector))
        .collect()
}

/// The extent of an ext file system at this offset and its free ranges, both in bytes of the disk.
fn ext_free(disk: &Path, offset: u64) -> Option<(Range<u64>, Vec<Range<u64>>)> {
    let mut name = disk.as_os_str().to_owned();
    name.push(format!("?offset={offset}"));
    let name = if offset == 0 {
        PathBuf::from(disk)
    } else {
        PathBuf::from(name)
    };
    let output = Command::new("dumpe2fs")
        .arg(name)
        .env("LC_ALL", "C")
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| free_ranges(&String::from_utf8_lossy(&output.stdout), offset))
        .flatten()
}

/// What an ext file system that fills this disk has free once its journal is replayed, in bytes; `copy` is where that is done, and stays.
/// Nothing where there is none.
///
/// # Errors
/// When the copy cannot be made, or e2fsck is missing.
pub fn free_after_replay(disk: &Path, copy: &Path) -> io::Result<Vec<Range<u64>>> {
    crate::guest::copy(disk, copy)?;
    let replayed = Command::new("e2fsck").arg("-p").arg(copy).output()?;
    let is_sound = matches!(replayed.status.code(), Some(0 | 1));
    let found = is_sound.then(|| ext_free(copy, 0)).flatten();
    Ok(found.map(|(_, free)| free).unwrap_or_default())
}

/// Reads dumpe2fs: "Block size:" and "Block count:" from its head, "  Free blocks: 3-5, 9" from each group.
fn free_ranges(text: &str, offset: u64) -> Option<(Range<u64>, Vec<Range<u64>>)> {
    let head = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok())
    };
    let (size, count) = (head("Block size:")?, head("Block count:")?);
    let part = offset..offset.checked_add(size.checked_mul(count)?)?;
    let lists = text
        .lines()
        .filter_map(|line| line.strip_prefix("  Free blocks:"));
    let runs = lists.flat_map(|list| list.split(',')).filter_map(|run| {
        let run = run.trim();
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        Some(offset + first.checked_mul(size)?..offset + last.checked_add(1)?.checked_mul(size)?)
    });
    Some((part, runs.collect()))
}

/// A raw file with the content of `image`: itself, or a copy beside `raw` made by qemu-img.
///
/// # Errors
/// When qemu-img is missing or refuses the image.
pub fn as_raw(image: &Path, format: &str, raw: &Path) -> io::Result<PathBuf> {
    if format == "raw" {
        return Ok(image.to_owned());
    }
    // Nobody writes it, but an agent holds the lock of an image that it bars. QEMU wants commas doubled.
    let name = image.display().to_string().replace(',', ",,");
    let unlocked = format!("driver={format},file.driver=file,file.locking=off,file.filename={name}");
    let output = Command::new("qemu-img")
        .args(["convert", "--image-opts", &unlocked, "-O", "raw"])
        .arg(raw)
        .output();
    let output = output.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot run qemu-img (Debian package qemu-utils): {error}"),
        )
    })?;
    if output.status.success() {
        return Ok(raw.to_owned());
    }
    Err(io::Error::other(format!(
        "qemu-img: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn with(bytes: usize, blocks: &[(usize, u8)]) -> Vec<u8> {
        let mut content = vec![0; bytes];
        for (block, value) in blocks {
            content[block * BLOCK..(block + 1) * BLOCK].fill(*value);
        }
        content
    }

    #[test]
    fn a_changed_byte_is_found_wherever_it_is() {
        let source = file(&with(3 << 20, &[(1, 1), (700, 2)]));
        let mut copy = with(3 << 20, &[(1, 1), (700, 2)]);
        assert!(compare(source.path(), file(&copy).path(), 0).unwrap().equal);
        for at in [0, BLOCK + 7, 2 << 20, (3 << 20) - 1] {
            copy[at] ^= 0x40;
            let found = compare(source.path(), file(&copy).path(), u64::MAX).unwrap();
            assert!(!found.equal, "at {at}");
            assert_eq!(found.first_wrong, Some((at / BLOCK * BLOCK) as u64));
            copy[at] ^= 0x40;
        }
    }

    #[test]
    fn zeroed_blocks_pass_only_as_far_as_they_were_reported() {
        let source = file(&with(1 << 20, &[(3, 1), (4, 1)]));
        let target = file(&with(1 << 20, &[(3, 1)]));
        assert!(!compare(source.path(), target.path(), 4095).unwrap().equal);
        let found = compare(source.path(), target.path(), 4096).unwrap();
        assert!(found.equal && found.zeroed_unknown_bytes == 4096);
    }

    #[test]
    fn a_short_target_is_not_equal() {
        let source = file(&with(1 << 20, &[]));
        assert!(
            !compare(source.path(), file(&with(1 << 19, &[])).path(), u64::MAX)
                .unwrap()
                .equal
        );
    }

    #[test]
    fn holes_on_both_sides_are_passed_over_and_on_one_side_are_not() {
        let (source, target) = (
            tempfile::tempfile().unwrap(),
            tempfile::NamedTempFile::new().unwrap(),
        );
        drop(source);
        let source = tempfile::NamedTempFile::new().unwrap();
        for file in [&source, &target] {
            file.as_file().set_len(1 << 40).unwrap();
        }
        assert!(compare(source.path(), target.path(), 0).unwrap().equal);
        target.as_file().write_all_at(&[1], (1 << 39) + 5).unwrap();
        assert_eq!(
            compare(source.path(), target.path(), 0).unwrap().first_wrong,
            Some(1 << 39)
        );
    }

    #[test]
    fn the_oracle_tells_free_blocks_from_used_ones() {
        let disk = file(&[]);
        disk.as_file().set_len(16 << 20).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-b", "4096"])
            .arg(disk.path())
            .status();
        assert!(
            made.expect("mkfs.ext4 is missing (Debian package e2fsprogs)")
                .success()
        );
        let (part, free) = ext_free(disk.path(), 0).unwrap();
        assert_eq!(part, 0..16 << 20);
        let last = free.last().unwrap().clone();
        let known = Known {
            parts: vec![part],
            free,
        };
        assert_eq!(known.about(&(0..4096)), Some(false), "the superblock is in use");
        assert_eq!(known.about(&(last.start..last.start + 4096)), Some(true));
        assert_eq!(known.about(&(20 << 20..(20 << 20) + 4096)), None);

        // Old data in a free block may be dropped; the superblock may not.
        disk.as_file().write_all_at(&[7; 4096], last.start).unwrap();
        let target = tempfile::NamedTempFile::new().unwrap();
        std::fs::copy(disk.path(), target.path()).unwrap();
        target.as_file().write_all_at(&[0; 4096], last.start).unwrap();
        assert!(compare(disk.path(), target.path(), 4096).unwrap().equal);
        target.as_file().write_all_at(&[0; 4096], 0).unwrap();
        assert_eq!(
            compare(disk.path(), target.path(), u64::MAX).unwrap().first_wrong,
            Some(0)
        );
    }
}
