//! The overlay against e2fsck: debugfs writes transactions into the journal of an image that nobody mounts, and what is read with
//! the journal laid over is what e2fsck finds after a replay.

use std::fs;
use std::ops::Range;
use std::path::Path;

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::{Unproven, ext};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use crate::guest::{Guest, dumpe2fs, run};

/// A state that an image has been in: newest commit, free ranges.
pub(crate) type State = (u32, Vec<Range<u64>>);

/// Reads as on a running guest.
pub(crate) fn read(volume: &dyn ReadAt) -> Result<State, Unproven> {
    let found = ext::probe_running(volume)?.ok_or_else(|| Unproven::Inconsistent {
        kind: "ext4",
        what: "not recognised".into(),
    })?;
    let mut free: Vec<Range<u64>> = Vec::new();
    found.scan(volume, &mut |extent| free.push(extent.offset()..extent.end()))?;
    let committed = found.committed().unwrap();
    Ok((committed.journal.unwrap().newest, free))
}

fn debugfs(image: &Path, script: &str) {
    let file = image.with_extension("script");
    fs::write(&file, script).unwrap();
    let output = run(
        "debugfs",
        &["-w", "-f", file.to_str().unwrap(), image.to_str().unwrap()],
        &[0],
    );
    let faults = String::from_utf8_lossy(&output.stderr).lines().count();
    assert!(faults <= 1, "{}", String::from_utf8_lossy(&output.stderr));
}

/// An image with `count` transactions in its journal, each of them one file more, and the state after each.
pub(crate) fn journaled(mkfs: &str, mib: u64, version: &str, count: usize, seed: u64) -> (Guest, Vec<State>) {
    let guest = Guest::make(mkfs, mib);
    let (image, ahead) = (guest.image(), guest.image().with_extension("ahead"));
    let mut rng = StdRng::seed_from_u64(seed);
    fs::copy(&image, &ahead).unwrap();
    let block = block_size(&image);
    let mut states = vec![read(&guest.disk()).unwrap()];
    for number in 0..count {
        let before = fs::read(&ahead).unwrap();
        let content = image.with_extension("content");
        let mut bytes = vec![0; 200_000];
        rng.fill_bytes(&mut bytes);
        fs::write(&content, bytes).unwrap();
        debugfs(&ahead, &format!("write {} file-{number}\n", content.display()));
        let after = fs::read(&ahead).unwrap();
        // All that the file changed, as one transaction.
        let (mut numbers, mut changed) = (Vec::new(), Vec::new());
        for (index, (old, new)) in before.chunks(block).zip(after.chunks(block)).enumerate() {
            if old != new {
                numbers.push(index.to_string());
                changed.extend_from_slice(new);
            }
        }
        fs::write(&content, changed).unwrap();
        transaction(
            &image,
            version,
            &format!("jw -b {} {}", numbers.join(","), content.display()),
        );
        let free = dumpe2fs(&ahead);
        let newest = states.last().unwrap().0.wrapping_add(1);
        states.push((newest, joined(free)));
    }
    (guest, states)
}

fn transaction(image: &Path, version: &str, line: &str) {
    debugfs(image, &format!("jo {version}\n{line}\njc\n"));
}

fn block_size(image: &Path) -> usize {
    let raw = fs::read(image).unwrap();
    1024 << raw[1024 + 0x18]
}

fn joined(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => out.push(range),
        }
    }
    out
}

const SHAPES: &[(&str, u64, &str)] = &[
    ("mkfs.ext4 -q -F -b 1024", 16, "-c -v 3"),
    ("mkfs.ext4 -q -F -b 4096", 32, "-c -v 3"),
    ("mkfs.ext4 -q -F -b 2048 -O ^64bit", 32, "-c -v 2"),
    ("mkfs.ext4 -q -F -b 1024 -O 64bit", 24, "-c -v 2"),
    ("mkfs.ext4 -q -F -b 1024 -O ^64bit,^metadata_csum", 24, ""),
    ("mkfs.ext4 -q -F -b 1024 -O 64bit,^metadata_csum", 24, ""),
    ("mkfs.ext3 -q -F -b 1024", 24, ""),
];

#[test]
fn the_overlay_is_what_a_replay_leaves() {
    for (mkfs, mib, version) in SHAPES {
        let (guest, states) = journaled(mkfs, *mib, version, 3, 11);
        assert_ne!(states[0].1, states[3].1);
        assert_eq!(read(&guest.disk()).unwrap(), states[3], "{mkfs} {version}");
        let copy = guest.image().with_extension("copy");
        fs::copy(guest.image(), &copy).unwrap();
        run(
            "e2fsck",
            &["-fy", "-E", "journal_only", copy.to_str().unwrap()],
            &[0, 1],
        );
        assert_eq!(joined(dumpe2fs(&copy)), states[3].1, "{mkfs} {version}: e2fsck");
    }
}

#[test]
fn an_uncommitted_transaction_does_not_count() {
    for (mkfs, mib, version) in [SHAPES[0], SHAPES[4]] {
        let (guest, states) = journaled(mkfs, mib, version, 2, 12);
        let content = guest.image().with_extension("content");
        let block = bitmap_block(&guest.image());
        fs::write(&content, vec![0; block_size(&guest.image())]).unwrap();
        transaction(
            &guest.image(),
            version,
            &format!("jw -c -b {block} {}", content.display()),
        );
        assert_eq!(read(&guest.disk()).unwrap(), states[2], "{mkfs}");
    }
}

#[test]
fn revoked_content_is_not_laid_over() {
    for (mkfs, mib, version) in [SHAPES[0], SHAPES[4]] {
        let (guest, states) = journaled(mkfs, mib, version, 1, 13);
        let list = guest.image().with_extension("revoked");
        // All but the superblock: then what lies at home is the state before.
        let per = block_size(&guest.image());
        let ahead = fs::read(guest.image().with_extension("ahead")).unwrap();
        let home = fs::read(guest.image()).unwrap();
        let changed = home.chunks(per).zip(ahead.chunks(per)).enumerate();
        let revoked: Vec<String> = changed
            .filter(|(block, (old, new))| *block > 1 && old != new)
            .map(|(block, _)| block.to_string())
            .collect();
        fs::write(&list, "").unwrap();
        transaction(&guest.image(), version, &format!("jw -r {}", revoked.join(",")));
        let (newest, free) = read(&guest.disk()).unwrap();
        assert_eq!(newest, states[1].0 + 1);
        assert_eq!(free, states[0].1, "{mkfs}: the state before is what lies at home");
    }
}

/// A bitmap that begins with the journal's magic number is escaped in the log.
#[test]
fn an_escaped_bitmap_is_restored() {
    let guest = Guest::make(
        "mkfs.ext4 -q -F -b 1024 -O ^64bit,^metadata_csum,^uninit_bg,^resize_inode -g 8192",
        48,
    );
    let image = guest.image();
    let (group, block) = whole_free_group(&image);
    let raw = fs::read(&image).unwrap();
    let mut bitmap = raw[block * 1024..][..1024].to_vec();
    assert!(bitmap[..4] == [0; 4], "the group begins with free blocks");
    bitmap[..4].copy_from_slice(&0xC03B_3998u32.to_be_bytes());
    let used: u32 = bitmap[..4].iter().map(|byte| byte.count_ones()).sum();
    let mut descriptors = raw[2048..3072].to_vec();
    let at = group * 32 + 0xC;
    let free = u16::from_le_bytes([descriptors[at], descriptors[at + 1]]) - used as u16;
    descriptors[at..at + 2].copy_from_slice(&free.to_le_bytes());
    let content = image.with_extension("content");
    fs::write(&content, [descriptors, bitmap].concat()).unwrap();
    let (_, before) = read(&guest.disk()).unwrap();
    transaction(&image, "", &format!("jw -b 2,{block} {}", content.display()));
    let (_, after) = read(&guest.disk()).unwrap();
    let sum = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>();
    assert_eq!(sum(&before) - sum(&after), u64::from(used) * 1024);
}

fn bitmap_block(image: &Path) -> u64 {
    let output = run("dumpe2fs", &[image.to_str().unwrap()], &[0]);
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Block bitmap at "))
        .unwrap();
    line.split_whitespace()
        .next()
        .unwrap()
        .trim_end_matches(',')
        .parse()
        .unwrap()
}

/// The number and the bitmap block of a group without anything of the file system's own.
fn whole_free_group(image: &Path) -> (usize, usize) {
    let output = run("dumpe2fs", &[image.to_str().unwrap()], &[0]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let groups = text.split("\nGroup ").skip(1);
    groups
        .filter(|group| group.contains("8192 free blocks"))
        .map(|group| {
            let number = group.split(':').next().unwrap().parse().unwrap();
            let at = group.split("Block bitmap at ").nth(1).unwrap();
            let block = at.split(|c: char| !c.is_ascii_digit()).next().unwrap();
            (number, block.parse().unwrap())
        })
        .next()
        .unwrap()
}
