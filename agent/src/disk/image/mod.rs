//! Reading images: raw files, block devices, and every format that QEMU reads.
//!
//! Owns the source side of a copy: which bytes an image holds, which of them are stored at all, and that
//! nobody changes them meanwhile. Leaves alone what the bytes mean (`volume`, `fs`) and how targets are
//! written (`apply`). All calls block; any number of threads may read at once.
//!
//! An image is opened in this order, and refused with one sentence at the first doubt:
//! 1. path allowed by the agent's config, file opened, locked as QEMU does, not in use by anybody who may
//!    write (`held`, `locks`, `holders`);
//! 2. format as stated, or recognised by its magic numbers (`format` says why that is a guess);
//! 3. raw: read directly (`raw`). Anything else: all files of its chain found, allowed, held (`header`,
//!    `chain`), then served read-only by `qemu-nbd` on a unix socket (`server`, `served`) and read with our
//!    own client (`nbd`).
//!
//! The disks of a running VM are not opened at all but read through its own QEMU (`live`).
//!
//! Promises: `unchanged` right after the last read says whether what was read is one consistent state; a
//! guest or tenant who forges an image's header cannot make this host read another file.

mod chain;
mod error;
mod format;
pub mod header;
mod held;
pub(crate) mod holders;
mod live;
mod locks;
pub mod nbd;
pub(crate) mod program;
mod raw;
mod served;
mod server;

use std::io;
use std::path::{Path, PathBuf};

use longhaul_common::extent::Extent;

pub use self::error::ImageError;
pub use self::format::{Format, UnknownFormat};
pub use self::live::{LiveImage, READ_MAX, ShownBitmap};
pub use self::server::end_stale_servers;

use self::chain::Chain;
use self::held::HeldFile;
use self::raw::RawImage;
use self::served::ServedImage;
use self::server::Programs;
use super::ReadAt;

/// Most runs that one call gives, about 24 MiB of memory; where an image is more fragmented, the rest is
/// called data.
const RUNS_MAX: usize = 1 << 20;

/// How images are opened.
#[derive(Clone)]
pub struct OpenOptions<'a> {
    /// What the operator says it is. `None`: recognise it, which is safe only for images that no guest or
    /// tenant wrote; an image recognised so may not refer to other files.
    pub format: Option<Format>,
    /// What to do with backing chains and internal snapshots.
    pub flatten: Flatten,
    /// Which files may be read: gets absolute paths free of links; for block devices also the link in /dev,
    /// such as `/dev/vg/disk`.
    pub allowed: &'a (dyn Fn(&Path) -> bool + Send + Sync),
    /// Most requests to a served image at a time, 1 to 64.
    pub connections: usize,
    /// Directory for sockets and pid files, made where it is missing; its path must be short (about 70
    /// bytes).
    pub run_dir: PathBuf,
    /// Program, default `qemu-nbd` from PATH; where it is missing, `qemu-storage-daemon` stands in.
    pub qemu_nbd: PathBuf,
    /// Program, default `qemu-img` from PATH.
    pub qemu_img: PathBuf,
}

impl<'a> OpenOptions<'a> {
    /// The defaults: recognise the format, refuse chains and snapshots, 4 connections, programs from PATH.
    pub fn new(run_dir: impl Into<PathBuf>, allowed: &'a (dyn Fn(&Path) -> bool + Send + Sync)) -> Self {
        Self {
            format: None,
            flatten: Flatten::Refuse,
            allowed,
            connections: 4,
            run_dir: run_dir.into(),
            qemu_nbd: "qemu-nbd".into(),
            qemu_img: "qemu-img".into(),
        }
    }
}

/// What to do with an image that is more than its current content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Flatten {
    /// Copy the current content as one disk; snapshots stay behind, and the image's notes say so.
    Yes,
    /// Refuse backing chains and internal snapshots.
    Refuse,
}

/// A run of bytes in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub extent: Extent,
    pub state: Allocation,
}

/// What an image stores for a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Has to be read.
    Data,
    /// Nothing is stored; reads as zero.
    Hole,
    /// Stored, and known to read as zero.
    Zero,
}

/// An image that is open for reading, locked against writers.
#[derive(Debug)]
pub struct SourceImage {
    // Dropped in this order: whoever reads first, the locks last.
    body: Body,
    held: Vec<HeldFile>,
    path: PathBuf,
    format: Format,
    notes: Vec<String>,
}

#[derive(Debug)]
enum Body {
    /// Read from `held[0]`.
    Raw,
    Served(Box<ServedImage>),
}

/// Opens an image for reading and keeps everybody else from writing to it.
///
/// # Errors
/// See [`ImageError`]; each is one sentence with the remedy.
pub fn open(path: &Path, options: &OpenOptions<'_>) -> Result<SourceImage, ImageError> {
    let chain = Chain::open(path, options)?;
    let body = if chain.format == Format::Raw {
        Body::Raw
    } else {
        let programs = Programs {
            qemu_nbd: &options.qemu_nbd,
            storage_daemon: Path::new("qemu-storage-daemon"),
        };
        let served = ServedImage::start(programs, &chain.options, options.connections, &options.run_dir)?;
        Body::Served(Box::new(served))
    };
    Ok(SourceImage {
        body,
        held: chain.held,
        path: path.to_owned(),
        format: chain.format,
        notes: chain.notes,
    })
}

impl SourceImage {
    /// Size of the disk that the image holds, in bytes; for a raw file its length, be it whole sectors or
    /// not.
    pub fn size(&self) -> u64 {
        match &self.body {
            Body::Raw => self.held[0].size(),
            Body::Served(served) => served.size(),
        }
    }

    /// The format it was opened as.
    pub const fn format(&self) -> &Format {
        &self.format
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the report should say of this image: a recognised format, flattened chains, snapshots left
    /// behind, missing locks.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What is stored of `range`: runs in order that cover it exactly, neighbours in different states.
    ///
    /// Best asked for in ranges of some GiB: after 1 Mi runs, the rest is given as data.
    ///
    /// # Errors
    /// `UnexpectedEof` where the range reaches beyond the image; else what the system or the server said.
    pub fn allocation(&self, range: Extent) -> io::Result<Vec<Run>> {
        self.check_range(range.offset(), range.len())?;
        match &self.body {
            Body::Raw => RawImage(&self.held[0]).allocation(range),
            Body::Served(served) => served.allocation(range),
        }
    }

    /// Whether all of the image's files are still what they were when it was opened; an error names file and
    /// change.
    pub fn unchanged(&self) -> Result<(), ImageError> {
        self.held.iter().try_for_each(HeldFile::unchanged)
    }

    /// Ends the server, if there is one, in good order, and releases the locks. Dropping does the same in
    /// haste.
    pub fn close(self) {
        if let Body::Served(served) = self.body {
            served.finish();
        }
        self.held.iter().for_each(HeldFile::forget_cached);
    }

    fn check_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let size = self.size();
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        let path = self.path.display();
        let what = format!("{path} ends at {size} bytes, before the end of {len} bytes at {offset}");
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, what))
    }
}

impl ReadAt for SourceImage {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        match &self.body {
            Body::Raw => RawImage(&self.held[0]).read_exact_at(buf, offset),
            Body::Served(served) => {
                served.read_exact_at(buf, offset)?;
                if served.is_time_to_forget(buf.len() as u64) {
                    self.held.iter().for_each(HeldFile::forget_cached);
                }
                Ok(())
            }
        }
    }
}

/// Runs that are being collected, from a range's start to its end.
#[derive(Debug)]
struct Runs {
    range: Extent,
    runs: Vec<Run>,
    end: u64,
}

impl Runs {
    const fn new(range: Extent) -> Self {
        Self {
            range,
            runs: Vec::new(),
            end: range.offset(),
        }
    }

    /// First byte that is not covered yet.
    const fn end(&self) -> u64 {
        self.end
    }

    const fn is_complete(&self) -> bool {
        self.end >= self.range.end()
    }

    /// Says that everything up to `end` is in `state`.
    fn push_until(&mut self, end: u64, state: Allocation) {
        let end = end.min(self.range.end());
        if end <= self.end {
            return;
        }
        let is_full = self.runs.len() + 1 >= RUNS_MAX;
        let (end, state) = if is_full {
            (self.range.end(), Allocation::Data)
        } else {
            (end, state)
        };
        let extent = Extent::between(self.end, end);
        self.end = end;
        match self.runs.last_mut() {
            Some(last) if last.state == state => last.extent = Extent::between(last.extent.offset(), end),
            _ => self.runs.push(Run { extent, state }),
        }
    }

    fn finish(self) -> Vec<Run> {
        self.runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_merge_and_stay_inside() {
        let mut runs = Runs::new(Extent::between(10, 100));
        runs.push_until(5, Allocation::Data);
        runs.push_until(20, Allocation::Hole);
        runs.push_until(30, Allocation::Hole);
        runs.push_until(400, Allocation::Data);
        assert!(runs.is_complete());
        let states: Vec<_> = runs
            .finish()
            .iter()
            .map(|run| (run.extent.offset(), run.extent.end(), run.state))
            .collect();
        assert_eq!(states, [(10, 30, Allocation::Hole), (30, 100, Allocation::Data)]);
    }

    #[test]
    fn too_many_runs_end_in_data() {
        let mut runs = Runs::new(Extent::between(0, 1 << 30));
        let mut at = 0;
        while !runs.is_complete() {
            at += 1;
            runs.push_until(
                at,
                if at % 2 == 0 {
                    Allocation::Hole
                } else {
                    Allocation::Data
                },
            );
        }
        let runs = runs.finish();
        assert!((RUNS_MAX - 1..=RUNS_MAX).contains(&runs.len()));
        assert_eq!(runs.last().unwrap().extent.end(), 1 << 30);
        assert!(
            runs.windows(2)
                .all(|pair| pair[0].extent.end() == pair[1].extent.offset())
        );
    }
}
