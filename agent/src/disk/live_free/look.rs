//! One look at a disk in use: what is perhaps free, and which state that is.
//!
//! Owns the choice of file systems that may be asked on a running guest. Leaves the tables, volumes and LVM to `disk::scan`, and
//! what a look proves to `proofs`. Promises that a look never fails: a part that gives nothing carries its reason.

use std::time::{Duration, Instant};

use longhaul_common::extent::Extent;

use super::mounts::Mount;
use crate::disk::ReadAt;
use crate::disk::free_map::FreeMap;
use crate::disk::fs::{Committed, FileSystem, FsSummary, Unproven, ext, fat, ntfs, xfs};
use crate::disk::scan::{Part, scan_seen};
use crate::disk::volume::Probe;

/// File systems on a running guest: ext with its journal laid over, the others only to say why they give nothing.
const RUNNING: &[Probe] = &[ext::probe_running, xfs::probe_running, ntfs_running, fat_running];
/// File systems while they are frozen; NTFS writes on.
const FROZEN: &[Probe] = &[ext::probe_frozen, xfs::probe_frozen, ntfs_running, fat_running];

/// What was read of a disk at one time after the dirty bitmaps were switched on.
pub struct Look {
    /// Blocks that the metadata calls free; nothing is proven by that alone.
    pub free: FreeMap,
    /// When reading began.
    pub taken: Instant,
    pub(super) parts: Vec<LookPart>,
    pub(super) is_frozen: bool,
}

/// A part of the disk as one look saw it.
#[derive(Clone, Debug)]
pub(super) struct LookPart {
    /// The line of the report; its `reason` says why it gives nothing.
    pub(super) part: Part,
    /// `None` where it gives nothing.
    pub(super) found: Option<Found>,
}

/// What a part with free extents was made of.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// "partition 2", "logical volume vg/root".
    pub(super) place: String,
    /// Ranges of the disk in which its free blocks lie.
    pub(super) ranges: Vec<Extent>,
    pub(super) state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    FileSystem(Committed),
    /// A physical volume: the fingerprint of its metadata.
    Extents([u8; 32]),
}

/// The freeze under which a look is taken.
pub struct Freeze<'a> {
    /// The mounts that the guest's agent froze before the dirty bitmaps were switched on, on this disk.
    pub mounts: &'a [Mount],
    /// When the guest's agent said that they are frozen.
    pub since: Instant,
    /// Tells the time; asked again after reading.
    pub clock: &'a dyn Fn() -> Instant,
}

impl Freeze<'_> {
    /// XFS and what has no journal must have been read within this time of the freeze; a freeze does not hold for ever.
    pub const LIMIT: Duration = Duration::from_secs(2);
}

impl Look {
    /// Looks at a disk that a running guest may write to; `now` is the time before the first read.
    pub fn running(disk: &dyn ReadAt, now: Instant) -> Self {
        Self::take(disk, RUNNING, now, false)
    }

    /// Looks at a disk while some of its file systems are frozen and the dirty bitmaps are on. Other parts give nothing. Neither
    /// does any part where reading took longer than [`Freeze::LIMIT`] from the freeze on: the caller thaws by then.
    pub fn frozen(disk: &dyn ReadAt, freeze: &Freeze<'_>) -> Self {
        let mut look = Self::take(disk, FROZEN, (freeze.clock)(), true);
        let late = (freeze.clock)().saturating_duration_since(freeze.since) > Freeze::LIMIT;
        let places = look.places();
        for index in 0..look.parts.len() {
            let part = &look.parts[index];
            let Some(found) = &part.found else { continue };
            let is_frozen = matches!(found.state, State::FileSystem(_))
                && Mount::covers(freeze.mounts, &found.place, &part.part.kind, &places);
            if late || !is_frozen {
                let why = match is_frozen {
                    true => "it was not read within the time a freeze lasts",
                    false => "the guest's agent did not freeze it",
                };
                look.forget(index, why.to_owned());
            }
        }
        look
    }

    fn take(disk: &dyn ReadAt, probes: &[Probe], now: Instant, is_frozen: bool) -> Self {
        let (scan, seen) = scan_seen(disk, probes);
        let parts = scan.parts.into_iter().map(|mut part| {
            // What a running guest's part is worth is not known yet.
            part.proof = None;
            LookPart { part, found: None }
        });
        let mut look = Self {
            free: scan.free,
            taken: now,
            parts: parts.collect(),
            is_frozen,
        };
        for one in seen {
            let state = match (one.committed, one.metadata) {
                (Some(committed), _) => State::FileSystem(committed),
                (None, Some(metadata)) => State::Extents(metadata),
                (None, None) => continue,
            };
            if let Some(part) = look.parts.get_mut(one.line) {
                part.found = Some(Found {
                    place: one.place,
                    ranges: one.ranges,
                    state,
                });
            }
        }
        look
    }

    /// Takes back what a part gave.
    fn forget(&mut self, index: usize, why: String) {
        let part = &mut self.parts[index];
        for range in part.found.take().into_iter().flat_map(|found| found.ranges) {
            self.free.clear(&range);
        }
        part.part.free_bytes = 0;
        part.part.reason = Some(why);
    }

    /// The place and the kind of each file system found.
    pub(super) fn places(&self) -> Vec<(String, String)> {
        let parts = self.parts.iter();
        parts
            .filter_map(|part| {
                let found = part.found.as_ref()?;
                let is_fs = matches!(found.state, State::FileSystem(_));
                is_fs.then(|| (found.place.clone(), part.part.kind.clone()))
            })
            .collect()
    }

    /// The lines of the report: what is perhaps free of each part, or why it gives nothing.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter().map(|part| &part.part)
    }
}

/// A file system that proves nothing while its guest runs.
struct Mute {
    kind: &'static str,
    size: u64,
    why: &'static str,
}

impl FileSystem for Mute {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn scan(&self, _: &dyn ReadAt, _: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        Err(Unproven::InUse {
            kind: self.kind,
            what: self.why.to_owned(),
        })
    }
}

fn ntfs_running(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let why = "it keeps metadata in memory without limit, and a freeze does not stop it";
    muted(ntfs::probe(volume)?, why)
}

fn fat_running(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    muted(
        fat::probe(volume)?,
        "it has no journal that tells what is on its way to the disk",
    )
}

fn muted(
    found: Option<Box<dyn FileSystem>>,
    why: &'static str,
) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    Ok(found.map(|fs| {
        let (kind, size) = (fs.kind(), fs.size());
        Box::new(Mute { kind, size, why }) as Box<dyn FileSystem>
    }))
}
