//! A file system for tests: one checksummed block that lists its free extents. Stands for the real ones, which have tests of
//! their own, so that what is tested here is everything around them.

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::fs::{FileSystem, FsSummary, Unproven};
use longhaul_agent::disk::volume::Probe;
use longhaul_common::extent::Extent;

/// What [`scan_with`](longhaul_agent::disk::scan::scan_with) takes in these tests.
pub(crate) const PROBES: &[Probe] = &[probe, probe_twin];

const MAGIC: &[u8; 8] = b"LHTOYFS1";
const TWIN: &[u8; 8] = b"LHTOYFS2";
/// Where the second file system keeps its magic.
const TWIN_AT: u64 = 8192;
/// A little less than a block: a signature of swap space fits behind it.
const HEADER: usize = 4000;
/// Where its checksum stands.
const SUM: usize = HEADER - 4;

/// Gives half of its free extents, then says that it is not clean.
pub(crate) const DIRTY: u32 = 1;
/// Calls a byte beyond its end free.
pub(crate) const STRAY: u32 = 2;

/// The header of a file system of `size` bytes; `free` holds extents from the volume's start.
pub(crate) fn header(size: u64, flags: u32, label: &str, free: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&size.to_le_bytes());
    bytes[16..20].copy_from_slice(&flags.to_le_bytes());
    bytes[20..24].copy_from_slice(&(free.len() as u32).to_le_bytes());
    bytes[24..24 + label.len()].copy_from_slice(label.as_bytes());
    for (slot, (start, len)) in bytes[512..SUM].chunks_exact_mut(16).zip(free) {
        slot[..8].copy_from_slice(&start.to_le_bytes());
        slot[8..].copy_from_slice(&len.to_le_bytes());
    }
    let sum = crc32fast::hash(&bytes[..SUM]);
    bytes[SUM..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Makes the checksum right again after a change of the header at the start of `volume`.
pub(crate) fn reseal(volume: &mut [u8]) {
    let sum = crc32fast::hash(&volume[..SUM]);
    volume[SUM..HEADER].copy_from_slice(&sum.to_le_bytes());
}

/// Makes a second file system claim the volume too.
pub(crate) fn add_twin(volume: &mut [u8]) {
    volume[TWIN_AT as usize..][..8].copy_from_slice(TWIN);
}

struct Toy {
    size: u64,
    header: Vec<u8>,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn probe(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let mut header = vec![0; HEADER];
    if volume.size() < HEADER as u64 || volume.read_exact_at(&mut header, 0).is_err() || &header[..8] != MAGIC
    {
        return Ok(None);
    }
    if crc32fast::hash(&header[..SUM]).to_le_bytes() != header[SUM..] {
        let what = "header".to_owned();
        return Err(Unproven::Checksum { kind: "toy", what });
    }
    let size = u64_at(&header, 8);
    Ok(Some(Box::new(Toy { size, header })))
}

fn probe_twin(volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    let mut magic = [0; 8];
    match volume.read_exact_at(&mut magic, TWIN_AT) {
        Ok(()) if &magic == TWIN => Err(Unproven::UnknownFeature {
            kind: "twin",
            what: "all of it".into(),
        }),
        _ => Ok(None),
    }
}

impl FileSystem for Toy {
    fn kind(&self) -> &'static str {
        "toy"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn scan(&self, _: &dyn ReadAt, free: &mut dyn FnMut(Extent)) -> Result<FsSummary, Unproven> {
        let flags = u64_at(&self.header, 16) as u32;
        let count = (u64_at(&self.header, 16) >> 32) as usize;
        let mut sum = 0;
        for slot in self.header[512..SUM].chunks_exact(16).take(count) {
            free(Extent::new(u64_at(slot, 0), u64_at(slot, 8)).unwrap());
            sum += u64_at(slot, 8);
            if flags & DIRTY != 0 && sum > 0 {
                let what = "toy".to_owned();
                return Err(Unproven::NotClean { kind: "toy", what });
            }
        }
        if flags & STRAY != 0 {
            free(Extent::between(self.size - 1, self.size + 1));
        }
        let label = self.header[24..64].iter().take_while(|byte| **byte != 0);
        Ok(FsSummary {
            kind: "toy",
            label: label.map(|byte| *byte as char).collect(),
            block_size: 4096,
            size: self.size,
            free: sum,
        })
    }
}
