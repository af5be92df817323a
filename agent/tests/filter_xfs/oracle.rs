//! What `xfs_db` says: the free extents of an image, and where each piece of its metadata lies.

use super::image::Image;
use super::volume::{FreeSet, merged};

/// A kind of metadata, and the place of one piece of it in bytes.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) kind: &'static str,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Where version 5 keeps the checksum within it; `None` for the log.
    pub(crate) crc: Option<u64>,
}

/// Every free extent, from a dump of each by-block tree.
pub(crate) fn free(image: &Image) -> FreeSet {
    let (block, ag_blocks) = (image.superblock("blocksize"), image.superblock("agblocks"));
    let mut free = Vec::new();
    for ag in 0..image.superblock("agcount") {
        let dump = image.db(&[&format!("agf {ag}"), "addr bnoroot", "btdump"]);
        let base = ag * ag_blocks;
        free.extend(
            records(&dump).map(|(start, len)| ((base + start) * block, (base + start + len) * block)),
        );
    }
    merged(free)
}

/// The records of a dumped tree: keys of inner blocks look alike and are left out.
fn records(dump: &str) -> impl Iterator<Item = (u64, u64)> {
    let mut in_records = false;
    let tokens = dump.lines().flat_map(move |line| {
        if line.contains('=') {
            in_records = line.starts_with("recs[");
        }
        let taken = if in_records { line } else { "" };
        taken.split_whitespace()
    });
    tokens.filter_map(|token| {
        let pair = token.split_once(":[")?.1.strip_suffix(']')?;
        let (start, len) = pair.split_once(',')?;
        Some((start.parse().ok()?, len.parse().ok()?))
    })
}

/// Superblock, AG headers, tree blocks and log.
pub(crate) fn metadata(image: &Image) -> Vec<Piece> {
    let (block, sector) = (image.superblock("blocksize"), image.superblock("sectsize"));
    let ag_bytes = image.superblock("agblocks") * block;
    let mut pieces = vec![Piece {
        kind: "superblock",
        offset: 0,
        len: sector,
        crc: Some(224),
    }];
    for ag in 0..image.superblock("agcount") {
        for (index, kind, crc) in [(1, "AGF", 216), (2, "AGI", 312), (3, "AGFL", 32)] {
            pieces.push(Piece {
                kind,
                offset: ag * ag_bytes + index * sector,
                len: sector,
                crc: Some(crc),
            });
        }
        for (kind, root) in [("by-block tree", "bnoroot"), ("by-length tree", "cntroot")] {
            let dump = image.db(&[&format!("agf {ag}"), &format!("addr {root}"), "btdump -i"]);
            let leaves = image.db(&[&format!("agf {ag}"), &format!("addr {root}"), "btdump"]);
            for offset in block_offsets(&dump).chain(block_offsets(&leaves)) {
                pieces.push(Piece {
                    kind,
                    offset,
                    len: block,
                    crc: Some(52),
                });
            }
        }
    }
    pieces.push(log(image));
    pieces.sort_by_key(|piece| piece.offset);
    pieces.dedup_by_key(|piece| piece.offset);
    pieces
}

/// Lines like "bnobt level 0 block 1 daddr 153608"; the address counts 512 bytes.
fn block_offsets(dump: &str) -> impl Iterator<Item = u64> {
    let lines = dump.lines().filter_map(|line| line.split_once(" daddr "));
    lines.filter_map(|(_, address)| Some(address.trim().parse::<u64>().ok()? * 512))
}

/// The internal log.
pub(crate) fn log(image: &Image) -> Piece {
    let (start, bits) = (image.superblock("logstart"), image.superblock("agblklog"));
    let block = image.superblock("blocksize");
    let block_number = (start >> bits) * image.superblock("agblocks") + (start & ((1 << bits) - 1));
    Piece {
        kind: "log",
        offset: block_number * block,
        len: image.superblock("logblocks") * block,
        crc: None,
    }
}
