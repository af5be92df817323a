//! Whatever is not settled, or not understood, is not filtered.

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::Unproven;

use crate::image::{Image, run, scan};

const PLAIN: &str = "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg";
const CHECKED: &str = "-t ext4 -b 1024";

fn image(options: &str) -> Image {
    let mut image = Image::make(40 << 10, options, 5);
    image.fill(10, 50_000);
    image.settle();
    image
}

fn refusal(volume: &dyn ReadAt) -> Unproven {
    match scan(volume) {
        Err(why) => why,
        Ok(_) => panic!("not refused"),
    }
}

fn assert_not_clean(image: &Image, word: &str) {
    match refusal(&image.bytes()) {
        Unproven::NotClean { kind, what } => {
            assert!(kind == "ext4" && what.contains(word), "{kind}: {what}");
        }
        other => panic!("{other}"),
    }
}

/// Flips `bits` of the byte at `at`.
fn patched(image: &Image, at: usize, bits: u8) -> Vec<u8> {
    let mut bytes = image.bytes();
    bytes[at] ^= bits;
    bytes
}

#[test]
fn signs_of_use_are_not_clean() {
    for options in [PLAIN, CHECKED] {
        for (command, word) in [
            ("feature needs_recovery", "journal"),
            ("ssv state 0", "mounted"),
            ("ssv state 3", "check"),
            ("ssv state 5", "check"),
            ("ssv error_count 1", "errors"),
        ] {
            let image = image(options);
            image.debugfs(command);
            assert_not_clean(&image, word);
        }
    }
}

#[test]
fn a_file_system_without_journal_that_was_cut_off_is_not_clean() {
    let image = Image::make(20 << 10, "-t ext2 -b 1024", 5);
    image.debugfs("ssv state 0");
    assert!(matches!(
        refusal(&image.bytes()),
        Unproven::NotClean { kind: "ext2", .. }
    ));
}

#[test]
fn a_journal_with_transactions_is_not_clean_whatever_the_flag_says() {
    for options in [PLAIN, CHECKED] {
        let image = image(options);
        let journaled = image.dir().join("journaled");
        std::fs::write(&journaled, vec![7; 3 << 10]).unwrap();
        image.debugfs(&format!("jo -c\njw -b 20000-20002 {}\njc\n", journaled.display()));
        assert_not_clean(&image, "journal has to be replayed");
        image.debugfs("feature -needs_recovery");
        assert_not_clean(&image, "journal is not empty");
        run("e2fsck", &["-fy", image.path().to_str().unwrap()], &[0, 1]);
        assert!(scan(&image.volume()).unwrap().is_some());
    }
}

#[test]
fn orphans_alone_hide_nothing() {
    let mut image = image(PLAIN);
    let expected = image.oracle();
    let name = image.files()[0].clone();
    // As if it had been deleted while open: no name, no links, on the list, its blocks still in use.
    let inode = image.debugfs(&format!("stat {name}"));
    let inode = inode
        .lines()
        .find_map(|line| line.strip_prefix("Inode: "))
        .unwrap();
    let inode = inode.split_whitespace().next().unwrap().to_owned();
    image.debugfs(&format!(
        "unlink {name}\nsif <{inode}> links_count 0\nssv last_orphan {inode}"
    ));
    assert_eq!(scan(&image.volume()).unwrap().unwrap().ranges, expected);
    image.settle();
    assert_eq!(scan(&image.volume()).unwrap().unwrap().ranges, image.oracle());
}

#[test]
fn unknown_features_are_refused() {
    let image = image(PLAIN);
    // Compatible, incompatible and read-only compatible flags, at 0x5C, 0x60 and 0x64 of the superblock.
    for (at, bits) in [
        (0x5C, 0x40),
        (0x5C, 0x80),
        (0x5D, 0x01),
        (0x5F, 0x80),
        (0x60, 0x01),
        (0x61, 0x08),
        (0x61, 0x10),
        (0x63, 0x80),
        (0x64, 0x80),
        (0x65, 0x08),
        (0x65, 0x40),
        (0x67, 0x01),
        (0x160, 0x10),
        (0x160, 0x20),
        (0x4C, 0x02),
        (0x48, 0x01),
    ] {
        let why = refusal(&patched(&image, 1024 + at, bits));
        assert!(
            matches!(why, Unproven::UnknownFeature { .. }),
            "{at:x} {bits:x}: {why}"
        );
    }
    let why = refusal(&patched(&image, 1024 + 0x66, 1));
    assert!(matches!(why, Unproven::NotClean { .. }), "orphan_present: {why}");
}

#[test]
fn an_external_journal_is_no_file_system_to_filter() {
    let image = Image::make(20 << 10, "-b 1024 -O journal_dev", 5);
    assert!(matches!(refusal(&image.bytes()), Unproven::UnknownFeature { .. }));
}

#[test]
fn a_file_system_with_an_external_journal_needs_a_checksum_to_be_believed() {
    for (options, believed) in [(PLAIN, false), (CHECKED, true)] {
        let image = image(options);
        // The blocks of the former internal journal stay in use, which is safe.
        image.debugfs("ssv journal_inum 0\nssv journal_dev 2065");
        match believed {
            true => assert!(scan(&image.volume()).unwrap().is_some()),
            false => assert_not_clean(&image, "another device"),
        }
    }
}

#[test]
fn multiple_mount_protection_in_use_is_not_clean() {
    for features in ["mmp", "mmp,^metadata_csum,uninit_bg"] {
        let image = Image::make(20 << 10, &format!("-t ext4 -b 1024 -O {features}"), 5);
        assert_eq!(scan(&image.volume()).unwrap().unwrap().ranges, image.oracle());
        let text =
            String::from_utf8(run("dumpe2fs", &["-h", image.path().to_str().unwrap()], &[0]).stdout).unwrap();
        let block = text
            .lines()
            .find_map(|line| line.strip_prefix("MMP block number:"))
            .unwrap();
        let at = block.trim().parse::<usize>().unwrap() * 1024;
        let why = refusal(&patched(&image, at + 4, 0x10));
        match features {
            "mmp" => assert!(matches!(why, Unproven::Checksum { .. }), "{why}"),
            _ => assert!(matches!(why, Unproven::NotClean { .. }), "{why}"),
        }
    }
}

#[test]
fn a_volume_without_the_magic_number_is_not_recognised() {
    assert!(scan(&vec![0; 1 << 20]).unwrap().is_none());
    assert!(scan(&vec![0x53; 100]).unwrap().is_none());
    assert!(scan(&patched(&image(PLAIN), 1024 + 0x38, 1)).unwrap().is_none());
}
