//! The frozen proof: file systems that were frozen while the dirty bitmap was switched on.

use std::fs;
use std::time::{Duration, Instant};

use longhaul_agent::disk::live_free::{Freeze, Look, Mount, Proofs, Rules, second_look};
use longhaul_agent::disk::scan::Proof;

use crate::campaign::{lost, require_same_files, seed, used_at_end};
use crate::guest::{Guest, run, same_files};

fn mount(kind: &str) -> Mount {
    Mount {
        device: "vdb".into(),
        kind: kind.into(),
    }
}

/// A guest under load, frozen while the dirty bitmap is switched on, shut down a second later: what it was at that time and at the
/// end, and the proofs.
fn freeze_and_go_on(mkfs: &str, mib: u64, kind: &str, seed: u64) -> (Guest, Vec<u8>, Vec<u8>, Proofs) {
    let mut guest = Guest::boot(mkfs, mib, "");
    let load = guest.work(seed, 2);
    std::thread::sleep(Duration::from_millis(700));
    let disk = guest.disk();
    guest.fsfreeze("-f");
    let started = Instant::now();
    let before = fs::read(guest.image()).unwrap();
    let mounts = [mount(kind)];
    // Reading the whole image is the test's, not the agent's.
    let freeze = Freeze {
        mounts: &mounts,
        since: Instant::now(),
        clock: &Instant::now,
    };
    let frozen = Look::frozen(&disk, &freeze);
    guest.fsfreeze("-u");
    let rules = Rules {
        started,
        age: None,
        frozen: mounts.to_vec(),
    };
    let mut proofs = Proofs::new(before.len() as u64, rules);
    proofs.add(&frozen);
    for part in proofs.parts() {
        assert_eq!(part.proof, Some(Proof::Frozen), "{part:?}");
        assert!(part.free_bytes > 0, "{part:?}");
    }
    std::thread::sleep(Duration::from_millis(400));
    let later = Look::running(&disk, Instant::now());
    proofs.add(&later);
    assert!(proofs.parts().all(|part| part.proof == Some(Proof::Frozen)));
    let second = second_look(proofs.free(), &later);
    if kind == "xfs" {
        assert_eq!(
            (second.bytes, second.unseen),
            (0, proofs.free().free_bytes()),
            "XFS cannot be seen again"
        );
    }
    load.end();
    guest.shut_down();
    let after = fs::read(guest.image()).unwrap();
    (guest, before, after, proofs)
}

#[test]
fn ext_frozen_at_the_start_loses_nothing_with_and_without_a_journal() {
    let seed = seed();
    println!("LONGHAUL_LIVE_FREE_SEED={seed}");
    for mkfs in [
        "mkfs.ext4 -q -F -b 4096",
        "mkfs.ext4 -q -F -b 4096 -O ^has_journal",
        "mkfs.ext2 -q -F -b 1024",
    ] {
        let (guest, before, after, proofs) = freeze_and_go_on(mkfs, 64, "ext4", seed);
        let used = used_at_end(&guest.image());
        let skip = |at: u64| proofs.free().is_free(at);
        assert_eq!(lost(&before, &after, &used, &skip), 0, "seed {seed}: {mkfs}");
        require_same_files(&guest.image(), &before, &after, &skip);
    }
}

#[test]
fn xfs_frozen_at_the_start_loses_nothing() {
    let seed = seed();
    println!("LONGHAUL_LIVE_FREE_SEED={seed}");
    let (guest, before, after, proofs) = freeze_and_go_on("mkfs.xfs -q -f", 320, "xfs", seed);
    require_same_xfs(&guest, &before, after, &|at| proofs.free().is_free(at));
}

/// A guest under load whose dirty bitmap has been on for a while, and was looked at, when it is frozen: what was proven, and what the
/// target would hold. `too_late`: the frozen look could not be had, only that they were frozen is known.
fn freeze_in_the_middle(mkfs: &str, mib: u64, kind: &str, seed: u64, too_late: bool) {
    let mut guest = Guest::boot(mkfs, mib, "");
    let load = guest.work(seed, 2);
    std::thread::sleep(Duration::from_millis(300 + seed % 500));
    let (disk, started) = (guest.disk(), Instant::now());
    let rules = Rules {
        started,
        age: None,
        frozen: Vec::new(),
    };
    let before = fs::read(guest.image()).unwrap();
    let size = before.len() as u64;
    let mut proofs = Proofs::new(size, rules);
    proofs.add(&Look::running(&disk, Instant::now()));
    std::thread::sleep(Duration::from_millis(seed / 500 % 200));
    guest.fsfreeze("-f");
    let mounts = [mount(kind)];
    let freeze = Freeze {
        mounts: &mounts,
        since: Instant::now(),
        clock: &Instant::now,
    };
    let frozen = Look::frozen(&disk, &freeze);
    guest.fsfreeze("-u");
    proofs.froze(mounts.to_vec(), Some(&frozen).filter(|_| !too_late), size);
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(60));
        proofs.add(&Look::running(&disk, Instant::now()));
    }
    load.end();
    guest.shut_down();
    let after = fs::read(guest.image()).unwrap();
    let proven: Vec<_> = proofs.parts().map(|part| part.proof).collect();
    let words = format!("seed {seed}, {mkfs}, too late: {too_late}: {proven:?}");
    if kind == "xfs" && too_late {
        assert_eq!(proofs.free().free_bytes(), 0, "{words}");
        return;
    }
    // A running look may be torn each time: then only the frozen one proves.
    assert!(too_late || proven == [Some(Proof::Frozen)], "{words}");
    println!("{words}, {} bytes free", proofs.free().free_bytes());
    let skip = |at: u64| proofs.free().is_free(at);
    if kind == "xfs" {
        require_same_xfs(&guest, &before, after, &skip);
        return;
    }
    let used = used_at_end(&guest.image());
    assert_eq!(lost(&before, &after, &used, &skip), 0, "{words}");
    require_same_files(&guest.image(), &before, &after, &skip);
}

#[test]
fn a_freeze_after_the_bitmap_is_on_loses_nothing_over_many_seeds() {
    let first = seed();
    println!("LONGHAUL_LIVE_FREE_SEED={first}");
    let runs = std::env::var("LONGHAUL_LIVE_FREE_RUNS").map_or(1, |text| text.parse::<u64>().unwrap());
    for seed in (0..runs).map(|run| first.wrapping_add(run * 1009)) {
        for (mkfs, mib, kind) in [
            ("mkfs.ext4 -q -F -b 4096", 64, "ext4"),
            ("mkfs.xfs -q -f", 320, "xfs"),
        ] {
            for too_late in [false, true] {
                freeze_in_the_middle(mkfs, mib, kind, seed, too_late);
            }
        }
    }
}

/// The same for XFS: what was skipped and not dirty is zeros at the target, which must be whole, with the same files.
fn require_same_xfs(guest: &Guest, before: &[u8], mut target: Vec<u8>, skip: &dyn Fn(u64) -> bool) {
    for (block, content) in (0..).zip(target.chunks_exact_mut(4096)) {
        if skip(block * 4096) && before[block as usize * 4096..][..4096] == *content {
            content.fill(0);
        }
    }
    let path = guest.image().with_extension("target");
    fs::write(&path, target).unwrap();
    run("xfs_repair", &["-n", path.to_str().unwrap()], &[0]);
    same_files(&guest.image(), &path, ",nouuid,norecovery");
}

#[test]
fn a_freeze_proves_nothing_for_others_nor_when_reading_took_too_long() {
    let guest = Guest::boot("mkfs.xfs -q -f", 320, "");
    fs::write(guest.root().join("file"), vec![7; 100_000]).unwrap();
    guest.fsfreeze("-f");
    let disk = guest.disk();
    let since = Instant::now();
    let look = |mounts: &[Mount], clock: &dyn Fn() -> Instant| {
        let freeze = Freeze { mounts, since, clock };
        let look = Look::frozen(&disk, &freeze);
        let reason = look.parts().next().and_then(|part| part.reason.clone());
        (look.free.free_bytes(), reason.unwrap_or_default())
    };
    let (free, reason) = look(&[mount("xfs")], &Instant::now);
    assert!(free > 0, "{reason}");
    let late = || since + Freeze::LIMIT + Duration::from_millis(1);
    let (free, reason) = look(&[mount("xfs")], &late);
    assert_eq!(free, 0);
    assert!(reason.contains("within the time"), "{reason}");
    let (free, reason) = look(&[mount("ext4")], &Instant::now);
    assert_eq!(free, 0);
    assert!(reason.contains("did not freeze"), "{reason}");
    guest.fsfreeze("-u");
    let running = Look::running(&disk, Instant::now());
    assert_eq!(running.free.free_bytes(), 0, "XFS gives nothing while it runs");
    let reason = running
        .parts()
        .next()
        .and_then(|part| part.reason.clone())
        .unwrap();
    assert!(reason.contains("only a freeze"), "{reason}");
}
