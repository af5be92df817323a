//! The boot sector, and its backup in the volume's last sector.
//!
//! Owns the geometry: sector, cluster, MFT record and the places of `$MFT` and its mirror. Promises that a parsed boot sector
//! spans fewer than 2^32 clusters of 512 bytes to 2 MiB, and that all products of its numbers fit in 64 bits.

use super::fields::Fields;
use super::{inconsistent, unknown};
use crate::disk::fs::Unproven;
use crate::disk::fs::volume_reader::Reader;

/// Bytes of a boot sector that carry meaning, on any sector size.
pub(super) const LEN: usize = 512;

/// The parameter block: what must be the same in the backup. Boot code and its messages may differ.
const PARAMETERS: std::ops::Range<usize> = 0x0b..0x54;

#[derive(Clone, Debug)]
pub(super) struct Boot {
    /// Bytes.
    sector: u64,
    /// Bytes of a cluster.
    pub(super) cluster: u32,
    /// Whole clusters of the volume; what `$Bitmap` has bits for.
    pub(super) clusters: u64,
    /// Sectors, without the backup boot sector.
    sectors: u64,
    /// First cluster of `$MFT`.
    pub(super) mft: u64,
    /// First cluster of `$MFTMirr`.
    pub(super) mirror: u64,
    /// Bytes of an MFT record.
    pub(super) record: usize,
    parameters: Vec<u8>,
}

impl Boot {
    pub(super) fn recognises(sector: &[u8; LEN]) -> bool {
        &sector[3..11] == b"NTFS    "
    }

    pub(super) fn parse(raw: &[u8; LEN]) -> Result<Self, Unproven> {
        let fields = Fields(raw);
        // Fields of a FAT boot sector, which NTFS leaves zero: reserved sectors, FATs, root entries, sectors, sectors per FAT.
        let unused = [&raw[0x0e..0x15], &raw[0x16..0x18], &raw[0x20..0x24]].concat();
        if fields.u16(0x1fe)? != 0xaa55 || unused.iter().any(|byte| *byte != 0) {
            return Err(inconsistent("the boot sector is not one of NTFS"));
        }
        let sector = u64::from(fields.u16(0x0b)?);
        if !sector.is_power_of_two() || !(256..=4096).contains(&sector) {
            return Err(inconsistent(format!("{sector} bytes per sector")));
        }
        let per_cluster = sectors_per_cluster(fields.u8(0x0d)?)?;
        let cluster = sector * per_cluster;
        if !(512..=2 << 20).contains(&cluster) {
            return Err(unknown(format!("clusters of {cluster} bytes")));
        }
        let sectors = fields.u64(0x28)?;
        let clusters = sectors / per_cluster;
        if clusters == 0 || clusters >= 1 << 32 {
            return Err(inconsistent(format!("{clusters} clusters")));
        }
        let (mft, mirror) = (fields.u64(0x30)?, fields.u64(0x38)?);
        if mft >= clusters || mirror >= clusters || mft == mirror {
            return Err(inconsistent("the MFT lies outside the volume"));
        }
        Ok(Self {
            sector,
            cluster: cluster as u32,
            clusters,
            sectors,
            mft,
            mirror,
            record: record_size(fields.u8(0x40)?, cluster)?,
            parameters: raw[PARAMETERS].to_vec(),
        })
    }

    /// Bytes that the file system spans, with the backup boot sector.
    pub(super) fn volume_size(&self) -> u64 {
        (self.sectors + 1) * self.sector
    }

    /// Compares with the backup boot sector: the only second witness of the geometry. It lies behind the last sector of the file
    /// system, or, once that was resized to whole clusters, in the last sector of the volume.
    pub(super) fn confirm(&self, reader: &Reader<'_>) -> Result<(), Unproven> {
        let last = (reader.size() / self.sector).saturating_sub(1);
        for place in [self.sectors, last] {
            let mut backup = [0; LEN];
            let len = backup.len().min(self.sector as usize);
            reader.read(&mut backup[..len], place * self.sector)?;
            if Self::recognises(&backup) && backup[PARAMETERS] == self.parameters[..] {
                return Ok(());
            }
        }
        Err(inconsistent(
            "the boot sector differs from its backup at the volume's end",
        ))
    }
}

/// A count up to 128, or from 0xf0 on the negative binary logarithm of one (Windows 10's clusters above 64 KiB).
fn sectors_per_cluster(code: u8) -> Result<u64, Unproven> {
    match code {
        1..=128 if code.is_power_of_two() => Ok(code.into()),
        0xf0..=0xff => Ok(1 << code.wrapping_neg()),
        _ => Err(inconsistent(format!("{code:#x} as sectors per cluster"))),
    }
}

/// Clusters per record where positive, else the negative binary logarithm of its bytes.
fn record_size(code: u8, cluster: u64) -> Result<usize, Unproven> {
    let size = match code {
        1..=127 => u64::from(code) * cluster,
        0xe0..=0xff => 1 << code.wrapping_neg(),
        _ => 0,
    };
    if !(512..=16 << 10).contains(&size) || !size.is_power_of_two() {
        return Err(inconsistent(format!("{code:#x} as the size of an MFT record")));
    }
    Ok(size as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_encodings() {
        assert_eq!(sectors_per_cluster(8).unwrap(), 8);
        assert_eq!(sectors_per_cluster(0xf4).unwrap(), 4096);
        assert!(
            sectors_per_cluster(0).is_err()
                && sectors_per_cluster(3).is_err()
                && sectors_per_cluster(0xa0).is_err()
        );
        assert_eq!(record_size(0xf6, 4096).unwrap(), 1024);
        assert_eq!(record_size(2, 512).unwrap(), 1024);
        assert!(
            record_size(1, 2 << 20).is_err()
                && record_size(0xe0, 512).is_err()
                && record_size(0, 512).is_err()
        );
    }
}
