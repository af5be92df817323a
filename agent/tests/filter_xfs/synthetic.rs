//! XFS volumes made by the tests themselves, in memory: any free extents, trees of any height, a log whose head is anywhere.
//!
//! Only what the filter reads is there. The real tools hold the filter against real images in `clean` and `mounted`; these here
//! reach sizes and lies that the tools do not make.

use std::collections::HashMap;
use std::io;

use longhaul_agent::disk::ReadAt;

const PAGE: u64 = 4096;
const UUID: [u8; 16] = *b"longhaul-testing";

/// Mostly zeros.
#[derive(Default)]
pub(crate) struct Sparse {
    size: u64,
    pages: HashMap<u64, Box<[u8; PAGE as usize]>>,
}

impl Sparse {
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let here = (bytes.len() - done).min(PAGE as usize - within);
            let page = self
                .pages
                .entry(at / PAGE)
                .or_insert_with(|| Box::new([0; PAGE as usize]));
            page[within..within + here].copy_from_slice(&bytes[done..done + here]);
            done += here;
        }
    }
}

impl ReadAt for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + buf.len() as u64 > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let here = (buf.len() - done).min(PAGE as usize - within);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => buf[done..done + here].copy_from_slice(&page[within..within + here]),
                None => buf[done..done + here].fill(0),
            }
            done += here;
        }
        Ok(())
    }
}

/// A volume to be made. The log fills the end of the last group.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) version_5: bool,
    pub(crate) block: u32,
    pub(crate) ag_blocks: u32,
    pub(crate) ag_count: u32,
    pub(crate) log_blocks: u32,
    pub(crate) log: LogPlan,
    /// Fewer records per tree block than fit, where it is less than what fits.
    pub(crate) fill: usize,
}

/// How the log ends.
#[derive(Clone, Debug)]
pub(crate) struct LogPlan {
    /// Block of 512 bytes at which the next record would begin.
    pub(crate) head: u32,
    /// Of the log's first block.
    pub(crate) cycle: u32,
    pub(crate) version: u32,
    /// Bytes of the writer's buffers.
    pub(crate) buffer: u32,
    /// Bytes of the unmount record's data.
    pub(crate) len: u32,
    pub(crate) crc: bool,
    /// 0x20 for an unmount record.
    pub(crate) flags: u8,
}

impl Default for LogPlan {
    fn default() -> Self {
        Self {
            head: 2,
            cycle: 1,
            version: 2,
            buffer: 32 << 10,
            len: 512,
            crc: true,
            flags: 0x20,
        }
    }
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            version_5: true,
            block: 4096,
            ag_blocks: 8192,
            ag_count: 2,
            log_blocks: 1024,
            log: LogPlan::default(),
            fill: usize::MAX,
        }
    }
}

/// Blocks of one group: (start, length).
pub(crate) type Records = Vec<(u32, u32)>;

impl Plan {
    pub(crate) fn log_offset(&self) -> u64 {
        self.offset(self.ag_count - 1, self.ag_blocks - self.log_blocks)
    }

    pub(crate) fn offset(&self, ag: u32, block: u32) -> u64 {
        (u64::from(ag) * u64::from(self.ag_blocks) + u64::from(block)) * u64::from(self.block)
    }

    pub(crate) fn sectors_in_log(&self) -> u32 {
        self.log_blocks * (self.block / 512)
    }

    fn header_blocks(&self) -> u32 {
        2048u32.div_ceil(self.block)
    }

    /// First block behind headers, the roots of other trees, and the free-space trees of `records` records.
    pub(crate) fn first_free(&self, records: usize) -> u32 {
        self.header_blocks() + 8 + 2 * self.tree_blocks(records)
    }

    fn tree_blocks(&self, records: usize) -> u32 {
        let (mut total, mut blocks) = (0, records.div_ceil(self.capacity(0)).max(1));
        loop {
            total += blocks;
            if blocks == 1 {
                return total as u32;
            }
            blocks = blocks.div_ceil(self.capacity(1));
        }
    }

    fn capacity(&self, level: u32) -> usize {
        let entry = if level == 0 { 8 } else { 12 };
        ((self.block as usize - self.header()) / entry).min(self.fill)
    }

    fn header(&self) -> usize {
        if self.version_5 { 56 } else { 16 }
    }

    /// Both trees name `free(ag)`, whatever it is.
    pub(crate) fn make(&self, free: impl Fn(u32) -> Records) -> Sparse {
        let mut volume = Sparse {
            size: self.offset(self.ag_count, 0),
            pages: HashMap::new(),
        };
        self.write_superblock(&mut volume);
        for ag in 0..self.ag_count {
            self.write_group(&mut volume, ag, &free(ag));
        }
        self.write_log(&mut volume);
        volume
    }

    fn write_superblock(&self, volume: &mut Sparse) {
        let mut sector = [0; 512];
        let bits = (self.ag_blocks - 1).ilog2() + 1;
        let log_start = (u64::from(self.ag_count - 1) << bits) + u64::from(self.ag_blocks - self.log_blocks);
        put(&mut sector, 0, b"XFSB");
        put(&mut sector, 4, &self.block.to_be_bytes());
        put(
            &mut sector,
            8,
            &(u64::from(self.ag_count) * u64::from(self.ag_blocks)).to_be_bytes(),
        );
        put(&mut sector, 32, &UUID);
        put(&mut sector, 48, &log_start.to_be_bytes());
        put(&mut sector, 84, &self.ag_blocks.to_be_bytes());
        put(&mut sector, 88, &self.ag_count.to_be_bytes());
        put(&mut sector, 96, &self.log_blocks.to_be_bytes());
        put(
            &mut sector,
            100,
            &(if self.version_5 { 0xb4a5u16 } else { 0xb4a4 }).to_be_bytes(),
        );
        put(&mut sector, 102, &512u16.to_be_bytes());
        put(&mut sector, 120, &[self.block.ilog2() as u8, 9]);
        put(&mut sector, 124, &[bits as u8]);
        self.seal(&mut sector, 224);
        volume.write(0, &sector);
    }

    fn write_group(&self, volume: &mut Sparse, ag: u32, free: &Records) {
        let mut by_length = free.clone();
        by_length.sort_unstable_by_key(|(start, len)| (*len, *start));
        let base = self.header_blocks() + 8;
        let (bno, bno_levels) = self.write_tree(volume, ag, base, [b"ABTB", b"AB3B"], free);
        let second = base + self.tree_blocks(free.len());
        let (cnt, cnt_levels) = self.write_tree(volume, ag, second, [b"ABTC", b"AB3C"], &by_length);
        let blocks: u32 = free.iter().map(|(_, len)| len).sum();
        let longest = by_length.last().map_or(0, |(_, len)| *len);
        let mut agf = [0; 512];
        for (at, value) in [
            (4, 1),
            (8, ag),
            (12, self.ag_blocks),
            (16, bno),
            (20, cnt),
            (28, bno_levels),
            (32, cnt_levels),
            (44, u32::MAX),
            (52, blocks),
            (56, longest),
        ] {
            put(&mut agf, at, &u32::to_be_bytes(value));
        }
        put(&mut agf, 0, b"XAGF");
        put(&mut agf, 64, &UUID);
        self.seal(&mut agf, 216);
        let mut agi = [0; 512];
        for (at, value) in [
            (4, 1),
            (8, ag),
            (12, self.ag_blocks),
            (20, self.header_blocks()),
            (24, 1),
        ] {
            put(&mut agi, at, &u32::to_be_bytes(value));
        }
        put(&mut agi, 0, b"XAGI");
        put(&mut agi, 296, &UUID);
        self.seal(&mut agi, 312);
        let mut agfl = [0; 512];
        put(&mut agfl, 0, b"XAFL");
        put(&mut agfl, 4, &ag.to_be_bytes());
        put(&mut agfl, 8, &UUID);
        self.seal(&mut agfl, 32);
        for (index, sector) in [agf, agi, agfl].iter().enumerate() {
            volume.write(self.offset(ag, 0) + 512 * (index as u64 + 1), sector);
        }
    }

    /// Writes a tree into the blocks from `at` on; gives its root and its levels.
    fn write_tree(
        &self,
        volume: &mut Sparse,
        ag: u32,
        mut at: u32,
        magics: [&[u8; 4]; 2],
        records: &Records,
    ) -> (u32, u32) {
        let magic = magics[usize::from(self.version_5)];
        let mut entries: Vec<((u32, u32), u32)> = records.iter().map(|record| (*record, 0)).collect();
        for level in 0.. {
            let blocks = entries.len().div_ceil(self.capacity(level)).max(1);
            let mut parents = Vec::with_capacity(blocks);
            for index in 0..blocks {
                let here = &entries[index * entries.len() / blocks..(index + 1) * entries.len() / blocks];
                let left = if index == 0 { u32::MAX } else { at - 1 };
                let right = if index + 1 == blocks { u32::MAX } else { at + 1 };
                let bytes = self.tree_block(magic, (ag, at), level, (left, right), here);
                volume.write(self.offset(ag, at), &bytes);
                parents.push((here.first().map_or((0, 0), |entry| entry.0), at));
                at += 1;
            }
            if blocks == 1 {
                return (at - 1, level + 1);
            }
            entries = parents;
        }
        unreachable!("a level has fewer blocks than the one below");
    }

    fn tree_block(
        &self,
        magic: &[u8; 4],
        (ag, block): (u32, u32),
        level: u32,
        (left, right): (u32, u32),
        entries: &[((u32, u32), u32)],
    ) -> Vec<u8> {
        let mut bytes = vec![0; self.block as usize];
        put(&mut bytes, 0, magic);
        put(&mut bytes, 4, &(level as u16).to_be_bytes());
        put(&mut bytes, 6, &(entries.len() as u16).to_be_bytes());
        put(&mut bytes, 8, &left.to_be_bytes());
        put(&mut bytes, 12, &right.to_be_bytes());
        let header = self.header();
        let fits = (self.block as usize - header) / 12;
        for (index, ((start, len), child)) in entries.iter().enumerate() {
            put(&mut bytes, header + 8 * index, &start.to_be_bytes());
            put(&mut bytes, header + 8 * index + 4, &len.to_be_bytes());
            if level > 0 {
                put(&mut bytes, header + 8 * fits + 4 * index, &child.to_be_bytes());
            }
        }
        if self.version_5 {
            put(&mut bytes, 16, &(self.offset(ag, block) / 512).to_be_bytes());
            put(&mut bytes, 32, &UUID);
            put(&mut bytes, 48, &ag.to_be_bytes());
            self.seal(&mut bytes, 52);
        }
        bytes
    }

    fn seal(&self, bytes: &mut [u8], at: usize) {
        if self.version_5 {
            let crc = crc32c::crc32c(bytes);
            put(bytes, at, &crc.to_le_bytes());
        }
    }

    /// Stamps both laps and lays the unmount record before the head.
    fn write_log(&self, volume: &mut Sparse) {
        let (log, blocks) = (&self.log, self.sectors_in_log());
        for block in 0..blocks {
            let cycle = self.cycle_at(block);
            if cycle != 0 {
                volume.write(self.log_offset() + 512 * u64::from(block), &cycle.to_be_bytes());
            }
        }
        let headers = if log.version == 2 {
            log.buffer.div_ceil(32 << 10).max(1)
        } else {
            1
        };
        let total = headers + log.len.div_ceil(512);
        let first = (log.head + blocks - total) % blocks;
        let mut record = vec![0; total as usize * 512];
        for index in 0..total {
            let cycle = self.cycle_at((first + index) % blocks);
            put(&mut record, index as usize * 512, &cycle.to_be_bytes());
        }
        let cycle = self.cycle_at(first);
        let lsn = u64::from(cycle) << 32 | u64::from(first);
        for (at, value) in [
            (0, 0xfeed_babe),
            (4, cycle),
            (8, log.version),
            (12, log.len),
            (36, u32::MAX),
            (40, 1),
            (300, 1),
            (320, log.buffer),
        ] {
            put(&mut record, at, &u32::to_be_bytes(value));
        }
        put(&mut record, 16, &lsn.to_be_bytes());
        put(&mut record, 24, &lsn.to_be_bytes());
        put(&mut record, 304, &UUID);
        put(
            &mut record,
            headers as usize * 512 + 4,
            &[0, 0, 0, 8, 0xaa, log.flags, 0, 0],
        );
        if log.crc {
            let mut covered = record[..328].to_vec();
            for index in 1..headers.min(log.len.div_ceil(32 << 10)) as usize {
                covered.extend(&record[index * 512..index * 512 + 260]);
            }
            covered.extend(&record[headers as usize * 512..headers as usize * 512 + log.len as usize]);
            put(&mut record, 32, &crc32c::crc32c(&covered).to_le_bytes());
        }
        for (index, sector) in record.chunks(512).enumerate() {
            let block = (first + index as u32) % blocks;
            volume.write(self.log_offset() + 512 * u64::from(block), sector);
        }
    }

    pub(crate) fn cycle_at(&self, block: u32) -> u32 {
        match self.log.head {
            0 => self.log.cycle,
            head if block < head => self.log.cycle,
            _ => self.log.cycle - 1,
        }
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The free set that `records` of every group make, in bytes.
pub(crate) fn expected(plan: &Plan, free: impl Fn(u32) -> Records) -> super::volume::FreeSet {
    let groups = (0..plan.ag_count).flat_map(|ag| free(ag).into_iter().map(move |record| (ag, record)));
    let extents = groups.map(|(ag, (start, len))| (plan.offset(ag, start), plan.offset(ag, start + len)));
    super::volume::merged(extents.collect())
}
