//! What each stage of the data path does per core, in bytes of raw data per second.
//!
//! Compare with what the hardware can do: a copy of the same bytes (`copy`) is the ceiling of anything that reads and writes memory.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
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
    criterion.bench_function("header encode", |bench| bench.iter(|| header.encode()));
    criterion.bench_function("header decode", |bench| {
        bench.iter(|| BatchHeader::decode(&encoded).map(|(header, _)| header))
    });
}

criterion_group!(pipeline, stages, wire);
criterion_main!(pipeline);
