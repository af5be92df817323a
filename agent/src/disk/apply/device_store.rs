//! A block device as a target: opened exclusively, nothing of its old content trusted.
//!
//! Owns the checks before the first write (a device, large enough, not in use, blank unless overwriting is allowed) and how a
//! device is zeroed: by unmapping, by the device's or the kernel's zeroing, at last by writing. Bytes behind the disk's size stay
//! as they were.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};

use longhaul_common::extent::{BLOCK, Extent};
use rustix::fs::{Advice, FallocateFlags, Mode, OFlags, SeekFrom};

use super::store::{self, Store};
use super::{TargetError, blink, image_lock};
use crate::disk::image::holders;

/// So much is zeroed by one call: a call cannot be interrupted, and other writers wait for it.
const ZERO_STEP: u64 = 128 << 20;

/// A device without `overwrite` must be zero so far from both ends, where partition tables and signatures live.
const BLANK: u64 = 1 << 20;

pub(crate) struct DeviceStore {
    file: File,
    size: u64,
    /// Index into `WAYS` of the first way to zero that the device has not refused.
    way: AtomicU8,
}

const WAYS: [FallocateFlags; 2] = [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE];

/// An opened device: its own size in bytes, and what distinguishes it from another device of the same name.
pub(crate) struct Device {
    pub(crate) file: File,
    pub(crate) size: u64,
    pub(crate) identity: String,
}

impl Device {
    /// Opens `path` for this process alone.
    pub(crate) fn open(path: &Path) -> Result<Self, TargetError> {
        // On a device O_EXCL means: fail where it is mounted, swap, or below another device.
        let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = blink::wait_out(|| match rustix::fs::open(path, flags, Mode::empty()) {
            Err(rustix::io::Errno::BUSY) => Ok(None),
            opened => opened.map(Some),
        });
        let file = match opened.map_err(TargetError::during("open", path))? {
            Some(file) => File::from(file),
            None => {
                let rdev = std::fs::metadata(path).map_or(0, |metadata| metadata.rdev());
                return Err(TargetError::in_use(path, holders::of_device(rdev)));
            }
        };
        let metadata = file.metadata().map_err(TargetError::during("examine", path))?;
        if !metadata.file_type().is_block_device() {
            return Err(TargetError::refused(path, "it is not a block device any more"));
        }
        if !image_lock::hold(&file).map_err(TargetError::during("lock", path))? {
            return Err(TargetError::in_use(path, "a QEMU process holds its image lock"));
        }
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(TargetError::during("examine", path))?;
        Ok(Self {
            file,
            size,
            identity: identity(metadata.rdev(), size),
        })
    }

    /// Refuses a device whose beginning or end holds anything but zeros.
    pub(crate) fn require_blank(&self, path: &Path) -> Result<(), TargetError> {
        let mut buf = vec![0; BLANK.min(self.size) as usize];
        for offset in [0, self.size - buf.len() as u64] {
            self.file
                .read_exact_at(&mut buf, offset)
                .map_err(TargetError::during("read", path))?;
            if buf.iter().any(|byte| *byte != 0) {
                let reason = "it holds data already: wipe it (blkdiscard, wipefs) or allow overwriting";
                return Err(TargetError::refused(path, reason));
            }
        }
        Ok(())
    }
}

/// What a device is, beyond a number that another one may bear after the next boot.
fn identity(rdev: u64, size: u64) -> String {
    let number = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let at = format!("/sys/dev/block/{number}");
    // The second half: a partition's disk. Partitions are told apart by their place.
    let own = [
        "dm/uuid",
        "device/wwid",
        "wwid",
        "device/serial",
        "serial",
        "loop/backing_file",
    ];
    let above = [
        "../device/wwid",
        "../wwid",
        "../device/serial",
        "../serial",
        "partition",
        "start",
    ];
    let known: Vec<_> = own
        .iter()
        .chain(&above)
        .filter_map(|name| Some((name, std::fs::read_to_string(format!("{at}/{name}")).ok()?)))
        .filter(|(_, value)| !value.trim().is_empty())
        .map(|(name, value)| format!("{name}={}", value.trim()))
        .collect();
    if known
        .iter()
        .any(|known| !known.starts_with("partition=") && !known.starts_with("start="))
    {
        return format!("device {size} {}", known.join(" "));
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    format!("device {size} {number} {} {}", known.join(" "), boot.trim())
}

impl DeviceStore {
    /// The first `size` bytes of the device. `preallocated` keeps what is zeroed mapped.
    pub(crate) fn new(file: File, size: u64, preallocated: bool) -> Self {
        Self {
            file,
            size,
            way: AtomicU8::new(u8::from(preallocated)),
        }
    }

    fn zero_step(&self, extent: Extent) -> io::Result<()> {
        loop {
            let way = self.way.load(Ordering::Relaxed);
            let Some(how) = WAYS.get(usize::from(way)) else {
                return store::write_zeros(&self.file, extent);
            };
            let how = *how | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, how, extent.offset(), extent.len()) {
                Err(error) if store::unsupported(error) => self.way.fetch_max(way + 1, Ordering::Relaxed),
                done => return Ok(done?),
            };
        }
    }
}

impl Store for DeviceStore {
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        store::write_all(&self.file, parts, offset)
    }

    /// Whole blocks by the device, what is left at the edges by hand: sectors may be as large as a block.
    fn zero(&self, extent: Extent) -> io::Result<()> {
        let Some(inner) = extent.shrink_to(BLOCK) else {
            return store::write_zeros(&self.file, extent);
        };
        store::write_zeros(&self.file, Extent::between(extent.offset(), inner.offset()))?;
        store::write_zeros(&self.file, Extent::between(inner.end(), extent.end()))?;
        let mut at = inner.offset();
        while at < inner.end() {
            let step = Extent::between(at, at.saturating_add(ZERO_STEP).min(inner.end()));
            self.zero_step(step)?;
            at = step.end();
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// A device knows no holes: everything is read.
    fn next_data(&self, offset: u64) -> io::Result<Option<Extent>> {
        Ok((offset < self.size).then(|| Extent::between(offset, self.size)))
    }

    fn start_writeback(&self, extent: Extent) {
        super::file_store::start_writeback(&self.file, extent);
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }
}
