//! What a progress log says in the end: the durable leaves and their digests.
//!
//! Owns the meaning of the records: the last word on a leaf holds. Digests are never held for the whole disk: whoever needs them reads
//! the log once per window of 65,536 leaves (64 GiB of disk, about 3 MiB of memory).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use longhaul_common::digest::{Digest, leaf_extent};
use rustix::fs::OFlags;

use super::TargetError;
use super::board::{LeafState, LeafStates};
use super::progress_log::{ProgressLog, Records, Step};
use super::record::{Kind, Record, Version};

/// Leaves whose digests are held at once.
pub(crate) const WINDOW: u64 = 1 << 16;

/// What the log's records left behind.
pub(crate) struct Replayed {
    /// Entries that a later record made void.
    pub(crate) dead_entries: u64,
    /// Bytes of the log up to its end or to the damage.
    pub(crate) good: u64,
    pub(crate) damaged: bool,
}

/// Lays all records over `states`.
pub(crate) fn states(mut records: Records, states: &mut LeafStates) -> io::Result<Replayed> {
    let mut entries = 0;
    let damaged = loop {
        match records.next()? {
            Step::Record(record) => {
                entries += record.digests.len() as u64;
                lay_over(states, &record);
            }
            Step::End => break false,
            Step::Damaged => break true,
        }
    };
    let all = 0..records.leaves();
    let live = states
        .runs(all)
        .filter(|(_, leaf)| leaf.claimed() && leaf.touched());
    let live: u64 = live.map(|(run, _)| run.end - run.start).sum();
    Ok(Replayed {
        dead_entries: entries.saturating_sub(live),
        good: records.at(),
        damaged,
    })
}

fn lay_over(states: &mut LeafStates, record: &Record) {
    let (claimed, touched) = match record.kind {
        Kind::Written => (true, false),
        Kind::Void => (false, true),
        Kind::Shadow => (true, true),
    };
    states.set(
        record.leaves.clone(),
        LeafState::new(record.version, claimed, touched),
    );
    for (leaf, _) in &record.digests {
        states.set(*leaf..*leaf + 1, LeafState::new(record.version, claimed, true));
    }
}

/// What the log says of one leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Said {
    #[default]
    Nothing,
    Zero(Version),
    Data(Version, Digest),
    /// As the shadow was left.
    Shadow(Version),
}

/// What the log says of the leaves of `range`, at most `WINDOW` of them.
pub(crate) fn window(mut records: Records, range: &Range<u64>) -> io::Result<Vec<Said>> {
    let mut said = vec![Said::Nothing; (range.end - range.start) as usize];
    while let Step::Record(record) = records.next()? {
        let (start, end) = (
            record.leaves.start.max(range.start),
            record.leaves.end.min(range.end),
        );
        if start >= end {
            continue;
        }
        let slots = start - range.start..end - range.start;
        let word = match record.kind {
            Kind::Written => Said::Zero(record.version),
            Kind::Void => Said::Nothing,
            Kind::Shadow => Said::Shadow(record.version),
        };
        said[slots.start as usize..slots.end as usize].fill(word);
        for (leaf, digest) in record.digests.iter().filter(|(leaf, _)| range.contains(leaf)) {
            said[(leaf - range.start) as usize] = Said::Data(record.version, *digest);
        }
    }
    Ok(said)
}

/// The windows of a disk with `leaves` leaves.
pub(crate) fn windows(leaves: u64) -> impl Iterator<Item = Range<u64>> {
    (0..leaves)
        .step_by(WINDOW as usize)
        .map(move |start| start..leaves.min(start.saturating_add(WINDOW)))
}

/// Leaves that are durable at the target and need not be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    Data {
        leaf: u64,
        digest: Digest,
    },
    Zeros {
        first: u64,
        count: u64,
    },
    /// As the shadow was left that the copy began with, whatever that is.
    Shadow {
        first: u64,
        count: u64,
    },
}

/// The durable leaves as they were when the target was opened, in ascending order, runs of zero leaves and of leaves of a shadow as
/// one.
///
/// Reads the log as it goes: use it up before leaves it lists are written again.
pub struct Have {
    file: Arc<File>,
    path: PathBuf,
    end: u64,
    size: u64,
    bytes: u64,
    leaves: u64,
    window: Vec<Said>,
    window_start: u64,
    next: u64,
    failed: bool,
    has_shadow: bool,
}

impl Have {
    /// `bytes` of the disk are durable already.
    pub(crate) fn new(log: &ProgressLog, states: &LeafStates, has_shadow: bool) -> Result<Self, TargetError> {
        // Opened anew: through the log's own file it would keep the lock when the target is dropped.
        let file = log.dir.open_file(log.name.as_ref(), OFlags::RDONLY)?;
        let (size, leaves) = (log.header.size, log.header.leaves());
        let durable = states.runs(0..leaves).filter(|(_, leaf)| leaf.claimed());
        let bytes = durable
            .map(|(run, _)| leaf_extent(run.end - 1, size).end() - leaf_extent(run.start, size).offset());
        Ok(Self {
            file: Arc::new(file),
            path: log.path(),
            end: log.len,
            size,
            bytes: bytes.sum(),
            leaves,
            window: Vec::new(),
            window_start: 0,
            next: 0,
            failed: false,
            has_shadow,
        })
    }

    /// Bytes of the disk that are durable, zeros among them.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether some leaves may be as the shadow was left that the copy began with.
    pub fn has_shadow(&self) -> bool {
        self.has_shadow
    }

    /// Bytes of the whole disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What the log says of the leaf `next`, loading its window where needed.
    fn peek(&mut self) -> io::Result<Option<Said>> {
        if self.next >= self.leaves {
            return Ok(None);
        }
        let start = self.next / WINDOW * WINDOW;
        if self.window.is_empty() || start != self.window_start {
            let range = start..self.leaves.min(start.saturating_add(WINDOW));
            self.window = window(Records::new(self.file.clone(), self.end, self.leaves), &range)?;
            self.window_start = start;
        }
        Ok(self.window.get((self.next - start) as usize).copied())
    }

    fn step(&mut self) -> io::Result<Option<Durable>> {
        while let Some(said) = self.peek()? {
            let first = self.next;
            self.next += 1;
            match said {
                Said::Nothing => {}
                Said::Data(_, digest) => return Ok(Some(Durable::Data { leaf: first, digest })),
                Said::Zero(_) => {
                    while let Some(Said::Zero(_)) = self.peek()? {
                        self.next += 1;
                    }
                    return Ok(Some(Durable::Zeros {
                        first,
                        count: self.next - first,
                    }));
                }
                Said::Shadow(_) => {
                    while let Some(Said::Shadow(_)) = self.peek()? {
                        self.next += 1;
                    }
                    return Ok(Some(Durable::Shadow {
                        first,
                        count: self.next - first,
                    }));
                }
            }
        }
        Ok(None)
    }
}

impl Iterator for Have {
    type Item = Result<Durable, TargetError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.bytes == 0 || self.failed {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        step.map_err(TargetError::during("read", &self.path)).transpose()
    }
}
