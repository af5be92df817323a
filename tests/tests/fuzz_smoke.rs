//! A second of fuzzing for each parser and decoder, without any tool: seeds, mutated from a printed number.
//!
//! The real targets are in `tests/fuzz`; this keeps their entries honest in every run. `LONGHAUL_SEED` replays a run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use longhaul_lab::hostile::ENTRIES;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const EACH: Duration = Duration::from_secs(1);
/// No input may take longer, on a machine that does much else beside.
const ONE: Duration = Duration::from_secs(20);

#[test]
fn no_mutated_input_harms_any_parser() {
    let seed = std::env::var("LONGHAUL_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random::<u64>);
    println!("LONGHAUL_SEED={seed}");
    for entry in ENTRIES {
        let seeds = (entry.seeds)().unwrap_or_else(|error| panic!("{}: {error}", entry.name));
        let mut random = StdRng::seed_from_u64(seed);
        seeds.iter().for_each(|seed| (entry.run)(seed));
        (entry.run)(&[]);
        let (end, mut rounds) = (Instant::now() + EACH, 0);
        while Instant::now() < end {
            let input = mutated(&seeds, &mut random);
            let began = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| (entry.run)(&input)));
            if outcome.is_err() || began.elapsed() > ONE {
                let path = std::env::temp_dir().join(format!("longhaul-{}-{seed}", entry.name));
                let _ = std::fs::write(&path, &input);
                let words = if outcome.is_err() {
                    "panicked"
                } else {
                    "took too long"
                };
                panic!(
                    "{} {words} in round {rounds} of seed {seed}; the input is in {}",
                    entry.name,
                    path.display()
                );
            }
            rounds += 1;
        }
        println!("{}: {} seeds, {rounds} rounds", entry.name, seeds.len());
        assert!(rounds > 3, "{} is too slow to be fuzzed", entry.name);
    }
}

/// A seed with a few bytes flipped, overwritten with telling numbers, cut, doubled or joined with another.
fn mutated(seeds: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let mut bytes = seeds[random.random_range(0..seeds.len())].clone();
    for _ in 0..random.random_range(1..6) {
        if bytes.is_empty() {
            bytes.push(random.random());
        }
        let at = random.random_range(0..bytes.len());
        match random.random_range(0..8) {
            0 => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes[at] = random.random(),
            2 => {
                let telling = [
                    0,
                    1,
                    0x7f,
                    0x80,
                    0xff,
                    u64::MAX,
                    1 << 63,
                    u64::MAX >> 1,
                    1 << 31,
                    1 << 32,
                ];
                let number = telling[random.random_range(0..telling.len())].to_le_bytes();
                let len = 1 << random.random_range(0..4);
                bytes[at..]
                    .iter_mut()
                    .zip(&number[..len])
                    .for_each(|(byte, new)| *byte = *new);
            }
            3 => bytes.truncate(at),
            4 => {
                let end = (at + random.random_range(1..32)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => drop(bytes.drain(at..(at + random.random_range(1..16)).min(bytes.len()))),
            6 => {
                let other = &seeds[random.random_range(0..seeds.len())];
                let from = random.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            _ => bytes[at] = bytes[at].wrapping_add(1),
        }
    }
    bytes
}
