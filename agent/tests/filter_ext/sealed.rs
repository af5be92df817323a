//! Group descriptors and superblocks written by hand, with checksums that are right.
//!
//! Owns an implementation of ext4's checksums of its own, so that the filter's is not held against itself.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// CRC-32C, reflected.
const CRC32C: u32 = 0x82F6_3B78;
/// CRC-16, reflected.
const CRC16: u32 = 0xA001;

fn crc(crc: u32, polynomial: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| match crc & 1 {
            1 => crc >> 1 ^ polynomial,
            _ => crc >> 1,
        })
    })
}

pub(crate) fn le16(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(raw[at..at + 2].try_into().unwrap())
}

pub(crate) fn le32(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(raw[at..at + 4].try_into().unwrap())
}

/// The superblock and group descriptors of a file system whose descriptors lie in one table, in memory until `store`.
pub(crate) struct Tables {
    file: File,
    pub(crate) superblock: Vec<u8>,
    descriptors: Vec<u8>,
    descriptor_size: usize,
    table_at: u64,
    pub(crate) block: u64,
    pub(crate) groups: u32,
    metadata_checksums: bool,
}

impl Tables {
    pub(crate) fn load(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut superblock = vec![0; 1024];
        file.read_exact_at(&mut superblock, 1024).unwrap();
        let block = 1024 << le32(&superblock, 0x18);
        let wide = le32(&superblock, 0x60) & 0x80 != 0;
        let descriptor_size = if wide {
            usize::from(le16(&superblock, 0xFE))
        } else {
            32
        };
        let blocks = u64::from(le32(&superblock, 0x4)) - u64::from(le32(&superblock, 0x14));
        let groups = blocks.div_ceil(le32(&superblock, 0x20).into()) as u32;
        let mut descriptors = vec![0; groups as usize * descriptor_size];
        let table_at = if block == 1024 { 2048 } else { block };
        file.read_exact_at(&mut descriptors, table_at).unwrap();
        let metadata_checksums = le32(&superblock, 0x64) & 0x400 != 0;
        Self {
            file,
            superblock,
            descriptors,
            descriptor_size,
            table_at,
            block,
            groups,
            metadata_checksums,
        }
    }

    pub(crate) fn descriptor(&mut self, group: u32) -> &mut [u8] {
        let at = group as usize * self.descriptor_size;
        &mut self.descriptors[at..at + self.descriptor_size]
    }

    /// Writes `content` to block number `block`.
    pub(crate) fn write_block(&self, block: u32, content: &[u8]) {
        self.file
            .write_all_at(content, u64::from(block) * self.block)
            .unwrap();
    }

    /// What a descriptor states as the checksum of a block bitmap.
    pub(crate) fn bitmap_checksum(&self, bitmap: &[u8]) -> u32 {
        crc(
            crc(u32::MAX, CRC32C, &self.superblock[0x68..0x78]),
            CRC32C,
            bitmap,
        )
    }

    /// Gives the descriptor of `group` its right checksum.
    pub(crate) fn seal(&mut self, group: u32) {
        let (metadata, uuid) = (self.metadata_checksums, self.superblock[0x68..0x78].to_vec());
        let raw = self.descriptor(group);
        raw[0x1E..0x20].fill(0);
        let number = group.to_le_bytes();
        let sum = if metadata {
            crc(crc(crc(u32::MAX, CRC32C, &uuid), CRC32C, &number), CRC32C, raw)
        } else {
            let sum = crc(crc(0xFFFF, CRC16, &uuid), CRC16, &number);
            crc(crc(sum, CRC16, &raw[..0x1E]), CRC16, &raw[0x20..])
        };
        raw[0x1E..0x20].copy_from_slice(&sum.to_le_bytes()[..2]);
    }

    /// Writes superblock and descriptors back.
    pub(crate) fn store(&mut self) {
        if self.metadata_checksums {
            let sum = crc(u32::MAX, CRC32C, &self.superblock[..0x3FC]);
            self.superblock[0x3FC..].copy_from_slice(&sum.to_le_bytes());
        }
        self.file.write_all_at(&self.superblock, 1024).unwrap();
        self.file.write_all_at(&self.descriptors, self.table_at).unwrap();
    }
}
