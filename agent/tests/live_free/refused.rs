//! What proves nothing, and says why; and the age proof.

use std::fs;
use std::time::{Duration, Instant};

use longhaul_agent::disk::live_free::{Look, Proofs, Rules};
use longhaul_agent::disk::scan::{Part, Proof};

use crate::guest::{Guest, run};

/// Two looks a little apart, by the rules given; the only part.
fn judged(guest: &Guest, age: Option<Duration>) -> (Part, u64) {
    let disk = guest.disk();
    let started = Instant::now();
    let rules = Rules {
        started,
        age,
        frozen: Vec::new(),
    };
    let mut proofs = Proofs::new(fs::metadata(guest.image()).unwrap().len(), rules);
    for _ in 0..2 {
        proofs.add(&Look::running(&disk, Instant::now()));
    }
    let free = proofs.free().free_bytes();
    let mut parts = proofs.parts();
    let part = parts.next().unwrap().clone();
    assert!(parts.next().is_none());
    (part, free)
}

fn require_nothing(guest: &Guest, age: Option<Duration>, why: &str) {
    let (part, free) = judged(guest, age);
    assert_eq!((part.proof, free), (None, 0), "{part:?}");
    let reason = part.reason.unwrap();
    assert!(reason.contains(why), "{reason:?} does not say {why:?}");
}

const ANY_AGE: Option<Duration> = Some(Duration::ZERO);

#[test]
fn journals_that_do_not_tell_all_prove_nothing_at_any_age() {
    let without = Guest::boot("mkfs.ext4 -q -F -O ^has_journal", 32, "");
    require_nothing(&without, ANY_AGE, "no journal");
    let fast = Guest::boot("mkfs.ext4 -q -F -O fast_commit", 32, "");
    require_nothing(&fast, ANY_AGE, "fast-commit");
    let early = Guest::boot(
        "mkfs.ext4 -q -F",
        32,
        "data=writeback,journal_async_commit,journal_checksum",
    );
    fs::write(early.root().join("file"), "x").unwrap();
    // The journal's superblock tells of it from the first commit on.
    run("sync", &["-f", early.root().to_str().unwrap()], &[0]);
    require_nothing(&early, ANY_AGE, "async_commit");
    let old = Guest::boot("mkfs.ext4 -q -F -O ^metadata_csum", 32, "journal_checksum");
    fs::write(old.root().join("file"), "x").unwrap();
    run("sync", &["-f", old.root().to_str().unwrap()], &[0]);
    require_nothing(&old, ANY_AGE, "first kind");
    let elsewhere = Guest::make("mkfs.ext4 -q -F -O ^metadata_csum", 32);
    let image = elsewhere.image();
    run(
        "debugfs",
        &["-w", "-R", "ssv journal_inum 0", image.to_str().unwrap()],
        &[0],
    );
    run(
        "debugfs",
        &["-w", "-R", "ssv journal_dev 2049", image.to_str().unwrap()],
        &[0],
    );
    require_nothing(&elsewhere, ANY_AGE, "another device");
}

#[test]
fn other_file_systems_prove_nothing_while_they_run() {
    for (mkfs, mib, why) in [
        ("mkfs.xfs -q -f", 320, "only a freeze"),
        ("mkfs.vfat", 32, "no journal"),
        ("mkfs.ntfs -q -F -Q", 32, "a freeze does not stop it"),
        ("mkfs.ext2 -q -F", 32, "no journal"),
        ("mkswap -q", 32, "swap"),
    ] {
        require_nothing(&Guest::make(mkfs, mib), ANY_AGE, why);
    }
}

#[test]
fn an_idle_guest_gives_nothing_but_by_age() {
    let guest = Guest::boot(
        "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0",
        64,
        "",
    );
    fs::write(guest.root().join("file"), vec![1; 300_000]).unwrap();
    run("sync", &["-f", guest.root().to_str().unwrap()], &[0]);
    require_nothing(
        &guest,
        None,
        "is the first that began after the dirty bitmap was on",
    );
    require_nothing(&guest, Some(Duration::from_secs(3600)), "longhaul prepare");
    let (part, free) = judged(&guest, ANY_AGE);
    assert_eq!(part.proof, Some(Proof::Age));
    assert_eq!(part.free_bytes, free);
    assert!(free > 0);
}

/// Times a look at a large disk: set `LONGHAUL_LIVE_FREE_DISK` to the path of an image.
#[test]
fn a_look_at_a_given_disk_takes_as_long_as_it_says() {
    let Ok(path) = std::env::var("LONGHAUL_LIVE_FREE_DISK") else {
        return;
    };
    let disk = crate::guest::FileDisk::open(path.as_ref());
    for _ in 0..3 {
        let start = Instant::now();
        let look = Look::running(&disk, start);
        println!("{:?} for {} free bytes", start.elapsed(), look.free.free_bytes());
        look.parts().for_each(|part| println!("  {part:?}"));
    }
}

#[test]
fn a_clean_file_system_that_nobody_mounted_proves_nothing_on_a_running_guest() {
    let guest = Guest::make("mkfs.ext4 -q -F", 64);
    require_nothing(&guest, None, "not mounted for writing");
}

#[test]
fn a_look_from_before_the_dirty_bitmap_does_not_count() {
    let guest = Guest::boot("mkfs.ext4 -q -F", 64, "");
    let early = Look::running(&guest.disk(), Instant::now());
    let rules = Rules {
        started: Instant::now(),
        age: ANY_AGE,
        frozen: Vec::new(),
    };
    let mut proofs = Proofs::new(64 << 20, rules);
    proofs.add(&early);
    assert_eq!((proofs.free().free_bytes(), proofs.parts().count()), (0, 0));
}

#[test]
fn another_file_system_in_its_place_starts_anew() {
    let guest = Guest::boot("mkfs.ext4 -q -F", 64, "");
    let rules = Rules {
        started: Instant::now(),
        age: None,
        frozen: Vec::new(),
    };
    let mut proofs = Proofs::new(64 << 20, rules);
    proofs.add(&Look::running(&guest.disk(), Instant::now()));
    let mut guest = guest;
    guest.shut_down();
    let image = guest.image();
    run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()], &[0]);
    let guest = guest.mount("");
    let commit = |count| {
        for number in 0..count {
            fs::write(guest.root().join(format!("file-{number}")), "x").unwrap();
            run("sync", &["-f", guest.root().to_str().unwrap()], &[0]);
        }
    };
    commit(5);
    proofs.add(&Look::running(&guest.disk(), Instant::now()));
    assert!(
        proofs.parts().all(|part| part.proof.is_none()),
        "commits of another file system do not count"
    );
    commit(5);
    proofs.add(&Look::running(&guest.disk(), Instant::now()));
    assert!(proofs.parts().all(|part| part.proof == Some(Proof::Journal)));
}

#[test]
fn age_counts_from_an_earlier_bitmap_and_never_while_the_guest_stands() {
    let guest = Guest::boot(
        "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0",
        64,
        "",
    );
    fs::write(guest.root().join("file"), vec![1; 300_000]).unwrap();
    run("sync", &["-f", guest.root().to_str().unwrap()], &[0]);
    let (disk, hour) = (guest.disk(), Duration::from_secs(3600));
    let rules = |age| Rules {
        started: Instant::now(),
        age: Some(age),
        frozen: Vec::new(),
    };
    let size = fs::metadata(guest.image()).unwrap().len();
    let free_of = |proofs: &mut Proofs, from| {
        proofs.age_from(from);
        proofs.add(&Look::running(&disk, Instant::now()));
        proofs.free().free_bytes()
    };
    let mut standing = Proofs::new(size, rules(Duration::ZERO));
    assert_eq!(
        free_of(&mut standing, None),
        0,
        "a guest that stands commits nothing"
    );
    assert!(free_of(&mut standing, Some(Instant::now())) > 0);
    let mut prepared = Proofs::new(size, rules(hour));
    let now = Instant::now();
    assert_eq!(free_of(&mut prepared, Some(now)), 0);
    let Some(earlier) = now.checked_sub(hour) else {
        eprintln!("not tested here: this machine runs for less than an hour");
        return;
    };
    assert!(
        free_of(&mut prepared, Some(earlier)) > 0,
        "it was prepared an hour ago"
    );
}
