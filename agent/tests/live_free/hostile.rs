//! Damaged journals: never a panic, and never a state that the file system has not been in.

use std::fs;

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::live_free::Look;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use crate::campaign::seed;
use crate::guest::run;
use crate::replay::{State, journaled, read};

/// Bytes of the image that hold the journal, as debugfs lists its blocks.
fn journal(image: &std::path::Path, block: usize) -> Vec<usize> {
    let output = run("debugfs", &["-R", "blocks <8>", image.to_str().unwrap()], &[0]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace()
        .map(|word| word.parse::<usize>().unwrap() * block)
        .collect()
}

fn require_known(disk: &dyn ReadAt, states: &[State], what: &str) -> bool {
    match read(disk) {
        Ok(state) => {
            assert!(
                states.contains(&state),
                "{what}: a state that never was, newest {}",
                state.0
            );
            true
        }
        Err(_) => false,
    }
}

#[test]
fn a_flipped_bit_of_a_journal_with_checksums_gives_a_state_that_was_or_nothing() {
    let seed = seed();
    println!("LONGHAUL_LIVE_FREE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for (mkfs, version) in [
        ("mkfs.ext4 -q -F -b 1024", "-c -v 3"),
        ("mkfs.ext4 -q -F -b 1024 -O ^64bit", "-c -v 2"),
    ] {
        let (guest, states) = journaled(mkfs, 16, version, 3, seed);
        let mut disk = fs::read(guest.image()).unwrap();
        let blocks = journal(&guest.image(), 1024);
        // What is in use of the log: the transactions, and a little behind them.
        let live = blocks.iter().copied().take(1000);
        let live: Vec<usize> = live
            .filter(|at| disk[*at..at + 1024].iter().any(|byte| *byte != 0))
            .collect();
        let mut given = 0;
        for case in 0..400 {
            let at = live[rng.random_range(0..live.len())] + rng.random_range(0..1024);
            let bit = 1 << rng.random_range(0..8);
            disk[at] ^= bit;
            given += usize::from(require_known(
                &disk,
                &states,
                &format!("seed {seed}, case {case}, byte {at}, {mkfs}"),
            ));
            disk[at] ^= bit;
        }
        assert!(require_known(&disk, &states[3..], "intact"));
        println!("{mkfs}: {given} of 400 gave a state");
        // Each head of a block of the log, bit by bit.
        let is_head = |at: &&usize| disk[**at..][..4] == 0xC03B_3998u32.to_be_bytes();
        let heads: Vec<usize> = live.iter().filter(is_head).copied().collect();
        for block in &heads {
            for at in *block..*block + 32 {
                for bit in 0..8 {
                    disk[at] ^= 1 << bit;
                    require_known(&disk, &states, &format!("byte {at}, bit {bit}, {mkfs}"));
                    disk[at] ^= 1 << bit;
                }
            }
        }
    }
}

#[test]
fn random_damage_and_truncation_never_panic_and_never_stray() {
    let seed = seed();
    println!("LONGHAUL_LIVE_FREE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for (mkfs, version) in [
        ("mkfs.ext4 -q -F -b 1024", "-c -v 3"),
        ("mkfs.ext3 -q -F -b 1024", ""),
    ] {
        let (guest, _) = journaled(mkfs, 16, version, 2, seed);
        let intact = fs::read(guest.image()).unwrap();
        let mut hot = journal(&guest.image(), 1024);
        hot.truncate(600);
        hot.extend((0..400).map(|block| block * 1024));
        for case in 0..300 {
            let mut disk = intact.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = hot[rng.random_range(0..hot.len())] + rng.random_range(0..1000);
                let len = rng.random_range(1..1024.min(disk.len() - at));
                match case % 3 {
                    0 => rng.fill_bytes(&mut disk[at..at + len]),
                    1 => disk[at..at + len].fill(0xFF),
                    _ => disk.copy_within(at..at + len, hot[rng.random_range(0..hot.len())] & !1023),
                }
            }
            if case % 5 == 0 {
                disk.truncate(rng.random_range(0..disk.len()));
            }
            let look = Look::running(&disk, std::time::Instant::now());
            assert!(
                look.free.free_bytes() <= disk.len() as u64,
                "seed {seed}, case {case}"
            );
            let _ = read(&disk);
        }
    }
}
