//! Whether the volume was left settled: its flags, its journal, hibernation, shadow copies.
//!
//! Owns each of these four judgements. Promises that what it cannot judge counts as not settled.

use std::cmp::Ordering;

use super::content::Content;
use super::fields::{Fields, undo_fixups, utf16};
use super::mft::{LOG, Mft, VOLUME};
use super::record::{DATA, VOLUME_INFORMATION, VOLUME_NAME};
use super::{inconsistent, not_clean, unknown};
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

/// Volume flags that say nothing of the allocation: mounted by NT 4, and modified by chkdsk.
const HARMLESS: u16 = 0x8008;
const DIRTY: u16 = 1;

/// Bytes of a journal; NTFS itself allows no more.
const LOG_MAX: u64 = 4 << 30;

/// Checks version and flags of record 3; returns the label.
pub(super) fn volume(mft: &Mft<'_>) -> Result<String, Unproven> {
    let mut bytes = Vec::new();
    let record = mft.record(VOLUME, &mut bytes)?;
    let information = record.find(VOLUME_INFORMATION, "")?;
    let information = information
        .ok_or_else(|| inconsistent("there is no volume information"))?
        .resident()?;
    let (major, minor, flags) = (information.u8(8)?, information.u8(9)?, information.u16(10)?);
    if !matches!((major, minor), (1, 2) | (3, 0 | 1)) {
        return Err(unknown(format!("version {major}.{minor}")));
    }
    if flags & DIRTY != 0 {
        return Err(not_clean("its dirty flag is set"));
    }
    if flags & !HARMLESS != 0 {
        return Err(not_clean(format!("its volume flags are {flags:#06x}")));
    }
    match record.find(VOLUME_NAME, "")? {
        Some(name) => Ok(String::from_utf16_lossy(&utf16(name.resident()?.0))),
        None => Ok(String::new()),
    }
}

/// Checks that the journal has nothing to replay: it is emptied (0xff throughout), or the newer of its two restart pages says that
/// the volume was closed.
pub(super) fn log(mft: &Mft<'_>) -> Result<(), Unproven> {
    let log = mft.content(LOG, DATA, "")?;
    let log = log.ok_or_else(|| inconsistent("there is no $LogFile"))?;
    let mut head = [0; 0x20];
    log.read(&mft.reader, &mut head, 0)?;
    if head.starts_with(&[0xff; 4]) {
        return emptied(mft, &log);
    }
    let page = Fields(&head).u32(0x10)?;
    if !page.is_power_of_two() || !(512..=64 << 10).contains(&page) {
        return Err(not_clean("$LogFile has no valid restart page"));
    }
    let first = Restart::read(mft, &log, 0, page)?;
    let second = Restart::read(mft, &log, page.into(), page)?;
    let newer_open = match first.lsn.cmp(&second.lsn) {
        Ordering::Greater => !first.closed,
        Ordering::Less => !second.closed,
        Ordering::Equal => !first.closed || !second.closed,
    };
    if newer_open {
        return Err(not_clean("$LogFile is open"));
    }
    Ok(())
}

fn emptied(mft: &Mft<'_>, log: &Content) -> Result<(), Unproven> {
    let mut buf = vec![0; 64 << 10];
    let mut offset = 0;
    if log.size() > LOG_MAX {
        return Err(inconsistent("$LogFile is too large"));
    }
    while offset < log.size() {
        let piece = (log.size() - offset).min(buf.len() as u64) as usize;
        log.read(&mft.reader, &mut buf[..piece], offset)?;
        if buf[..piece].iter().any(|byte| *byte != 0xff) {
            return Err(not_clean("$LogFile begins emptied, but is not"));
        }
        offset += piece as u64;
    }
    Ok(())
}

struct Restart {
    lsn: u64,
    closed: bool,
}

impl Restart {
    fn read(mft: &Mft<'_>, log: &Content, offset: u64, page: u32) -> Result<Self, Unproven> {
        let mut bytes = vec![0; page as usize];
        log.read(&mft.reader, &mut bytes, offset)?;
        if !bytes.starts_with(b"RSTR") {
            return Err(not_clean("$LogFile has no valid restart page"));
        }
        undo_fixups(&mut bytes, "a restart page of $LogFile")?;
        let fields = Fields(&bytes);
        // Version 2 is what Windows 8 and later keep while mounted, and across a fast shutdown.
        if fields.u32(0x10)? != page || fields.u16(0x1c)? != 1 || fields.u16(0x1a)? > 1 {
            return Err(not_clean("$LogFile is kept in the form of a mounted volume"));
        }
        let area = fields.index(0x18)?;
        let area = Fields(bytes.get(area..).unwrap_or_default());
        let (clients, flags) = (area.u16(0x0c)?, area.u16(0x0e)?);
        Ok(Self {
            lsn: area.u64(0)?,
            closed: clients == 0xffff || flags & 2 != 0,
        })
    }
}

/// Checks that no hibernated system counts on this volume. `files` are the records of its hibernation file, if any.
pub(super) fn hibernation(mft: &Mft<'_>, files: &[u64]) -> Result<(), Unproven> {
    for file in files {
        let content = mft.content(*file, DATA, "");
        let content = content.ok().flatten();
        let content = content.ok_or_else(|| not_clean("hiberfil.sys cannot be read"))?;
        let mut head = vec![0; content.size().min(4096) as usize];
        content.read(&mft.reader, &mut head, 0)?;
        match head.get(..4) {
            Some(b"HIBR" | b"hibr") => return Err(not_clean("Windows is hibernated, or was shut down fast")),
            Some(b"WAKE" | b"wake") => {}
            Some(_) if head.len() == 4096 && head.iter().all(|byte| *byte == 0) => {}
            _ => return Err(not_clean("hiberfil.sys has an unknown header")),
        }
    }
    Ok(())
}

/// Where a volume with shadow copies has their catalogue, from the start of the volume.
const SHADOW_HEADER: u64 = 0x1e00;
const SHADOW_MAGIC: [u8; 16] = [
    0x6b, 0x87, 0x08, 0x38, 0x76, 0xc1, 0x48, 0x4e, 0xb7, 0xae, 0x04, 0x04, 0x6e, 0x6c, 0xc7, 0x52,
];

/// Checks that the boot area carries no header of volume shadow copies.
pub(super) fn shadow_header(reader: &Reader<'_>) -> Result<(), Unproven> {
    let mut header = [0; 16];
    reader.read(&mut header, SHADOW_HEADER)?;
    if header == SHADOW_MAGIC {
        return Err(unknown("volume shadow copies, which need blocks that look free"));
    }
    Ok(())
}
