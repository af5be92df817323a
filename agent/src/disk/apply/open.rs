//! Opening a target: going on with a partial copy of the same job, or beginning a clean one.
//!
//! Owns the decision which of the two, and that nothing of a log is believed that does not belong to this very file or device. A
//! damaged log is not believed blindly either: what it says up to the damage is checked against the disk, leaf by leaf.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use longhaul_common::digest::{Digest, LEAF, leaf_count};
use rustix::fs::FallocateFlags;

use super::board::{Board, LeafState, LeafStates};
use super::device_store::{Device, DeviceStore};
use super::file_store::FileStore;
use super::place::{self, Dir, Place};
use super::progress_log::{LockedLog, ProgressLog};
use super::qcow2_server;
use super::qcow2_store::{self, Qcow2Store};
use super::read_back::ReadBack;
use super::record::{ENTRY, Header, Version};
use super::replay::{self, Have};
use super::shadow::{self, Shadow, Taken};
use super::store::{self, Store};
use super::target::{Outcome, Target};
use super::{DISK_SIZE_MAX, TargetError, TargetFormat, TargetOptions, compact, image_lock, verify};

/// A store that is ready, with its log.
struct Opened {
    store: Box<dyn Store>,
    outcome: Outcome,
    log: LockedLog,
    header: Header,
    /// The log speaks of this store already.
    resumed: bool,
    /// The store reads as zeros where nothing was written.
    blank: bool,
    /// What is known of the shadow that the store was until now.
    shadow: Option<shadow::Content>,
    notes: Vec<String>,
}

impl Opened {
    fn file(store: Box<dyn Store>, place: Place, log: LockedLog, header: Header, resumed: bool) -> Self {
        let outcome = Outcome::File(place);
        Self {
            store,
            outcome,
            log,
            header,
            resumed,
            blank: true,
            shadow: None,
            notes: Vec::new(),
        }
    }
}

impl Target {
    /// Opens the place for a disk of `size` bytes: where a partial copy of this job lies there, it is continued.
    ///
    /// The second value lists what is durable already. Errors: `Exists`, `InUse`, `Refused`, `TooSmall`, `NoSpace`,
    /// `AlreadyPromoted` (this job completed the copy before), `Tool`, `Io`.
    pub fn open(options: &TargetOptions, size: u64) -> Result<(Self, Have), TargetError> {
        Self::open_with(options, size, None)
    }

    /// The same, but where no partial copy lies there `shadow` becomes it, if it can: what is not known of it is read.
    pub fn open_with(
        options: &TargetOptions,
        size: u64,
        shadow: Option<&Shadow>,
    ) -> Result<(Self, Have), TargetError> {
        if size > DISK_SIZE_MAX {
            return Err(TargetError::refused(
                &options.path,
                "disks of more than 4 PiB are not supported",
            ));
        }
        let opened = match (is_device(&options.path), options.format) {
            (true, TargetFormat::Raw) => open_device(options, size)?,
            (true, TargetFormat::Qcow2) => {
                return Err(TargetError::refused(
                    &options.path,
                    "a block device takes format raw only",
                ));
            }
            (false, _) => open_file(options, size, shadow)?,
        };
        finish(options, size, opened)
    }
}

pub(crate) fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
}

/// The name of a device's progress log below the state folder.
pub(crate) fn device_log(options: &TargetOptions) -> String {
    format!("{}-{}.log", options.job, options.disk)
}

fn finish(options: &TargetOptions, size: u64, opened: Opened) -> Result<(Target, Have), TargetError> {
    let Opened {
        store,
        outcome,
        log,
        header,
        resumed,
        blank,
        shadow,
        notes,
    } = opened;
    let path = &options.path;
    let untouched = LeafState::new(Version::default(), false, !blank);
    let mut states = LeafStates::new(leaf_count(size), untouched);
    let begun = shadow.is_some();
    let mut log = if resumed {
        if blank {
            mark_touched(&*store, size, &mut states).map_err(TargetError::during("examine", path))?;
        }
        take_up(log, header, &*store, size, &mut states)?
    } else {
        log.start(header)?
    };
    let as_left = match shadow {
        Some(shadow) => shadow.enter(&*store, size, &mut log, &mut states)?,
        None => false,
    };
    let have = Have::new(&log, &states, as_left)?;
    let target = Target {
        options: options.clone(),
        size,
        store,
        outcome,
        board: Board::new(states),
        pending: Mutex::default(),
        log: Mutex::new(log),
        failed: AtomicBool::new(false),
        notes,
        patched: Mutex::default(),
        read_back: ReadBack::default(),
        begun_with_shadow: begun,
    };
    Ok((target, have))
}

/// Marks the leaves of a partial copy that hold something, whatever the log says.
fn mark_touched(store: &dyn Store, size: u64, states: &mut LeafStates) -> io::Result<()> {
    let mut at = 0;
    while let Some(data) = store.next_data(at)? {
        let leaves = data.offset() / LEAF..data.end().div_ceil(LEAF);
        at = leaves.end.saturating_mul(LEAF).min(size);
        states.set(leaves, LeafState::new(Version::default(), false, true));
    }
    Ok(())
}

/// Reads the log; what stands behind a torn or damaged record is cut off, and what stands before is then checked on the disk.
fn take_up(
    log: LockedLog,
    header: Header,
    store: &dyn Store,
    size: u64,
    states: &mut LeafStates,
) -> Result<ProgressLog, TargetError> {
    let path = log.path();
    let len = log
        .file
        .metadata()
        .map_err(TargetError::during("examine", &path))?
        .len();
    let mut log = log.resume(header, len);
    let replayed = replay::states(log.records(), states).map_err(TargetError::during("read", &path))?;
    log.len = replayed.good;
    log.dead = replayed.dead_entries.saturating_mul(ENTRY as u64);
    if replayed.damaged {
        tracing::warn!(log = %path.display(), good = replayed.good, len, "the progress log is damaged: checking what it says");
        verify::recheck(store, size, &log, states)?;
        let checked = |leaf| states.get(leaf).claimed();
        compact::rewrite(&mut log, checked)?;
    }
    Ok(log)
}

fn open_file(options: &TargetOptions, size: u64, shadow: Option<&Shadow>) -> Result<Opened, TargetError> {
    let place = Place::of(options)?;
    let log = LockedLog::open(&place.dir, &place.log_name, false)?;
    let known = log.as_ref().map(LockedLog::header).transpose()?.flatten();
    require_own(options, &place.log_name, known.as_ref())?;
    let partial = place.partial_file()?;
    if let (Some(log), Some(known), None) = (&log, &known, &partial) {
        require_unfinished(options, size, &place, log, known)?;
    }
    place.check_final(options.overwrite)?;
    let log = match log {
        Some(log) => log,
        None => LockedLog::open(&place.dir, &place.log_name, true)?
            .ok_or_else(|| TargetError::refused(&place.path(), "its progress log cannot be made"))?,
    };
    if let Some(file) = partial {
        let header = header_for(options, size, &file, &place.partial_path())?;
        hold(options, &file, &place)?;
        if known.as_ref() == Some(&header) && has_size(options, &file, size) {
            let store = store_for(options, file, size, &place, true)?;
            return Ok(Opened::file(store, place, log, header, true));
        }
    }
    log.clear()?;
    let taken = shadow.map(|shadow| shadow.take(options, size, &place, &log));
    if let Some(Taken {
        file,
        header,
        content,
    }) = taken.transpose()?.flatten()
    {
        let store = store_for(options, file, size, &place, true)?;
        return Ok(Opened {
            blank: false,
            shadow: Some(content),
            ..Opened::file(store, place, log, header, false)
        });
    }
    match begin(options, size, &place) {
        Ok((store, header)) => Ok(Opened::file(store, place, log, header, false)),
        Err(error) => {
            // Best effort: the first error is the one that matters.
            let _ = place.dir.remove(&place.partial_name);
            let _ = log.remove();
            Err(error)
        }
    }
}

/// A log of another job under this name is none of our business: names hold only eight digits of the job.
fn require_own(options: &TargetOptions, name: &str, known: Option<&Header>) -> Result<(), TargetError> {
    match known {
        Some(known) if known.job != options.job || known.disk != options.disk => Err(TargetError::in_use(
            &options.path,
            format!("{name} belongs to disk {} of job {}", known.disk, known.job),
        )),
        _ => Ok(()),
    }
}

/// The copy may be complete already: then only the log was left over.
fn require_unfinished(
    options: &TargetOptions,
    size: u64,
    place: &Place,
    log: &LockedLog,
    known: &Header,
) -> Result<(), TargetError> {
    let path = place.path();
    let Ok(Some(done)) = place.final_file() else {
        return Ok(());
    };
    if *known != header_for(options, size, &done, &path)? {
        return Ok(());
    }
    log.remove()?;
    Err(TargetError::AlreadyPromoted { path })
}

/// Whether the image is as large as a disk of `size` bytes needs it.
pub(crate) fn has_size(options: &TargetOptions, file: &File, size: u64) -> bool {
    let needed = match options.format {
        TargetFormat::Raw => size,
        TargetFormat::Qcow2 => qcow2_store::virtual_size(size),
    };
    stated_size(options, file).is_ok_and(|stated| stated == needed)
}

/// What a log of this very file begins with.
pub(crate) fn header_for(
    options: &TargetOptions,
    size: u64,
    file: &File,
    path: &Path,
) -> Result<Header, TargetError> {
    let bound = place::file_identity(file, options.format.word(), path)?;
    Ok(Header {
        job: options.job,
        disk: options.disk,
        size,
        bound,
    })
}

/// Keeps QEMU away from a raw partial copy. A qcow2 one is opened, and locked, by `qemu-nbd`.
fn hold(options: &TargetOptions, file: &File, place: &Place) -> Result<(), TargetError> {
    let path = place.partial_path();
    if options.format == TargetFormat::Raw
        && !image_lock::hold(file).map_err(TargetError::during("lock", &path))?
    {
        return Err(TargetError::in_use(&path, "a QEMU process holds its image lock"));
    }
    Ok(())
}

/// Bytes of the disk in the image: of a raw one its length, of a qcow2 one what its header says.
fn stated_size(options: &TargetOptions, file: &File) -> io::Result<u64> {
    match options.format {
        TargetFormat::Raw => Ok(file.metadata()?.len()),
        TargetFormat::Qcow2 => {
            let mut header = [0; 32];
            file.read_exact_at(&mut header, 0)?;
            let (magic, size) = (&header[..4], &header[24..]);
            match (magic, size.try_into()) {
                (b"QFI\xfb", Ok(size)) => Ok(u64::from_be_bytes(size)),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is no qcow2 image")),
            }
        }
    }
}

/// An empty partial copy of the right size, in place of whatever had its name.
fn begin(options: &TargetOptions, size: u64, place: &Place) -> Result<(Box<dyn Store>, Header), TargetError> {
    let path = place.partial_path();
    place.dir.remove(&place.partial_name)?;
    let file = place.create_partial()?;
    hold(options, &file, place)?;
    match options.format {
        TargetFormat::Raw => reserve(options, size, &file, &path)?,
        TargetFormat::Qcow2 => qcow2_server::create(options, &path, qcow2_store::virtual_size(size))?,
    }
    file.sync_all().map_err(TargetError::during("sync", &path))?;
    let header = header_for(options, size, &file, &path)?;
    Ok((store_for(options, file, size, place, false)?, header))
}

fn reserve(options: &TargetOptions, size: u64, file: &File, path: &Path) -> Result<(), TargetError> {
    file.set_len(size)
        .map_err(TargetError::during("set the size of", path))?;
    if !options.preallocate || size == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
        Err(error) if store::unsupported(error) => Err(TargetError::refused(
            path,
            "its file system cannot reserve space: switch preallocation off",
        )),
        reserved => reserved.map_err(TargetError::during("reserve the space of", path)),
    }
}

fn store_for(
    options: &TargetOptions,
    file: File,
    size: u64,
    place: &Place,
    resumed: bool,
) -> Result<Box<dyn Store>, TargetError> {
    Ok(match options.format {
        TargetFormat::Raw => Box::new(FileStore::new(file, size, options.preallocate)),
        TargetFormat::Qcow2 => Box::new(Qcow2Store::open(
            options,
            &place.partial_path(),
            file,
            size,
            resumed,
        )?),
    })
}

fn open_device(options: &TargetOptions, size: u64) -> Result<Opened, TargetError> {
    let path = &options.path;
    let device = Device::open(path)?;
    if device.size < size {
        return Err(TargetError::TooSmall {
            path: path.clone(),
            have: device.size,
            need: size,
        });
    }
    let bound = Digest::of(device.identity.as_bytes());
    let header = Header {
        job: options.job,
        disk: options.disk,
        size,
        bound,
    };
    let (dir, name) = (Dir::open(&options.state_dir)?, device_log(options));
    let log = LockedLog::open(&dir, &name, false)?;
    let known = log.as_ref().map(LockedLog::header).transpose()?.flatten();
    let resumed = known.as_ref() == Some(&header);
    if !resumed && !options.overwrite {
        device.require_blank(path)?;
    }
    let log = match log {
        Some(log) => log,
        None => LockedLog::open(&dir, &name, true)?
            .ok_or_else(|| TargetError::refused(&dir.join(&name), "the progress log cannot be made"))?,
    };
    if !resumed {
        log.clear()?;
    }
    let notes = (device.size > size).then(|| {
        let (path, behind) = (path.display(), device.size - size);
        format!("{path} is larger than the disk: its last {behind} bytes are left as they were")
    });
    let store = Box::new(DeviceStore::new(device.file, size, options.preallocate));
    let outcome = Outcome::Device(path.clone());
    Ok(Opened {
        store,
        outcome,
        log,
        header,
        resumed,
        blank: false,
        shadow: None,
        notes: notes.into_iter().collect(),
    })
}
