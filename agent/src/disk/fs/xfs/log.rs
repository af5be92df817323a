//! Is the log clean: would a mount find nothing to replay?
//!
//! Owns finding the end of the log (its head) as Linux does, and the last record before it. Leaves alone what other records
//! hold. The log is a ring of 512-byte blocks; each carries the number of the lap (cycle) in which it was written, so one lap
//! ends and the one before begins at the head:
//!
//! ```text
//!   | cycle C ... | unmount record | cycle C-1 ...                  |
//!   0                              ^ head                          end
//! ```
//!
//! `xfs_repair` and `xfs_admin` leave blocks of zeros between the record and the lap before, up to block 512, when they format
//! a log that was in use.
//!
//! Promises to be stricter than Linux: around the head, as far as writes may have been under way at once, every block must
//! carry exactly the expected cycle, and the unmount record must be whole. Everything else is [`Unproven::NotClean`].

use super::reader::{Lsn, Reader, be32, be64, byte, uuid};
use super::superblock::Superblock;
use super::{Unproven, not_clean};

/// Bytes of a block of the log, whatever the sector size is.
const BLOCK: usize = 512;
const RECORD_MAGIC: u32 = 0xfeed_babe;
/// Writes that may be under way at once: eight buffers of at most 256 KiB; in blocks.
const WINDOW: u32 = 8 * 512;
/// The longest record, without its headers; in bytes.
const RECORD_MAX: u32 = 256 << 10;
/// Bytes of a record whose replaced words fit in one header block.
const HEADER_COVERS: u32 = 32 << 10;
const CRC: usize = 32;
/// The header as 64-bit and as 32-bit systems count its bytes for the checksum.
const HEADER_SIZES: [usize; 2] = [328, 324];
const EXTENDED_HEADER_SIZE: usize = 260;
/// The kernel's log client and its flag for "this is an unmount record".
const CLIENT_LOG: u8 = 0xaa;
const UNMOUNT: u8 = 0x20;
/// Where the first record of the lap before begins in a log that the tools have formatted.
const FORMATTED: u32 = 512;
/// Blocks read at once.
const CHUNK: u32 = 128;

/// Refuses the volume unless its log ends in an unmount record; gives the place at which the next record would be written.
pub(super) fn require_clean(reader: &Reader<'_>, superblock: &Superblock) -> Result<Lsn, Unproven> {
    let log = Log::of(reader, superblock);
    let head = log.find_head()?;
    log.check_window(&head)?;
    log.check_unmount_record(&head, &superblock.uuid)?;
    Ok(Lsn::new(head.next_cycle(), head.block))
}

/// The same place in the log of a frozen file system, whatever record it ends in.
pub(super) fn head(reader: &Reader<'_>, superblock: &Superblock) -> Result<Lsn, Unproven> {
    let log = Log::of(reader, superblock);
    let head = log.find_head()?;
    log.check_window(&head)?;
    Ok(Lsn::new(head.next_cycle(), head.block))
}

struct Log<'a> {
    reader: &'a Reader<'a>,
    /// Bytes from the volume's start.
    start: u64,
    /// Blocks of 512 bytes.
    blocks: u32,
}

/// Where the next record would go.
struct Head {
    /// Less than the log's blocks: a head at the end is one at the beginning.
    block: u32,
    /// Cycle of the log's first block, thus of all blocks before the head; where the head is 0, of all blocks.
    first: u32,
    /// Cycle of the log's last block.
    last: u32,
    /// Where blocks of zeros between the two laps end; the head, where there are none.
    zeros_end: u32,
}

impl Head {
    fn expected_cycle(&self, block: u32) -> u32 {
        match block {
            block if block < self.block => self.first,
            block if block < self.zeros_end => 0,
            _ => self.last,
        }
    }

    fn next_cycle(&self) -> u32 {
        if self.block == 0 {
            self.first.saturating_add(1)
        } else {
            self.first
        }
    }
}

impl<'a> Log<'a> {
    fn of(reader: &'a Reader<'a>, superblock: &Superblock) -> Self {
        let place = superblock.log;
        let blocks_per = reader.geometry.block_size / BLOCK as u32;
        Self {
            reader,
            start: reader.geometry.offset(place.ag, place.start),
            // At most 2 GiB: the superblock was refused otherwise.
            blocks: place.blocks.saturating_mul(blocks_per),
        }
    }

    fn find_head(&self) -> Result<Head, Unproven> {
        let first = self.cycle_at(0)?;
        let last = self.cycle_at(self.blocks - 1)?;
        let head = |block, zeros_end| Head {
            block,
            first,
            last,
            zeros_end,
        };
        if first == 0 {
            return Err(not_clean("its log holds no record"));
        }
        if first == last {
            return Ok(head(0, 0));
        }
        if last != first - 1 {
            return Err(not_clean("the cycles of its log do not follow each other"));
        }
        let formatted = last != 0 && self.blocks > FORMATTED && self.cycle_at(FORMATTED - 1)? == 0;
        if formatted {
            return Ok(head(self.find_change(first, 0, FORMATTED - 1)?, FORMATTED));
        }
        let change = self.find_change(first, last, self.blocks - 1)?;
        Ok(head(change, change))
    }

    /// The first block of cycle `next` behind blocks of cycle `first`; block 0 is of `first`, and `behind` of `next`.
    fn find_change(&self, first: u32, next: u32, mut behind: u32) -> Result<u32, Unproven> {
        let mut before = 0;
        while behind - before > 1 {
            let middle = before + (behind - before) / 2;
            match self.cycle_at(middle)? {
                cycle if cycle == first => before = middle,
                cycle if cycle == next => behind = middle,
                _ => return Err(not_clean("its log holds a block of another cycle")),
            }
        }
        Ok(behind)
    }

    fn cycle_at(&self, block: u32) -> Result<u32, Unproven> {
        let mut bytes = [0; BLOCK];
        self.read(block, &mut bytes)?;
        Ok(cycle(&bytes))
    }

    /// Each block that may have been in flight around the head must belong to its lap.
    fn check_window(&self, head: &Head) -> Result<(), Unproven> {
        let count = self.blocks.min(2 * WINDOW);
        let from = self.wrap(u64::from(head.block) + u64::from(self.blocks - count / 2));
        let mut bytes = vec![0; CHUNK as usize * BLOCK];
        let mut done = 0;
        while done < count {
            let block = self.wrap(u64::from(from) + u64::from(done));
            let here = CHUNK.min(count - done).min(self.blocks - block);
            let chunk = &mut bytes[..here as usize * BLOCK];
            self.read(block, chunk)?;
            let cycles = chunk.chunks_exact(BLOCK).map(cycle);
            if !cycles
                .zip(block..)
                .all(|(cycle, block)| cycle == head.expected_cycle(block))
            {
                return Err(not_clean("its log was cut off while it was written"));
            }
            done += here;
        }
        Ok(())
    }

    /// The last record must end at the head, and must be an unmount record.
    fn check_unmount_record(&self, head: &Head, expected_uuid: &[u8; 16]) -> Result<(), Unproven> {
        let (at, header) = self.last_record(head)?;
        let len = be32(&header, 12);
        let headers = header_blocks(&header);
        if len == 0 || len > RECORD_MAX || headers > RECORD_MAX / HEADER_COVERS {
            return Err(not_clean("the last record of its log has a wrong length"));
        }
        let blocks = headers + len.div_ceil(BLOCK as u32);
        if blocks > self.blocks || self.wrap(u64::from(at) + u64::from(blocks)) != head.block {
            return Err(not_clean(
                "the last record of its log does not end where the log ends",
            ));
        }
        let cycle = be32(&header, 4);
        let own_place = cycle == head.expected_cycle(at) && be64(&header, 16) == Lsn::new(cycle, at).0;
        let sane_tail = be64(&header, 24) <= be64(&header, 16);
        let known_version = matches!(be32(&header, 8), 1 | 2);
        if !own_place || !sane_tail || !known_version || uuid(&header, 304) != *expected_uuid {
            return Err(not_clean("the last record of its log belongs elsewhere"));
        }
        let record = self.read_wrapped(at, blocks)?;
        let operation = record.get(headers as usize * BLOCK..).unwrap_or_default();
        let unmount = byte(operation, 8) == CLIENT_LOG && byte(operation, 9) & UNMOUNT != 0;
        if be32(&header, 40) != 1 || !unmount {
            return Err(not_clean("its log does not end in an unmount record"));
        }
        if !record_crc_matches(&record, headers, len) {
            return Err(not_clean("the last record of its log fails its checksum"));
        }
        Ok(())
    }

    /// The last record header before the head. An unmount record is one buffer at most, so it is near.
    fn last_record(&self, head: &Head) -> Result<(u32, Vec<u8>), Unproven> {
        let far = self
            .blocks
            .min(RECORD_MAX / BLOCK as u32 + RECORD_MAX / HEADER_COVERS);
        let mut bytes = vec![0; BLOCK];
        for back in 1..=far {
            let block = self.wrap(u64::from(head.block) + u64::from(self.blocks - back));
            self.read(block, &mut bytes)?;
            if be32(&bytes, 0) == RECORD_MAGIC {
                return Ok((block, bytes));
            }
        }
        Err(not_clean("no record lies before the end of its log"))
    }

    fn read_wrapped(&self, block: u32, count: u32) -> Result<Vec<u8>, Unproven> {
        let mut bytes = vec![0; count as usize * BLOCK];
        let before_end = count.min(self.blocks - block) as usize * BLOCK;
        let (first, rest) = bytes.split_at_mut(before_end);
        self.read(block, first)?;
        self.read(0, rest)?;
        Ok(bytes)
    }

    fn read(&self, block: u32, bytes: &mut [u8]) -> Result<(), Unproven> {
        self.reader
            .read(bytes, self.start + u64::from(block) * BLOCK as u64)
    }

    fn wrap(&self, block: u64) -> u32 {
        (block % u64::from(self.blocks)) as u32
    }
}

/// Every block begins with its cycle; a record header with a signature before it.
fn cycle(block: &[u8]) -> u32 {
    match be32(block, 0) {
        RECORD_MAGIC => be32(block, 4),
        cycle => cycle,
    }
}

/// Blocks of header before the record's data: version 2 needs more where its buffers are larger than 32 KiB.
fn header_blocks(header: &[u8]) -> u32 {
    match (be32(header, 8), be32(header, 320)) {
        (2, size) if size > HEADER_COVERS => size.div_ceil(HEADER_COVERS),
        _ => 1,
    }
}

/// A record that mkfs or an old kernel wrote carries no checksum.
fn record_crc_matches(record: &[u8], headers: u32, len: u32) -> bool {
    let stored = be32(record, CRC).swap_bytes();
    let data = headers as usize * BLOCK;
    let Some(data) = record.get(data..data + len as usize) else {
        return false;
    };
    let extended = (1..headers.min(len.div_ceil(HEADER_COVERS)) as usize).map(|index| index * BLOCK);
    let of = |size: usize| {
        let parts = [(0, CRC), (CRC + 4, size)];
        let crc = crc32c::crc32c(&record[parts[0].0..parts[0].1]);
        let crc = crc32c::crc32c_append(crc, &[0; 4]);
        let crc = crc32c::crc32c_append(crc, &record[parts[1].0..parts[1].1]);
        let crc = extended.clone().fold(crc, |crc, at| {
            crc32c::crc32c_append(crc, &record[at..at + EXTENDED_HEADER_SIZE])
        });
        crc32c::crc32c_append(crc, data)
    };
    stored == 0 || HEADER_SIZES.iter().any(|size| of(*size) == stored)
}
