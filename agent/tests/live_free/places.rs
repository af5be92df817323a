//! Partitions and logical volumes of a disk in use.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use longhaul_agent::disk::live_free::{Look, Proofs, Rules, second_look};
use longhaul_agent::disk::scan::Proof;

use crate::guest::{Guest, run};
use crate::lvm_image::{Pv, group, linear, lv};

const MIB: u64 = 1 << 20;

fn rules() -> Rules {
    Rules {
        started: Instant::now(),
        age: None,
        frozen: Vec::new(),
    }
}

/// One file and one commit after the other.
fn commit(guest: &Guest, count: u32) {
    for number in 0..count {
        fs::write(
            guest.root().join(format!("file-{number}")),
            vec![number as u8; 50_000],
        )
        .unwrap();
        run("sync", &["-f", guest.root().to_str().unwrap()], &[0]);
    }
}

/// Puts the file system of `guest` at `offset` of a disk of `size` bytes, which becomes its image.
fn move_inside(guest: Guest, size: u64, offset: u64, around: &[u8]) -> Guest {
    let volume = fs::read(guest.image()).unwrap();
    let file = fs::File::options().write(true).open(guest.image()).unwrap();
    file.set_len(0).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(around, 0).unwrap();
    file.write_all_at(&volume, offset).unwrap();
    guest
}

#[test]
fn three_commits_prove_a_mounted_partition_and_fewer_do_not() {
    let guest = move_inside(Guest::make("mkfs.ext4 -q -F -L root", 64), 80 * MIB, MIB, &[]);
    let image = guest.image();
    let script = image.with_extension("sfdisk");
    fs::write(&script, "label: gpt\nstart=2048, size=131072\n").unwrap();
    run(
        "sh",
        &[
            "-c",
            &format!("sfdisk -q {} < {}", image.display(), script.display()),
        ],
        &[0],
    );
    let guest = guest.mount(&format!("offset={MIB}"));
    commit(&guest, 2);
    let disk = guest.disk();
    let mut proofs = Proofs::new(80 * MIB, rules());
    let first = Look::running(&disk, Instant::now());
    proofs.add(&first);
    let deferred = first.free.free_bytes();
    assert!(deferred > 0);
    assert_eq!(proofs.missing(&first.free, 80 * MIB), deferred);
    commit(&guest, 2);
    proofs.add(&Look::running(&disk, Instant::now()));
    let line = |proofs: &Proofs| {
        let mut lines = proofs.parts().filter(|part| part.kind == "ext4");
        lines.next().unwrap().clone()
    };
    assert_eq!(line(&proofs).proof, None);
    assert_eq!(proofs.free().free_bytes(), 0);
    commit(&guest, 1);
    let third = Look::running(&disk, Instant::now());
    proofs.add(&third);
    let line = line(&proofs);
    assert_eq!(line.proof, Some(Proof::Journal));
    assert_eq!(line.name, "partition 1: ext4 'root'");
    assert_eq!(line.free_bytes, proofs.free().free_bytes());
    assert!(proofs.missing(&first.free, 80 * MIB) < deferred / 50);
    assert!(second_look(proofs.free(), &third).send.is_empty());
    fs::write(guest.root().join("large"), vec![9; 3 << 20]).unwrap();
    commit(&guest, 1);
    let second = second_look(proofs.free(), &Look::running(&disk, Instant::now()));
    assert!(second.bytes >= 3 << 20, "{second:?}");
    assert_eq!(
        second.bytes,
        second.send.iter().map(|extent| extent.len()).sum::<u64>()
    );
    assert_eq!(second.unseen, 0);
}

#[test]
fn free_extents_need_two_equal_readings_and_a_volume_its_journal() {
    let pv = Pv::new(0, 101 * MIB);
    let text = group(
        std::slice::from_ref(&pv),
        &[lv("root", &[(64, "striped", &linear(0, 10))])],
    );
    let mut around = vec![0; 101 << 20];
    pv.write(&mut around, &text, 0);
    let at = pv.extents(10, 64).offset();
    let guest = move_inside(Guest::make("mkfs.ext4 -q -F", 64), 101 * MIB, at, &around);
    let guest = guest.mount(&format!("offset={at}"));
    commit(&guest, 1);
    let disk = guest.disk();
    let mut proofs = Proofs::new(101 * MIB, rules());
    proofs.add(&Look::running(&disk, Instant::now()));
    assert_eq!(
        proofs.free().free_bytes(),
        0,
        "{:?}",
        proofs.parts().collect::<Vec<_>>()
    );
    proofs.add(&Look::running(&disk, Instant::now()));
    let of = |proofs: &Proofs, proof| {
        let lines = proofs.parts().filter(|part| part.proof == Some(proof));
        lines.map(|part| part.free_bytes).sum::<u64>()
    };
    assert_eq!(of(&proofs, Proof::FreeExtents), (100 - 64) * MIB);
    commit(&guest, 3);
    proofs.add(&Look::running(&disk, Instant::now()));
    assert!(
        of(&proofs, Proof::Journal) > 30 * MIB,
        "{:?}",
        proofs.parts().collect::<Vec<_>>()
    );
    assert_eq!(
        proofs.free().free_bytes(),
        of(&proofs, Proof::Journal) + of(&proofs, Proof::FreeExtents)
    );
}
