//! Metadata with right checksums that is wrong, and group bitmaps that were never written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use longhaul_agent::disk::fs::Unproven;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use crate::image::{Image, scan};
use crate::sealed::{Tables, le16, le32};

/// `EXT4_BG_BLOCK_UNINIT`, in the low byte of the flags.
const BLOCK_UNINIT: u8 = 2;
const FLAGS: usize = 0x12;
const UNINIT: &str = "-t ext4 -b 1024 -G 4 -N 800 -O ^metadata_csum,uninit_bg";
const CHECKED: &str = "-t ext4 -b 1024 -G 4 -N 800";

fn image(options: &str) -> Image {
    let mut image = Image::make(100 << 10, options, 8);
    image.fill(20, 30_000);
    image.settle();
    image
}

fn assert_inconsistent(image: &Image, what: &str) {
    match scan(&image.volume()) {
        Err(Unproven::Inconsistent { .. }) => {}
        Err(why) => panic!("{what}: {why}"),
        Ok(_) => panic!("{what}: not refused"),
    }
}

#[test]
fn bitmaps_that_were_never_written_are_not_read() {
    for options in [UNINIT, CHECKED] {
        let image = image(options);
        let expected = image.oracle();
        let mut tables = Tables::load(&image.path());
        let mut garbage = vec![0; 1024];
        let mut count = 0;
        for group in 0..tables.groups {
            let raw = tables.descriptor(group);
            let (flags, block) = (raw[FLAGS], le32(raw, 0));
            if flags & BLOCK_UNINIT != 0 {
                StdRng::seed_from_u64(group.into()).fill_bytes(&mut garbage);
                tables.write_block(block, &garbage);
                count += 1;
            }
        }
        assert!(count > 2, "{options}: only {count} groups without bitmap");
        assert_eq!(
            scan(&image.volume()).unwrap().unwrap().ranges,
            expected,
            "{options}"
        );
    }
}

/// The flag that says so is wrong on a group that holds files, and right on one that holds nothing but metadata, its own or that
/// of other groups.
#[test]
fn a_group_called_never_written_is_believed_only_where_its_count_agrees() {
    for options in [UNINIT, CHECKED] {
        let image = image(options);
        let expected = image.oracle();
        let (mut believed, mut refused) = (Vec::new(), Vec::new());
        for group in 0..Tables::load(&image.path()).groups {
            let mut tables = Tables::load(&image.path());
            let before = tables.descriptor(group).to_vec();
            if before[FLAGS] & BLOCK_UNINIT != 0 {
                continue;
            }
            tables.descriptor(group)[FLAGS] |= BLOCK_UNINIT;
            tables.seal(group);
            tables.store();
            match scan(&image.volume()) {
                Ok(found) => {
                    assert_eq!(found.unwrap().ranges, expected, "{options}: group {group}");
                    believed.push(group);
                }
                Err(Unproven::Inconsistent { .. }) => refused.push(group),
                Err(why) => panic!("{options}: group {group}: {why}"),
            }
            tables.descriptor(group).copy_from_slice(&before);
            tables.store();
        }
        // Every fourth group holds the bitmaps and inode tables of the three behind it.
        assert!(
            believed.iter().any(|group| group % 4 == 0),
            "{options}: {believed:?}"
        );
        assert!(refused.contains(&0), "{options}: {refused:?}");
    }
}

#[test]
fn metadata_that_overlaps_is_refused() {
    for options in [UNINIT, CHECKED] {
        for (field, from) in [(0x0, 5u32), (0x4, 5), (0x8, 5), (0x0, 0), (0x8, 0)] {
            let image = image(options);
            let mut tables = Tables::load(&image.path());
            let target = match from {
                // On the first group descriptors.
                0 => 2,
                group => le32(tables.descriptor(group), field),
            };
            tables.descriptor(6)[field..field + 4].copy_from_slice(&target.to_le_bytes());
            tables.seal(6);
            tables.store();
            assert_inconsistent(&image, &format!("{options}: field {field:#x} from {from}"));
        }
    }
}

#[test]
fn counts_that_do_not_add_up_are_refused() {
    for options in [UNINIT, CHECKED] {
        let image = image(options);
        let mut tables = Tables::load(&image.path());
        let free = le32(&tables.superblock, 0xC);
        tables.superblock[0xC..0x10].copy_from_slice(&(free - 1).to_le_bytes());
        tables.store();
        assert_inconsistent(&image, "the superblock's count");
        tables.superblock[0xC..0x10].copy_from_slice(&free.to_le_bytes());
        let free = le16(tables.descriptor(1), 0xC);
        tables.descriptor(1)[0xC..0xE].copy_from_slice(&(free + 1).to_le_bytes());
        tables.seal(1);
        tables.store();
        assert_inconsistent(&image, "a group's count");
    }
}

/// A double indirect block full of itself would be followed 2^24 times if nothing counted.
#[test]
fn a_map_that_leads_back_to_itself_ends_soon() {
    let mut image = Image::make(40 << 10, "-t ext2 -b 1024", 9);
    image.fill(1, 8 << 20);
    image.settle();
    let map = image.debugfs("stat file-1\n");
    let block = map
        .split_once("(DIND):")
        .unwrap()
        .1
        .split([',', '\n'])
        .next()
        .unwrap();
    let block: u32 = block.parse().unwrap();
    let file = File::options().write(true).open(image.path()).unwrap();
    let itself = block.to_le_bytes().repeat(256);
    file.write_all_at(&itself, u64::from(block) * 1024).unwrap();
    let begin = Instant::now();
    assert_inconsistent(&image, "a loop");
    assert!(begin.elapsed() < Duration::from_secs(5));
}
