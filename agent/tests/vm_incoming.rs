//! A whole migration between two real QEMUs, the bytes carried by this test; and the way back from every state.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod vm_qemu;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::image::LiveImage;
use longhaul_agent::vm::incoming::{Files, Incoming, IncomingError, Template, Values};
use longhaul_agent::vm::outgoing::{
    Cancelled, Outgoing, OutgoingError, OutgoingOptions, Saved, cancel, stats, throttle,
};
use longhaul_agent::vm::qmp::{MigrationStatus, Qmp};
use longhaul_agent::vm::rounds::{GRANULARITY, Rounds, RoundsOptions, add_bitmaps, bitmaps, exports, sweep};
use longhaul_common::extent::Extent;
use serde_json::{Value, json};
use vm_qemu::{DISK, Qemu, UUID, write};

const LIMIT: Duration = Duration::from_secs(15);

/// Ends the QEMU with this pid file, which lies in a folder of this test's own: a QEMU outlives whoever started it.
struct EndOnDrop(PathBuf);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(&self.0)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let ours = |pid: &i32| {
            let words = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.contains(&self.0.display().to_string())
        };
        let pid = pid.filter(ours);
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

struct Target {
    _end: EndOnDrop,
    folder: tempfile::TempDir,
    incoming: Incoming,
    raw: PathBuf,
    qcow2: PathBuf,
}

fn template() -> Template {
    let mut parts = vec![vm_qemu::program()];
    parts.extend(vm_qemu::arguments(
        Path::new("{disk0}"),
        Path::new("{disk1}"),
        Path::new("{qmp}"),
    ));
    for part in ["-S", "-incoming", "{incoming}", "-pidfile", "{pidfile}"] {
        parts.push(part.to_owned());
    }
    Template(parts)
}

async fn target() -> Target {
    let folder = tempfile::tempdir().unwrap();
    let raw = vm_qemu::raw(folder.path(), "t0.raw");
    let qcow2 = vm_qemu::qcow2(folder.path(), "t1.qcow2");
    let files = Files::in_folder(folder.path(), "target");
    let values = Values {
        disks: &[&raw, &qcow2],
        qmp: &folder.path().join("qmp.sock"),
        pid_file: &files.pid,
        name: "web",
        uuid: Some(UUID),
    };
    let incoming = Incoming::start(&template(), &values, &files).await.unwrap();
    Target {
        _end: EndOnDrop(files.pid.clone()),
        incoming,
        raw,
        qcow2,
        folder,
    }
}

async fn is_running(qmp: &Qmp) -> bool {
    let status: Value = qmp.query("query-status").await.unwrap();
    status["running"] == true
}

async fn rounds(qemu: &Qemu, qmp: &Qmp) -> Rounds {
    let options = RoundsOptions {
        job: "feedbeef".into(),
        nodes: nodes(qmp).await,
        granularity: GRANULARITY,
        socket: qemu.path("nbd.sock"),
        foreign_socket: None,
    };
    Rounds::start(qmp, options).await.unwrap()
}

/// Copies the stream; the byte count comes back.
fn carry(mut from: UnixStream, to: Option<UnixStream>) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let (mut buf, mut count) = (vec![0; 1 << 16], 0);
        while let Ok(read @ 1..) = from.read(&mut buf) {
            if let Some(mut to) = to.as_ref() {
                to.write_all(&buf[..read]).unwrap();
            }
            count += read as u64;
        }
        count
    })
}

/// Copies what the open round says is dirty (all, in round 0) into plain memory.
async fn copy(rounds: &mut Rounds, disks: &mut [Vec<u8>]) {
    for (export, disk) in rounds.exports().to_vec().into_iter().zip(disks) {
        let mut copy = std::mem::take(disk);
        let sockets = rounds.sockets(2).await.unwrap();
        *disk = tokio::task::spawn_blocking(move || {
            let bitmap = export.bitmap.as_ref();
            let image = LiveImage::connect(&export.socket, &export.export, bitmap, sockets).unwrap();
            let whole = Extent::between(0, DISK);
            let extents = match bitmap {
                Some(_) => image.dirty(whole).unwrap(),
                None => vec![whole],
            };
            for extent in extents {
                let range = extent.offset() as usize..extent.end() as usize;
                image.read_exact_at(&mut copy[range], extent.offset()).unwrap();
            }
            copy
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn a_running_vm_moves_with_its_disks() {
    let source = Qemu::busy();
    let qmp = source.qmp().await;
    vm_qemu::wait_busy(&qmp).await;
    write(&qmp, "d0", 0x41, 1 << 20, 1 << 20).await;
    let mut disks = vec![vec![0; DISK as usize]; 2];
    let mut rounds = rounds(&source, &qmp).await;
    copy(&mut rounds, &mut disks).await;
    write(&qmp, "d0", 0x42, 3 << 20, 100_000).await;
    write(&qmp, "d1", 0x43, 7 << 20, 5_000).await;
    rounds.finish().await.unwrap();

    let mut target = target().await;
    let socket = target.folder.path().join("ram.sock");
    target.incoming.listen(&socket).await.unwrap();
    let (outgoing, stream) = Outgoing::start(&qmp, &OutgoingOptions::default(), |_| {})
        .await
        .unwrap();
    outgoing.wait_active(&qmp, LIMIT).await.unwrap();
    // While nobody reads, QEMU cannot come to an end: the guest runs on.
    rounds.next().await.unwrap();
    copy(&mut rounds, &mut disks).await;
    write(&qmp, "d1", 0x44, 9 << 20, 5_000).await;
    rounds.finish().await.unwrap();
    assert!(is_running(&qmp).await);
    assert!(matches!(
        target.incoming.run().await,
        Err(IncomingError::NotLoaded(_))
    ));

    let carried = carry(stream, Some(UnixStream::connect(&socket).unwrap()));
    outgoing.switch_over(&qmp).await.unwrap();
    outgoing.wait_pre_switchover(&qmp, LIMIT).await.unwrap();
    assert!(!is_running(&qmp).await);
    rounds.next().await.unwrap();
    copy(&mut rounds, &mut disks).await;
    rounds.finish().await.unwrap();
    rounds.remove().await.unwrap();
    assert_eq!(bitmaps(&qmp).await.unwrap(), []);
    // The target's images are ours until `cont`.
    std::fs::write(&target.raw, &disks[0]).unwrap();
    fill_qcow2(&target.qcow2, &disks[1]);
    outgoing.go_on(&qmp).await.unwrap();
    outgoing.wait_completed(&qmp, LIMIT).await.unwrap();
    target.incoming.wait_loaded(LIMIT).await.unwrap();
    // For the way back: on before the first write of the guest.
    let back = nodes(target.incoming.qmp()).await;
    add_bitmaps(target.incoming.qmp(), &back, "longhaul-back", GRANULARITY)
        .await
        .unwrap();
    target.incoming.run().await.unwrap();
    assert!(target.incoming.is_running().await.unwrap());
    assert!(carried.join().unwrap() > 100_000);
    for (drive, pattern, offset) in [
        ("d0", 0x41, 1 << 20),
        ("d0", 0x42, 3 << 20),
        ("d1", 0x43, 7 << 20),
        ("d1", 0x44, 9 << 20),
    ] {
        let line = format!("qemu-io {drive} \"read -P {pattern} {offset} 5000\"");
        target.incoming.qmp().human(&line).await.unwrap();
    }
    let log = std::fs::read_to_string(target.folder.path().join("target.log")).unwrap();
    assert_eq!(
        (log.matches("read 5000/5000").count(), log.contains("failed")),
        (4, false),
        "{log}"
    );
    write(target.incoming.qmp(), "d1", 0x45, 0, 4096).await;
    let counts = bitmaps(target.incoming.qmp()).await.unwrap();
    let dirty = |node: &String| counts.iter().find(|info| info.node == *node).unwrap().count;
    assert_eq!(back.iter().map(dirty).collect::<Vec<_>>(), [0, 65536]);
    target.incoming.abort().await;
}

async fn nodes(qmp: &Qmp) -> Vec<String> {
    let blocks: Vec<Value> = qmp.query("query-block").await.unwrap();
    let of = |device: &str| {
        let block = blocks.iter().find(|block| block["device"] == device).unwrap();
        block["inserted"]["node-name"].as_str().unwrap().to_owned()
    };
    vec![of("d0"), of("d1")]
}

fn fill_qcow2(path: &Path, content: &[u8]) {
    let raw = path.with_extension("raw");
    std::fs::write(&raw, content).unwrap();
    let done = std::process::Command::new("qemu-img")
        .args(["convert", "-n", "-f", "raw", "-O", "qcow2"])
        .args([&raw, path])
        .status()
        .unwrap();
    assert!(done.success());
}

async fn settings(qmp: &Qmp) -> Value {
    let capabilities: Value = qmp.query("query-migrate-capabilities").await.unwrap();
    let parameters: Value = qmp.query("query-migrate-parameters").await.unwrap();
    json!([capabilities, parameters])
}

#[tokio::test]
async fn called_back_from_every_state_the_vm_runs_as_before() {
    let source = Qemu::start();
    let qmp = source.qmp().await;
    let change = json!({ "capabilities": [{ "capability": "xbzrle", "state": true }] });
    qmp.execute("migrate-set-capabilities", change).await.unwrap();
    let before = settings(&qmp).await;
    let running = |found, settled, continued| Cancelled {
        found,
        settled,
        continued,
        running: true,
    };
    use MigrationStatus::{Active, Cancelled as Off, Completed, PreSwitchover};

    // While RAM flows and nobody reads: the socket is full.
    let small = OutgoingOptions {
        send_buffer: 16 << 10,
        may_throttle: true,
        listen: None,
    };
    let (outgoing, stream) = Outgoing::start(&qmp, &small, |_| {}).await.unwrap();
    outgoing.wait_active(&qmp, LIMIT).await.unwrap();
    throttle(&qmp, Some(60)).await.unwrap();
    throttle(&qmp, None).await.unwrap();
    assert_ne!(settings(&qmp).await, before);
    let twice = Outgoing::start(&qmp, &small, |_| {}).await.unwrap_err();
    assert!(matches!(twice, OutgoingError::AlreadyMigrating), "{twice}");
    assert_eq!(
        outgoing.cancel(&qmp, LIMIT).await.unwrap(),
        running(Active, Off, false)
    );
    assert_eq!(settings(&qmp).await, before);
    drop(stream);

    // In pre-switchover, with a round open; the bitmaps go on.
    let mut rounds = rounds(&source, &qmp).await;
    rounds.finish().await.unwrap();
    let (outgoing, stream) = Outgoing::start(&qmp, &OutgoingOptions::default(), |_| {})
        .await
        .unwrap();
    let carried = carry(stream, None);
    outgoing.switch_over(&qmp).await.unwrap();
    outgoing.wait_pre_switchover(&qmp, LIMIT).await.unwrap();
    rounds.next().await.unwrap();
    let called_back = outgoing.cancel(&qmp, LIMIT).await.unwrap();
    assert_eq!(called_back, running(PreSwitchover, Off, false));
    carried.join().unwrap();
    write(&qmp, "d0", 1, 0, 65536).await;
    assert_eq!(rounds.dirty_bytes().await.unwrap(), [65536, 0]);
    rounds.give_back().await.unwrap();

    // After `completed`.
    let (outgoing, stream) = Outgoing::start(&qmp, &OutgoingOptions::default(), |_| {})
        .await
        .unwrap();
    let carried = carry(stream, None);
    outgoing.switch_over(&qmp).await.unwrap();
    outgoing.wait_pre_switchover(&qmp, LIMIT).await.unwrap();
    rounds.next().await.unwrap();
    outgoing.go_on(&qmp).await.unwrap();
    outgoing.wait_completed(&qmp, LIMIT).await.unwrap();
    carried.join().unwrap();
    assert!(!is_running(&qmp).await);
    let called_back = outgoing.cancel(&qmp, LIMIT).await.unwrap();
    assert_eq!(called_back, running(Completed, Completed, true));
    write(&qmp, "d0", 1, 1 << 20, 65536).await;
    rounds.give_back().await.unwrap();
    assert_eq!(rounds.dirty_bytes().await.unwrap(), [131_072, 0]);
    rounds.remove().await.unwrap();
    assert_eq!(settings(&qmp).await, before);
    // Once more is harmless.
    assert_eq!(
        cancel(&qmp, None, LIMIT).await.unwrap(),
        running(Completed, Completed, false)
    );
}

#[tokio::test]
async fn an_agent_that_died_in_pre_switchover_is_cleaned_up_after() {
    let source = Qemu::start();
    let qmp = source.qmp().await;
    let before = settings(&qmp).await;
    let mut rounds = rounds(&source, &qmp).await;
    rounds.finish().await.unwrap();
    let mut journal = Vec::new();
    let (outgoing, stream) = Outgoing::start(&qmp, &OutgoingOptions::default(), |saved| {
        journal = serde_json::to_vec(saved).unwrap();
    })
    .await
    .unwrap();
    let carried = carry(stream, None);
    outgoing.switch_over(&qmp).await.unwrap();
    outgoing.wait_pre_switchover(&qmp, LIMIT).await.unwrap();
    rounds.next().await.unwrap();
    drop((outgoing, rounds, qmp));

    let started = std::time::Instant::now();
    let qmp = source.qmp().await;
    let saved: Saved = serde_json::from_slice(&journal).unwrap();
    let called_back = cancel(&qmp, Some(&saved), LIMIT).await.unwrap();
    assert!(called_back.running && called_back.found == MigrationStatus::PreSwitchover);
    let swept = sweep(&qmp, &source.path("nbd.sock"), |_| false).await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(
        (swept.exports.len(), swept.bitmaps.len(), swept.server),
        (2, 4, true)
    );
    assert_eq!(exports(&qmp).await.unwrap(), []);
    assert_eq!(settings(&qmp).await, before);
    carried.join().unwrap();
}

#[tokio::test]
async fn a_broken_stream_ends_the_target_with_its_reason() {
    let mut target = target().await;
    let socket = target.folder.path().join("ram.sock");
    target.incoming.listen(&socket).await.unwrap();
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream
        .write_all(b"this is not a migration stream at all")
        .unwrap();
    drop(stream);
    let error = target.incoming.wait_loaded(LIMIT).await.unwrap_err();
    let (IncomingError::Died { said, .. } | IncomingError::LoadFailed { said, .. }) = &error else {
        panic!("{error}")
    };
    assert!(said.contains("migration stream"), "{error}");
}

#[tokio::test]
async fn a_target_is_found_again_and_given_up() {
    let target = target().await;
    let files = Files::in_folder(target.folder.path(), "target");
    let socket = target.folder.path().join("qmp.sock");
    // The agent's death: handles go, the process stays.
    drop(target.incoming);
    let stranger = Incoming::find(&socket, Some("00000000-0000-0000-0000-000000000001"), &files).await;
    assert!(stranger.unwrap().is_none());
    let found = Incoming::find(&socket, Some(UUID), &files)
        .await
        .unwrap()
        .unwrap();
    assert!(found.is_ours() && !found.is_running().await.unwrap());
    assert_eq!(stats(found.qmp()).await.unwrap().status, MigrationStatus::None);
    found.abort().await;
    assert!(
        Incoming::find(&socket, Some(UUID), &files)
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn a_waiting_qemu_is_adopted_and_a_running_one_is_not() {
    let running = Qemu::start();
    drop(running.qmp().await);
    let refused = Incoming::adopt(&running.path("qmp.sock")).await.unwrap_err();
    assert!(matches!(refused, IncomingError::NotWaiting { .. }), "{refused}");
    let waiting = Qemu::with(&["-S", "-incoming", "defer"]);
    drop(waiting.qmp().await);
    let adopted = Incoming::adopt(&waiting.path("qmp.sock")).await.unwrap();
    assert!(!adopted.is_ours());
    adopted.abort().await;
    waiting.qmp().await; // It was not ours to end.
}

#[tokio::test]
async fn a_tail_that_nobody_takes_is_given_up_by_closing_the_socket() {
    let source = Qemu::busy();
    let qmp = source.qmp().await;
    vm_qemu::wait_busy(&qmp).await;
    let small = OutgoingOptions {
        send_buffer: 16 << 10,
        ..OutgoingOptions::default()
    };
    let (outgoing, mut stream) = Outgoing::start(&qmp, &small, |_| {}).await.unwrap();
    outgoing.switch_over(&qmp).await.unwrap();
    let mut waiting = Box::pin(outgoing.wait_pre_switchover(&qmp, LIMIT));
    let mut piece = vec![0; 64 << 10];
    stream.set_nonblocking(true).unwrap();
    loop {
        let _ = stream.read(&mut piece);
        let moment = tokio::time::timeout(Duration::from_millis(1), &mut waiting).await;
        if let Ok(reached) = moment {
            reached.unwrap();
            break;
        }
    }
    drop(waiting);
    // The device state alone is more than the socket holds: QEMU blocks, and its monitor with it.
    outgoing.go_on(&qmp).await.unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(10);
    let deaf = async || {
        let asked = qmp.execute_within("query-status", json!({}), Duration::from_millis(300));
        asked.await.is_err()
    };
    while !deaf().await {
        assert!(std::time::Instant::now() < until, "QEMU still answers");
    }
    drop(stream);
    let called_back = outgoing.cancel(&qmp, LIMIT).await.unwrap();
    assert!(called_back.running, "{called_back:?}");
    // Which of the two ends comes first is QEMU's affair.
    use MigrationStatus::{Cancelled, Failed};
    assert!(
        matches!(called_back.settled, Failed | Cancelled),
        "{called_back:?}"
    );
}

#[tokio::test]
async fn ram_flows_through_a_path_too() {
    let source = Qemu::start();
    let qmp = source.qmp().await;
    let path = source.path("ram.sock");
    let options = OutgoingOptions {
        listen: Some(path.clone()),
        ..OutgoingOptions::default()
    };
    let (outgoing, mut stream) = Outgoing::start(&qmp, &options, |_| {}).await.unwrap();
    assert!(!path.exists());
    let mut magic = [0; 4];
    stream.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"QEVM");
    assert!(outgoing.cancel(&qmp, LIMIT).await.unwrap().running);
}

#[tokio::test]
async fn a_command_that_fails_is_told_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let files = Files::in_folder(folder.path(), "target");
    let values = Values {
        disks: &[],
        qmp: &folder.path().join("qmp.sock"),
        pid_file: &files.pid,
        name: "web",
        uuid: None,
    };
    let parts = [
        &vm_qemu::program(),
        "-S",
        "-incoming",
        "defer",
        "-qmp",
        "unix:{qmp},server=on,wait=off",
        "-pidfile",
        "{pidfile}",
        "-device",
        "nonsense",
    ];
    let template = Template(parts.iter().map(|&part| part.to_owned()).collect());
    let error = Incoming::start(&template, &values, &files).await.unwrap_err();
    assert!(
        matches!(error, IncomingError::Died { .. }) && error.to_string().contains("nonsense"),
        "{error}"
    );
    let missing = Template(
        std::iter::once("no-such-program".to_owned())
            .chain(template.0[1..].iter().cloned())
            .collect(),
    );
    let error = Incoming::start(&missing, &values, &files).await.unwrap_err();
    assert!(error.to_string().contains("no-such-program"), "{error}");
}
