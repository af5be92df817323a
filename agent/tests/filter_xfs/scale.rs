//! Large volumes: a TiB with millions of free extents, and trees larger than the filter walks.

use std::time::{Duration, Instant};

use longhaul_agent::disk::fs::Unproven;

use super::image::Image;
use super::synthetic::{Plan, Records, expected};
use super::volume::{FileVolume, scan};
use super::{cases, oracle};

const TIB: u64 = 1 << 40;

#[test]
fn a_tebibyte_in_three_million_pieces_is_scanned_in_a_second_or_two() {
    let plan = Plan {
        ag_blocks: 4 << 20,
        ag_count: 64,
        ..Plan::default()
    };
    let per_group = cases(50_000) as u32;
    let comb = |_| -> Records {
        let first = plan.first_free(per_group as usize);
        (0..per_group)
            .map(|index| (first + 80 * index, 1 + index % 79))
            .collect()
    };
    let volume = plan.make(comb);
    let mut count = 0;
    let started = Instant::now();
    let fs = longhaul_agent::disk::fs::xfs::probe(&volume).unwrap().unwrap();
    assert_eq!(fs.size(), TIB);
    fs.scan(&volume, &mut |_| count += 1).unwrap();
    let took = started.elapsed();
    eprintln!("{count} extents in {took:?}");
    assert_eq!(count, 64 * per_group);
    assert!(took < Duration::from_secs(10), "{took:?}");
    let (_, free) = scan(&volume).unwrap();
    assert_eq!(free, expected(&plan, comb));
}

#[test]
fn a_sparse_tebibyte_of_mkfs_is_scanned_at_once() {
    let image = Image::fresh(TIB, &["-d", "agcount=1024", "-l", "size=64m"]);
    let started = Instant::now();
    let (summary, free) = scan(&FileVolume::open(&image.path)).unwrap();
    let took = started.elapsed();
    assert_eq!(summary.size, TIB);
    assert!(summary.free > TIB / 1000 * 999);
    assert!(took < Duration::from_secs(5), "{took:?}");
    let last = image.db(&["agf 1023", "print freeblks"]);
    let blocks: u64 = last.split_whitespace().last().unwrap().parse().unwrap();
    assert_eq!(free.last().map(|(start, end)| end - start), Some(blocks * 4096));
    assert_eq!(oracle::log(&image).len, 64 << 20);
}

/// The places of a level's blocks are remembered; a tree that would need more than a few MiB for it is refused.
#[test]
fn a_tree_of_too_many_blocks_is_refused() {
    let plan = Plan {
        version_5: false,
        block: 512,
        ag_blocks: 12 << 20,
        ag_count: 1,
        log_blocks: 4096,
        // 31 of 62 records: as empty as a tree block may be.
        fill: 32,
        ..Plan::default()
    };
    let count = (64 << 10) * 32 + 1;
    let comb = |_| -> Records {
        let first = plan.first_free(count);
        (0..count as u32).map(|index| (first + 2 * index, 1)).collect()
    };
    let error = scan(&plan.make(comb)).unwrap_err();
    let Unproven::Inconsistent { what, .. } = &error else {
        panic!("{error}");
    };
    assert!(what.contains("more blocks than"), "{error}");
}
