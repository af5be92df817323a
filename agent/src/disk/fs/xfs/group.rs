//! One allocation group (AG): its AGF, AGI and AGFL.
//!
//! Owns their layout and their agreement with the AG's number and length. Gives the roots of the two free-space trees, what
//! the AGF counts, and every block known to be used without walking a tree. Leaves alone the trees.

use super::geometry::Geometry;
use super::reader::{Reader, Seal, be32};
use super::superblock::{Features, Superblock};
use super::{Unproven, inconsistent};

const AGF_MAGIC: u32 = u32::from_be_bytes(*b"XAGF");
const AGI_MAGIC: u32 = u32::from_be_bytes(*b"XAGI");
const AGFL_MAGIC: u32 = u32::from_be_bytes(*b"XAFL");
const AGF_SEAL: Seal = Seal {
    crc: 216,
    uuid: 64,
    lsn: 208,
};
const AGI_SEAL: Seal = Seal {
    crc: 312,
    uuid: 296,
    lsn: 320,
};
const AGFL_SEAL: Seal = Seal {
    crc: 32,
    uuid: 8,
    lsn: 24,
};
/// The AGFL of version 5 has a header before its slots.
const AGFL_HEADER: usize = 36;
/// No tree of XFS is higher.
const LEVELS_MAX: u32 = 9;

/// Blocks `[start, end)` of one AG.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Blocks {
    pub(super) start: u32,
    pub(super) end: u32,
}

impl Blocks {
    pub(super) fn one(block: u32) -> Self {
        Self {
            start: block,
            end: block.saturating_add(1),
        }
    }
}

/// The root of a tree, inside the AG and behind its headers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Root {
    pub(super) block: u32,
    /// At least 1: a root that is a leaf.
    pub(super) levels: u32,
}

pub(super) struct Group {
    pub(super) number: u32,
    /// Blocks.
    pub(super) len: u32,
    pub(super) by_block: Root,
    pub(super) by_length: Root,
    /// Free blocks, without those of the free list.
    pub(super) free_blocks: u32,
    pub(super) holds_log: bool,
    /// Blocks of the longest free extent.
    pub(super) longest: u32,
    /// Headers, free list, log and the roots of the other trees, in no order.
    pub(super) used: Vec<Blocks>,
}

impl Group {
    /// Reads the headers of AG `number` in one go and checks them.
    pub(super) fn read(reader: &Reader<'_>, superblock: &Superblock, number: u32) -> Result<Self, Unproven> {
        let geometry = reader.geometry;
        let sector = geometry.sector_size as usize;
        let mut headers = vec![0; 4 * sector];
        reader.read(&mut headers, geometry.offset(number, 0))?;
        let mut sectors = headers.chunks_exact(sector).skip(1);
        let mut next = || sectors.next().unwrap_or_default();
        let (agf, agi, agfl) = (next(), next(), next());
        let headers = Headers {
            reader,
            number,
            agf,
            agi,
            agfl,
        };
        headers.check()?;
        headers.group(superblock)
    }

    /// Whether `block` may hold something else than the headers.
    pub(super) fn holds(&self, geometry: &Geometry, block: u32) -> bool {
        (geometry.header_blocks()..self.len).contains(&block)
    }
}

struct Headers<'a> {
    reader: &'a Reader<'a>,
    number: u32,
    agf: &'a [u8],
    agi: &'a [u8],
    agfl: &'a [u8],
}

impl Headers<'_> {
    fn check(&self) -> Result<(), Unproven> {
        let len = self.reader.geometry.ag_len(self.number);
        for (name, bytes, magic, seal) in [
            ("AGF", self.agf, AGF_MAGIC, &AGF_SEAL),
            ("AGI", self.agi, AGI_MAGIC, &AGI_SEAL),
        ] {
            self.require(be32(bytes, 0) == magic && be32(bytes, 4) == 1, name, "signature")?;
            self.reader.check(&self.name(name), bytes, seal)?;
            self.require(be32(bytes, 8) == self.number, name, "number")?;
            self.require(be32(bytes, 12) == len, name, "length")?;
        }
        if self.reader.metadata_uuid.is_some() {
            self.require(be32(self.agfl, 0) == AGFL_MAGIC, "AGFL", "signature")?;
            self.reader.check(&self.name("AGFL"), self.agfl, &AGFL_SEAL)?;
            self.require(be32(self.agfl, 4) == self.number, "AGFL", "number")?;
        }
        Ok(())
    }

    fn group(&self, superblock: &Superblock) -> Result<Group, Unproven> {
        let geometry = self.reader.geometry;
        let mut used = vec![Blocks {
            start: 0,
            end: geometry.header_blocks(),
        }];
        used.extend(self.free_list()?.into_iter().map(Blocks::one));
        used.extend(
            self.other_roots(superblock.features)?
                .into_iter()
                .map(Blocks::one),
        );
        let log = superblock.log;
        let holds_log = log.ag == self.number;
        if holds_log {
            used.push(Blocks {
                start: log.start,
                end: log.start.saturating_add(log.blocks),
            });
        }
        Ok(Group {
            number: self.number,
            len: geometry.ag_len(self.number),
            by_block: self.root("AGF", self.agf, 16, 28)?,
            by_length: self.root("AGF", self.agf, 20, 32)?,
            free_blocks: be32(self.agf, 52),
            holds_log,
            longest: be32(self.agf, 56),
            used,
        })
    }

    /// Roots of the inode trees and of the trees of owners and references.
    fn other_roots(&self, features: Features) -> Result<Vec<u32>, Unproven> {
        let roots = [
            (true, "AGI", self.agi, 20, 24),
            (features.free_inodes, "AGI", self.agi, 328, 332),
            (features.owners, "AGF", self.agf, 24, 36),
            (features.references, "AGF", self.agf, 88, 92),
        ];
        let present = roots.into_iter().filter(|(present, ..)| *present);
        present
            .map(|(_, name, bytes, block, levels)| Ok(self.root(name, bytes, block, levels)?.block))
            .collect()
    }

    fn root(&self, name: &str, bytes: &[u8], block: usize, levels: usize) -> Result<Root, Unproven> {
        let root = Root {
            block: be32(bytes, block),
            levels: be32(bytes, levels),
        };
        let good = self.inside(root.block) && (1..=LEVELS_MAX).contains(&root.levels);
        self.require(good, name, "tree root")?;
        Ok(root)
    }

    /// Blocks that the AG keeps for the growth of its own trees: a ring of slots, of which the AGF says which are filled.
    fn free_list(&self) -> Result<Vec<u32>, Unproven> {
        let header = match self.reader.metadata_uuid {
            Some(_) => AGFL_HEADER,
            None => 0,
        };
        let slots = ((self.agfl.len() - header) / 4) as u32;
        let (first, last, count) = (be32(self.agf, 40), be32(self.agf, 44), be32(self.agf, 48));
        if count == 0 {
            return Ok(Vec::new());
        }
        self.require(first < slots && last < slots, "AGF", "free list")?;
        let filled = (last + slots - first) % slots + 1;
        self.require(filled == count, "AGF", "free list")?;
        let blocks = (0..count).map(|index| (first + index) % slots);
        let blocks: Vec<u32> = blocks
            .map(|slot| be32(self.agfl, header + 4 * slot as usize))
            .collect();
        self.require(blocks.iter().all(|block| self.inside(*block)), "AGFL", "block")?;
        Ok(blocks)
    }

    fn inside(&self, block: u32) -> bool {
        let geometry = self.reader.geometry;
        (geometry.header_blocks()..geometry.ag_len(self.number)).contains(&block)
    }

    fn require(&self, holds: bool, name: &str, what: &str) -> Result<(), Unproven> {
        if holds {
            return Ok(());
        }
        Err(inconsistent(format!("{} has a wrong {what}", self.name(name))))
    }

    fn name(&self, name: &str) -> String {
        format!("{name} of allocation group {}", self.number)
    }
}
