//! NTFS 1.2, 3.0 and 3.1.
//!
//! Owns the recognition of an NTFS volume and the order in which its metadata is questioned. NTFS has no checksums, so nothing
//! is taken from one place alone: the boot sector must equal its backup, the first MFT records their mirror, and the set of
//! clusters that all MFT records together refer to must equal the set that `$Bitmap` calls allocated. Where a part of the volume
//! differs (clusters leaked by an old crash), nothing of that part is called free; where it contradicts, nothing at all.
//!
//! Promises: no free cluster is given for a volume that is dirty, hibernated, or carries shadow copies (their blocks look free, yet
//! are needed), nor for one whose metadata lost a single byte that matters. Memory is bounded by about 6 MiB for any volume.
//!
//! There is no official specification; the layout follows what the Linux-NTFS project documents and what `ntfs-3g` and Windows write.

mod boot;
mod census;
mod clean;
mod content;
mod fields;
mod mft;
mod names;
mod record;
mod runs;
mod tally;

use longhaul_common::extent::Extent;

use self::boot::Boot;
use self::mft::Mft;
use super::{FileSystem, FsSummary, Unproven};
use crate::disk::ReadAt;
use crate::disk::fs::volume_reader::Reader;

const KIND: &str = "ntfs";

/// Recognises the file system: `None` where the volume does not carry its signature, an error where it does but cannot be used.
pub fn probe(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let mut sector = [0; boot::LEN];
    if volume.size() < sector.len() as u64 {
        return Ok(None);
    }
    Reader::new(volume, KIND).read(&mut sector, 0)?;
    if !Boot::recognises(&sector) {
        return Ok(None);
    }
    Ok(Some(Box::new(Ntfs {
        boot: Boot::parse(&sector)?,
    })))
}

struct Ntfs {
    boot: Boot,
}

impl FileSystem for Ntfs {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn size(&self) -> u64 {
        self.boot.volume_size()
    }

    fn scan(&self, volume: &dyn ReadAt, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        if volume.size() < self.size() {
            return Err(Unproven::Truncated {
                kind: KIND,
                needed: self.size(),
                size: volume.size(),
            });
        }
        let reader = Reader::new(volume, KIND);
        self.boot.confirm(&reader)?;
        clean::shadow_header(&reader)?;
        let mft = Mft::open(&reader, &self.boot)?;
        let label = clean::volume(&mft)?;
        clean::log(&mft)?;
        let census = census::take(&mft)?;
        clean::hibernation(&mft, &census.hiberfil)?;
        let bitmap = mft.bitmap()?;
        let free = census.tally.settle(&reader, &bitmap, self.boot.cluster, free)?;
        Ok(FsSummary {
            kind: KIND,
            label,
            block_size: self.boot.cluster,
            size: self.size(),
            free,
        })
    }
}

fn inconsistent(what: impl Into<String>) -> Unproven {
    Unproven::Inconsistent {
        kind: KIND,
        what: what.into(),
    }
}

fn not_clean(what: impl Into<String>) -> Unproven {
    Unproven::NotClean {
        kind: KIND,
        what: what.into(),
    }
}

fn unknown(what: impl Into<String>) -> Unproven {
    Unproven::UnknownFeature {
        kind: KIND,
        what: what.into(),
    }
}
