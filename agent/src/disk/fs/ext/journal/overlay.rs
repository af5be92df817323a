//! The committed journal, laid over the volume: what the allocation metadata was at one commit.
//!
//! Owns the index of logged blocks with revokes honoured, the contents that are kept (superblock, group descriptors, block
//! bitmaps: bounded), and the view through which the rest of `ext` reads them. Leaves alone what they mean. Promises that a
//! block of the view is the newest committed content, or what lies at home.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::header::{HEADER_LEN, Header};
use super::log::{Log, Word};
use super::place::Places;
use super::tags;
use super::{Fault, is_after};
use crate::disk::ReadAt;
use crate::disk::fs::ext::Ext;
use crate::disk::fs::ext::descriptor::{Descriptors, location};
use crate::disk::fs::ext::inode::Inode;
use crate::disk::fs::ext::superblock::SUPERBLOCK_OFFSET;

/// Blocks in the log of which the newest content is known: about 32 MiB while a journal is read.
const INDEX_MAX: usize = 1 << 19;
/// Bytes of content kept.
const CONTENT_MAX: usize = 32 << 20;

/// The newest content of a block within the log.
#[derive(Clone, Copy)]
struct Logged {
    /// Block of the log.
    at: u32,
    sequence: u32,
    checksum: u32,
    is_escaped: bool,
}

/// What the log says of all blocks.
#[derive(Default)]
struct Index {
    logged: HashMap<u64, Logged>,
    revoked: HashMap<u64, u32>,
}

impl Index {
    fn enter(&mut self, word: &Word) -> Result<(), Fault> {
        match *word {
            Word::Logged { tag, at, sequence } => {
                let logged = Logged {
                    at,
                    sequence,
                    checksum: tag.checksum,
                    is_escaped: tag.is_escaped,
                };
                // In the order of the log: a later one wins.
                self.logged.insert(tag.block, logged);
            }
            Word::Revoked { block, sequence } => {
                self.revoked.insert(block, sequence);
            }
        }
        match self.logged.len() + self.revoked.len() > INDEX_MAX {
            true => Err(Fault::Unproven(crate::disk::fs::Unproven::InUse {
                kind: "ext4",
                what: "its journal holds more blocks than this version keeps in mind".into(),
            })),
            false => Ok(()),
        }
    }

    /// The newest content of `block`, unless the transaction that wrote it or a later one took it back.
    fn get(&self, block: u64) -> Option<Logged> {
        let logged = self.logged.get(&block).copied()?;
        match self.revoked.get(&block) {
            Some(revoked) if !is_after(logged.sequence, *revoked) => None,
            _ => Some(logged),
        }
    }
}

/// A journal as it was read: the commit it reached, and the contents kept.
pub(super) struct Reading {
    pub(super) uuid: [u8; 16],
    /// Number of the newest committed transaction.
    pub(super) newest: u32,
    contents: Contents,
}

/// Blocks by their number on the volume.
#[derive(Default)]
struct Contents {
    blocks: BTreeMap<u64, Vec<u8>>,
    bytes: usize,
}

impl Reading {
    /// Reads the journal of `ext` on `volume`.
    pub(super) fn take(ext: &Ext<'_>, volume: &dyn ReadAt) -> Result<Self, Fault> {
        let inode = Inode::read(ext, &mut Descriptors::new(ext), ext.superblock.journal_inode)?;
        if !inode.is_regular {
            return Err(ext
                .superblock
                .kind
                .inconsistent("the journal is not a file")
                .into());
        }
        let places = Places::read(ext, &inode)?;
        let header = read_header(ext, &places)?;
        let log = Log::new(ext, &places, header);
        let newest = log.newest()?;
        let mut index = Index::default();
        log.words(newest, &mut |word| index.enter(&word))?;
        let contents = Contents::of_metadata(&log, &index, volume)?;
        // While the tail stands, no block of the log from there to the newest commit was written again.
        if read_header(ext, &places)? != header {
            return Err(Fault::Moved("its journal moved on under the read"));
        }
        Ok(Self {
            uuid: header.uuid,
            newest,
            contents,
        })
    }

    /// `volume` with the contents laid over.
    pub(super) fn over<'a>(&'a self, ext: &Ext<'_>, volume: &'a dyn ReadAt) -> Overlay<'a> {
        Overlay {
            volume,
            block_size: ext.superblock.block_size.into(),
            contents: &self.contents,
        }
    }
}

fn read_header(ext: &Ext<'_>, places: &Places) -> Result<Header, Fault> {
    let superblock = &ext.superblock;
    let (place, _) = places
        .find(0)
        .ok_or_else(|| superblock.kind.inconsistent("journal: it has no blocks"))?;
    let mut block = vec![0; superblock.block_size as usize];
    ext.read_block(place, &mut block)?;
    // Blocks have at least 1 KiB.
    let raw = block
        .first_chunk::<HEADER_LEN>()
        .ok_or_else(|| superblock.kind.inconsistent("journal: blocks too short"))?;
    let blocks = places.blocks();
    Ok(Header::parse(
        superblock.kind,
        raw,
        superblock.block_size,
        blocks,
    )?)
}

impl Contents {
    /// The superblock, then the group descriptors as that one places them, then the bitmaps as those place them.
    fn of_metadata(log: &Log<'_>, index: &Index, volume: &dyn ReadAt) -> Result<Self, Fault> {
        let mut contents = Self::default();
        let block_size = u64::from(log.ext.superblock.block_size);
        contents.load(log, index, SUPERBLOCK_OFFSET / block_size)?;
        let locations: Vec<u64> = contents.with(log, volume, |ext| {
            Ok((0..ext.superblock.descriptor_blocks)
                .map(|block| location(ext, block))
                .collect())
        })?;
        for block in locations {
            contents.load(log, index, block)?;
        }
        let bitmaps = contents.with(log, volume, |ext| {
            let mut descriptors = Descriptors::new(ext);
            let mut logged = Vec::new();
            for group in 0..ext.superblock.groups {
                let block = descriptors.read(group)?.block_bitmap;
                logged.extend(index.get(block).map(|_| block));
            }
            Ok(logged)
        })?;
        for block in bitmaps {
            contents.load(log, index, block)?;
        }
        Ok(contents)
    }

    /// Looks at the volume with the contents so far laid over.
    fn with<T>(
        &self,
        log: &Log<'_>,
        volume: &dyn ReadAt,
        look: impl FnOnce(&Ext<'_>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let overlay = Overlay {
            volume,
            block_size: log.ext.superblock.block_size.into(),
            contents: self,
        };
        match Ext::open(&overlay)? {
            Some(ext) if ext.superblock.block_size == log.ext.superblock.block_size => look(&ext),
            _ => Err(Fault::Moved("its superblock changed under the read")),
        }
    }

    fn load(&mut self, log: &Log<'_>, index: &Index, block: u64) -> Result<(), Fault> {
        let Some(logged) = index.get(block) else {
            return Ok(());
        };
        let mut content = log.read(logged.at)?;
        if !tags::is_content(&log.header, logged.sequence, logged.checksum, &content) {
            return Err(Fault::Moved("a logged block fails its checksum"));
        }
        if logged.is_escaped {
            content[..4].copy_from_slice(&super::header::MAGIC.to_be_bytes());
        }
        self.bytes += content.len();
        if self.bytes > CONTENT_MAX {
            let what = "its journal holds more bitmaps than this version keeps in memory";
            return Err(log.ext.superblock.kind.in_use(what).into());
        }
        self.blocks.insert(block, content);
        Ok(())
    }
}

/// The volume as it was at the newest commit, as far as allocation metadata goes.
pub(super) struct Overlay<'a> {
    volume: &'a dyn ReadAt,
    block_size: u64,
    contents: &'a Contents,
}

impl ReadAt for Overlay<'_> {
    fn size(&self) -> u64 {
        self.volume.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.volume.read_exact_at(buf, offset)?;
        let end = offset.saturating_add(buf.len() as u64);
        let (first, last) = (offset / self.block_size, end.div_ceil(self.block_size));
        for (block, content) in self.contents.blocks.range(first..last) {
            let at = block * self.block_size;
            let (from, to) = (at.max(offset), (at + self.block_size).min(end));
            if from < to {
                // All differences are at most the buffer's or the block's length.
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&content[(from - at) as usize..(to - at) as usize]);
            }
        }
        Ok(())
    }
}
