//! An ext file system that may be mounted: its free extents at one commit.
//!
//! Owns the order of a reading, its repetition where the guest wrote meanwhile, and what must not be looked at at all. Leaves
//! alone whether the commit is new enough to prove anything: that is for `disk::live_free`. Promises that the extents given are free
//! in block bitmaps with the journal laid over up to [`JournalState::newest`]; a bitmap that is not in the journal may be newer
//! than that, never older.

use std::cell::Cell;

use longhaul_common::extent::Extent;

use super::Fault;
use super::overlay::Reading;
use crate::disk::ReadAt;
use crate::disk::fs::ext::features::{FAST_COMMIT, HAS_JOURNAL, JOURNAL_DEVICE, NEEDS_RECOVERY};
use crate::disk::fs::ext::superblock::Superblock;
use crate::disk::fs::ext::{Ext, free};
use crate::disk::fs::{Committed, FileSystem, FsSummary, JournalState, Unproven};

/// Readings of a file system before the guest is held to write too fast.
const READINGS: u32 = 8;
/// Free extents kept until a reading is known to hold: 32 MiB.
const EXTENTS_MAX: usize = 1 << 21;
/// `EXT4_ERROR_FS` and `EXT4_ORPHAN_FS`
const STATE_TROUBLED: u16 = 0x2 | 0x4;
/// `s_flags` of a snapshot (next3), or of a file system repaired around one.
const SNAPSHOT_FLAGS: u32 = 0x70;

/// Recognises a file system that may be mounted; only one with a usable journal gives anything.
pub fn probe_running(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    probe(volume, false)
}

/// The same for a file system that the guest's agent has frozen: one without a journal gives its free extents too.
pub fn probe_frozen(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    probe(volume, true)
}

fn probe(volume: &dyn ReadAt, is_frozen: bool) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let ext = repeated(&mut || Ok(Ext::open(volume)?))?;
    Ok(ext.map(|ext| {
        Box::new(Running {
            kind: ext.superblock.kind.0,
            size: ext.superblock.size(),
            is_frozen,
            committed: Cell::new(None),
        }) as Box<dyn FileSystem>
    }))
}

struct Running {
    kind: &'static str,
    size: u64,
    is_frozen: bool,
    committed: Cell<Option<Committed>>,
}

impl FileSystem for Running {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn scan(&self, volume: &dyn ReadAt, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        let reading = repeated(&mut || self.read(volume))?;
        self.committed.set(Some(reading.committed));
        reading.free.into_iter().for_each(free);
        Ok(reading.summary)
    }

    fn committed(&self) -> Option<Committed> {
        self.committed.get()
    }
}

/// What one reading gave.
struct Taken {
    committed: Committed,
    summary: FsSummary,
    free: Vec<Extent>,
}

impl Running {
    fn read(&self, volume: &dyn ReadAt) -> Result<Taken, Fault> {
        let home = Ext::open(volume)?.ok_or(Fault::Moved("its superblock vanished"))?;
        let superblock = &home.superblock;
        if !superblock.features.has(HAS_JOURNAL) && self.is_frozen {
            return taken(&home, None);
        }
        check_journal(superblock)?;
        let reading = Reading::take(&home, volume)?;
        let journal = JournalState {
            uuid: reading.uuid,
            newest: reading.newest,
        };
        let overlay = reading.over(&home, volume);
        let ext = Ext::open(&overlay)?.ok_or(Fault::Moved("its superblock vanished"))?;
        let same = |one: &Superblock| (one.uuid, one.blocks, one.block_size, one.journal_inode);
        if same(&ext.superblock) != same(superblock) {
            return Err(Fault::Moved("its superblock changed under the read"));
        }
        taken(&ext, Some(journal))
    }
}

fn taken(ext: &Ext<'_>, journal: Option<JournalState>) -> Result<Taken, Fault> {
    check_state(&ext.superblock)?;
    let mut runs = Vec::new();
    let mut is_full = false;
    let summary = free::scan_bitmaps(ext, &mut |extent| {
        is_full |= runs.len() == EXTENTS_MAX;
        if !is_full {
            runs.push(extent);
        }
    })?;
    if is_full {
        let what = format!("its free space lies in more than {EXTENTS_MAX} pieces");
        return Err(ext.superblock.kind.in_use(what).into());
    }
    let committed = Committed {
        uuid: ext.superblock.uuid,
        is_mounted: ext.superblock.features.has(NEEDS_RECOVERY),
        journal,
    };
    Ok(Taken {
        committed,
        summary,
        free: runs,
    })
}

/// Repeats what failed because the guest wrote at the same time; damage looks the same, and remains.
fn repeated<T>(read: &mut dyn FnMut() -> Result<T, Fault>) -> Result<T, Unproven> {
    let mut last = Unproven::InUse {
        kind: "ext4",
        what: "it was not read".into(),
    };
    for _ in 0..READINGS {
        last = match read() {
            Ok(value) => return Ok(value),
            Err(Fault::Moved(what)) => Unproven::InUse {
                kind: "ext4",
                what: what.into(),
            },
            Err(Fault::Unproven(why @ (Unproven::Checksum { .. } | Unproven::Inconsistent { .. }))) => why,
            Err(Fault::Unproven(why)) => return Err(why),
        };
    }
    Err(last)
}

/// Whether there is a journal of the kind that proves something.
fn check_journal(superblock: &Superblock) -> Result<(), Unproven> {
    let kind = superblock.kind;
    if !superblock.features.has(HAS_JOURNAL) {
        return Err(kind.in_use("it has no journal that tells what is on its way to the disk"));
    }
    if superblock.features.has(JOURNAL_DEVICE) || superblock.journal_inode == 0 {
        return Err(kind.in_use("its journal is on another device"));
    }
    if superblock.features.has(FAST_COMMIT) {
        return Err(kind.in_use("its journal may have a fast-commit area in use"));
    }
    Ok(())
}

fn check_state(superblock: &Superblock) -> Result<(), Unproven> {
    if superblock.state & STATE_TROUBLED != 0 || superblock.error_count != 0 {
        return Err(superblock.kind.in_use("it recorded errors or needs a check"));
    }
    match superblock.flags & SNAPSHOT_FLAGS {
        0 => Ok(()),
        _ => Err(superblock.kind.unknown("snapshots")),
    }
}
