//! What a guest, a broken storage or a helper program can put before an agent: disks, images, NBD servers, progress logs.
//!
//! Disks are given sparsely, so that few bytes make a large one: size in 512-byte sectors (u32), then sectors one after the other,
//! each its number (u32) and its 512 bytes; all else is zeros.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Command;

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::apply;
use longhaul_agent::disk::fs::{FileSystem, Unproven};
use longhaul_agent::disk::image::{Format, header, nbd};

const SECTOR: usize = 512;
/// Largest disk: 512 GiB.
const SECTORS_MAX: u32 = 1 << 30;

struct Sparse<'a> {
    size: u64,
    sectors: BTreeMap<u32, &'a [u8]>,
}

impl<'a> Sparse<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let (size, rest) = bytes.split_first_chunk::<4>()?;
        let size = u64::from(u32::from_le_bytes(*size) % SECTORS_MAX) * SECTOR as u64;
        let mut sectors = BTreeMap::new();
        for chunk in rest.chunks_exact(4 + SECTOR) {
            let (number, content) = chunk.split_first_chunk::<4>()?;
            sectors.insert(u32::from_le_bytes(*number), content);
        }
        Some(Self { size, sectors })
    }
}

impl ReadAt for Sparse<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|end| *end <= self.size);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.fill(0);
        let sector = SECTOR as u64;
        let (first, last) = ((offset / sector) as u32, end.div_ceil(sector) as u32);
        for (number, content) in self.sectors.range(first..last.max(first)) {
            let at = u64::from(*number) * sector;
            let (from, to) = (at.max(offset), (at + sector).min(end));
            if from < to {
                let there = &mut buf[(from - offset) as usize..(to - offset) as usize];
                there.copy_from_slice(&content[(from - at) as usize..(to - at) as usize]);
            }
        }
        Ok(())
    }
}

pub(super) fn scan(bytes: &[u8]) {
    let Some(disk) = Sparse::new(bytes) else { return };
    let found = longhaul_agent::disk::scan::scan(&disk);
    assert!(found.free.free_bytes() <= disk.size);
    for part in &found.parts {
        let _ = format!("{part:?}").len();
    }
}

/// How a file system recognises itself.
type Probe = fn(&dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven>;

fn probe(bytes: &[u8], probe: Probe) {
    let Some(disk) = Sparse::new(bytes) else { return };
    let Ok(Some(found)) = probe(&disk) else { return };
    let mut inside = true;
    let scanned = found.scan(&disk, &mut |extent| inside &= extent.end() <= disk.size);
    // Only what is proven counts.
    assert!(scanned.is_err() || inside, "free beyond the volume");
}

pub(super) fn ext(bytes: &[u8]) {
    probe(bytes, longhaul_agent::disk::fs::ext::probe);
    // The same bytes as the disk of a running guest: the journal is read, too.
    probe(bytes, longhaul_agent::disk::fs::ext::probe_running);
    probe(bytes, longhaul_agent::disk::fs::ext::probe_frozen);
}

pub(super) fn xfs(bytes: &[u8]) {
    probe(bytes, longhaul_agent::disk::fs::xfs::probe);
    probe(bytes, longhaul_agent::disk::fs::xfs::probe_frozen);
}

pub(super) fn ntfs(bytes: &[u8]) {
    probe(bytes, longhaul_agent::disk::fs::ntfs::probe);
}

pub(super) fn fat(bytes: &[u8]) {
    probe(bytes, longhaul_agent::disk::fs::fat::probe);
}

/// An image that `program` of the Debian package `package` makes in a file of `size` bytes, sparsely.
fn made(package: &str, program: &str, words: &[&str], size: u64) -> io::Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("image");
    std::fs::File::create(&path)?.set_len(size)?;
    let failed = |why: String| io::Error::other(format!("{program} (Debian package {package}) {why}"));
    let output = Command::new(program).args(words).arg(&path).output();
    let output = output.map_err(|error| failed(format!("cannot be run: {error}")))?;
    if !output.status.success() {
        return Err(failed(format!(
            "failed: {}",
            String::from_utf8_lossy(&output.stderr)
        )));
    }
    sparse(&path)
}

fn sparse(path: &Path) -> io::Result<Vec<u8>> {
    let content = std::fs::read(path)?;
    let mut bytes = ((content.len() / SECTOR) as u32).to_le_bytes().to_vec();
    for (number, sector) in (0u32..).zip(content.chunks_exact(SECTOR)) {
        if sector.iter().any(|byte| *byte != 0) {
            bytes.extend(number.to_le_bytes());
            bytes.extend(sector);
        }
    }
    Ok(bytes)
}

pub(super) fn ext_images() -> io::Result<Vec<Vec<u8>>> {
    let make = |words: &[&str], size| made("e2fsprogs", "mkfs.ext4", &[&["-q", "-F"], words].concat(), size);
    Ok(vec![
        make(
            &[
                "-b",
                "1024",
                "-O",
                "^has_journal,^metadata_csum,^resize_inode",
                "-N",
                "16",
            ],
            512 << 10,
        )?,
        make(
            &["-b", "1024", "-O", "^has_journal,metadata_csum,64bit", "-N", "16"],
            1 << 20,
        )?,
        make(
            &[
                "-b",
                "4096",
                "-O",
                "^has_journal,bigalloc,^resize_inode",
                "-N",
                "16",
            ],
            4 << 20,
        )?,
    ])
}

pub(super) fn xfs_images() -> io::Result<Vec<Vec<u8>>> {
    // Version 5 checks every block, so version 4 lets fuzzing go deeper.
    let make = |words: &[&str]| {
        made(
            "xfsprogs",
            "mkfs.xfs",
            &[&["-q", "-f"], words].concat(),
            320 << 20,
        )
    };
    Ok(vec![make(&["-m", "crc=0"])?, make(&[])?])
}

pub(super) fn ntfs_images() -> io::Result<Vec<Vec<u8>>> {
    Ok(vec![made(
        "ntfs-3g",
        "mkntfs",
        &["-F", "-Q", "-q", "-s", "512", "-p", "0", "-H", "16", "-S", "63"],
        2 << 20,
    )?])
}

pub(super) fn fat_images() -> io::Result<Vec<Vec<u8>>> {
    let make = |bits: &str, size| made("dosfstools", "mkfs.fat", &["-F", bits], size);
    Ok(vec![
        make("12", 1 << 20)?,
        make("16", 16 << 20)?,
        make("32", 64 << 20)?,
    ])
}

/// A small one of each kind, bare and behind a partition table.
pub(super) fn all() -> io::Result<Vec<Vec<u8>>> {
    let bare = [ext_images()?.swap_remove(0), fat_images()?.swap_remove(0)];
    let mut seeds: Vec<_> = bare.iter().map(|image| partitioned(image)).collect();
    seeds.extend(bare);
    seeds.push(xfs_images()?.swap_remove(0));
    seeds.push(lvm()?);
    Ok(seeds)
}

/// The same image as the only partition of a disk, 63 sectors further back.
fn partitioned(image: &[u8]) -> Vec<u8> {
    const START: u32 = 63;
    let number = |at: usize| u32::from_le_bytes([image[at], image[at + 1], image[at + 2], image[at + 3]]);
    let size = number(0);
    let mut table = [0; SECTOR];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 12].copy_from_slice(&START.to_le_bytes());
    table[446 + 12..446 + 16].copy_from_slice(&size.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let mut bytes = (START + size).to_le_bytes().to_vec();
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(table);
    for at in (4..image.len()).step_by(4 + SECTOR) {
        bytes.extend((number(at) + START).to_le_bytes());
        bytes.extend(&image[at + 4..at + 4 + SECTOR]);
    }
    bytes
}

/// A label and a text area of LVM2; its checksums are right, its text is nearly empty.
fn lvm() -> io::Result<Vec<u8>> {
    let mut label = vec![0; SECTOR];
    label[..8].copy_from_slice(b"LABELONE");
    label[8] = 1;
    label[20] = 32;
    label[24..32].copy_from_slice(b"LVM2 001");
    let mut bytes = (64u32 << 11).to_le_bytes().to_vec();
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(label);
    Ok(bytes)
}

pub(super) fn nbd(bytes: &[u8]) {
    let _ = nbd::replay(bytes);
}

/// A server's side of a session: greeting, export, one data chunk.
pub(super) fn nbd_sessions() -> io::Result<Vec<Vec<u8>>> {
    let mut server = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let option = |option: u32, kind: u32, payload: &[u8]| {
        let head = [
            &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
            &option.to_be_bytes(),
            &kind.to_be_bytes(),
        ];
        [&head.concat()[..], &(payload.len() as u32).to_be_bytes(), payload].concat()
    };
    // Extended headers are unknown, structured replies are fine, base:allocation is number 1, the export has 1 MiB.
    server.extend(option(11, 0x8000_0001, b""));
    server.extend(option(8, 1, b""));
    server.extend(option(10, 4, b"\0\0\0\x01base:allocation"));
    server.extend(option(10, 1, b""));
    server.extend(option(7, 3, b"\0\0\0\0\0\0\0\x10\0\0\0\x0d"));
    server.extend(option(7, 1, b""));
    server.extend(b"\x66\x8e\x33\xef\0\x01\0\x02\0\0\0\0\0\0\0\x01\0\0\0\x0c\0\0\0\0\0\0\0\0\0\x01\0\0");
    Ok(vec![server])
}

pub(super) fn image_header(bytes: &[u8]) {
    let Some((kind, image)) = bytes.split_first() else {
        return;
    };
    let formats = [
        "raw",
        "qcow2",
        "vmdk",
        "vhdx",
        "vpc",
        "vdi",
        "qed",
        "qcow",
        "parallels",
    ];
    let name = formats[usize::from(*kind) % formats.len()];
    if let Ok(format) = name.parse::<Format>() {
        let _ = header::read(&format, &image.to_vec());
    }
    let _ = header::check_part(&image.to_vec());
}

pub(super) fn image_headers() -> io::Result<Vec<Vec<u8>>> {
    let mut seeds = Vec::new();
    for (kind, format) in [
        (1u8, "qcow2"),
        (2, "vmdk"),
        (3, "vhdx"),
        (4, "vpc"),
        (5, "vdi"),
        (6, "qed"),
    ] {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("image");
        let output = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&path)
            .arg("1M")
            .output();
        let output = output.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("qemu-img (Debian package qemu-utils) cannot be run: {error}"),
            )
        })?;
        if output.status.success() {
            let mut image = std::fs::read(&path)?;
            image.truncate(4096);
            seeds.push([&[kind][..], &image].concat());
        }
    }
    let descriptor = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n\
        RW 2048 FLAT \"part.vmdk\" 0\n";
    seeds.push([&[2], descriptor.as_bytes()].concat());
    Ok(seeds)
}

pub(super) fn progress_log(bytes: &[u8]) {
    apply::replay_log(bytes);
}

pub(super) fn progress_logs() -> io::Result<Vec<Vec<u8>>> {
    Ok(vec![apply::example_log()])
}
