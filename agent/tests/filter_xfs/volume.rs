//! Volumes for tests: a file, changed bytes laid over another volume, and what a scan of one gives.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::{FsSummary, Unproven, xfs};
use longhaul_common::extent::Extent;

/// Free extents in ascending order, in bytes; neighbours are merged.
pub(crate) type FreeSet = Vec<(u64, u64)>;

/// Recognises and scans, as the agent does. A volume that is not recognised is unproven as well.
pub(crate) fn scan(volume: &dyn ReadAt) -> Result<(FsSummary, FreeSet), Unproven> {
    let Some(fs) = xfs::probe(volume)? else {
        let what = "no signature".to_owned();
        return Err(Unproven::Inconsistent { kind: "xfs", what });
    };
    let mut free = Vec::new();
    let summary = fs.scan(volume, &mut |extent: Extent| {
        assert!(
            !extent.is_empty() && extent.end() <= fs.size(),
            "{extent:?} leaves the volume"
        );
        free.push((extent.offset(), extent.end()));
    })?;
    assert_eq!(
        summary.free,
        free.iter().map(|(start, end)| end - start).sum::<u64>()
    );
    assert_eq!((summary.size, summary.kind), (fs.size(), "xfs"));
    Ok((summary, merged(free)))
}

/// Sorts, refuses overlaps, joins neighbours.
pub(crate) fn merged(mut extents: FreeSet) -> FreeSet {
    extents.sort_unstable();
    let mut joined: FreeSet = Vec::with_capacity(extents.len());
    for (start, end) in extents {
        match joined.last_mut() {
            Some(last) if last.1 > start => panic!("byte {start} is free twice"),
            Some(last) if last.1 == start => last.1 = end,
            _ => joined.push((start, end)),
        }
    }
    joined
}

/// Whether every byte of `part` is in `whole`; both merged.
pub(crate) fn is_subset(part: &FreeSet, whole: &FreeSet) -> bool {
    part.iter().all(|(start, end)| {
        let behind = whole.partition_point(|(first, _)| first <= start);
        behind > 0 && whole[behind - 1].1 >= *end
    })
}

pub(crate) struct FileVolume {
    file: File,
    size: u64,
}

impl FileVolume {
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::open(path).expect("the image opens");
        let size = file.metadata().expect("the image has a size").len();
        Self { file, size }
    }
}

impl ReadAt for FileVolume {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

/// Bytes laid over another volume, which may also be cut short.
pub(crate) struct Patched<'a> {
    base: &'a dyn ReadAt,
    size: u64,
    bytes: BTreeMap<u64, u8>,
}

impl<'a> Patched<'a> {
    pub(crate) fn new(base: &'a dyn ReadAt) -> Self {
        Self {
            base,
            size: base.size(),
            bytes: BTreeMap::new(),
        }
    }

    pub(crate) fn cut(mut self, size: u64) -> Self {
        self.size = size;
        self
    }

    pub(crate) fn write(mut self, offset: u64, bytes: &[u8]) -> Self {
        self.put(offset, bytes);
        self
    }

    pub(crate) fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.bytes.extend((offset..).zip(bytes.iter().copied()));
    }

    pub(crate) fn flip(&mut self, offset: u64, mask: u8) {
        let byte = self.get::<1>(offset)[0] ^ mask;
        self.put(offset, &[byte]);
    }

    pub(crate) fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.read_exact_at(&mut bytes, offset)
            .expect("a place inside the volume");
        bytes
    }

    /// Makes the checksum at `crc` of the `len` bytes at `offset` right again.
    pub(crate) fn seal(&mut self, offset: u64, len: usize, crc: u64) {
        self.put(offset + crc, &[0; 4]);
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, offset)
            .expect("a place inside the volume");
        self.put(offset + crc, &crc32c::crc32c(&bytes).to_le_bytes());
    }
}

impl ReadAt for Patched<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset
            .checked_add(buf.len() as u64)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        if end > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.base.read_exact_at(buf, offset)?;
        for (at, byte) in self.bytes.range(offset..end) {
            buf[(at - offset) as usize] = *byte;
        }
        Ok(())
    }
}

/// Remembers what was read.
pub(crate) struct Watched<'a> {
    base: &'a dyn ReadAt,
    pub(crate) reads: Mutex<Vec<(u64, u64)>>,
}

impl<'a> Watched<'a> {
    pub(crate) fn new(base: &'a dyn ReadAt) -> Self {
        Self {
            base,
            reads: Mutex::default(),
        }
    }
}

impl ReadAt for Watched<'_> {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let read = (offset, buf.len() as u64);
        self.reads.lock().expect("no reader panicked").push(read);
        self.base.read_exact_at(buf, offset)
    }
}
