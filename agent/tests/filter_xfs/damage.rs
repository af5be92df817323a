//! Damaged images: whatever is spoilt, nothing is called free that the pristine image does not call free.

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::Unproven;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::image::{Image, MIB, SMALL};
use super::oracle::{self, Piece};
use super::volume::{FileVolume, FreeSet, Patched, is_subset, scan};
use super::{cases, each_seed};

const VERSION_4: &[&str] = &[
    "-m",
    "crc=0",
    "-b",
    "size=512",
    "-i",
    "size=256",
    "-n",
    "size=4096",
];
const VERSION_5: &[&str] = &["-m", "rmapbt=1,reflink=1,finobt=1", "-b", "size=1024"];

/// A fragmented image with trees of several levels, and the truth about it.
struct Specimen {
    image: Image,
    volume: FileVolume,
    free: FreeSet,
    pieces: Vec<Piece>,
}

impl Specimen {
    fn new(options: &[&str]) -> Self {
        let mut rng = StdRng::seed_from_u64(3);
        let image = Image::filled(SMALL + 11 * MIB, options, 2_500, 4_000, &mut rng);
        image.delete_some(0.5, &mut rng);
        let volume = image.volume();
        let (_, free) = scan(&volume).expect("the pristine image is proven");
        let pieces = oracle::metadata(&image);
        assert!(
            pieces
                .iter()
                .filter(|piece| piece.kind == "by-block tree")
                .count()
                > 6
        );
        Self {
            image,
            volume,
            free,
            pieces,
        }
    }

    /// Each kind of metadata equally often, and its densest bytes more often than its padding.
    fn place(&self, rng: &mut StdRng) -> (&Piece, u64) {
        let kinds = [
            "superblock",
            "AGF",
            "AGI",
            "AGFL",
            "by-block tree",
            "by-length tree",
            "log",
        ];
        let kind = kinds.choose(rng).unwrap();
        let alike: Vec<&Piece> = self.pieces.iter().filter(|piece| piece.kind == *kind).collect();
        let piece = alike.choose(rng).unwrap();
        let reach = *[64, 256, 2048, piece.len].choose(rng).unwrap();
        (piece, rng.random_range(0..reach.min(piece.len)))
    }

    fn require_harmless(&self, spoilt: &Patched<'_>, what: &str) -> Result<(), Unproven> {
        let (_, free) = scan(spoilt)?;
        assert!(
            is_subset(&free, &self.free),
            "{what}: a used block is called free"
        );
        Ok(())
    }
}

#[test]
fn one_flipped_byte_never_frees_a_used_block_without_checksums() {
    let specimen = Specimen::new(VERSION_4);
    each_seed("flips, version 4", 2_500, |rng| {
        let (piece, at) = specimen.place(rng);
        let mut spoilt = Patched::new(&specimen.volume);
        spoilt.flip(piece.offset + at, rng.random_range(1..=255));
        let _either = specimen.require_harmless(&spoilt, &format!("byte {at} of {piece:?}"));
    });
}

#[test]
fn each_flipped_bit_of_the_first_headers_is_harmless_without_checksums() {
    let specimen = Specimen::new(VERSION_4);
    let headers = specimen.pieces.iter().filter(|piece| piece.offset < 2048);
    for piece in headers {
        for bit in 0..8 * piece.len.min(264) {
            let mut spoilt = Patched::new(&specimen.volume);
            spoilt.flip(piece.offset + bit / 8, 1 << (bit % 8));
            let _either = specimen.require_harmless(&spoilt, &format!("bit {bit} of {piece:?}"));
        }
    }
}

#[test]
fn one_flipped_byte_is_always_noticed_with_checksums() {
    let specimen = Specimen::new(VERSION_5);
    each_seed("flips, version 5", 1_500, |rng| {
        let (piece, at) = specimen.place(rng);
        let mut spoilt = Patched::new(&specimen.volume);
        spoilt.flip(piece.offset + at, rng.random_range(1..=255));
        let result = specimen.require_harmless(&spoilt, &format!("byte {at} of {piece:?}"));
        // Of the log, only its end is looked at.
        assert!(
            result.is_err() || piece.kind == "log",
            "byte {at} of {piece:?} went unnoticed"
        );
    });
}

#[test]
fn a_flipped_byte_under_a_matching_checksum_frees_no_used_block() {
    let specimen = Specimen::new(VERSION_5);
    each_seed("flips under a checksum", 1_500, |rng| {
        let (piece, at) = specimen.place(rng);
        let mut spoilt = Patched::new(&specimen.volume);
        spoilt.flip(piece.offset + at, rng.random_range(1..=255));
        if let Some(crc) = piece.crc {
            spoilt.seal(piece.offset, piece.len as usize, crc);
        }
        let _either = specimen.require_harmless(&spoilt, &format!("byte {at} of {piece:?}"));
    });
}

#[test]
fn a_volume_that_is_cut_short_is_refused() {
    for options in [VERSION_4, VERSION_5] {
        let image = Image::fresh(SMALL, options);
        let volume = image.volume();
        let whole = scan(&volume).unwrap().0.size;
        let mut sizes: Vec<u64> = (0..=28).map(|shift| 1 << shift).collect();
        sizes.extend([0, 511, 513, 4095, whole - 1, whole - 512, whole / 2]);
        for size in sizes.into_iter().filter(|size| *size < whole) {
            match scan(&Patched::new(&volume).cut(size)) {
                Err(Unproven::Truncated {
                    needed, size: has, ..
                }) => assert_eq!((needed, has), (whole, size)),
                Err(Unproven::Inconsistent { .. }) if size < 512 => {}
                other => panic!("{size} bytes: {:?}", other.err()),
            }
        }
    }
}

#[test]
fn garbage_behind_a_valid_signature_is_refused() {
    let specimen = Specimen::new(VERSION_5);
    each_seed("garbage", 300, |rng| {
        let (piece, _) = specimen.place(rng);
        let mut garbage = vec![0; piece.len.min(4096) as usize];
        rng.fill(&mut garbage[4..]);
        let mut spoilt = Patched::new(&specimen.volume);
        let signature = spoilt.get::<4>(piece.offset);
        garbage[..4].copy_from_slice(&signature);
        spoilt.put(piece.offset, &garbage);
        if let Some(crc) = piece.crc {
            spoilt.seal(piece.offset, piece.len as usize, crc);
        }
        assert!(scan(&spoilt).is_err(), "{piece:?}");
    });
}

/// Many changes at once, checksums made right again: no promise about what is free, but no panic, no loop, nothing outside.
#[test]
fn any_mutation_ends_in_an_answer() {
    for options in [VERSION_4, VERSION_5] {
        let specimen = Specimen::new(options);
        let sealed = options == VERSION_5;
        let change = (
            any::<prop::sample::Index>(),
            any::<prop::sample::Index>(),
            any::<u32>(),
            1usize..=4,
        );
        let changes = prop::collection::vec(change, 1..12);
        let config = ProptestConfig {
            cases: cases(400) as u32,
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        let run = TestRunner::new(config).run(&changes, |changes| {
            let mut spoilt = Patched::new(&specimen.volume);
            for (piece, at, value, width) in changes {
                let piece = &specimen.pieces[piece.index(specimen.pieces.len())];
                let reach = piece.len.min(1024) as usize - 4;
                let at = piece.offset + (at.index(reach) & !3) as u64;
                spoilt.put(at, &value.to_be_bytes()[..width]);
                if let (true, Some(crc)) = (sealed, piece.crc) {
                    spoilt.seal(piece.offset, piece.len as usize, crc);
                }
            }
            let _either = scan(&spoilt);
            Ok(())
        });
        run.unwrap_or_else(|error| panic!("{error}"));
        drop(specimen.image);
    }
}

#[test]
fn an_unreadable_place_is_an_error_of_its_own() {
    struct Failing<'a>(&'a dyn ReadAt, u64);
    impl ReadAt for Failing<'_> {
        fn size(&self) -> u64 {
            self.0.size()
        }

        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            if (offset..offset + buf.len() as u64).contains(&self.1) {
                return Err(std::io::ErrorKind::Other.into());
            }
            self.0.read_exact_at(buf, offset)
        }
    }
    let specimen = Specimen::new(VERSION_5);
    for piece in &specimen.pieces {
        let result = scan(&Failing(&specimen.volume, piece.offset));
        assert!(matches!(result, Err(Unproven::Read { .. })), "{piece:?}");
    }
}
