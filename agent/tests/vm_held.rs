//! What is done to a running VM so that it can be moved, on a real QEMU: writes held down and let go exactly as before, media taken
//! out and put back, memory's rate asked; and a firmware's variable store as a disk like any other.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod vm_qemu;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::image::LiveImage;
use longhaul_agent::vm::attach::look;
use longhaul_agent::vm::facts::{DiskFacts, DiskKind};
use longhaul_agent::vm::io_limit;
use longhaul_agent::vm::media::Medium;
use longhaul_agent::vm::qmp::Qmp;
use longhaul_agent::vm::ram_rate::{self, RamRateError};
use longhaul_agent::vm::rounds::{GRANULARITY, Rounds, RoundsOptions, bitmaps};
use serde_json::{Value, json};
use vm_qemu::{DISK, Qemu, raw, wait_busy, write};

/// Where Debian's package seabios has the BIOS that QEMU starts.
const BIOS: &str = "/usr/share/seabios/bios-256k.bin";
/// As large as OVMF's store of variables: no multiple of a bitmap's granularity.
const VARS: u64 = 528 << 10;

async fn inserted(qmp: &Qmp, node: &str) -> Value {
    let blocks: Vec<Value> = qmp.query("query-block").await.unwrap();
    let mut found = blocks.iter().map(|block| &block["inserted"]);
    found
        .find(|inserted| inserted["node-name"] == *node)
        .unwrap()
        .clone()
}

async fn disk(qmp: &Qmp, name: &str) -> DiskFacts {
    let facts = look(qmp).await.unwrap();
    let found = facts.disks.iter().find(|disk| disk.name == name);
    found
        .unwrap_or_else(|| panic!("no {name} in {:?}", facts.disks))
        .clone()
}

/// Limits of every kind that a VM may have already.
fn limited(folder: &Path) -> Vec<String> {
    let drive = |name: &str, more: &str| {
        let path = raw(folder, &format!("{name}.raw"));
        [
            "-drive".to_owned(),
            format!("file={},format=raw,if=none,id={name}{more}", path.display()),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive={name},id=v{name}"),
        ]
    };
    let total =
        ",throttling.bps-total=4000000,throttling.bps-total-max=8000000,throttling.bps-total-max-length=3";
    let split = ",throttling.bps-read=3000000,throttling.iops-write=500,throttling.iops-size=4096";
    let shared = ",throttling.bps-write=9000000,throttling.group=pair";
    let blockdev = raw(folder, "plain.raw");
    let mut all = vec![
        "-blockdev".to_owned(),
        format!(
            "driver=raw,node-name=plain,file.driver=file,file.filename={}",
            blockdev.display()
        ),
        "-device".to_owned(),
        "virtio-blk-pci,drive=plain,id=vplain".to_owned(),
    ];
    for (name, more) in [
        ("total", total),
        ("split", split),
        ("one", shared),
        ("two", shared),
    ] {
        all.extend(drive(name, more));
    }
    all
}

#[tokio::test]
async fn writes_are_held_down_and_let_go_exactly_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let more = limited(folder.path());
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    let qemu = Qemu::with(&more);
    let qmp = qemu.qmp().await;
    let mut nodes = Vec::new();
    for name in ["vd0", "vplain", "vtotal", "vsplit", "vone", "vtwo"] {
        nodes.push(disk(&qmp, name).await.node);
    }
    let before = io_limit::read(&qmp, &nodes).await.unwrap();
    let told: Vec<Value> = qmp.query("query-block").await.unwrap();

    io_limit::hold(&qmp, &before, 100_000).await.unwrap();
    for (node, key, expected) in [
        (0, "bps_wr", 100_000),
        (1, "bps_wr", 100_000),
        (2, "bps", 100_000),
        (3, "bps_wr", 100_000),
        (3, "bps_rd", 3_000_000),
        (3, "iops_wr", 500),
        (4, "bps_wr", 200_000),
        (5, "bps_wr", 200_000),
    ] {
        assert_eq!(
            inserted(&qmp, &nodes[node]).await[key],
            expected,
            "{} {key}",
            nodes[node]
        );
    }
    let began = Instant::now();
    // The first one only fills the bucket.
    write(&qmp, "d0", 0x55, 0, 200_000).await;
    write(&qmp, "d0", 0x55, 0, 4096).await;
    assert!(
        began.elapsed() > Duration::from_millis(700),
        "took {:?}",
        began.elapsed()
    );

    // A crash between the two: the record says how it was.
    let record = serde_json::to_string(&before).unwrap();
    let saved: Vec<io_limit::SavedLimits> = serde_json::from_str(&record).unwrap();
    for _ in 0..2 {
        io_limit::put_back(&qmp, &saved).await.unwrap();
        assert_eq!(io_limit::read(&qmp, &nodes).await.unwrap(), before);
    }
    let now: Vec<Value> = qmp.query("query-block").await.unwrap();
    for (one, two) in told.iter().zip(&now) {
        let limits = |block: &Value| {
            let fields = block["inserted"].as_object().unwrap().clone();
            let limits = fields
                .into_iter()
                .filter(|(key, _)| key.contains("ps") || key == "group");
            limits.collect::<Vec<_>>()
        };
        assert_eq!(limits(one), limits(two));
    }
    assert!(io_limit::read(&qmp, &["nobody".to_owned()]).await.is_err());
}

#[tokio::test]
async fn media_are_taken_out_and_put_back() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (raw(folder.path(), "one.iso"), raw(folder.path(), "two.iso"));
    let qemu = Qemu::with(&[
        "-drive",
        &format!(
            "file={},format=raw,if=none,id=c0,media=cdrom,readonly=on",
            one.display()
        ),
        "-device",
        "ide-cd,drive=c0,id=cd0,bus=ide.0",
        "-blockdev",
        &format!(
            "driver=raw,node-name=iso,read-only=on,file.driver=file,file.filename={}",
            two.display()
        ),
        "-device",
        "ide-cd,drive=iso,id=cd1,bus=ide.1",
    ]);
    let qmp = qemu.qmp().await;
    for name in ["cd0", "cd1"] {
        let found = disk(&qmp, name).await;
        assert!(
            found.is_read_only && found.is_removable && !found.is_locked,
            "{found:?}"
        );
        assert_eq!((found.kind, found.size), (DiskKind::Cdrom, DISK));
        let medium = Medium::of(&found);
        medium.eject(&qmp).await.unwrap();
        let facts = look(&qmp).await.unwrap();
        assert!(
            facts.disks.iter().all(|disk| disk.name != name),
            "{:?}",
            facts.disks
        );
        // As the record of a former life has it; twice, for it may have come that far.
        let medium: Medium = serde_json::from_str(&serde_json::to_string(&medium).unwrap()).unwrap();
        for _ in 0..2 {
            medium.insert(&qmp).await.unwrap();
        }
        let back = disk(&qmp, name).await;
        assert_eq!(
            (back.file, back.size, back.is_read_only),
            (found.file, found.size, true)
        );
    }
}

#[tokio::test]
async fn the_rate_of_memory_is_measured() {
    let qemu = Qemu::busy();
    let qmp = qemu.qmp().await;
    wait_busy(&qmp).await;
    let began = Instant::now();
    let rate = ram_rate::measure(&qmp, 32 << 20, 1).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(6));
    // The guest writes the same half MiB over and over: pages count, not writes.
    assert!((1 << 19..4 << 20).contains(&rate), "{rate} bytes/s");
    // A QEMU that is gone has no rate, and nobody waits for it.
    drop(qemu);
    let gone = ram_rate::measure(&qmp, 32 << 20, 1).await;
    assert!(matches!(gone, Err(RamRateError::Qmp(_))), "{gone:?}");
}

#[tokio::test]
async fn a_store_of_firmware_variables_is_a_disk() {
    if !Path::new(BIOS).exists() {
        eprintln!("not tested here: no {BIOS}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let vars = folder.path().join("vars.fd");
    File::create(&vars).unwrap().set_len(VARS).unwrap();
    let qemu = Qemu::with(&[
        "-drive",
        &format!("if=pflash,unit=0,format=raw,readonly=on,file={BIOS}"),
        "-drive",
        &format!("if=pflash,unit=1,format=raw,file={}", vars.display()),
    ]);
    let qmp = qemu.qmp().await;
    let (code, store) = (disk(&qmp, "pflash0").await, disk(&qmp, "pflash1").await);
    assert!(code.kind == DiskKind::Flash && code.is_read_only, "{code:?}");
    assert!(store.kind == DiskKind::Flash && !store.is_read_only, "{store:?}");
    assert_eq!(store.size, VARS);
    let options = RoundsOptions {
        job: "0f0f0f0f".into(),
        nodes: vec![store.node.clone()],
        granularity: GRANULARITY,
        socket: qemu.path("nbd.sock"),
        foreign_socket: None,
    };
    let mut rounds = Rounds::start(&qmp, options).await.unwrap();
    rounds.finish().await.unwrap();
    // The last piece of the bitmap is shorter than the others.
    write(&qmp, "pflash1", 0x77, VARS - 4096, 4096).await;
    rounds.next().await.unwrap();
    let export = rounds.exports()[0].clone();
    let sockets = rounds.sockets(1).await.unwrap();
    let (dirty, last) = tokio::task::spawn_blocking(move || {
        let image =
            LiveImage::connect(&export.socket, &export.export, export.bitmap.as_ref(), sockets).unwrap();
        let mut dirty = Vec::new();
        image.each_dirty(|extents| dirty.extend(extents)).unwrap();
        let mut last = vec![0; 4096];
        image.read_exact_at(&mut last, VARS - 4096).unwrap();
        (dirty, last)
    })
    .await
    .unwrap();
    assert_eq!(
        (dirty.len(), dirty[0].offset(), dirty[0].end()),
        (1, 512 << 10, VARS)
    );
    assert_eq!(last, vec![0x77; 4096]);
    rounds.finish().await.unwrap();
    rounds.remove().await.unwrap();
    assert_eq!(bitmaps(&qmp).await.unwrap(), []);
    let saved = io_limit::read(&qmp, &[store.node]).await.unwrap();
    io_limit::hold(&qmp, &saved, 1 << 20).await.unwrap();
    io_limit::put_back(&qmp, &saved).await.unwrap();
    let mut stored = vec![0; 4096];
    File::open(&vars)
        .unwrap()
        .read_exact_at(&mut stored, VARS - 4096)
        .unwrap();
    assert_eq!(stored, vec![0x77; 4096]);
    let version: Value = qmp.execute("query-version", json!({})).await.unwrap();
    assert!(version["qemu"]["major"].is_u64());
}
