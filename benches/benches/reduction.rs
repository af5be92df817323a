//! What reducing and restoring cost per core, part by part and as a whole, in bytes of raw data per second.
//!
//! A copy of the same bytes (`copy`, in `pipeline`) is the ceiling of anything that reads and writes memory. Each whole is measured on
//! the four kinds of content that there are: new, known, changed a little, and noise.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use longhaul_benches::{noise, system};
use longhaul_common::digest::Digest;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
use longhaul_common::wire::batch::{BatchHeader, Content, Leaves, Piece};
use longhaul_gateway::reduction::{
    DigestKey, Features, Index, Level, Method, Pair, Size, Vm, Windows, differing, is_noise, is_zero, reduce,
    reduce_plainly, restore, xor,
};

const LEN: usize = 1 << 20;
const BLOCK: usize = 4096;

fn header(offset: u64, data: &[u8]) -> BatchHeader {
    let mut header = BatchHeader {
        job: JobId::random(),
        attempt: Attempt(1),
        disk: DiskIndex(0),
        round: Round(0),
        sequence: Sequence(1),
        pieces: vec![Piece {
            extent: Extent::between(offset, offset + data.len() as u64),
            content: Content::Data,
        }],
        leaves: Leaves::default(),
        ram: None,
        urgent: false,
        digest: Digest([0; 32]),
    };
    header.digest = header.digest_of(data).unwrap_or(header.digest);
    header
}

fn blocks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("blocks of a MiB");
    group.throughput(Throughput::Bytes(LEN as u64)).sample_size(20);
    let (noise, system) = (noise(LEN), system(LEN));
    let key = DigestKey::random();
    let each = |data: &[u8], work: &mut dyn FnMut(&[u8])| data.chunks(BLOCK).for_each(work);
    group.bench_function("digest", |bench| {
        bench.iter(|| each(&noise, &mut |block| _ = std::hint::black_box(key.digest(block))));
    });
    group.bench_function("zero?", |bench| {
        let zeros = vec![0; LEN];
        bench.iter(|| each(&zeros, &mut |block| _ = std::hint::black_box(is_zero(block))));
    });
    group.bench_function("noise?", |bench| {
        bench.iter(|| each(&noise, &mut |block| _ = std::hint::black_box(is_noise(block))));
    });
    group.bench_function("features", |bench| {
        bench.iter(|| each(&noise, &mut |block| _ = std::hint::black_box(Features::of(block))));
    });
    group.bench_function("differing", |bench| {
        let pair = || noise.chunks(BLOCK).zip(system.chunks(BLOCK));
        bench.iter(|| pair().map(|(a, b)| differing(a, b)).sum::<usize>());
    });
    group.bench_function("xor", |bench| {
        let mut residue = noise.clone();
        bench.iter(|| xor(std::hint::black_box(&mut residue), &system));
    });
    let raw = text();
    for level in Level::ALL {
        let reduced = reduce_plainly(&raw, level);
        group.bench_function(format!("reduce plainly {level}"), |bench| {
            bench.iter(|| reduce_plainly(&raw, level))
        });
        let header = header(0, &raw);
        group.bench_function(format!("restore plainly {level}"), |bench| {
            bench.iter(|| restore(&reduced.payload, &header, Vm::named("vm"), None))
        });
    }
    group.finish();
}

/// Content with the repetitions of programs and the values of text: not taken for noise.
fn text() -> Bytes {
    system(LEN).into_iter().map(|byte| byte & 0x3f).collect()
}

fn gateways() -> Option<[Arc<Pair>; 2]> {
    let size = Some(Size::of(256 << 20, 0));
    let pair = || Windows::new(size, BTreeSet::new()).with("the other", "");
    let (a, b) = (pair()?, pair()?);
    a.answered(a.hello(), b.greet(a.hello()));
    Some([a, b])
}

/// Look-ups in the index of a window of a GiB, each for one block: those that are there, and those that are not.
fn look_ups(criterion: &mut Criterion) {
    const SLOTS: u64 = 1 << 18;
    let mut index = Index::new(SLOTS);
    let key = |position: u64| position.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    for position in 0..SLOTS {
        index.insert(key(position), position);
    }
    let mut group = criterion.benchmark_group("blocks of a MiB");
    group.throughput(Throughput::Bytes(LEN as u64)).sample_size(20);
    let blocks = (LEN / BLOCK) as u64;
    for (name, first) in [("look up known", 0), ("look up unknown", SLOTS)] {
        let mut at = 0;
        group.bench_function(name, |bench| {
            bench.iter(|| {
                // Far apart, as digests are: each look-up is a cache line that was not near.
                let start = at;
                let found =
                    |n: u64| index.find(key(first + (start + n * 4099) % SLOTS), |slot| slot, |_| true);
                at += 1;
                (0..blocks).filter_map(found).count()
            });
        });
    }
    group.finish();
}

/// The whole of it, with deduplication and XOR, at LZ4.
fn whole(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("reduce and restore");
    group.throughput(Throughput::Bytes(LEN as u64)).sample_size(20);
    let method = Method {
        dedup: true,
        xor: true,
        level: Level::Lz4,
    };
    let Some([a, b]) = gateways() else { return };
    let vm = Vm::named("vm");
    let known = text();
    let first = header(0, &known);
    // Each time anew: what is measured pushes it out of the window.
    let send_known = || {
        let sent = reduce(&known, &first, vm, Some(&a), method);
        if restore(&sent.payload, &first, vm, Some(&b)).is_ok() {
            a.accepted(&sent.kept);
        }
    };
    let change = |stamp: u64| {
        let mut data = known.to_vec();
        for block in data.chunks_mut(BLOCK) {
            block[96..104].copy_from_slice(&stamp.to_le_bytes());
            block[2000..2008].copy_from_slice(&stamp.to_be_bytes());
        }
        data
    };
    // As compressible, and like nothing that is known.
    let other = |stamp: u64| known.iter().map(|byte| byte ^ (1 + stamp % 63) as u8).collect();
    let mut stamp = 0_u64;
    let mut fresh = |kind: &str| {
        stamp += 1;
        send_known();
        let (place, data) = match kind {
            "known" => (stamp << 30, known.to_vec()),
            "changed" => (0, change(stamp)),
            // Known nearly, from another place.
            "alike" => (stamp << 30, change(stamp)),
            "new" => (stamp << 30, other(stamp)),
            _ => {
                let mut data = noise(LEN);
                data.chunks_mut(BLOCK)
                    .for_each(|block| block[..8].copy_from_slice(&stamp.to_le_bytes()));
                (stamp << 30, data)
            }
        };
        (header(place, &data), Bytes::from(data))
    };
    for kind in ["new", "alike", "known", "changed", "noise"] {
        group.bench_function(format!("reduce {kind}"), |bench| {
            let work = |(header, data): (BatchHeader, Bytes)| {
                let reduced = reduce(&data, &header, vm, Some(&a), method);
                a.given_up(&reduced.kept);
                reduced.payload.bytes.len()
            };
            bench.iter_batched(|| fresh(kind), work, BatchSize::SmallInput);
        });
        group.bench_function(format!("restore {kind}"), |bench| {
            let reduced = |(header, data): (BatchHeader, Bytes)| {
                let reduced = reduce(&data, &header, vm, Some(&a), method);
                a.given_up(&reduced.kept);
                (header, reduced.payload)
            };
            let work = |(header, payload)| restore(&payload, &header, vm, Some(&b)).is_ok();
            bench.iter_batched(|| reduced(fresh(kind)), work, BatchSize::SmallInput);
        });
    }
    group.finish();
}

criterion_group!(reduction, blocks, look_ups, whole);
criterion_main!(reduction);
