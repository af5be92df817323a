//! MFT records and the attributes in them.
//!
//! Owns the layout of a file record and of an attribute's header. Leaves alone what an attribute holds. Promises that every slice
//! an attribute gives lies inside the attribute, the attribute inside the used part of its record, and that a list of attributes
//! without its end mark is an error.

use super::fields::{Fields, undo_fixups};
use super::inconsistent;
use super::runs::Runs;
use crate::disk::fs::Unproven;

pub(super) const ATTRIBUTE_LIST: u32 = 0x20;
pub(super) const FILE_NAME: u32 = 0x30;
pub(super) const VOLUME_NAME: u32 = 0x60;
pub(super) const VOLUME_INFORMATION: u32 = 0x70;
pub(super) const DATA: u32 = 0x80;
pub(super) const INDEX_ROOT: u32 = 0x90;
pub(super) const INDEX_ALLOCATION: u32 = 0xa0;
pub(super) const BITMAP: u32 = 0xb0;
const END: u32 = 0xffff_ffff;

/// Which record a reference names: 48 bits of number under 16 bits of sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Reference(pub(super) u64);

impl Reference {
    pub(super) fn number(self) -> u64 {
        self.0 & 0xffff_ffff_ffff
    }

    pub(super) fn sequence(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

/// One MFT record, its fixups undone.
pub(super) struct Record<'a> {
    fields: Fields<'a>,
    /// First attribute, and end of the used part.
    attributes: std::ops::Range<usize>,
    pub(super) in_use: bool,
    pub(super) sequence: u16,
    /// The record that this one extends; number 0 and sequence 0 for a base record.
    pub(super) base: Reference,
}

impl<'a> Record<'a> {
    /// Opens record `number`; `None` where it was never written (zeros in place of its magic).
    pub(super) fn open(bytes: &'a mut [u8], number: u64) -> Result<Option<Self>, Unproven> {
        match bytes.get(..4) {
            Some(b"FILE") => {}
            Some([0, 0, 0, 0]) => return Ok(None),
            _ => return Err(inconsistent(format!("MFT record {number} has no valid magic"))),
        }
        undo_fixups(bytes, &format!("MFT record {number}"))?;
        let fields = Fields(bytes);
        let (first, used) = (fields.index(0x14)?, fields.u32(0x18)? as usize);
        let allocated = fields.u32(0x1c)? as usize;
        let in_use = fields.u16(0x16)? & 1 != 0;
        // Formatters leave the number of unused records blank, and NTFS before 3.1 has none.
        let numbered = in_use && fields.index(4)? >= 0x30;
        if allocated != bytes.len() || used > allocated || first < 0x28 || first % 8 != 0 || first > used {
            return Err(inconsistent(format!("MFT record {number} has impossible sizes")));
        }
        if numbered && u64::from(fields.u32(0x2c)?) != number & 0xffff_ffff {
            return Err(inconsistent(format!(
                "MFT record {number} calls itself by another number"
            )));
        }
        Ok(Some(Self {
            fields,
            attributes: first..used,
            in_use,
            sequence: fields.u16(0x10)?,
            base: Reference(fields.u64(0x20)?),
        }))
    }

    pub(super) fn is_base(&self) -> bool {
        self.base.0 == 0
    }

    /// The attributes, in order; the last item is an error where the list does not end as it must.
    pub(super) fn attributes(&self) -> Attributes<'a> {
        Attributes {
            fields: self.fields,
            at: self.attributes.start,
            end: self.attributes.end,
            done: false,
        }
    }

    /// The first attribute of `kind` and `name` in this record itself.
    pub(super) fn find(&self, kind: u32, name: &str) -> Result<Option<Attribute<'a>>, Unproven> {
        for attribute in self.attributes() {
            let attribute = attribute?;
            if attribute.kind == kind && attribute.is_named(name)? {
                return Ok(Some(attribute));
            }
        }
        Ok(None)
    }
}

pub(super) struct Attributes<'a> {
    fields: Fields<'a>,
    at: usize,
    end: usize,
    done: bool,
}

impl<'a> Attributes<'a> {
    fn decode(&mut self) -> Result<Option<Attribute<'a>>, Unproven> {
        let used = Fields(self.fields.bytes(0, self.end)?);
        let kind = used.u32(self.at)?;
        if kind == END {
            return Ok(None);
        }
        let len = used.u32(self.at + 4)? as usize;
        if len < 0x18 || !len.is_multiple_of(8) || kind == 0 {
            return Err(inconsistent("an attribute has an impossible length"));
        }
        let fields = Fields(used.bytes(self.at, len)?);
        self.at += len;
        Attribute::open(kind, fields).map(Some)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<Attribute<'a>, Unproven>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let attribute = self.decode().transpose();
        self.done = !matches!(attribute, Some(Ok(_)));
        attribute
    }
}

pub(super) struct Attribute<'a> {
    pub(super) kind: u32,
    fields: Fields<'a>,
    /// Compressed, encrypted, sparse.
    pub(super) flags: u16,
    pub(super) body: Body<'a>,
}

/// Where an attribute's value is.
#[derive(Clone, Copy)]
pub(super) enum Body<'a> {
    /// In the record.
    Resident(&'a [u8]),
    /// In clusters of its own, as far as this piece of the attribute goes.
    Mapped(Mapped<'a>),
}

#[derive(Clone, Copy)]
pub(super) struct Mapped<'a> {
    /// First virtual cluster of this piece.
    pub(super) lowest: u64,
    /// Virtual clusters of this piece.
    pub(super) len: u64,
    /// Bytes allocated, valid and written of the whole attribute; only in the piece whose `lowest` is 0.
    pub(super) allocated: u64,
    pub(super) size: u64,
    pub(super) initialised: u64,
    pairs: &'a [u8],
}

impl<'a> Attribute<'a> {
    fn open(kind: u32, fields: Fields<'a>) -> Result<Self, Unproven> {
        let body = match fields.u8(8)? {
            0 => Body::Resident(fields.bytes(fields.index(0x14)?, fields.u32(0x10)? as usize)?),
            1 => Body::Mapped(Mapped::open(fields)?),
            _ => return Err(inconsistent("an attribute is neither resident nor mapped")),
        };
        Ok(Self {
            kind,
            fields,
            flags: fields.u16(0x0c)?,
            body,
        })
    }

    /// Whether its name is `name`; the unnamed attribute's is empty.
    pub(super) fn is_named(&self, name: &str) -> Result<bool, Unproven> {
        let units = self.fields.name(self.fields.index(0x0a)?, self.fields.u8(9)?)?;
        Ok(units.into_iter().eq(name.encode_utf16()))
    }

    /// First virtual cluster of this piece; 0 where it lies in the record.
    pub(super) fn lowest(&self) -> u64 {
        match self.body {
            Body::Resident(_) => 0,
            Body::Mapped(mapped) => mapped.lowest,
        }
    }

    /// The value, where it lies in the record.
    pub(super) fn resident(&self) -> Result<Fields<'a>, Unproven> {
        match self.body {
            Body::Resident(value) => Ok(Fields(value)),
            Body::Mapped(_) => Err(inconsistent("an attribute that must be resident is not")),
        }
    }
}

impl<'a> Mapped<'a> {
    fn open(fields: Fields<'a>) -> Result<Self, Unproven> {
        let (lowest, highest) = (fields.u64(0x10)?, fields.u64(0x18)?);
        let pairs = fields.index(0x20)?;
        // An attribute without clusters has -1 as its highest.
        let len = highest.wrapping_add(1).checked_sub(lowest);
        let len = len.filter(|len| *len < 1 << 48 && lowest < 1 << 48 && pairs >= 0x40);
        Ok(Self {
            lowest,
            len: len.ok_or_else(|| inconsistent("an attribute's range of clusters is impossible"))?,
            allocated: fields.u64(0x28)?,
            size: fields.u64(0x30)?,
            initialised: fields.u64(0x38)?,
            pairs: fields.0.get(pairs..).unwrap_or_default(),
        })
    }

    /// The runs of this piece, on a volume of `clusters` clusters. The reader of them compares their sum with `len`.
    pub(super) fn runs(&self, clusters: u64) -> Runs<'a> {
        Runs::new(self.pairs, clusters)
    }
}
