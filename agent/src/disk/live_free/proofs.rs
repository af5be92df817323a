//! From looks to proofs: which blocks of a running guest's disk are proven free, and by what.
//!
//! Owns the decisions; reads nothing and asks no clock. Leaves looking to `look`. A proof always rests on a state of the metadata
//! that is not older than the moment the dirty bitmaps were switched on (T0), in the one sense that counts: whatever was written
//! before T0 and is still needed is allocated in that state. A block allocated later was written later, and is in a dirty bitmap.
//!
//! - **journal**: let C be the newest commit of a complete scan after T0. At T0, C+1 may have been committing and C+2 running, and
//!   an allocation precedes the write of its data: so it belongs to C+2 at the latest. A state of C+3 or later knows it.
//! - **frozen**: at some time since T0 nothing was under way and all of it was on the disk; the state is that one, or, with a
//!   journal, a later one.
//! - **age**: as long a time after T0 as the setting says, a journaling file system has committed what was running at T0.
//! - **free extents**: LVM writes its metadata before it lets anybody write to a new volume; two equal readings are not torn.
//!
//! A clean file system that nobody mounted proves nothing on a running guest: a mount would mark the superblock first, but a
//! program that writes to the device itself (mkfs, a restore, a repair) marks nothing, and may have written only half by T0.

use std::time::{Duration, Instant};

use longhaul_common::extent::Extent;

use super::look::{Found, Look, State};
use super::mounts::Mount;
use crate::disk::free_map::FreeMap;
use crate::disk::fs::Committed;
use crate::disk::fs::ext::is_after;
use crate::disk::scan::{Part, Proof};

/// How many commits behind the newest one at T0 a state must be.
const COMMITS: u32 = 3;

/// What the proofs may rest on.
#[derive(Clone, Debug)]
pub struct Rules {
    /// When all dirty bitmaps of the disk were on.
    pub started: Instant,
    /// How long after that the age proof holds; `None` forbids it.
    pub age: Option<Duration>,
    /// The mounts of this disk that were frozen at some time when the dirty bitmaps were on, before the first look that is added.
    pub frozen: Vec<Mount>,
}

/// The proofs of one disk, growing with every look.
pub struct Proofs {
    rules: Rules,
    /// Since when the guest has run without a stop: the age proof counts from here; `None` while it stands.
    aged_from: Option<Instant>,
    free: FreeMap,
    parts: Vec<Known>,
}

/// What is known of one part.
struct Known {
    line: Part,
    /// The earliest state since T0 that later ones can be compared with.
    base: Option<Found>,
    /// Whether that is the first state that was seen at all: the part has been the same since T0.
    is_original: bool,
}

impl Proofs {
    /// For a disk of `size` bytes, nothing proven.
    pub fn new(size: u64, rules: Rules) -> Self {
        Self {
            aged_from: Some(rules.started),
            rules,
            free: FreeMap::new(size),
            parts: Vec::new(),
        }
    }

    /// The age proof counts from here on: a dirty bitmap that was on before the job began makes it earlier, a guest that stood
    /// and committed nothing makes it later. It never holds with `None`.
    pub fn age_from(&mut self, from: Option<Instant>) {
        self.aged_from = from;
    }

    /// Some of the disk's file systems were frozen, and thawed only after that, while the dirty bitmaps were on: `mounts`. The look
    /// that was taken meanwhile, if it could be had, proves what it saw; looks before the freeze do not count any more.
    pub fn froze(&mut self, mounts: Vec<Mount>, look: Option<&Look>, size: u64) {
        self.rules.frozen = mounts;
        self.free = FreeMap::new(size);
        self.parts.clear();
        if let Some(look) = look {
            self.add(look);
        }
    }

    /// Takes in a look that began after the dirty bitmaps were on; looks come in the order in which they were taken.
    pub fn add(&mut self, look: &Look) {
        if look.taken < self.rules.started {
            return;
        }
        let places = look.places();
        for seen in &look.parts {
            let index = self.known(&seen.part, seen.found.as_ref());
            let Some(found) = &seen.found else {
                self.unproven(index, seen.part.reason.clone());
                continue;
            };
            match self.judge(index, look, found, &places) {
                Ok(proof) => self.prove(index, look, found, proof, &seen.part),
                Err(why) => self.unproven(index, Some(why)),
            }
        }
    }

    /// The place of a part among those known; a new one where it, or what it holds, was not known.
    fn known(&mut self, line: &Part, found: Option<&Found>) -> usize {
        let same = |known: &Known| match (&known.base, found) {
            (Some(base), Some(found)) => base.place == found.place,
            _ => known.line.extent == line.extent && known.line.kind == line.kind,
        };
        let index = self.parts.iter().position(same).unwrap_or(self.parts.len());
        if index == self.parts.len() {
            let line = Part {
                proof: None,
                free_bytes: 0,
                ..line.clone()
            };
            self.parts.push(Known {
                line,
                base: None,
                is_original: true,
            });
        }
        index
    }

    fn judge(
        &mut self,
        index: usize,
        look: &Look,
        found: &Found,
        places: &[(String, String)],
    ) -> Result<Proof, String> {
        let known = &mut self.parts[index];
        let base = known.base.as_ref().filter(|base| is_comparable(base, found));
        let base = match base {
            Some(base) => base.state,
            None => {
                known.is_original &= known.base.is_none();
                known.base = Some(found.clone());
                if let State::Extents(_) = found.state {
                    return Err(
                        "its metadata was read once since the dirty bitmap is on; twice is needed".into(),
                    );
                }
                found.state
            }
        };
        let (State::FileSystem(base), State::FileSystem(now)) = (base, found.state) else {
            return Ok(Proof::FreeExtents);
        };
        // Taken while frozen, or of a file system that was frozen at T0 and has been the same one since.
        let was_frozen = look.is_frozen
            || (now.journal.is_some()
                && known.is_original
                && Mount::covers(&self.rules.frozen, &found.place, &known.line.kind, places));
        if was_frozen {
            return Ok(Proof::Frozen);
        }
        let age = self
            .aged_from
            .map(|from| look.taken.saturating_duration_since(from));
        by_commits(&base, &now).or_else(|why| match (self.rules.age, age) {
            (Some(least), Some(age)) if now.journal.is_some() && age >= least => Ok(Proof::Age),
            _ => Err(why),
        })
    }

    fn prove(&mut self, index: usize, look: &Look, found: &Found, proof: Proof, line: &Part) {
        let mut bytes = 0;
        for range in &found.ranges {
            bytes += self.free.take(&look.free, range);
        }
        self.parts[index].line = Part {
            proof: Some(proof),
            free_bytes: bytes,
            reason: None,
            ..line.clone()
        };
    }

    /// A proof once given stays: it spoke of T0.
    fn unproven(&mut self, index: usize, why: Option<String>) {
        let line = &mut self.parts[index].line;
        if line.proof.is_none() {
            line.reason = why;
        }
    }

    /// The blocks proven free by now.
    pub fn free(&self) -> &FreeMap {
        &self.free
    }

    /// Bytes of `deferred` that are not proven free yet.
    pub fn missing(&self, deferred: &FreeMap, size: u64) -> u64 {
        let mut proven = 0;
        deferred.each_run(&Extent::between(0, size), &mut |run| {
            self.free.each_run(&run, &mut |run| proven += run.len());
        });
        deferred.free_bytes().saturating_sub(proven)
    }

    /// The lines of the report: of each part the proof and the bytes that it lets skip, or why all of it is sent.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter().map(|known| &known.line)
    }
}

/// Whether both looks saw the same file system or physical volume, and the later one a later state of it.
fn is_comparable(base: &Found, found: &Found) -> bool {
    let same = match (&base.state, &found.state) {
        (State::FileSystem(base), State::FileSystem(now)) => is_same(base, now),
        (State::Extents(base), State::Extents(now)) => base == now,
        _ => false,
    };
    same && base.ranges == found.ranges
}

fn is_same(base: &Committed, now: &Committed) -> bool {
    let journals = match (base.journal, now.journal) {
        (Some(base), Some(now)) => base.uuid == now.uuid && !is_after(base.newest, now.newest),
        (None, None) => true,
        _ => false,
    };
    base.uuid == now.uuid && journals
}

/// The journal proof.
fn by_commits(base: &Committed, now: &Committed) -> Result<Proof, String> {
    let (Some(base), Some(journal)) = (base.journal, now.journal) else {
        return Err("it has no journal that tells what is on its way to the disk".into());
    };
    let needed = base.newest.wrapping_add(COMMITS);
    if !is_after(needed, journal.newest) {
        return Ok(Proof::Journal);
    }
    let seen = journal.newest;
    Err(match now.is_mounted {
        true => format!(
            "its journal has committed transaction {seen}, and {needed} is the first that began after the dirty bitmap \
             was on; a freeze by the guest's agent, or `longhaul prepare` in time, would have proven it"
        ),
        false => "it is not mounted for writing, and nothing on the disk tells whether a program writes to it directly; \
                  `longhaul prepare` in time would have proven it"
            .into(),
    })
}
