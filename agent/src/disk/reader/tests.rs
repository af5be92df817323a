//! A disk read into batches and laid out again from them is the disk, with skipped ranges as zeros.

use longhaul_common::wire::session::Have;
use proptest::prelude::*;

use super::*;
use crate::disk::image::{Allocation, Run};

/// Reads `image` with everything in `free` skipped; gives digest, counts and batches.
fn read(image: &Vec<u8>, free: &FreeMap, have: &HaveLeaves) -> (Digest, DiskCounts, Vec<Outgoing>) {
    let batches = Mutex::new(Vec::new());
    let sequence = AtomicU64::new(0);
    let disk = DiskRead {
        job: JobId::random(),
        attempt: Attempt(1),
        disk: DiskIndex(0),
        image,
        allocation: &|range| {
            Ok(vec![Run {
                extent: range,
                state: Allocation::Data,
            }])
        },
        free,
        have,
        known: &KnownLeaves::new(image.len() as u64),
        sequence: &sequence,
        emit: &|outgoing| {
            batches.lock().unwrap().push(outgoing);
            true
        },
    };
    let (digest, counts) = disk.run(3).unwrap();
    (digest, counts, batches.into_inner().unwrap())
}

fn plain_digest(content: &[u8]) -> Digest {
    let mut digest = DiskDigest::new(content.len() as u64);
    for (leaf, bytes) in (0..).zip(content.chunks(LEAF as usize)) {
        digest.leaf(leaf, Digest::of(bytes)).unwrap();
    }
    digest.finish().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn batches_rebuild_the_disk(
        size in 1usize..6_000_000,
        fill in prop::collection::vec((0usize..6_000_000, 0usize..400_000, any::<u8>()), 0..12),
        freed in prop::collection::vec((0u64..6_000_000, 0u64..900_000), 0..6),
        held in prop::collection::vec(any::<bool>(), 6),
    ) {
        let mut image = vec![0; size];
        for (at, len, byte) in fill {
            let at = at.min(size);
            let end = (at + len).min(size);
            image[at..end].fill(byte);
        }
        let mut free = FreeMap::new(size as u64);
        let mut expected = image.clone();
        for (at, len) in freed {
            free.mark(&Extent::between(at.min(size as u64), (at + len).min(size as u64)));
        }
        for (block, bytes) in (0..).zip(expected.chunks_mut(BLOCK as usize)) {
            if free.is_free(block * BLOCK) {
                bytes.fill(0);
            }
        }
        // The target holds some leaves already, one of them with other content.
        let mut have = HaveLeaves::default();
        let mut copy = vec![0xaa; size];
        for (leaf, bytes) in (0usize..).zip(expected.chunks(LEAF as usize)).filter(|(leaf, _)| held[*leaf]) {
            let digest = if bytes.iter().all(|b| *b == 0) { vec![] } else { vec![(leaf as u64, Digest::of(bytes))] };
            have.add(&Have { disk: DiskIndex(0), first: leaf as u64, count: 1, digests: digest, shadow: None }, size as u64).unwrap();
            copy[leaf * LEAF as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        let (digest, counts, batches) = read(&image, &free, &have);
        prop_assert_eq!(digest, plain_digest(&expected));
        prop_assert_eq!(counts.batches, batches.len() as u64);
        prop_assert_eq!(counts.hole + counts.free + counts.zero + counts.data + counts.kept, size as u64);
        for Outgoing { header, data } in batches {
            header.check(size as u64).unwrap();
            header.verify(&data).unwrap();
            let mut from = &data[..];
            for piece in &header.pieces {
                let place = &mut copy[piece.extent.offset() as usize..piece.extent.end() as usize];
                if piece.content == Content::Data {
                    let (now, rest) = from.split_at(place.len());
                    place.copy_from_slice(now);
                    from = rest;
                } else {
                    place.fill(0);
                }
            }
        }
        prop_assert!(copy == expected);
    }
}

#[test]
fn a_leaf_whose_content_changed_is_sent_again() {
    let image = vec![7; 2 * LEAF as usize];
    let mut have = HaveLeaves::default();
    let digests = vec![
        (0, Digest::of(&image[..LEAF as usize])),
        (1, Digest::of(b"older")),
    ];
    have.add(
        &Have {
            disk: DiskIndex(0),
            first: 0,
            count: 2,
            digests,
            shadow: None,
        },
        2 * LEAF,
    )
    .unwrap();
    let (_, counts, batches) = read(&image, &FreeMap::new(2 * LEAF), &have);
    assert_eq!((counts.kept, counts.data, batches.len()), (LEAF, LEAF, 1));
    assert_eq!(batches[0].header.leaves.first, 1);
}
