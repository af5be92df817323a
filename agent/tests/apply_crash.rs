//! Random histories of batches, flushes and crashes: what was durable stays, nothing more is claimed, the newest content wins.
//!
//! A history is repeated with `LONGHAUL_APPLY_SEED`.

#![allow(clippy::unwrap_used)] // a failed step fails the test

mod apply_model;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::ops::ControlFlow::Continue;
use std::os::unix::fs::FileExt;
use std::path::Path;

use apply_model::{Leaf, Model, ODD_SIZE, apply, log, options, partial, seed};
use longhaul_agent::disk::apply::{Durable, Have, Target, TargetError, TargetOptions};
use longhaul_common::digest::{Digest, leaf_count, leaf_extent};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Replaces a file's content but not the file: its progress log belongs to this very one.
fn put(path: &Path, content: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    file.write_all_at(content, 0).unwrap();
}

fn listed(have: Have) -> BTreeMap<u64, Option<Digest>> {
    let mut leaves = BTreeMap::new();
    let mut end = 0;
    for durable in have {
        let (first, count, digest) = match durable.unwrap() {
            Durable::Data { leaf, digest } => (leaf, 1, Some(digest)),
            Durable::Zeros { first, count } => (first, count, None),
            Durable::Shadow { first, .. } => panic!("leaf {first} is a shadow's, and there is none"),
        };
        assert!(first >= end && count > 0, "leaves come in order");
        end = first + count;
        leaves.extend((first..end).map(|leaf| (leaf, digest)));
    }
    leaves
}

struct History {
    rng: StdRng,
    options: TargetOptions,
    size: u64,
    target: Option<Target>,
    attempt: u32,
    round: u32,
    /// The newest content of each leaf, and its version.
    newest: BTreeMap<u64, ((u32, u32), Leaf)>,
    /// What the last flush made durable, as long as nothing newer was begun.
    durable: BTreeMap<u64, Option<Digest>>,
    /// The partial copy as the disk holds it for sure.
    synced: Vec<u8>,
}

impl History {
    fn begin(seed: u64, dir: &Path) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut options = options(dir, "disk.raw");
        options.preallocate = rng.random_bool(0.3);
        let (target, have) = Target::open(&options, ODD_SIZE).unwrap();
        assert!(listed(have).is_empty());
        Self {
            rng,
            size: ODD_SIZE,
            target: Some(target),
            attempt: 1,
            round: 0,
            newest: BTreeMap::new(),
            durable: BTreeMap::new(),
            synced: vec![0; ODD_SIZE as usize],
            options,
        }
    }

    fn target(&self) -> &Target {
        self.target.as_ref().unwrap()
    }

    /// Several batches at once, overlapping and with versions in any order.
    fn apply_in_parallel(&mut self) {
        let batches: Vec<_> = (0..self.rng.random_range(1..5)).map(|_| self.batch()).collect();
        std::thread::scope(|scope| {
            for (version, first, leaves) in &batches {
                let target = self.target();
                scope.spawn(move || match apply(target, *version, *first, leaves) {
                    Ok(applied) => assert!(applied.stale_leaves < leaves.len() as u64),
                    Err(error) => assert!(matches!(error, TargetError::Stale { .. }), "{error}"),
                });
            }
        });
        for (version, first, leaves) in batches {
            for (number, leaf) in (first..).zip(leaves) {
                if self
                    .newest
                    .get(&number)
                    .is_none_or(|(newest, _)| *newest < version)
                {
                    self.newest.insert(number, (version, leaf));
                    self.durable.remove(&number);
                }
            }
        }
    }

    fn batch(&mut self) -> ((u32, u32), u64, Vec<Leaf>) {
        let first = self.rng.random_range(0..leaf_count(self.size));
        let count = self.rng.random_range(1..=3).min(leaf_count(self.size) - first);
        self.round += 1;
        // Versions are unique, but come out of order.
        let version = (
            self.attempt,
            self.round * 2 + if self.rng.random() { 1001 } else { 0 },
        );
        let mut leaves = Vec::new();
        for number in first..first + count {
            let len = leaf_extent(number, self.size).len() as usize;
            leaves.push(Leaf::random(&mut self.rng, len));
        }
        (version, first, leaves)
    }

    fn flush(&mut self) {
        self.target().flush().unwrap();
        self.synced = std::fs::read(partial(&self.options)).unwrap();
        let digest = |leaf: &Leaf| (!leaf.is_zero()).then(|| Digest::of(&leaf.bytes));
        self.durable = self
            .newest
            .iter()
            .map(|(number, (_, leaf))| (*number, digest(leaf)))
            .collect();
    }

    /// The host dies: of what was written since the last flush, any 4 KiB may have reached the disk or not.
    fn crash(&mut self) {
        let during_flush = self.rng.random_bool(0.4);
        let log_before = std::fs::read(log(&self.options)).unwrap();
        if during_flush {
            self.target().flush().unwrap();
        }
        self.target = None;
        let mut on_disk = std::fs::read(partial(&self.options)).unwrap();
        let written = std::fs::read(log(&self.options)).unwrap();
        if during_flush {
            // The data is there already; the log ends anywhere behind what was synced before.
            let keeps = written.starts_with(&log_before);
            let from = if keeps { log_before.len() } else { written.len() };
            put(
                &log(&self.options),
                &written[..self.rng.random_range(from..=written.len())],
            );
        } else {
            for (new, old) in on_disk.chunks_mut(4096).zip(self.synced.chunks(4096)) {
                if self.rng.random() {
                    new.copy_from_slice(old);
                }
            }
            put(&partial(&self.options), &on_disk);
        }
        self.reopen(!during_flush);
    }

    /// Only the process dies: all that was written is there.
    fn kill(&mut self) {
        self.target = None;
        self.reopen(true);
    }

    fn reopen(&mut self, exactly: bool) {
        let (target, have) = Target::open(&self.options, self.size).unwrap();
        let listed = listed(have);
        let content = std::fs::read(partial(&self.options)).unwrap();
        for (leaf, digest) in &listed {
            let extent = leaf_extent(*leaf, self.size);
            let bytes = &content[extent.offset() as usize..extent.end() as usize];
            match digest {
                Some(digest) => assert_eq!(*digest, Digest::of(bytes), "leaf {leaf}"),
                None => assert!(bytes.iter().all(|byte| *byte == 0), "leaf {leaf}"),
            }
        }
        for (leaf, digest) in &self.durable {
            assert_eq!(listed.get(leaf), Some(digest), "leaf {leaf} was durable");
        }
        assert!(!exactly || listed == self.durable, "nothing else is listed");
        self.newest.retain(|leaf, _| listed.contains_key(leaf));
        self.durable = listed;
        self.synced = content;
        self.target = Some(target);
        self.attempt += 1;
        self.round = 0;
    }

    fn finish(mut self) {
        for leaf in 0..leaf_count(self.size) {
            let missing = !self.newest.contains_key(&leaf);
            if missing {
                let content = Leaf::random(&mut self.rng, leaf_extent(leaf, self.size).len() as usize);
                self.newest.insert(leaf, ((self.attempt, 0), content.clone()));
                apply(self.target(), (self.attempt, 0), leaf, &[content]).unwrap();
            }
            let old = Leaf::random(&mut self.rng, leaf_extent(leaf, self.size).len() as usize);
            let refused = apply(self.target(), (1, 0), leaf, &[old]);
            assert!(missing && self.attempt == 1 || matches!(refused, Err(TargetError::Stale { .. })));
            if let Ok(applied) = refused {
                // The same version again: what was applied last holds.
                assert_eq!(applied.stale_leaves, 0);
                let (_, content) = self.newest[&leaf].clone();
                apply(self.target(), (1, 0), leaf, &[content]).unwrap();
            }
        }
        let leaves = std::mem::take(&mut self.newest)
            .into_values()
            .map(|(_, leaf)| leaf)
            .collect();
        let model = Model {
            size: self.size,
            leaves,
        };
        let target = self.target.take().unwrap();
        assert_eq!(target.verify(2, &|_| Continue(())).unwrap(), model.digest());
        let path = target.promote().unwrap();
        assert!(std::fs::read(path).unwrap() == model.bytes());
        assert!(!partial(&self.options).exists() && !log(&self.options).exists());
    }
}

fn history(seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut history = History::begin(seed, dir.path());
    for _ in 0..25 {
        match history.rng.random_range(0..10) {
            0..=5 => history.apply_in_parallel(),
            6 | 7 => history.flush(),
            8 => history.crash(),
            _ => history.kill(),
        }
    }
    history.finish();
}

#[test]
fn nothing_durable_is_ever_lost() {
    let first = seed("LONGHAUL_APPLY_SEED");
    let histories = if std::env::var_os("LONGHAUL_APPLY_SEED").is_some() {
        1
    } else {
        24
    };
    for seed in (0..histories).map(|n| first.wrapping_add(n)) {
        println!("history {seed}");
        history(seed);
    }
}

/// A flush beside writers makes durable what was complete, and nothing else.
#[test]
fn flushing_beside_writers_claims_only_whole_batches() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let (target, _) = Target::open(&options, ODD_SIZE).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let models: Vec<_> = (0..8).map(|_| Model::random(&mut rng, ODD_SIZE)).collect();
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (target, models) = (&target, &models);
            scope.spawn(move || {
                for (round, model) in (0..).zip(models) {
                    model.send(target, (1, round), |leaf| leaf % 3 == thread);
                }
            });
        }
        scope.spawn(|| {
            let mut through = 0;
            for _ in 0..20 {
                let flushed = target.flush().unwrap().through.0;
                assert!(flushed >= through);
                through = flushed;
            }
        });
    });
    drop(target);
    let (target, have) = Target::open(&options, ODD_SIZE).unwrap();
    let content = std::fs::read(partial(&options)).unwrap();
    for (leaf, digest) in listed(have) {
        let extent = leaf_extent(leaf, ODD_SIZE);
        let bytes = &content[extent.offset() as usize..extent.end() as usize];
        let newest = &models[7].leaves[leaf as usize];
        assert!(newest.bytes == bytes);
        assert_eq!(digest, (!newest.is_zero()).then(|| Digest::of(bytes)));
    }
    models[7].send(&target, (2, 0), |_| true);
    assert_eq!(target.verify(3, &|_| Continue(())).unwrap(), models[7].digest());
}

/// A batch that comes twice changes nothing: what was durable stays so, even if nobody flushes again.
#[test]
fn a_repeated_batch_takes_nothing_back() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), "disk.raw");
    let (target, _) = Target::open(&options, ODD_SIZE).unwrap();
    let mut model = Model::random(&mut StdRng::seed_from_u64(5), ODD_SIZE);
    model.send(&target, (1, 0), |_| true);
    target.flush().unwrap();
    let logged = std::fs::metadata(log(&options)).unwrap().len();
    model.send(&target, (1, 0), |_| true);
    assert_eq!(std::fs::metadata(log(&options)).unwrap().len(), logged);
    // Unless it says something else.
    model.leaves[4] = Leaf::random(&mut StdRng::seed_from_u64(6), 1 << 20);
    model.leaves[5] = Leaf {
        stretches: vec![1 << 20],
        bytes: vec![9; 1 << 20],
    };
    model.send(&target, (1, 0), |leaf| leaf == 4 || leaf == 5);
    drop(target);
    let (target, have) = Target::open(&options, ODD_SIZE).unwrap();
    assert_eq!(have.bytes(), ODD_SIZE - (2 << 20));
    model.send(&target, (2, 0), |leaf| leaf == 4 || leaf == 5);
    assert_eq!(target.verify(3, &|_| Continue(())).unwrap(), model.digest());
}
