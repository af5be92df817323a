//! Feature bits: the known ones change nothing about free space, every other one is refused.

use std::process::Command;

use longhaul_agent::disk::fs::Unproven;

use super::image::{Image, SMALL, succeed};
use super::oracle;
use super::volume::{FileVolume, Patched, scan};

/// Offset of the word in the superblock, and its bits that are accepted.
const WORDS: [(u64, u32); 4] = [(208, 0), (212, 0xf), (216, 0xeb), (220, 0x1)];

#[test]
fn every_unknown_bit_is_refused_and_every_known_bit_accepted() {
    let image = Image::fresh(SMALL, &[]);
    let volume = image.volume();
    let (_, free) = scan(&volume).unwrap();
    for (word, known) in WORDS {
        for bit in (0..32).map(|shift| 1u32 << shift) {
            let mut changed = Patched::new(&volume);
            let before = u32::from_be_bytes(changed.get(word));
            changed.put(word, &(before | bit).to_be_bytes());
            changed.seal(0, 512, 224);
            let result = scan(&changed);
            if before & bit != 0 || known & bit != 0 && !has_a_tree(word, bit) {
                assert_eq!(result.unwrap().1, free, "word {word}, bit {bit:#x}");
            } else {
                assert!(result.is_err(), "word {word}, bit {bit:#x}");
            }
        }
    }
}

/// A tree that the bit promises and that is not there, as in this image, contradicts it.
fn has_a_tree(word: u64, bit: u32) -> bool {
    word == 212 && bit == 2
}

#[test]
fn older_versions_and_unknown_version_bits_are_refused() {
    let image = Image::fresh(SMALL, &["-m", "crc=0"]);
    let volume = image.volume();
    let word = u16::from_be_bytes(Patched::new(&volume).get(100));
    for version in [0, 1, 2, 3, 6, 15] {
        let changed = Patched::new(&volume).write(100, &(word & !0xf | version).to_be_bytes());
        assert!(
            matches!(scan(&changed), Err(Unproven::UnknownFeature { .. })),
            "version {version}"
        );
    }
    let shared = Patched::new(&volume).write(100, &(word | 0x200).to_be_bytes());
    assert!(matches!(scan(&shared), Err(Unproven::UnknownFeature { .. })));
    for bit in (0..32).map(|shift| 1u32 << shift).filter(|bit| bit & 0x38a == 0) {
        let changed = Patched::new(&volume).write(200, &bit.to_be_bytes());
        assert!(
            matches!(scan(&changed), Err(Unproven::UnknownFeature { .. })),
            "features2 {bit:#x}"
        );
    }
}

/// The tool also formats the log anew, and leaves zeros in it.
#[test]
fn a_volume_whose_uuid_was_changed_is_read_exactly() {
    for options in [
        &[][..],
        &["-m", "crc=0"],
        &["-l", "su=64k"],
        &["-s", "size=4096"],
        &["-l", "su=256k"],
    ] {
        let image = Image::fresh(SMALL, options);
        succeed(
            Command::new("xfs_admin")
                .args(["-U", "generate"])
                .arg(&image.path),
        );
        let volume = image.volume();
        let (_, free) = scan(&volume).unwrap();
        assert_eq!(free, oracle::free(&image), "{options:?}");
        let log = oracle::log(&image).offset;
        // A later lap or a part of one among the zeros or behind them.
        for (block, cycle) in [
            (2, 2),
            (130, 2),
            (511, 2),
            (512, 2),
            (513, 2),
            (900, 0),
            (4000, 2),
        ] {
            let torn = Patched::new(&volume).write(log + 512 * block, &u32::to_be_bytes(cycle));
            if torn.get::<4>(log + 512 * block) != volume_word(&volume, log + 512 * block) {
                assert!(
                    matches!(scan(&torn), Err(Unproven::NotClean { .. })),
                    "{options:?}: block {block}"
                );
            }
        }
    }
}

fn volume_word(volume: &FileVolume, offset: u64) -> [u8; 4] {
    Patched::new(volume).get(offset)
}

#[test]
fn counters_kept_in_the_superblock_are_read_exactly() {
    let image = Image::fresh(SMALL, &["-m", "crc=0", "-l", "lazy-count=0"]);
    assert_eq!(scan(&image.volume()).unwrap().1, oracle::free(&image));
}
