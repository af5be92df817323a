//! The boot sector: geometry, state flags, and the backup of FAT32.
//!
//! Owns what the BIOS parameter block says. Promises that in a parsed geometry the areas follow each other (reserved, tables, root
//! directory, clusters), that every entry of the table that a cluster needs lies inside the table, and that all ends fit in 64 bits.

use super::fields::{u16_at, u32_at};
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

pub(super) const LEN: usize = 512;

/// The fields that say where everything is; other bytes may differ between a boot sector and its backup.
pub(super) const PARAMETERS: std::ops::Range<usize> = 0x0b..0x24;
const PARAMETERS_32: std::ops::Range<usize> = 0x24..0x34;

/// Bits of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Fat12,
    Fat16,
    Fat32,
}

impl Width {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fat12 => "fat12",
            Self::Fat16 => "fat16",
            Self::Fat32 => "fat32",
        }
    }

    pub(super) fn bits(self) -> u64 {
        match self {
            Self::Fat12 => 12,
            Self::Fat16 => 16,
            Self::Fat32 => 32,
        }
    }
}

/// Where everything lies; all places and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) width: Width,
    pub(super) sector: u64,
    pub(super) cluster: u64,
    pub(super) fats: u64,
    /// First table, and the length of each.
    pub(super) table: u64,
    pub(super) table_len: u64,
    /// Root directory of FAT12 and FAT16; empty on FAT32.
    pub(super) root: u64,
    pub(super) root_len: u64,
    /// First cluster of the root directory of FAT32.
    pub(super) root_cluster: u32,
    /// Cluster 2.
    pub(super) data: u64,
    pub(super) clusters: u32,
    pub(super) size: u64,
    pub(super) media: u8,
}

impl Geometry {
    /// What the parameter block of a boot sector says; an error says in words what is wrong with it.
    fn parse(raw: &[u8; LEN]) -> Result<Self, &'static str> {
        let sector = u64::from(u16_at(raw, 0x0b));
        let per_cluster = u64::from(raw[0x0d]);
        let (reserved, fats) = (u64::from(u16_at(raw, 0x0e)), u64::from(raw[0x10]));
        let media = raw[0x15];
        if !matches!(sector, 512 | 1024 | 2048 | 4096) || !per_cluster.is_power_of_two() {
            return Err("its sector or cluster size is impossible");
        }
        if reserved == 0 || !(1..=2).contains(&fats) || !matches!(media, 0xf0 | 0xf8..=0xff) {
            return Err("its reserved sectors, number of tables or media byte is impossible");
        }
        let root_len = u64::from(u16_at(raw, 0x11)) * 32;
        let total = sectors(raw)?;
        let (narrow, wide) = (u64::from(u16_at(raw, 0x16)), u64::from(u32_at(raw, 0x24)));
        let fat32 = narrow == 0;
        if root_len % sector != 0 || (root_len == 0) != fat32 || (fat32 && wide == 0) {
            return Err("its table and root directory do not fit one kind of FAT");
        }
        let table_len = if fat32 { wide } else { narrow } * sector;
        let table = reserved * sector;
        let root = table + fats * table_len;
        let data = root + root_len;
        let clusters = (total * sector).saturating_sub(data) / (per_cluster * sector);
        let width = match clusters {
            _ if fat32 => Width::Fat32,
            0..4085 => Width::Fat12,
            _ => Width::Fat16,
        };
        let most = match width {
            Width::Fat12 | Width::Fat16 => 65_524,
            Width::Fat32 => 0x0fff_fff5,
        };
        if clusters == 0 || clusters > most || table_len * 8 < (clusters + 2) * width.bits() {
            return Err("its clusters do not fit its table");
        }
        if named(raw).is_some_and(|named| named != width) {
            return Err("it calls itself by another kind of FAT than its clusters do");
        }
        Ok(Self {
            width,
            sector,
            cluster: per_cluster * sector,
            fats,
            table,
            table_len,
            root,
            root_len,
            root_cluster: if fat32 { u32_at(raw, 0x2c) } else { 0 },
            data,
            clusters: clusters as u32,
            size: total * sector,
            media,
        })
    }

    /// Whether a backup boot sector can confirm it.
    pub(super) fn backed_up(&self) -> bool {
        self.width == Width::Fat32
    }

    /// First byte of `cluster`, which is 2 or more.
    pub(super) fn offset(&self, cluster: u32) -> u64 {
        self.data + u64::from(cluster - 2) * self.cluster
    }

    /// One behind the last cluster's number.
    pub(super) fn end(&self) -> u32 {
        self.clusters + 2
    }

    fn inconsistent(&self, what: &str) -> Unproven {
        inconsistent(self.width, what)
    }
}

pub(super) fn inconsistent(width: Width, what: impl Into<String>) -> Unproven {
    Unproven::Inconsistent {
        kind: width.name(),
        what: what.into(),
    }
}

pub(super) fn not_clean(width: Width, what: &str) -> Unproven {
    Unproven::NotClean {
        kind: width.name(),
        what: what.into(),
    }
}

#[derive(Clone, Debug)]
pub(super) struct Boot {
    pub(super) geometry: Geometry,
    pub(super) label: String,
    /// Sectors of a track, as the formatter saw the disk.
    pub(super) track: u64,
    raw: [u8; LEN],
}

impl Boot {
    /// Parses a boot sector that is one of FAT; `None` where it is not.
    pub(super) fn recognise(raw: &[u8; LEN]) -> Result<Option<Self>, Unproven> {
        let foreign = &raw[3..11] == b"NTFS    " || &raw[3..11] == b"EXFAT   ";
        if !matches!(raw[0], 0xeb | 0xe9) || raw[510..] != [0x55, 0xaa] || foreign {
            return Ok(None);
        }
        let named = named(raw);
        match Geometry::parse(raw) {
            Ok(geometry) => Ok(Some(Self {
                label: label(raw, geometry.width == Width::Fat32),
                track: u16_at(raw, 0x18).into(),
                raw: *raw,
                geometry,
            })),
            Err(what) => match named {
                Some(width) => Err(inconsistent(width, what)),
                None => Ok(None),
            },
        }
    }

    /// What the boot sectors say that differ from this one in one byte of the parameter block.
    pub(super) fn neighbours(&self) -> impl Iterator<Item = Geometry> {
        let one = |at: usize| (1..=u8::MAX).map(move |flip| (at, flip));
        let mut raw = self.raw;
        PARAMETERS.flat_map(one).filter_map(move |(at, flip)| {
            raw[at] ^= flip;
            let geometry = Geometry::parse(&raw);
            raw[at] ^= flip;
            geometry.ok()
        })
    }

    /// Checks the state flags that Linux and Windows keep in the boot sector while mounted.
    pub(super) fn settled(&self) -> Result<(), Unproven> {
        let width = self.geometry.width;
        let (state, signature) = match width {
            Width::Fat32 => (0x41, 0x42),
            Width::Fat12 | Width::Fat16 => (0x25, 0x26),
        };
        if matches!(self.raw[signature], 0x28 | 0x29) && self.raw[state] & 3 != 0 {
            return Err(not_clean(
                width,
                "its boot sector says that it is mounted or was not closed",
            ));
        }
        Ok(())
    }

    /// Checks what only FAT32 has: version, mirrored tables, and the backup boot sector.
    pub(super) fn confirm(&self, reader: &Reader<'_>) -> Result<(), Unproven> {
        let unknown = |what: &str| Unproven::UnknownFeature {
            kind: Width::Fat32.name(),
            what: what.into(),
        };
        let (flags, version) = (u16_at(&self.raw, 0x28), u16_at(&self.raw, 0x2a));
        if version != 0 {
            return Err(unknown("a version other than 0.0"));
        }
        if flags & 0x80 != 0 {
            return Err(unknown("tables that are not mirrored"));
        }
        let geometry = &self.geometry;
        if !(2..geometry.end()).contains(&geometry.root_cluster) {
            return Err(geometry.inconsistent("its root directory lies outside the volume"));
        }
        let place = u64::from(u16_at(&self.raw, 0x32)) * geometry.sector;
        if place == 0 || place + LEN as u64 > geometry.table {
            return Err(unknown("no backup boot sector"));
        }
        let mut backup = [0; LEN];
        reader.read(&mut backup, place)?;
        let same = |range: std::ops::Range<usize>| backup[range.clone()] == self.raw[range];
        if !same(PARAMETERS) || !same(PARAMETERS_32) || !same(510..512) {
            return Err(geometry.inconsistent("its boot sector differs from the backup"));
        }
        Ok(())
    }
}

/// Sectors of the volume: a 16-bit or a 32-bit number, and where both are there, the same.
fn sectors(raw: &[u8; LEN]) -> Result<u64, &'static str> {
    match (u16_at(raw, 0x13).into(), u32_at(raw, 0x20)) {
        (0, 0) => Err("it has no sectors"),
        (0, total) | (total, 0) => Ok(total.into()),
        (short, long) if short == long => Ok(long.into()),
        _ => Err("it says two sizes"),
    }
}

/// The kind that the formatter wrote into the sector, for people to read.
fn named(raw: &[u8; LEN]) -> Option<Width> {
    match (&raw[0x36..0x3e], &raw[0x52..0x5a]) {
        (_, b"FAT32   ") => Some(Width::Fat32),
        (b"FAT16   ", _) => Some(Width::Fat16),
        (b"FAT12   ", _) => Some(Width::Fat12),
        _ => None,
    }
}

fn label(raw: &[u8; LEN], fat32: bool) -> String {
    let (at, signature) = if fat32 { (0x47, 0x42) } else { (0x2b, 0x26) };
    match (raw[signature], &raw[at..at + 11]) {
        (0x29, b"NO NAME    ") => String::new(),
        (0x29, label) => String::from_utf8_lossy(label).trim_end().to_owned(),
        _ => String::new(),
    }
}
