//! Making a progress log short again.
//!
//! Owns the rewriting: only what still holds, ordered by leaf, into a new file that takes the old one's name once it is synced. A crash
//! at any moment leaves one of the two, and both say the same.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags};

use super::TargetError;
use super::progress_log::ProgressLog;
use super::record::{ENTRIES_MAX, HEADER, Kind, Record};
use super::replay::{self, Said};

/// Below so many dead bytes a log is left alone.
const WORTH: u64 = 1 << 20;

/// Whether more than half of the log says nothing any more.
pub(crate) fn is_due(log: &ProgressLog) -> bool {
    log.dead > WORTH && log.dead > log.len / 2
}

/// Replaces the log by a shorter one with the leaves for which `keep` holds.
pub(crate) fn rewrite(log: &mut ProgressLog, keep: impl Fn(u64) -> bool) -> Result<(), TargetError> {
    let name = format!("{}.new", log.name);
    let path = log.dir.join(&name);
    log.dir.remove(name.as_ref())?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&log.dir.fd, &*name, flags, Mode::RUSR | Mode::WUSR);
    let file = File::from(file.map_err(TargetError::during("create", &path))?);
    let written = write(log, &file, keep).and_then(|len| {
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        file.sync_all()?;
        rustix::fs::renameat(&log.dir.fd, &*name, &log.dir.fd, &*log.name)?;
        Ok(len)
    });
    match written {
        Ok(len) => {
            (log.file, log.len, log.dead) = (Arc::new(file), len, 0);
            log.dir.sync()
        }
        Err(error) => {
            log.dir.remove(name.as_ref())?;
            Err(TargetError::during("write", &path)(error))
        }
    }
}

/// Writes header and records; the bytes written.
fn write(log: &ProgressLog, file: &File, keep: impl Fn(u64) -> bool) -> io::Result<u64> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&log.header.encode())?;
    let mut len = HEADER as u64;
    let mut bytes = Vec::new();
    for range in replay::windows(log.header.leaves()) {
        let said = replay::window(log.records(), &range)?;
        let mut record: Option<Record> = None;
        for (leaf, said) in range.zip(said) {
            let (kind, version, digest) = match said {
                Said::Zero(version) if keep(leaf) => (Kind::Written, version, None),
                Said::Data(version, digest) if keep(leaf) => (Kind::Written, version, Some((leaf, digest))),
                Said::Shadow(version) if keep(leaf) => (Kind::Shadow, version, None),
                _ => continue,
            };
            let full = record.as_ref().is_some_and(|record| {
                record.leaves.end != leaf
                    || (record.kind, record.version) != (kind, version)
                    || record.digests.len() == ENTRIES_MAX
            });
            if let Some(full) = record.take_if(|_| full) {
                full.encode(&mut bytes);
            }
            let begun = || Record {
                kind,
                version,
                leaves: leaf..leaf,
                digests: Vec::new(),
            };
            let record = record.get_or_insert_with(begun);
            record.leaves.end = leaf + 1;
            record.digests.extend(digest);
        }
        if let Some(last) = record {
            last.encode(&mut bytes);
        }
        out.write_all(&bytes)?;
        len += bytes.len() as u64;
        bytes.clear();
    }
    out.flush()?;
    Ok(len)
}
