//! Beginning a copy with the image that the VM left behind when it was moved away from here.
//!
//! Owns taking such a shadow, stating what is known of it, and giving it back. Leaves alone whose shadow it is, and what changed
//! since: the sender knows. Promises that a shadow counts as it was left only where nobody has touched its file since, with
//! the blocks that were left behind as free made zeros as the VM sees them; in every other case each leaf of it is read, and its digest is
//! what counts. A shadow that is taken is no shadow any more: once a batch was written over it, it is given back as one of unknown content.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use longhaul_common::digest::leaf_count;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, Round};
use serde::{Deserialize, Serialize};

use super::board::{LeafState, LeafStates};
use super::place::Place;
use super::placed::Placed;
use super::progress_log::{LockedLog, ProgressLog};
use super::record::{Header, Kind, Record, Version};
use super::store::Store;
use super::target::{Outcome, Target, lock};
use super::{TargetError, TargetFormat, TargetOptions, image_lock, open, verify};

/// Bytes of a qcow2 image's header that are looked at.
const QCOW2_HEADER: usize = 96;

/// What tells whether anybody touched a file: which file it is, its size, and when it was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Seal {
    /// Of an open file, as it is now.
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            // Nobody can set it back.
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// An image that may become the partial copy.
#[derive(Clone, Debug)]
pub struct Shadow {
    /// In the folder of the target.
    pub name: OsString,
    /// None: nothing is known of what it holds.
    pub left: Option<Left>,
    /// Whether the sender knows all that the VM wrote since.
    pub changes_known: bool,
}

/// How a shadow was left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// With this seal it is what the VM had when it was moved, but for `free`.
    pub seal: Seal,
    /// Left behind as free, so zeros at the VM's new place: offset and length of each run.
    pub free: Vec<(u64, u64)>,
}

/// An image that was a shadow a moment ago.
pub(super) struct Taken {
    pub(super) file: File,
    pub(super) header: Header,
    pub(super) content: Content,
}

/// What is known of it.
pub(super) struct Content {
    /// Runs that must become zeros, and then the rest is as the VM had it; none where somebody touched the shadow.
    free: Option<Vec<(u64, u64)>>,
    changes_known: bool,
}

/// A shadow that was given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Returned {
    /// Its seal, where nothing was written over it.
    pub untouched: Option<Seal>,
}

impl Shadow {
    /// Gives the file the partial copy's name. `None` where it is not there, or no image that can be written to.
    pub(super) fn take(
        &self,
        options: &TargetOptions,
        size: u64,
        place: &Place,
        log: &LockedLog,
    ) -> Result<Option<Taken>, TargetError> {
        let path = place.dir.join(&self.name);
        let Some(file) = place.own_file(&self.name)? else {
            return Ok(None);
        };
        let examined = |error| TargetError::during("examine", &path)(error);
        let plain = is_plain(options, &file).map_err(examined)?;
        if !plain || !open::has_size(options, &file, size) {
            return Ok(None);
        }
        if options.format == TargetFormat::Raw
            && !image_lock::hold(&file).map_err(TargetError::during("lock", &path))?
        {
            return Err(TargetError::in_use(
                &path,
                "a process holds the image lock of this shadow: end it, or set target.shadow = false",
            ));
        }
        let seal = Seal::of(&file).map_err(examined)?;
        let left = self.left.as_ref().filter(|left| left.seal == seal);
        let header = open::header_for(options, size, &file, &path)?;
        // In this order: a copy without a log that knows it would be thrown away.
        log.bind(&header)?;
        place.dir.remove(&place.partial_name)?;
        place.rename_own(&self.name, &place.partial_name)?;
        Ok(Some(Taken {
            file,
            header,
            content: Content {
                free: left.map(|left| left.free.clone()),
                changes_known: self.changes_known,
            },
        }))
    }
}

impl Content {
    /// States in the log what the copy holds that was a shadow until now. `true`: it is as it was left; else there are digests.
    pub(super) fn enter(
        self,
        store: &dyn Store,
        size: u64,
        log: &mut ProgressLog,
        states: &mut LeafStates,
    ) -> Result<bool, TargetError> {
        // Older than, or as old as, everything that this job may send.
        let (Some(version), leaves) = (Version::new(Attempt(1), Round(0)), leaf_count(size)) else {
            return Ok(false);
        };
        let as_left = self.free.is_some();
        let whole = Extent::between(0, size);
        let free = self.free.iter().flatten();
        let zeroed = free
            .filter_map(|(offset, len)| {
                Extent::between(*offset, offset.saturating_add(*len)).intersect(&whole)
            })
            .try_for_each(|free| store.zero(free))
            .and_then(|()| store.flush());
        zeroed.map_err(TargetError::during(
            "clear free blocks of the copy of",
            &log.path(),
        ))?;
        if !(as_left && self.changes_known) {
            return verify::state_all(store, size, log, states, version).map(|()| false);
        }
        if leaves > 0 {
            log.append(&[Record {
                kind: Kind::Shadow,
                version,
                leaves: 0..leaves,
                digests: Vec::new(),
            }])?;
            states.set(0..leaves, LeafState::new(version, true, true));
        }
        Ok(true)
    }
}

impl Target {
    /// Gives up a copy that began with a shadow: it has the name of one again.
    pub fn give_back(self, name: &OsStr) -> Result<Returned, TargetError> {
        let Outcome::File(place) = &self.outcome else {
            return Err(TargetError::refused(
                &self.options.path,
                "a block device is no shadow",
            ));
        };
        // A flush that fails leaves a copy of unknown content, which is what it will be called.
        let touched = !self.begun_with_shadow || lock(&self.pending).take().through > 0;
        let closed = self.store.close();
        closed.map_err(TargetError::during("close", &self.options.path))?;
        return_as(place, name, touched)
    }
}

impl Placed {
    /// The same of a copy that is closed already.
    pub fn give_back(&mut self, name: &OsStr) -> Result<Returned, TargetError> {
        let Outcome::File(place) = &self.outcome else {
            return Err(TargetError::refused(
                &self.options.path,
                "a block device is no shadow",
            ));
        };
        let returned = return_as(place, name, true)?;
        self.log = None;
        Ok(returned)
    }
}

fn return_as(place: &Place, name: &OsStr, touched: bool) -> Result<Returned, TargetError> {
    place.unlink()?;
    place.rename_own(&place.partial_name, name)?;
    place.dir.remove(place.log_name.as_ref())?;
    place.dir.sync()?;
    let path = place.dir.join(name);
    let untouched = match place.own_file(name)?.filter(|_| !touched) {
        Some(file) => Some(Seal::of(&file).map_err(TargetError::during("examine", &path))?),
        None => None,
    };
    Ok(Returned { untouched })
}

/// Whether the image stands alone: a qcow2 one may lean on others, or hold snapshots that somebody wants.
fn is_plain(options: &TargetOptions, file: &File) -> io::Result<bool> {
    if options.format == TargetFormat::Raw {
        return Ok(true);
    }
    let mut header = [0; QCOW2_HEADER];
    match file.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        read => read?,
    }
    let zero = |range: std::ops::Range<usize>| header[range].iter().all(|byte| *byte == 0);
    // Backing file; encryption; snapshots; of version 3, incompatible features (a dirty or damaged image among them), bitmaps.
    let version = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    let features = version < 3 || (zero(72..80) && zero(88..96));
    Ok(&header[..4] == b"QFI\xfb" && zero(8..16) && zero(32..36) && zero(60..64) && features)
}
