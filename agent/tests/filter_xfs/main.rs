//! The XFS part of the free-block filter against images made by the real tools.
//!
//! Owns the promise "a used block is never called free" for XFS: clean images against `xfs_db`, `xfs_repair` and (where this
//! host may mount) the kernel; damaged, cut off, dirty and hostile images against the pristine answer. Random cases print
//! their seed; `LONGHAUL_FILTER_SEED=n` replays it, `LONGHAUL_FILTER_CASES=n` runs n cases of each campaign.

// Everything here is a test, also what clippy does not recognise as one.
#![allow(clippy::unwrap_used)]

mod clean;
mod damage;
mod dirty;
mod features;
mod hostile;
mod image;
mod mounted;
mod oracle;
mod scale;
mod synthetic;
mod volume;

use std::env;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// How many cases a campaign runs: `default`, unless the environment says otherwise.
fn cases(default: u64) -> u64 {
    number("LONGHAUL_FILTER_CASES").unwrap_or(default)
}

/// Runs `case` under seeds that it prints; one seed only, where the environment names it.
fn each_seed(campaign: &str, default_cases: u64, mut case: impl FnMut(&mut StdRng)) {
    let mut run = |seed: u64| {
        let shown = Shown { campaign, seed };
        case(&mut StdRng::seed_from_u64(seed));
        drop(shown);
    };
    if let Some(seed) = number("LONGHAUL_FILTER_SEED") {
        return run(seed);
    }
    let mut seeds = rand::rng();
    for _ in 0..cases(default_cases) {
        run(seeds.random());
    }
}

/// Prints the seed when its case fails.
struct Shown<'a> {
    campaign: &'a str,
    seed: u64,
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "{}: replay with LONGHAUL_FILTER_SEED={}",
                self.campaign, self.seed
            );
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} must be a number, not {text:?}")),
    )
}
