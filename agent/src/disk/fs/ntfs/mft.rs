//! The master file table: where its records lie, and the value of any attribute of any of them.
//!
//! Owns the bootstrap (record 0 describes the table that holds it), attribute lists, and the comparison with `$MFTMirr`. Leaves
//! alone what the records say. Promises that no list of a hostile volume makes it loop: an attribute list is at most
//! [`LIST_MAX`] bytes and is never followed from within another.

use super::boot::Boot;
use super::content::Content;
use super::fields::Fields;
use super::inconsistent;
use super::record::{ATTRIBUTE_LIST, Attribute, DATA, Record, Reference};
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

/// Bytes of an attribute list; NTFS itself allows no more.
const LIST_MAX: u64 = 256 << 10;

/// Records that `$MFTMirr` repeats.
const MIRRORED: u64 = 4;

/// Numbers of the system's records.
const MFT: u64 = 0;
pub(super) const LOG: u64 = 2;
pub(super) const VOLUME: u64 = 3;
pub(super) const ROOT: u64 = 5;
const BITMAP: u64 = 6;

pub(super) struct Mft<'a> {
    pub(super) reader: Reader<'a>,
    pub(super) boot: &'a Boot,
    table: Content,
}

impl<'a> Mft<'a> {
    /// Finds the whole table, and checks its first records against their mirror.
    pub(super) fn open(reader: &Reader<'a>, boot: &'a Boot) -> Result<Self, Unproven> {
        let mut bytes = vec![0; boot.record];
        reader.read(&mut bytes, boot.mft * u64::from(boot.cluster))?;
        let record = Record::open(&mut bytes, MFT)?.filter(|record| record.in_use && record.is_base());
        let record = record.ok_or_else(|| inconsistent("MFT record 0 is not in use"))?;
        let table = record.find(DATA, "")?;
        let table = table.ok_or_else(|| inconsistent("MFT record 0 holds no table"))?;
        let mut mft = Self {
            reader: *reader,
            boot,
            table: Content::start(&table, boot.cluster, boot.clusters)?,
        };
        if mft.table.first_cluster() != Some(boot.mft) {
            return Err(inconsistent(
                "the boot sector and MFT record 0 differ in the place of the MFT",
            ));
        }
        let base = Reference(MFT | u64::from(record.sequence) << 48);
        for piece in mft.pieces(&record, DATA, "")?.into_iter().skip(1) {
            let mut bytes = Vec::new();
            let extension = mft.extension(piece, base, &mut bytes)?;
            mft.table.extend(&piece.find(&extension, DATA, "")?)?;
        }
        mft.table.complete()?;
        mft.confirm()?;
        Ok(mft)
    }

    /// Records that were ever written.
    pub(super) fn records(&self) -> u64 {
        self.table.initialised() / self.boot.record as u64
    }

    /// Reads the records from `number` on into `buf`, fixups still in place.
    pub(super) fn read(&self, buf: &mut [u8], number: u64) -> Result<(), Unproven> {
        self.table
            .read(&self.reader, buf, number * self.boot.record as u64)
    }

    /// Reads record `number`, which must be in use.
    pub(super) fn record<'b>(&self, number: u64, bytes: &'b mut Vec<u8>) -> Result<Record<'b>, Unproven> {
        if number >= self.records() {
            return Err(inconsistent(format!("MFT record {number} lies beyond the table")));
        }
        bytes.clear();
        bytes.resize(self.boot.record, 0);
        self.read(bytes, number)?;
        let record = Record::open(bytes, number)?.filter(|record| record.in_use);
        record.ok_or_else(|| inconsistent(format!("MFT record {number} is not in use, but needed")))
    }

    /// The value of attribute `kind`, `name` of base record `number`; `None` where it has none.
    pub(super) fn content(&self, number: u64, kind: u32, name: &str) -> Result<Option<Content>, Unproven> {
        let mut bytes = Vec::new();
        let record = self.record(number, &mut bytes)?;
        if !record.is_base() {
            return Err(inconsistent(format!("MFT record {number} is no base record")));
        }
        let listed = self.pieces(&record, kind, name)?;
        if listed.is_empty() {
            let whole = record.find(kind, name)?;
            let content = whole.map(|whole| Content::start(&whole, self.boot.cluster, self.boot.clusters));
            return content.transpose()?.map(completed).transpose();
        }
        let base = Reference(number | u64::from(record.sequence) << 48);
        let mut content = None;
        for piece in listed {
            let mut bytes = Vec::new();
            let holder = self.extension(piece, base, &mut bytes)?;
            let attribute = piece.find(&holder, kind, name)?;
            match &mut content {
                None => content = Some(Content::start(&attribute, self.boot.cluster, self.boot.clusters)?),
                Some(content) => content.extend(&attribute)?,
            }
        }
        content.map(completed).transpose()
    }

    /// The volume's bitmap: one bit for each cluster, written in full.
    pub(super) fn bitmap(&self) -> Result<Content, Unproven> {
        let bitmap = self.content(BITMAP, DATA, "")?;
        let bitmap = bitmap.ok_or_else(|| inconsistent("there is no $Bitmap"))?;
        if bitmap.initialised() < self.boot.clusters.div_ceil(8) {
            return Err(inconsistent("$Bitmap is shorter than the volume"));
        }
        Ok(bitmap)
    }

    /// The record that holds `piece`: the base record itself, or one that says it extends it.
    fn extension<'b>(
        &self,
        piece: Piece,
        base: Reference,
        bytes: &'b mut Vec<u8>,
    ) -> Result<Record<'b>, Unproven> {
        let number = piece.holder.number();
        let record = self.record(number, bytes)?;
        let belongs = if number == base.number() {
            record.is_base()
        } else {
            record.base == base
        };
        if !belongs || record.sequence != piece.holder.sequence() {
            return Err(inconsistent(format!(
                "MFT record {number} does not extend what lists it"
            )));
        }
        Ok(record)
    }

    /// What the record's attribute list says of `kind` and `name`, by first virtual cluster; empty where there is no list.
    fn pieces(&self, record: &Record<'_>, kind: u32, name: &str) -> Result<Vec<Piece>, Unproven> {
        let Some(list) = record.find(ATTRIBUTE_LIST, "")? else {
            return Ok(Vec::new());
        };
        let list = completed(Content::start(&list, self.boot.cluster, self.boot.clusters)?)?;
        if list.size() > LIST_MAX {
            return Err(inconsistent("an attribute list is too long"));
        }
        let mut bytes = vec![0; list.size() as usize];
        list.read(&self.reader, &mut bytes, 0)?;
        let mut pieces = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let entry = Fields(rest);
            let len = entry.index(4)?;
            if len < 0x1a || len > rest.len() {
                return Err(inconsistent("an attribute list does not decode"));
            }
            let named = entry.name(entry.u8(7)?.into(), entry.u8(6)?)?;
            if entry.u32(0)? == kind && named.into_iter().eq(name.encode_utf16()) {
                pieces.push(Piece {
                    lowest: entry.u64(8)?,
                    holder: Reference(entry.u64(0x10)?),
                });
            }
            rest = &rest[len..];
        }
        pieces.sort_by_key(|piece| piece.lowest);
        Ok(pieces)
    }

    fn confirm(&self) -> Result<(), Unproven> {
        let place = self.boot.mirror * u64::from(self.boot.cluster);
        for number in 0..MIRRORED {
            let (mut original, mut copy) = (Vec::new(), vec![0; self.boot.record]);
            self.record(number, &mut original)?;
            self.reader
                .read(&mut copy, place + number * self.boot.record as u64)?;
            let copy_used = Record::open(&mut copy, number)?.is_some_and(|record| record.in_use);
            let (array, count) = (Fields(&original).index(4)?, Fields(&original).index(6)?);
            // Copies may be written under different update sequence numbers.
            for bytes in [&mut original, &mut copy] {
                bytes[array..array + count * 2].fill(0);
            }
            let used = Fields(&original).u32(0x18)? as usize;
            if !copy_used || original[..used] != copy[..used] {
                return Err(inconsistent(format!(
                    "MFT record {number} differs from its mirror"
                )));
            }
        }
        Ok(())
    }
}

fn completed(content: Content) -> Result<Content, Unproven> {
    content.complete()?;
    Ok(content)
}

/// One line of an attribute list.
#[derive(Clone, Copy)]
struct Piece {
    lowest: u64,
    holder: Reference,
}

impl Piece {
    /// Finds the attribute that the line speaks of.
    fn find<'b>(&self, record: &Record<'b>, kind: u32, name: &str) -> Result<Attribute<'b>, Unproven> {
        for attribute in record.attributes() {
            let attribute = attribute?;
            if attribute.kind == kind && attribute.is_named(name)? && attribute.lowest() == self.lowest {
                return Ok(attribute);
            }
        }
        Err(inconsistent(
            "an attribute list speaks of an attribute that is not there",
        ))
    }
}
