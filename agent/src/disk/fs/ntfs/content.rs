//! The value of one attribute, wherever it lies: in its record, or in clusters gathered from one or more records.
//!
//! Owns reading by byte offset through runs. Promises that its runs join from virtual cluster 0 on without a hole, that a list of
//! runs is at most [`RUNS_MAX`] long, and that a read beyond the value is an error.

use super::record::{Attribute, Body, Mapped};
use super::runs::Run;
use super::{inconsistent, unknown};
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

/// Runs kept of one attribute: 2 MiB of memory. Only a hopelessly fragmented `$MFT` or `$Bitmap` has more.
const RUNS_MAX: usize = 1 << 16;

pub(super) enum Content {
    Resident(Vec<u8>),
    Mapped(Clusters),
}

/// Clusters of an attribute, from virtual cluster 0 on.
pub(super) struct Clusters {
    cluster: u64,
    /// Clusters of the volume.
    limit: u64,
    /// First virtual cluster, and the run.
    runs: Vec<(u64, Run)>,
    /// Virtual clusters gathered.
    len: u64,
    /// Bytes that the attribute says it has allocated, holds, and has written.
    allocated: u64,
    size: u64,
    initialised: u64,
}

impl Content {
    /// Starts with the piece that holds virtual cluster 0. Compressed and encrypted values are not read.
    pub(super) fn start(attribute: &Attribute<'_>, cluster: u32, limit: u64) -> Result<Self, Unproven> {
        match &attribute.body {
            // A directory's flags speak of its new files, not of itself.
            Body::Resident(value) => Ok(Self::Resident(value.to_vec())),
            Body::Mapped(_) if attribute.flags != 0 => {
                Err(unknown("a system attribute is compressed, encrypted or sparse"))
            }
            Body::Mapped(mapped) => Clusters::start(mapped, cluster, limit).map(Self::Mapped),
        }
    }

    /// Adds the next piece.
    pub(super) fn extend(&mut self, attribute: &Attribute<'_>) -> Result<(), Unproven> {
        match (self, &attribute.body) {
            (Self::Mapped(clusters), Body::Mapped(mapped)) => clusters.extend(mapped),
            _ => Err(inconsistent("an attribute continues where it cannot")),
        }
    }

    /// Bytes of the value.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Resident(value) => value.len() as u64,
            Self::Mapped(clusters) => clusters.size,
        }
    }

    /// Bytes of the value that were ever written; zeros follow.
    pub(super) fn initialised(&self) -> u64 {
        match self {
            Self::Resident(value) => value.len() as u64,
            Self::Mapped(clusters) => clusters.initialised,
        }
    }

    /// Checks that every piece has come.
    pub(super) fn complete(&self) -> Result<(), Unproven> {
        match self {
            Self::Resident(_) => Ok(()),
            Self::Mapped(clusters) => clusters.complete(),
        }
    }

    /// First cluster, where it has clusters of its own.
    pub(super) fn first_cluster(&self) -> Option<u64> {
        match self {
            Self::Mapped(Clusters { runs, .. }) => runs.first().and_then(|(_, run)| run.lcn),
            Self::Resident(_) => None,
        }
    }

    /// Fills `buf` from byte `offset` of the value on; zeros where it was never written.
    pub(super) fn read(&self, reader: &Reader<'_>, buf: &mut [u8], offset: u64) -> Result<(), Unproven> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(inconsistent("an attribute ends before what it must hold"));
        }
        match self {
            Self::Resident(value) => {
                let start = offset as usize;
                buf.copy_from_slice(&value[start..start + buf.len()]);
                Ok(())
            }
            Self::Mapped(clusters) => {
                let written = clusters.initialised.saturating_sub(offset).min(buf.len() as u64);
                let (written, never) = buf.split_at_mut(written as usize);
                never.fill(0);
                clusters.read(reader, written, offset)
            }
        }
    }
}

impl Clusters {
    fn start(mapped: &Mapped<'_>, cluster: u32, limit: u64) -> Result<Self, Unproven> {
        let mut clusters = Self {
            cluster: cluster.into(),
            limit,
            runs: Vec::new(),
            len: 0,
            allocated: mapped.allocated,
            size: mapped.size,
            initialised: mapped.initialised,
        };
        let whole =
            mapped.allocated.is_multiple_of(clusters.cluster) && mapped.allocated / clusters.cluster <= limit;
        if !whole || mapped.size > mapped.allocated || mapped.initialised > mapped.size {
            return Err(inconsistent(
                "the sizes of a system attribute contradict each other",
            ));
        }
        clusters.extend(mapped)?;
        Ok(clusters)
    }

    fn extend(&mut self, mapped: &Mapped<'_>) -> Result<(), Unproven> {
        if mapped.lowest != self.len {
            return Err(inconsistent("the pieces of an attribute do not join"));
        }
        let end = self.len + mapped.len;
        if end > self.allocated / self.cluster {
            return Err(inconsistent(
                "an attribute has more clusters than it has allocated",
            ));
        }
        for run in mapped.runs(self.limit) {
            let run = run?;
            if run.len > end - self.len || self.runs.len() >= RUNS_MAX || run.lcn.is_none() {
                return Err(inconsistent("a system attribute has too many runs, or a hole"));
            }
            self.runs.push((self.len, run));
            self.len += run.len;
        }
        if self.len != end {
            return Err(inconsistent("an attribute has fewer runs than clusters"));
        }
        Ok(())
    }

    fn complete(&self) -> Result<(), Unproven> {
        if self.len * self.cluster != self.allocated {
            return Err(inconsistent("the runs of an attribute do not make up its size"));
        }
        Ok(())
    }

    fn read(&self, reader: &Reader<'_>, mut buf: &mut [u8], mut offset: u64) -> Result<(), Unproven> {
        while !buf.is_empty() {
            let (vcn, within) = (offset / self.cluster, offset % self.cluster);
            let next = self.runs.partition_point(|(start, _)| *start <= vcn);
            let hit = next.checked_sub(1).and_then(|index| self.runs.get(index));
            let hit = hit.filter(|(start, run)| vcn - start < run.len);
            let &(start, run) =
                hit.ok_or_else(|| inconsistent("an attribute's runs end before its value"))?;
            let there = (run.len - (vcn - start)) * self.cluster - within;
            let (now, later) = buf.split_at_mut(there.min(buf.len() as u64) as usize);
            match run.lcn {
                Some(lcn) => reader.read(now, (lcn + vcn - start) * self.cluster + within)?,
                None => now.fill(0),
            }
            offset += now.len() as u64;
            buf = later;
        }
        Ok(())
    }
}
