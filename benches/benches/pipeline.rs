//! What each stage of the data path does per core, in bytes of raw data per second.
//!
//! Compare with what the hardware can do: a copy of the same bytes (`copy`) is the ceiling of anything that reads and writes memory.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::scan::scan;
use longhaul_benches::{noise, system};
use longhaul_common::digest::{Digest, LEAF, leaf_count};
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
use longhaul_common::wire::batch::{BatchHeader, Content, Leaves, Piece};

fn batch(data: &[u8]) -> BatchHeader {
    let size = data.len() as u64;
    let mut header = BatchHeader {
        job: JobId::random(),
        attempt: Attempt(1),
        disk: DiskIndex(0),
        round: Round(0),
        sequence: Sequence(1),
        pieces: vec![Piece {
            extent: Extent::between(0, size),
            content: Content::Data,
        }],
        leaves: Leaves {
            first: 0,
            count: leaf_count(size),
            digests: vec![(0, Digest::of(data))],
        },
        ram: None,
        urgent: false,
        digest: Digest([0; 32]),
    };
    header.digest = header.digest_of(data).unwrap_or(header.digest);
    header
}

fn stages(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("per MiB");
    group.throughput(Throughput::Bytes(LEAF)).sample_size(30);
    let (noise, system) = (noise(LEAF as usize), system(LEAF as usize));
    group.bench_function("copy", |bench| {
        let mut to = vec![0; noise.len()];
        bench.iter(|| to.copy_from_slice(std::hint::black_box(&noise)));
    });
    group.bench_function("leaf digest", |bench| {
        bench.iter(|| Digest::of(std::hint::black_box(&noise)))
    });
    let header = batch(&system);
    group.bench_function("verify batch digest", |bench| {
        bench.iter(|| header.verify(std::hint::black_box(&system)))
    });
    group.finish();
}

fn wire(criterion: &mut Criterion) {
    let header = batch(&system(LEAF as usize));
    let encoded = header.encode().unwrap_or_default();
    // One header goes with each batch: its cost is one of so many raw bytes.
    let mut group = criterion.benchmark_group("wire, per MiB");
    group.throughput(Throughput::Bytes(LEAF));
    group.bench_function("header encode", |bench| bench.iter(|| header.encode()));
    group.bench_function("header decode", |bench| {
        bench.iter(|| BatchHeader::decode(&encoded).map(|(header, _)| header))
    });
    group.finish();
}

const DISK: u64 = 1 << 30;

struct Image(std::fs::File);

impl ReadAt for Image {
    fn size(&self) -> u64 {
        DISK
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.0, buf, offset)
    }
}

/// A disk of a GiB with an ext4 of many files, in the page cache: how fast its free blocks are proven, in bytes of disk.
fn scanning(criterion: &mut Criterion) {
    let Some((_folder, disk)) = used_disk() else {
        eprintln!("scan is left out: mkfs.ext4 is missing or failed (Debian package e2fsprogs)");
        return;
    };
    let mut group = criterion.benchmark_group("scan, of a disk");
    group.throughput(Throughput::Bytes(DISK)).sample_size(20);
    group.bench_function("ext4", |bench| bench.iter(|| scan(&disk).free.free_bytes()));
    group.finish();
}

/// The disk, and the folder that it goes away with.
fn used_disk() -> Option<(tempfile::TempDir, Image)> {
    let folder = tempfile::tempdir().ok()?;
    let (content, path) = (folder.path().join("content"), folder.path().join("disk"));
    for directory in 0..40 {
        let directory = content.join(directory.to_string());
        std::fs::create_dir_all(&directory).ok()?;
        for file in 0..100 {
            std::fs::write(directory.join(file.to_string()), noise(file * 500)).ok()?;
        }
    }
    let disk = std::fs::File::create_new(&path).ok()?;
    disk.set_len(DISK).ok()?;
    let mut make = std::process::Command::new("mkfs.ext4");
    let made = make
        .args(["-q", "-b", "4096", "-d"])
        .arg(&content)
        .arg(&path)
        .status();
    made.ok()?.success().then_some(())?;
    Some((folder, Image(std::fs::File::open(path).ok()?)))
}

criterion_group!(pipeline, stages, wire, scanning);
criterion_main!(pipeline);
