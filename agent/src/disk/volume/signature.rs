//! Signatures by which the content of a volume is recognised, and by which a volume is found to be claimed twice.
//!
//! Owns the list of well-known places: from a volume's start, from its end, and the searches (ZFS, DRBD, a nested partition
//! table). Leaves alone whether a file system's own metadata holds together ([`crate::disk::fs`]). Promises to read at most
//! 1 MiB. A signature found only ever costs a skip: content without one is not trusted more for it. Places are as documented by
//! each format and as libblkid looks for them.

use std::io;

use longhaul_common::extent::Extent;

use super::{field, mbr, read};
use crate::disk::ReadAt;

/// Something that claims the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signature {
    /// One word for the report, also the start of the name of the file system it belongs to: "ext" of "ext4".
    pub(crate) kind: &'static str,
    /// For people.
    pub(crate) what: &'static str,
    /// Where it lies in the volume.
    pub(crate) at: Extent,
}

type Place = (&'static str, &'static str, u64, &'static [u8]);

/// Kind, name, offset from the start, bytes.
const HEAD: &[Place] = &[
    ("xfs", "XFS", 0, b"XFSB"),
    ("ntfs", "NTFS", 3, b"NTFS    "),
    ("fat", "FAT", 0x36, b"FAT12   "),
    ("fat", "FAT", 0x36, b"FAT16   "),
    ("fat", "FAT32", 0x52, b"FAT32   "),
    ("exfat", "exFAT", 3, b"EXFAT   "),
    ("refs", "ReFS", 0, b"\0\0\0ReFS\0"),
    ("bitlocker", "BitLocker", 3, b"-FVE-FS-"),
    ("luks", "LUKS encryption", 0, b"LUKS\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x4000, b"SKUL\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x8000, b"SKUL\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x10000, b"SKUL\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x20000, b"SKUL\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x40000, b"SKUL\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x80000, b"SKUL\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x10_0000, b"SKUL\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x20_0000, b"SKUL\xba\xbe"),
    ("luks", "a LUKS2 header copy", 0x40_0000, b"SKUL\xba\xbe"),
    ("lvm2", "an LVM2 label", 0, b"LABELONE"),
    ("lvm2", "an LVM2 label", 512, b"LABELONE"),
    ("lvm2", "an LVM2 label", 1024, b"LABELONE"),
    ("lvm2", "an LVM2 label", 1536, b"LABELONE"),
    ("lvm1", "an LVM1 volume", 0, b"HM\x01\0"),
    ("lvm1", "an LVM1 volume", 0, b"HM\x02\0"),
    ("swap", "swap space", 4086, b"SWAPSPACE2"),
    ("swap", "swap space", 4086, b"SWAP-SPACE"),
    ("swap", "swap space", 8182, b"SWAPSPACE2"),
    ("swap", "swap space", 16374, b"SWAPSPACE2"),
    ("swap", "swap space", 32758, b"SWAPSPACE2"),
    ("swap", "swap space", 65526, b"SWAPSPACE2"),
    ("swap", "a hibernated system", 4086, b"S1SUSPEND"),
    ("swap", "a hibernated system", 4086, b"S2SUSPEND"),
    ("swap", "a hibernated system", 4086, b"ULSUSPEND"),
    ("swap", "a hibernated system", 4086, b"LINHIB0001"),
    ("md", "an md RAID superblock 1.1", 0, b"\xfc\x4e\x2b\xa9"),
    ("md", "an md RAID superblock 1.2", 4096, b"\xfc\x4e\x2b\xa9"),
    (
        "bcache",
        "bcache",
        4120,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
    ),
    (
        "bcachefs",
        "bcachefs",
        4120,
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
    ),
    ("btrfs", "btrfs", 0x10040, b"_BHRfS_M"),
    ("reiserfs", "ReiserFS", 0x10034, b"ReIsEr"),
    ("reiserfs", "ReiserFS", 0x2034, b"ReIsEr"),
    ("jfs", "JFS", 0x8000, b"JFS1"),
    ("f2fs", "F2FS", 0x400, b"\x10\x20\xf5\xf2"),
    ("erofs", "EROFS", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("squashfs", "SquashFS", 0, b"hsqs"),
    ("cramfs", "cramfs", 0, b"\x45\x3d\xcd\x28"),
    ("romfs", "romfs", 0, b"-rom1fs-"),
    ("hfsplus", "HFS+", 0x400, b"H+\0\x04"),
    ("hfsplus", "HFS+", 0x400, b"HX\0\x05"),
    ("apfs", "APFS", 32, b"NXSB"),
    ("udf", "UDF", 0x8001, b"BEA01"),
    ("udf", "UDF", 0x8001, b"NSR0"),
    ("iso9660", "ISO 9660", 0x8001, b"CD001"),
    ("gfs2", "GFS2", 0x10000, b"\x01\x16\x19\x70\0\0\0\x01"),
    ("ocfs2", "OCFS2", 0x400, b"OCFSV2"),
    ("ocfs2", "OCFS2", 0x800, b"OCFSV2"),
    ("ocfs2", "OCFS2", 0x1000, b"OCFSV2"),
    ("ocfs2", "OCFS2", 0x2000, b"OCFSV2"),
    ("ufs", "UFS", 0x255c, b"\x54\x19\x01\0"),
    ("ufs", "UFS2", 0x1055c, b"\x19\x01\x54\x19"),
    ("ufs", "UFS2", 0x255c, b"\x19\x01\x54\x19"),
    ("vxfs", "VxFS", 0x400, b"\xf5\xfc\x01\xa5"),
    ("vmfs", "a VMFS volume", 0x10_0000, b"\x0d\xd0\x01\xc0"),
    ("vmfs", "VMFS", 0x20_0000, b"\x5e\xf1\xab\x2f"),
    ("stratis", "Stratis", 516, b"!Stra0tis\x86\xff\x02^\x41rh"),
    ("vdo", "VDO", 0, b"dmvdo001"),
    ("verity", "dm-verity hashes", 0, b"verity\0\0"),
    ("integrity", "dm-integrity", 0, b"integrt\0"),
    ("snapshot", "a device-mapper snapshot store", 0, b"SnAp"),
    ("bluestore", "Ceph BlueStore", 0, b"bluestore block device"),
    ("asm", "Oracle ASM", 32, b"ORCLDISK"),
    ("table", "a partition table", 512, b"EFI PART"),
    ("table", "a partition table", 4096, b"EFI PART"),
];

/// Whatever claims `volume` by a signature.
pub(crate) fn find(volume: &dyn ReadAt) -> io::Result<Vec<Signature>> {
    let reader = Reader {
        head: read(volume, 0, volume.size().min(0x1_2000) as usize)?,
        volume,
    };
    let mut found = Vec::new();
    for (kind, what, at, magic) in HEAD {
        if reader.holds(*at, magic)? {
            found.push(signature(kind, what, *at, magic.len() as u64));
        }
    }
    reader.checked(&mut found);
    reader.tail(&mut found)?;
    reader.zfs(&mut found)?;
    reader.drbd(&mut found)?;
    reader.nested_table(&mut found);
    Ok(found)
}

/// Whether dm-verity hashes begin at `at`: they cover what lies before, free blocks too.
pub(crate) fn has_hashes(volume: &dyn ReadAt, at: u64) -> io::Result<bool> {
    Ok(bytes_at(volume, at, 8)? == b"verity\0\0")
}

fn signature(kind: &'static str, what: &'static str, at: u64, len: u64) -> Signature {
    let at = Extent::between(at, at.saturating_add(len));
    Signature { kind, what, at }
}

/// Nothing where the volume ends before.
fn bytes_at(volume: &dyn ReadAt, at: u64, len: usize) -> io::Result<Vec<u8>> {
    match at.checked_add(len as u64) {
        Some(end) if end <= volume.size() => read(volume, at, len),
        _ => Ok(Vec::new()),
    }
}

struct Reader<'a> {
    head: Vec<u8>,
    volume: &'a dyn ReadAt,
}

impl Reader<'_> {
    fn holds(&self, at: u64, magic: &[u8]) -> io::Result<bool> {
        let end = at + magic.len() as u64;
        if end <= self.head.len() as u64 {
            return Ok(self.head[at as usize..end as usize] == *magic);
        }
        Ok(bytes_at(self.volume, at, magic.len())? == magic)
    }

    /// Two-byte signatures, which chance produces: a few more fields must make sense.
    fn checked(&self, found: &mut Vec<Signature>) {
        let le16 = |at| u16::from_le_bytes(field(&self.head, at));
        let le32 = |at| u32::from_le_bytes(field(&self.head, at));
        let be32 = |at| u32::from_be_bytes(field(&self.head, at));
        if le16(0x438) == 0xef53 && le32(0x418) <= 6 && le32(0x44c) <= 1 && le32(0x420) != 0 {
            // Every copy of the superblock but the first says of which group it is.
            match le16(0x45a) {
                0 => found.push(signature("ext", "ext2/3/4", 0x438, 2)),
                _ => found.push(signature(
                    "ext copy",
                    "a copy of an ext2/3/4 superblock",
                    0x438,
                    2,
                )),
            }
        }
        if le16(0x406) == 0x3434 && le32(0x400) == 2 {
            found.push(signature("nilfs2", "NILFS2", 0x406, 2));
        }
        let hfs_block = be32(0x414);
        if field(&self.head, 0x400) == *b"BD" && hfs_block != 0 && hfs_block % 512 == 0 {
            found.push(signature("hfs", "HFS", 0x400, 2));
        }
    }

    fn tail(&self, found: &mut Vec<Signature>) -> io::Result<()> {
        let size = self.volume.size();
        let sectors = size / 512;
        let md_1_0 = (sectors.saturating_sub(16) & !7) * 512;
        let md_0_9 = (size & !0xffff).saturating_sub(0x1_0000);
        let last = sectors.saturating_sub(1) * 512;
        let md_09 = "an md RAID superblock 0.90";
        let places: [Place; 7] = [
            ("md", "an md RAID superblock 1.0", md_1_0, b"\xfc\x4e\x2b\xa9"),
            ("md", md_09, md_0_9, b"\xfc\x4e\x2b\xa9"),
            ("md", md_09, md_0_9, b"\xa9\x2b\x4e\xfc"),
            ("raid", "firmware RAID metadata (DDF)", last, b"\xde\x11\xde\x11"),
            ("raid", "firmware RAID metadata (DDF)", last, b"\x11\xde\x11\xde"),
            (
                "raid",
                "firmware RAID metadata (Intel)",
                last.saturating_sub(512),
                b"Intel Raid ISM Cfg",
            ),
            ("geom", "FreeBSD GEOM metadata", last, b"GEOM::"),
        ];
        for (kind, what, at, magic) in places {
            if at != 0 && bytes_at(self.volume, at, magic.len())? == magic {
                found.push(signature(kind, what, at, magic.len() as u64));
            }
        }
        Ok(())
    }

    /// Each of the four labels has a ring of uberblocks in its second half.
    fn zfs(&self, found: &mut Vec<Signature>) -> io::Result<()> {
        const LABEL: u64 = 256 << 10;
        /// ZFS takes no smaller device.
        const SMALLEST: u64 = 64 << 20;
        let end = self.volume.size() / LABEL * LABEL;
        if end < SMALLEST {
            return Ok(());
        }
        for label in [0, LABEL, end - 2 * LABEL, end - LABEL] {
            let ring = read(self.volume, label + LABEL / 2, (LABEL / 2) as usize)?;
            let magic = |slot: &[u8]| {
                [0x00ba_b10c_u64.to_le_bytes(), 0x00ba_b10c_u64.to_be_bytes()].contains(&field(slot, 0))
            };
            if ring.chunks(1024).any(magic) {
                found.push(signature("zfs", "a ZFS label", label, LABEL));
            }
        }
        Ok(())
    }

    /// Internal metadata lies at the end; its magic has stood at different places of the last 4 KiB.
    fn drbd(&self, found: &mut Vec<Signature>) -> io::Result<()> {
        let Some(at) = (self.volume.size() & !4095).checked_sub(4096) else {
            return Ok(());
        };
        let block = read(self.volume, at, 4096)?;
        let magic = |word: &[u8]| (0x8374_0267..=0x8374_026f).contains(&u32::from_be_bytes(field(word, 0)));
        if block[..512].chunks(4).any(magic) {
            found.push(signature("drbd", "DRBD metadata", at, 4096));
        }
        Ok(())
    }

    /// A boot sector whose entries describe this volume: a disk inside a volume.
    fn nested_table(&self, found: &mut Vec<Signature>) {
        let entries = self.head.get(..512).and_then(mbr::decode).unwrap_or_default();
        let inside = |entry: &mbr::Entry| entry.start > 0 && entry.end() * mbr::SECTOR <= self.volume.size();
        if !entries.is_empty() && entries.iter().all(inside) {
            found.push(signature("table", "a partition table", 0, 512));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_found_where_it_is_written() {
        for (kind, what, at, magic) in HEAD {
            let mut volume = vec![0; 5 << 20];
            volume[*at as usize..][..magic.len()].copy_from_slice(magic);
            let found = find(&volume).unwrap();
            assert_eq!(found, [signature(kind, what, *at, magic.len() as u64)], "{what}");
        }
    }

    #[test]
    fn what_lies_at_the_end_is_found_in_volumes_of_odd_sizes() {
        for size in [(64 << 20) + 512, (64 << 20) + 7 * 512, (65 << 20) + 65536 + 4096] {
            let sectors = size / 512;
            let at = [
                ("md", (sectors - 16) / 8 * 8 * 512, &b"\xfc\x4e\x2b\xa9"[..]),
                ("md", size / 65536 * 65536 - 65536, &b"\xfc\x4e\x2b\xa9"[..]),
                ("raid", (sectors - 1) * 512, &b"\xde\x11\xde\x11"[..]),
                ("raid", (sectors - 2) * 512, &b"Intel Raid ISM Cfg Sig. 1.0"[..]),
                ("drbd", size / 4096 * 4096 - 4096 + 60, &b"\x83\x74\x02\x6d"[..]),
                (
                    "zfs",
                    size / 262144 * 262144 - 262144 + 131072 + 5120,
                    &b"\x0c\xb1\xba\0\0\0\0\0"[..],
                ),
            ];
            for (kind, at, magic) in at {
                let mut volume = vec![0; size];
                volume[at..at + magic.len()].copy_from_slice(magic);
                let found = find(&volume).unwrap();
                assert_eq!(found.len(), 1, "{kind} at {at} of {size}: {found:?}");
                assert_eq!(found[0].kind, kind);
            }
        }
    }

    #[test]
    fn volumes_of_any_small_size_are_read_without_an_error() {
        for size in (0..8192).step_by(64).chain([511, 513, 65535, 65537, 0x11fff]) {
            assert_eq!(find(&vec![0; size]).unwrap(), []);
        }
    }

    #[test]
    fn a_superblock_copy_is_not_the_file_system() {
        let mut volume = vec![0; 1 << 20];
        volume[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
        volume[0x420] = 1;
        assert_eq!(find(&volume).unwrap()[0].kind, "ext");
        volume[0x45a] = 1;
        assert_eq!(find(&volume).unwrap()[0].kind, "ext copy");
    }
}
