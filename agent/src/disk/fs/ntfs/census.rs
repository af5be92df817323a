//! One walk over all MFT records: which clusters they refer to, and which names decide whether free blocks may be skipped.
//!
//! Owns the walk. Leaves alone what follows from it. Promises that every record that was ever written is read once, in order, in
//! pieces of [`PIECE`] bytes, and that a record in use that does not decode ends the scan.

use super::fields::Fields;
use super::mft::Mft;
use super::names::{self, FileName};
use super::record::{Body, FILE_NAME, Mapped, Record};
use super::tally::Tally;
use super::{inconsistent, unknown};
use crate::disk::fs::Unproven;

/// Bytes read at once; a multiple of every record size.
const PIECE: usize = 256 << 10;

/// Records that call themselves the hibernation file; there is one at most.
const HIBERFIL_MAX: usize = 8;

pub(super) struct Census {
    pub(super) tally: Tally,
    /// Records of the hibernation file, by the name in the record or in the root directory.
    pub(super) hiberfil: Vec<u64>,
}

pub(super) fn take(mft: &Mft<'_>) -> Result<Census, Unproven> {
    let mut census = Census {
        tally: Tally::new(mft.boot.clusters),
        hiberfil: Vec::new(),
    };
    let record = mft.boot.record;
    let mut buf = vec![0; PIECE];
    let (mut number, records) = (0, mft.records());
    while number < records {
        let piece = ((records - number) as usize).min(PIECE / record) * record;
        mft.read(&mut buf[..piece], number)?;
        for bytes in buf[..piece].chunks_exact_mut(record) {
            if let Some(record) = Record::open(bytes, number)?.filter(|record| record.in_use) {
                census.count(&record, number, mft.boot.clusters)?;
            }
            number += 1;
        }
    }
    names::in_root(mft, &mut |name, reference| {
        if name.is_hiberfil() {
            census.suspect(reference.number());
        }
    })?;
    match census.hiberfil.len() {
        0..HIBERFIL_MAX => Ok(census),
        _ => Err(inconsistent("several files are the hibernation file")),
    }
}

impl Census {
    fn count(&mut self, record: &Record<'_>, number: u64, clusters: u64) -> Result<(), Unproven> {
        for attribute in record.attributes() {
            let attribute = attribute?;
            match attribute.body {
                Body::Mapped(_) if attribute.kind == FILE_NAME => {
                    return Err(inconsistent("a file's name lies outside its record"));
                }
                Body::Mapped(mapped) => self.refer(&mapped, clusters)?,
                Body::Resident(value) if attribute.kind == FILE_NAME => {
                    let holder = if record.is_base() {
                        number
                    } else {
                        record.base.number()
                    };
                    self.name(&FileName::decode(&Fields(value))?, holder)?;
                }
                Body::Resident(_) => {}
            }
        }
        Ok(())
    }

    fn refer(&mut self, mapped: &Mapped<'_>, clusters: u64) -> Result<(), Unproven> {
        let mut left = mapped.len;
        for run in mapped.runs(clusters) {
            let run = run?;
            left = left
                .checked_sub(run.len)
                .ok_or_else(|| inconsistent("an attribute has more runs than clusters"))?;
            if let Some(lcn) = run.lcn {
                self.tally.refer(lcn, run.len)?;
            }
        }
        if left != 0 {
            return Err(inconsistent("an attribute has fewer runs than clusters"));
        }
        Ok(())
    }

    fn name(&mut self, name: &FileName, holder: u64) -> Result<(), Unproven> {
        if name.is_shadow() {
            return Err(unknown("volume shadow copies, which need blocks that look free"));
        }
        if name.is_hiberfil() {
            self.suspect(holder);
        }
        Ok(())
    }

    fn suspect(&mut self, number: u64) {
        if !self.hiberfil.contains(&number) && self.hiberfil.len() < HIBERFIL_MAX {
            self.hiberfil.push(number);
        }
    }
}
