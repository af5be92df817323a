//! The file allocation table.
//!
//! Owns reading entries, the two reserved entries, and the comparison of the copies. Promises to keep one window of [`WINDOW`] bytes
//! of the table in memory, and that an entry other than zero in all its bits never counts as free.

use super::boot::{Geometry, Width, inconsistent, not_clean};
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

/// Bytes read at once: any table of FAT16, and a multiple of 3, so that no pair of 12-bit entries is cut.
const WINDOW: usize = 192 << 10;

/// What an entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Free,
    /// The chain goes on with this cluster.
    Next(u32),
    Last,
    Bad,
}

pub(super) struct Table<'a> {
    reader: Reader<'a>,
    geometry: &'a Geometry,
    window: Vec<u8>,
    /// Where in the table the window begins.
    at: u64,
    /// Bytes read so far.
    pub(super) loaded: u64,
}

impl<'a> Table<'a> {
    pub(super) fn new(reader: &Reader<'a>, geometry: &'a Geometry) -> Self {
        Self {
            reader: *reader,
            geometry,
            window: Vec::new(),
            at: 0,
            loaded: 0,
        }
    }

    /// The number in the table for `cluster`, which is below the geometry's end.
    fn raw(&mut self, cluster: u32) -> Result<u32, Unproven> {
        let (width, cluster) = (self.geometry.width, u64::from(cluster));
        let (offset, len) = match width {
            Width::Fat12 => (cluster * 3 / 2, 2),
            Width::Fat16 => (cluster * 2, 2),
            Width::Fat32 => (cluster * 4, 4),
        };
        if offset < self.at || offset + len as u64 > self.at + self.window.len() as u64 {
            self.load(offset / WINDOW as u64 * WINDOW as u64)?;
        }
        let start = (offset - self.at) as usize;
        let mut bytes = [0; 4];
        let entry = self.window.get(start..start + len);
        bytes[..len].copy_from_slice(entry.ok_or_else(|| inconsistent(width, "its table is too short"))?);
        let number = u32::from_le_bytes(bytes);
        Ok(match width {
            Width::Fat12 if cluster % 2 == 1 => number >> 4,
            Width::Fat12 => number & 0xfff,
            _ => number,
        })
    }

    fn load(&mut self, at: u64) -> Result<(), Unproven> {
        let len = self.geometry.table_len.saturating_sub(at).min(WINDOW as u64);
        self.window.resize(len as usize, 0);
        self.at = at;
        self.loaded += len;
        self.reader.read(&mut self.window, self.geometry.table + at)
    }

    pub(super) fn entry(&mut self, cluster: u32) -> Result<Entry, Unproven> {
        let raw = self.raw(cluster)?;
        let (number, top) = match self.geometry.width {
            Width::Fat12 => (raw, 0xff0),
            Width::Fat16 => (raw, 0xfff0),
            // The upper four bits are reserved, and kept by whoever writes the rest.
            Width::Fat32 => (raw & 0x0fff_ffff, 0x0fff_fff0),
        };
        Ok(match number {
            0 if raw == 0 => Entry::Free,
            _ if number == top + 7 => Entry::Bad,
            _ if number >= top + 8 => Entry::Last,
            _ => Entry::Next(number),
        })
    }

    /// Checks that each copy begins as a table does: the media byte in entry 0, all other bits set.
    pub(super) fn headed(&mut self) -> Result<(), Unproven> {
        let width = self.geometry.width;
        let len = width.bits() as usize / 4;
        for copy in 0..self.geometry.fats {
            let mut head = [0xff; 8];
            let place = self.geometry.table + copy * self.geometry.table_len;
            self.reader.read(&mut head[..len], place)?;
            // Flags and reserved bits of entry 1 and of FAT32's entry 0 are judged elsewhere, or not at all.
            let ones = match width {
                Width::Fat12 => head[1..3] == [0xff; 2],
                Width::Fat16 => head[1] == 0xff && head[2] >= 0xf8 && head[3] | 0xc0 == 0xff,
                Width::Fat32 => head[1..3] == [0xff; 2] && head[3] | 0xf0 == 0xff && head[4] >= 0xf8,
            };
            if head[0] != self.geometry.media || !ones {
                return Err(inconsistent(width, "a table does not begin with the media byte"));
            }
        }
        Ok(())
    }

    /// Checks the flags in entry 1: closed, and no disk error met.
    pub(super) fn settled(&mut self) -> Result<(), Unproven> {
        let width = self.geometry.width;
        let (closed, sound) = match width {
            Width::Fat12 => return Ok(()),
            Width::Fat16 => (1 << 15, 1 << 14),
            Width::Fat32 => (1 << 27, 1 << 26),
        };
        let flags = self.raw(1)?;
        if flags & closed == 0 {
            return Err(not_clean(width, "its table says that it was not closed"));
        }
        if flags & sound == 0 {
            return Err(not_clean(width, "its table says that disk errors were met"));
        }
        Ok(())
    }

    /// Checks that all copies are the same as far as entries go.
    pub(super) fn copies_agree(&self) -> Result<(), Unproven> {
        let geometry = self.geometry;
        let len = (u64::from(geometry.end()) * geometry.width.bits()).div_ceil(8);
        let (mut first, mut copy) = (vec![0; WINDOW], vec![0; WINDOW]);
        let mut at = 0;
        while at < len && geometry.fats > 1 {
            let piece = (len - at).min(WINDOW as u64) as usize;
            self.reader.read(&mut first[..piece], geometry.table + at)?;
            self.reader
                .read(&mut copy[..piece], geometry.table + geometry.table_len + at)?;
            if first[..piece] != copy[..piece] {
                return Err(inconsistent(geometry.width, "the copies of its table differ"));
            }
            at += piece as u64;
        }
        Ok(())
    }

    /// Gives every free cluster, in order.
    pub(super) fn each_free(&mut self, free: &mut dyn FnMut(u32)) -> Result<(), Unproven> {
        for cluster in 2..self.geometry.end() {
            if self.entry(cluster)? == Entry::Free {
                free(cluster);
            }
        }
        Ok(())
    }
}
