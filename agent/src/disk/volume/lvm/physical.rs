//! One physical volume: label, header, metadata areas, and the one text that all areas agree on.
//!
//! Owns the binary structures of LVM2 (format "text": label sector, `pv_header`, `mda_header`, circular metadata buffer). Leaves
//! the text itself to `text` and `group`. Promises that every structure passed its checksum, that no two areas overlap, and that
//! at most [`TEXT_LIMIT`] bytes are read for a text.

use longhaul_common::extent::Extent;

use super::{LvmUnproven, checksum};
use crate::disk::ReadAt;
use crate::disk::volume::{field, read, table};

/// Twice what LVM's default metadata area of 1 MiB can hold as one text.
pub(crate) const TEXT_LIMIT: u64 = 1 << 20;

const SECTOR: usize = 512;
const MAGIC: &[u8; 16] = b"\x20LVM2\x20x[5A%r0N*>";
/// LVM writes at most two metadata areas on a volume.
const AREA_LIMIT: usize = 8;
const IGNORED: u32 = 1;

/// A physical volume with intact metadata.
#[derive(Clone, Debug)]
pub(crate) struct Physical {
    /// Without dashes.
    pub(crate) uuid: String,
    /// Bytes of the volume, as its header says.
    pub(crate) size: u64,
    /// Where its extents begin.
    pub(crate) data: u64,
    /// Label, metadata and boot loader areas, from the volume's start.
    pub(crate) areas: Vec<Extent>,
    /// The volume group's metadata.
    pub(crate) text: Vec<u8>,
}

/// Reads the physical volume on `volume`.
pub(crate) fn read_physical(volume: &dyn ReadAt) -> Result<Physical, LvmUnproven> {
    let sector = label_sector(volume)?;
    let header = Header::decode(&sector)?;
    if header.size > volume.size() {
        return Err(LvmUnproven::Truncated {
            needed: header.size,
            size: volume.size(),
        });
    }
    let mut texts = Vec::new();
    for area in &header.metadata {
        texts.extend(read_text(volume, area)?);
    }
    let text = texts.pop().ok_or(LvmUnproven::NoMetadata)?;
    if texts.iter().any(|other| *other != text) {
        return Err(LvmUnproven::Differ);
    }
    let text = text.ok_or(LvmUnproven::NoGroup)?;
    let mut areas = vec![Extent::between(0, 4 * SECTOR as u64)];
    areas.extend(header.metadata.iter().chain(&header.boot));
    if table::overlapping(&areas).contains(&true) {
        return Err(LvmUnproven::Inconsistent("metadata areas overlap".into()));
    }
    Ok(Physical {
        uuid: header.uuid,
        size: header.size,
        data: header.data,
        areas,
        text,
    })
}

/// The label may stand in any of the first four sectors; LVM writes one.
fn label_sector(volume: &dyn ReadAt) -> Result<Vec<u8>, LvmUnproven> {
    let head = read(volume, 0, volume.size().min(4 * SECTOR as u64) as usize)?;
    let labels: Vec<(usize, &[u8])> = head
        .chunks_exact(SECTOR)
        .enumerate()
        .filter(|(_, sector)| sector.starts_with(b"LABELONE"))
        .collect();
    let [(at, sector)] = labels[..] else {
        return Err(LvmUnproven::Damaged("label"));
    };
    if u32::from_le_bytes(field(sector, 16)) != checksum(&sector[20..]) {
        return Err(LvmUnproven::Checksum("label"));
    }
    let here = u64::from_le_bytes(field(sector, 8)) == at as u64;
    match here && field(sector, 24) == *b"LVM2 001" {
        true => Ok(sector.to_vec()),
        false => Err(LvmUnproven::Damaged("label")),
    }
}

struct Header {
    uuid: String,
    size: u64,
    data: u64,
    metadata: Vec<Extent>,
    boot: Vec<Extent>,
}

impl Header {
    fn decode(sector: &[u8]) -> Result<Self, LvmUnproven> {
        const DAMAGED: LvmUnproven = LvmUnproven::Damaged("physical volume header");
        let at = u32::from_le_bytes(field(sector, 20)) as usize;
        let bytes = sector.get(at..).filter(|_| at >= 32).ok_or(DAMAGED)?;
        let uuid = bytes.get(..32).ok_or(DAMAGED)?;
        if !uuid.iter().all(u8::is_ascii_alphanumeric) {
            return Err(DAMAGED);
        }
        let mut lists = Lists { bytes, at: 40 };
        let data = lists.next().ok_or(DAMAGED)?;
        let metadata = lists.next().ok_or(DAMAGED)?;
        let boot = lists.extension().ok_or(DAMAGED)?;
        let [(data, 0)] = data[..] else {
            return Err(LvmUnproven::Unknown(
                "a physical volume with several data areas".into(),
            ));
        };
        let extents = |list: &[(u64, u64)]| -> Result<Vec<Extent>, LvmUnproven> {
            let extent = |(at, len): &(u64, u64)| Extent::new(*at, *len).map_err(|_| DAMAGED);
            list.iter().map(extent).collect()
        };
        Ok(Self {
            uuid: String::from_utf8_lossy(uuid).into_owned(),
            size: u64::from_le_bytes(field(bytes, 32)),
            data,
            metadata: extents(&metadata)?,
            boot: extents(&boot)?,
        })
    }
}

/// Lists of (offset, length), each ended by a pair of zeros.
struct Lists<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Lists<'_> {
    fn next(&mut self) -> Option<Vec<(u64, u64)>> {
        let mut list = Vec::new();
        loop {
            let pair = self.bytes.get(self.at..self.at + 16)?;
            self.at += 16;
            match (
                u64::from_le_bytes(field(pair, 0)),
                u64::from_le_bytes(field(pair, 8)),
            ) {
                (0, 0) => return Some(list),
                _ if list.len() == AREA_LIMIT => return None,
                pair => list.push(pair),
            }
        }
    }

    /// The header extension: version, flags, then the boot loader areas. Headers of before 2.02.99 end without it.
    fn extension(&mut self) -> Option<Vec<(u64, u64)>> {
        let version = u32::from_le_bytes(field(self.bytes.get(self.at..self.at + 8)?, 0));
        self.at += 8;
        match version {
            0 => Some(Vec::new()),
            1 | 2 => self.next(),
            _ => None,
        }
    }
}

/// The text of a metadata area: `None` where LVM ignores the area, `Some(None)` where the area holds no volume group.
fn read_text(volume: &dyn ReadAt, area: &Extent) -> Result<Option<Option<Vec<u8>>>, LvmUnproven> {
    if area.end() > volume.size() || area.len() < 2 * SECTOR as u64 {
        return Err(LvmUnproven::Damaged("metadata area"));
    }
    let header = read(volume, area.offset(), SECTOR)?;
    if u32::from_le_bytes(field(&header, 0)) != checksum(&header[4..]) {
        return Err(LvmUnproven::Checksum("metadata area header"));
    }
    let u64_at = |at| u64::from_le_bytes(field(&header, at));
    let own = (u64_at(24), u64_at(32)) == (area.offset(), area.len());
    if field(&header, 4) != *MAGIC || u32::from_le_bytes(field(&header, 20)) != 1 || !own {
        return Err(LvmUnproven::Damaged("metadata area header"));
    }
    let locations = [Location::decode(&header, 40), Location::decode(&header, 64)];
    if locations[0].flags & IGNORED != 0 {
        return Ok(None);
    }
    if locations[1].offset != 0 {
        return Err(LvmUnproven::Precommitted);
    }
    match locations[0].offset {
        0 => Ok(Some(None)),
        _ => locations[0].read(volume, area).map(|text| Some(Some(text))),
    }
}

/// Where in an area a text lies.
struct Location {
    offset: u64,
    len: u64,
    checksum: u32,
    flags: u32,
}

impl Location {
    fn decode(header: &[u8], at: usize) -> Self {
        Self {
            offset: u64::from_le_bytes(field(header, at)),
            len: u64::from_le_bytes(field(header, at + 8)),
            checksum: u32::from_le_bytes(field(header, at + 16)),
            flags: u32::from_le_bytes(field(header, at + 20)),
        }
    }

    /// The area behind its header is a ring: a text may go on at the start.
    fn read(&self, volume: &dyn ReadAt, area: &Extent) -> Result<Vec<u8>, LvmUnproven> {
        let ring = SECTOR as u64;
        let inside = self.offset >= ring && self.offset < area.len() && self.len <= area.len() - ring;
        if self.flags != 0 || !inside || self.len == 0 {
            return Err(LvmUnproven::Damaged("metadata location"));
        }
        if self.len > TEXT_LIMIT {
            return Err(LvmUnproven::Unknown(format!(
                "a metadata text of {} bytes",
                self.len
            )));
        }
        let head = self.len.min(area.len() - self.offset);
        let mut text = read(volume, area.offset() + self.offset, head as usize)?;
        text.extend(read(volume, area.offset() + ring, (self.len - head) as usize)?);
        match checksum(&text) == self.checksum {
            true => Ok(text),
            false => Err(LvmUnproven::Checksum("metadata")),
        }
    }
}
