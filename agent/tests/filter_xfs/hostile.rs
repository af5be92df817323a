//! Volumes that lie consistently, and logs that end in every possible way, made by the tests themselves.

use longhaul_agent::disk::fs::Unproven;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rand::Rng;

use super::synthetic::{LogPlan, Plan, Records, expected};
use super::volume::{Patched, Watched, scan};
use super::{cases, each_seed};

/// `count` extents of `len` blocks, with a used block between each two.
fn comb(plan: &Plan, count: u32, len: u32) -> Records {
    let first = plan.first_free(count as usize);
    (0..count).map(|index| (first + index * (len + 1), len)).collect()
}

#[test]
fn trees_of_every_height_are_read_exactly_and_each_block_once() {
    for (version_5, block, count) in [
        (true, 4096, 0),
        (true, 4096, 1),
        (true, 4096, 505),
        (true, 4096, 506),
        (false, 4096, 3_000),
        (true, 1024, 2_000),
        (false, 512, 9_000),
        (true, 512, 9_000),
        (true, 65_536, 100),
    ] {
        let plan = Plan {
            version_5,
            block,
            ag_blocks: (32 << 20) / block + 24_000,
            log_blocks: (4 << 20) / block,
            ..Plan::default()
        };
        let volume = plan.make(|_| comb(&plan, count, 1));
        let watched = Watched::new(&volume);
        let (_, free) = scan(&watched).unwrap_or_else(|error| panic!("{plan:?}, {count}: {error}"));
        assert_eq!(free, expected(&plan, |_| comb(&plan, count, 1)));
        let mut reads = watched.reads.into_inner().unwrap();
        // Sector and log reads aside.
        reads.retain(|(offset, len)| {
            *len == u64::from(block) && *offset > 65_536 && *offset < plan.log_offset()
        });
        let total = reads.len();
        reads.sort_unstable();
        reads.dedup();
        assert_eq!(total, reads.len(), "a block was read twice");
    }
}

#[test]
fn free_extents_over_used_blocks_are_refused_even_if_both_trees_agree() {
    let plan = Plan::default();
    let end = plan.ag_blocks;
    let log = end - plan.log_blocks;
    let cases: [(&str, u32, Records); 8] = [
        ("the headers", 0, vec![(0, 1)]),
        ("a tree root", 0, vec![(9, 1)]),
        ("the inode tree's root", 0, vec![(1, 1)]),
        ("the log's first block", 1, vec![(log, 1)]),
        ("the log's last block", 1, vec![(500, 2), (end - 1, 1)]),
        ("the end of the group", 0, vec![(end - 1, 2)]),
        ("its neighbour", 0, vec![(100, 20), (119, 20)]),
        ("nothing", 0, vec![(100, 0)]),
    ];
    for (what, group, lie) in cases {
        let honest = vec![(50, 10)];
        let volume = plan.make(|ag| if ag == group { lie.clone() } else { honest.clone() });
        let error = scan(&volume).expect_err(what);
        assert!(matches!(error, Unproven::Inconsistent { .. }), "{what}: {error}");
    }
    assert!(scan(&plan.make(|_| vec![(50, 10), (log - 5, 5)])).is_ok());
}

#[test]
fn a_free_list_over_a_free_extent_is_refused() {
    let plan = Plan::default();
    let volume = plan.make(|_| vec![(50, 10)]);
    let list = |first: u32, last: u32, count: u32, block: u32| {
        let mut changed = Patched::new(&volume);
        changed.put(512 + 40, &[first, last, count].map(u32::to_be_bytes).concat());
        changed.seal(512, 512, 216);
        changed.put(1536 + 36 + 4 * 118, &block.to_be_bytes());
        changed.put(1536 + 36, &70u32.to_be_bytes());
        changed.seal(1536, 512, 32);
        scan(&changed).map(|_| ())
    };
    list(118, 118, 1, 60).unwrap();
    list(118, 0, 2, 49).unwrap();
    for (first, last, count, block) in [
        (118, 0, 2, 50),
        (118, 0, 2, 59),
        (118, 0, 2, 70),
        (118, 0, 2, 0),
        (118, 0, 2, u32::MAX),
        (118, 0, 3, 60),
        (119, 119, 1, 60),
        (118, u32::MAX, 1, 60),
        (118, 118, u32::MAX, 60),
    ] {
        let refused = list(first, last, count, block);
        assert!(refused.is_err(), "{first} {last} {count} {block}");
    }
}

#[test]
fn metadata_of_another_time_or_place_is_refused() {
    let plan = Plan::default();
    let volume = plan.make(|_| vec![(50, 10)]);
    let root = plan.offset(1, 9);
    let after = (1u64 << 32 | 3).to_be_bytes();
    let before = (1u64 << 32 | 2).to_be_bytes();
    let change = |piece: u64, len: usize, crc: u64, at: u64, bytes: &[u8]| {
        let mut changed = Patched::new(&volume);
        changed.put(piece + at, bytes);
        changed.seal(piece, len, crc);
        scan(&changed).map(|_| ())
    };
    let agf = plan.offset(1, 0) + 512;
    for (piece, len, crc, lsn) in [(0, 512, 224, 240), (agf, 512, 216, 208), (root, 4096, 52, 24)] {
        change(piece, len, crc, lsn, &before).unwrap();
        change(piece, len, crc, lsn, &[0xff; 8]).unwrap();
        change(piece, len, crc, lsn, &after).unwrap_err();
    }
    // Place, UUID and owner of a tree block.
    for (at, len) in [(16, 8), (32, 16), (48, 4)] {
        change(root, 4096, 52, at, &[0; 16][..len]).unwrap_err();
    }
    change(agf, 512, 216, 64, b"another-volume").unwrap_err();
}

#[test]
fn an_unmount_record_is_found_wherever_the_log_ends() {
    let plan = (
        prop_oneof![Just(1024u32), Just(2048), Just(700)],
        any::<prop::sample::Index>(),
        2u32..1000,
        prop_oneof![
            Just((1, 32 << 10)),
            Just((2, 32 << 10)),
            Just((2, 64 << 10)),
            Just((2, 256 << 10))
        ],
        prop_oneof![
            Just(512u32),
            Just(20),
            Just(32 << 10),
            Just(64 << 10),
            Just(255 << 10)
        ],
        any::<bool>(),
        any::<bool>(),
    );
    let config = ProptestConfig {
        cases: cases(150) as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let run = TestRunner::new(config).run(
        &plan,
        |(log_blocks, head, cycle, (version, buffer), len, crc, v5)| {
            let mut plan = Plan {
                version_5: v5,
                log_blocks,
                ..Plan::default()
            };
            // Near both ends more often than elsewhere.
            let sectors = plan.sectors_in_log();
            let near = [0, 1, 2, 3, sectors - 1, sectors - 2, 513, 514];
            let head = match head.index(16) {
                index if index < near.len() => near[index],
                _ => head.index(sectors as usize) as u32,
            };
            plan.log = LogPlan {
                head,
                cycle,
                version,
                buffer,
                len: len.min(buffer),
                crc,
                flags: 0x20,
            };
            let clean = plan.make(|_| vec![(50, 10)]);
            prop_assert!(scan(&clean).is_ok(), "{plan:?}");
            // The same record, but not of an unmount.
            plan.log.flags = 0;
            let dirty = plan.make(|_| vec![(50, 10)]);
            prop_assert!(matches!(scan(&dirty), Err(Unproven::NotClean { .. })), "{plan:?}");
            Ok(())
        },
    );
    run.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_write_behind_the_unmount_record_makes_the_log_dirty() {
    each_seed("writes behind the unmount record", 100, |rng| {
        let mut plan = Plan {
            log_blocks: 2048,
            version_5: rng.random(),
            ..Plan::default()
        };
        let sectors = plan.sectors_in_log();
        plan.log.head = rng.random_range(0..sectors);
        plan.log.cycle = rng.random_range(2..1000);
        let volume = plan.make(|_| vec![(50, 10)]);
        scan(&volume).unwrap();
        let head = plan.log.head;
        let place = |block: u32| plan.log_offset() + 512 * u64::from(block % sectors);
        // What the lap under way would stamp on the blocks from the head on.
        let lap = if head == 0 {
            plan.log.cycle + 1
        } else {
            plan.log.cycle
        };
        let written = rng.random_range(1..64);
        let mut dirty = Patched::new(&volume);
        for block in head..head + written {
            let lap = if block >= sectors && head != 0 {
                lap + 1
            } else {
                lap
            };
            dirty.put(place(block), &lap.to_be_bytes());
        }
        let mut header = [0; 512];
        header[..4].copy_from_slice(&0xfeed_babeu32.to_be_bytes());
        header[4..8].copy_from_slice(&lap.to_be_bytes());
        dirty.put(place(head), &header);
        assert!(matches!(scan(&dirty), Err(Unproven::NotClean { .. })), "{plan:?}");
        // One write that reached the disk before the others.
        let lone = head + rng.random_range(1..4096);
        let mut torn = Patched::new(&volume);
        torn.put(
            place(lone),
            &(lap + u32::from(lone >= sectors && head != 0)).to_be_bytes(),
        );
        assert!(
            matches!(scan(&torn), Err(Unproven::NotClean { .. })),
            "{plan:?} {lone}"
        );
        // One write that never did.
        let lost = head + sectors - rng.random_range(1..4000);
        let mut lost_write = Patched::new(&volume);
        lost_write.put(place(lost), &(plan.cycle_at(lost % sectors) - 1).to_be_bytes());
        assert!(
            matches!(scan(&lost_write), Err(Unproven::NotClean { .. })),
            "{plan:?} {lost}"
        );
    });
}
