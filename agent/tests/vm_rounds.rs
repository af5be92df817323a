//! Rounds on a real QEMU: what a bitmap holds, what its export shows, and that nothing is left behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod vm_qemu;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::image::nbd::{ConnectOptions, Connection, Headers};
use longhaul_agent::disk::image::{LiveImage, READ_MAX};
use longhaul_agent::vm::qmp::Qmp;
use longhaul_agent::vm::rounds::{
    GRANULARITY, RoundExport, Rounds, RoundsError, RoundsOptions, add_bitmaps, bitmaps, exports, find_since,
    since_name, start_since, sweep,
};
use longhaul_common::extent::Extent;
use longhaul_common::ids::{DiskIndex, JobId};
use longhaul_common::wire::session::ShadowId;
use serde_json::{Value, json};
use vm_qemu::{DISK, Qemu, write};

async fn nodes(qmp: &Qmp) -> Vec<String> {
    let blocks: Vec<Value> = qmp.query("query-block").await.unwrap();
    let node = |block: &Value| block["inserted"]["node-name"].as_str().map(str::to_owned);
    let of = |device: &str| {
        blocks
            .iter()
            .find(|block| block["device"] == device)
            .and_then(node)
    };
    vec![of("d0").unwrap(), of("d1").unwrap()]
}

async fn options(qemu: &Qemu, qmp: &Qmp) -> RoundsOptions {
    RoundsOptions {
        job: "0a1b2c3d".into(),
        nodes: nodes(qmp).await,
        granularity: GRANULARITY,
        socket: qemu.path("nbd.sock"),
        foreign_socket: None,
    }
}

/// Reads on a thread: a `LiveImage` blocks.
async fn with_image<R: Send + 'static>(
    rounds: &mut Rounds,
    disk: usize,
    look: impl FnOnce(LiveImage) -> R + Send + 'static,
) -> R {
    let export = rounds.exports()[disk].clone();
    let sockets = rounds.sockets(4).await.unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let bitmap = export.bitmap.as_ref();
        look(LiveImage::connect(&export.socket, &export.export, bitmap, sockets).unwrap())
    });
    reading.await.unwrap()
}

async fn dirty(rounds: &mut Rounds, disk: usize) -> Vec<(u64, u64)> {
    with_image(rounds, disk, |image| {
        let mut all = Vec::new();
        let add = |extents: Vec<Extent>| all.extend(extents.iter().map(|e| (e.offset(), e.end())));
        image.each_dirty(add).unwrap();
        all
    })
    .await
}

#[tokio::test]
async fn rounds_hold_what_was_written_and_leave_nothing() {
    let qemu = Qemu::start();
    let qmp = qemu.qmp().await;
    let mut rounds = Rounds::start(&qmp, options(&qemu, &qmp).await).await.unwrap();
    write(&qmp, "d0", 0x11, 1 << 20, 65536).await;
    write(&qmp, "d1", 0x22, 5 << 20, 4096).await;
    assert_eq!(rounds.round(), 0);
    let first = with_image(&mut rounds, 0, |image| {
        assert_eq!(image.size(), DISK);
        let threads: Vec<u8> = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let mut buf = vec![0; 65536];
                        image.read_exact_at(&mut buf, 1 << 20).unwrap();
                        buf[65535]
                    })
                })
                .collect();
            readers.into_iter().map(|reader| reader.join().unwrap()).collect()
        });
        assert_eq!(threads, vec![0x11; 8]);
        let runs = image.allocation(Extent::between(0, DISK)).unwrap();
        assert!(image.dirty(Extent::between(0, 4096)).is_err());
        runs.len()
    })
    .await;
    assert_eq!(first, 3, "hole, data, hole");
    assert_eq!(rounds.dirty_bytes().await.unwrap(), [65536, 65536]);
    assert!(matches!(rounds.next().await, Err(RoundsError::RoundOpen(0))));
    rounds.finish().await.unwrap();

    assert_eq!(rounds.next().await.unwrap(), 1);
    write(&qmp, "d0", 0x33, 2 << 20, 65536 * 2).await;
    assert_eq!(dirty(&mut rounds, 0).await, [(1 << 20, (1 << 20) + 65536)]);
    assert_eq!(dirty(&mut rounds, 1).await, [(5 << 20, (5 << 20) + 65536)]);
    assert_eq!(rounds.dirty_bytes().await.unwrap(), [131_072, 0]);
    rounds.give_back().await.unwrap();
    assert_eq!(rounds.dirty_bytes().await.unwrap(), [196_608, 65536]);

    rounds.next().await.unwrap();
    let both = [(1 << 20, (1 << 20) + 65536), (2 << 20, (2 << 20) + 131_072)];
    assert_eq!(dirty(&mut rounds, 0).await, both);
    rounds.finish().await.unwrap();
    rounds.remove().await.unwrap();
    nothing_left(&qmp).await;
    assert!(!qemu.path("nbd.sock").exists());
}

async fn nothing_left(qmp: &Qmp) {
    assert_eq!(bitmaps(qmp).await.unwrap(), []);
    assert_eq!(exports(qmp).await.unwrap(), []);
    let stopped = qmp.execute("nbd-server-stop", json!({})).await;
    assert!(stopped.is_err(), "the NBD server still runs");
}

#[tokio::test]
async fn what_a_crash_left_is_swept() {
    let qemu = Qemu::start();
    let qmp = qemu.qmp().await;
    let options = options(&qemu, &qmp).await;
    let mut rounds = Rounds::start(&qmp, options.clone()).await.unwrap();
    rounds.finish().await.unwrap();
    rounds.next().await.unwrap();
    // A reader that is still connected does not hold the sweep up.
    let (image, ended) = with_image(&mut rounds, 0, |image| (image, ())).await;
    drop((rounds, qmp));
    let _: () = ended;

    let qmp = qemu.qmp().await;
    let other = json!({ "node": options.nodes[0], "name": "someone-elses" });
    qmp.execute("block-dirty-bitmap-add", other).await.unwrap();
    let swept = sweep(&qmp, &options.socket, |_| false).await.unwrap();
    assert_eq!(
        (swept.exports.len(), swept.bitmaps.len(), swept.server),
        (2, 4, true)
    );
    let left: Vec<_> = bitmaps(&qmp).await.unwrap().into_iter().map(|b| b.name).collect();
    assert_eq!(left, ["someone-elses"]);
    assert!(sweep(&qmp, &options.socket, |_| false).await.unwrap().is_empty());
    let mut buf = [0; 512];
    assert!(
        tokio::task::spawn_blocking(move || image.read_exact_at(&mut buf, 0))
            .await
            .unwrap()
            .is_err()
    );
    // And a new job can begin.
    Rounds::start(&qmp, options)
        .await
        .unwrap()
        .remove()
        .await
        .unwrap();
}

#[tokio::test]
async fn somebody_elses_nbd_server_is_used_or_refused_and_never_stopped() {
    let qemu = Qemu::start();
    let qmp = qemu.qmp().await;
    let foreign: PathBuf = qemu.path("foreign.sock");
    let addr = json!({ "type": "unix", "data": { "path": foreign.to_str().unwrap() } });
    qmp.execute("nbd-server-start", json!({ "addr": addr }))
        .await
        .unwrap();
    let mut options = options(&qemu, &qmp).await;
    let refused = Rounds::start(&qmp, options.clone()).await.unwrap_err();
    assert!(matches!(refused, RoundsError::ServerTaken), "{refused}");
    options.foreign_socket = Some(qemu.path("qmp.sock"));
    let refused = Rounds::start(&qmp, options.clone()).await.unwrap_err();
    assert!(matches!(refused, RoundsError::NotItsServer(_)), "{refused}");
    options.foreign_socket = Some(foreign);
    let mut rounds = Rounds::start(&qmp, options.clone()).await.unwrap();
    assert_eq!(with_image(&mut rounds, 1, |image| image.size()).await, DISK);
    rounds.remove().await.unwrap();
    assert_eq!(exports(&qmp).await.unwrap(), []);
    assert!(sweep(&qmp, &options.socket, |_| false).await.unwrap().is_empty());
    qmp.execute("nbd-server-stop", json!({})).await.unwrap();
}

/// What a `kill -9` of the agent does: all of its sockets close at once, in the middle of a round. In QEMU 7.2 a client that
/// leaves an export in an I/O thread takes the VM with it.
#[tokio::test]
async fn the_vm_survives_a_reader_that_vanishes() {
    for _ in 0..5 {
        let qemu = Qemu::start();
        let qmp = qemu.qmp().await;
        let options = options(&qemu, &qmp).await;
        let mut rounds = Rounds::start(&qmp, options.clone()).await.unwrap();
        for disk in [0, 1] {
            let read = with_image(&mut rounds, disk, |image| image.read_exact_at(&mut [0; 4096], 0)).await;
            read.unwrap();
        }
        drop((rounds, qmp));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let qmp = qemu.qmp().await;
        let status: Value = qmp.query("query-status").await.unwrap();
        assert_eq!(status["running"], true);
        sweep(&qmp, &options.socket, |_| false).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        nothing_left(&qmp).await;
    }
}

/// Asks for `len` bytes on a connection, and is gone before the answer.
fn ask_and_vanish(export: &RoundExport, socket: OwnedFd, len: u32) {
    let mut wire = UnixStream::from(socket.try_clone().unwrap());
    let options = ConnectOptions::default();
    let connection = Connection::connect_on(socket, &export.socket, &export.export, &options).unwrap();
    // A read with neither flags nor cookie, of the disk's beginning.
    let mut request = Vec::new();
    match connection.export().headers {
        Headers::Extended => {
            request.extend(0x21e4_1c71_u32.to_be_bytes());
            request.extend([0; 20]);
            request.extend(u64::from(len).to_be_bytes());
        }
        Headers::Simple | Headers::Structured => {
            request.extend(0x2560_9513_u32.to_be_bytes());
            request.extend([0; 20]);
            request.extend(len.to_be_bytes());
        }
    }
    wire.write_all(&request).unwrap();
}

/// An agent that dies is no reader any more, and QEMU, which holds the socket's other end, does not notice. It drains its disks before
/// it changes bitmaps, and would wait for that answer for ever.
#[tokio::test]
async fn an_answer_that_nobody_reads_does_not_stop_the_vm() {
    let qemu = Qemu::start();
    let qmp = qemu.qmp().await;
    let options = options(&qemu, &qmp).await;
    let mut rounds = Rounds::start(&qmp, options.clone()).await.unwrap();
    write(&qmp, "d0", 0x11, 0, 4 << 20).await;
    let export = rounds.exports()[0].clone();
    let sockets = rounds.sockets(4).await.unwrap();
    let asked = tokio::task::spawn_blocking(move || {
        for socket in sockets {
            ask_and_vanish(&export, socket, READ_MAX as u32);
        }
    });
    asked.await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let action =
        json!({ "type": "block-dirty-bitmap-add", "data": { "node": options.nodes[0], "name": "after" } });
    let changed = qmp.execute("transaction", json!({ "actions": [action] }));
    let changed = tokio::time::timeout(Duration::from_secs(5), changed).await;
    changed.expect("QEMU stands").unwrap();
    rounds.finish().await.unwrap();
    rounds.remove().await.unwrap();
}

#[tokio::test]
async fn a_bitmap_from_before_is_taken_over_and_what_was_trimmed_is_forgotten() {
    let qemu = Qemu::start();
    let qmp = qemu.qmp().await;
    let nodes = nodes(&qmp).await;
    add_bitmaps(&qmp, &nodes, "longhaul-prepared-1", 4096)
        .await
        .unwrap();
    write(&qmp, "d0", 0x11, 1 << 20, 65536).await;
    let mut rounds = Rounds::start(&qmp, options(&qemu, &qmp).await).await.unwrap();
    write(&qmp, "d0", 0x22, 3 << 20, 65536).await;
    assert_eq!(rounds.dirty_bytes().await.unwrap(), [65536, 0]);
    rounds.forget_writes().await.unwrap();
    assert_eq!(rounds.dirty_bytes().await.unwrap(), [0, 0]);
    // The bitmap from before has recorded all of it.
    rounds.take_over("longhaul-prepared-1").await.unwrap();
    assert_eq!(rounds.dirty_bytes().await.unwrap(), [131_072, 0]);
    write(&qmp, "d0", 0x33, 5 << 20, 65536).await;
    rounds.finish().await.unwrap();
    rounds.next().await.unwrap();
    let parts = dirty(&mut rounds, 0).await;
    let expected = [1 << 20, 3 << 20, 5 << 20].map(|at: u64| (at, at + 65536));
    assert_eq!(parts, expected);
    rounds.finish().await.unwrap();
    rounds.remove().await.unwrap();
    assert_eq!(bitmaps(&qmp).await.unwrap(), []);
}

#[tokio::test]
async fn a_job_inherits_what_was_noted_before_it_and_leaves_it_recording() {
    let qemu = Qemu::start();
    let qmp = qemu.qmp().await;
    let options = options(&qemu, &qmp).await;
    let shadow = |disk| ShadowId {
        job: JobId::random(),
        generation: 1,
        disk: DiskIndex(disk),
    };
    let old = [shadow(0), shadow(1)];
    let noted = |ids: [ShadowId; 2]| -> Vec<_> { options.nodes.iter().cloned().zip(ids).collect() };
    start_since(&qmp, &noted(old), 4096).await.unwrap();
    let ids = [shadow(0), shadow(1)];
    start_since(&qmp, &noted(ids), 4096).await.unwrap();
    assert_eq!(find_since(&qmp, &options.nodes).await.unwrap(), ids.map(Some));
    write(&qmp, "d0", 0x11, 3 << 20, 4096).await;

    for written in [8 << 20, 12 << 20] {
        let mut rounds = Rounds::start(&qmp, options.clone()).await.unwrap();
        write(&qmp, "d0", 0x22, written, 4096).await;
        rounds.inherit(0, &since_name(&ids[0])).await.unwrap();
        assert!(
            rounds.inherit(1, &since_name(&ids[0])).await.is_err(),
            "of another disk"
        );
        assert!(
            rounds.inherit(2, &since_name(&ids[0])).await.is_err(),
            "of no disk"
        );
        rounds.finish().await.unwrap();
        rounds.next().await.unwrap();
        let dirty = dirty(&mut rounds, 0).await;
        let run = |at: u64| (at, at + 65536);
        // A job that ended without moving the VM took nothing away: the next one has all of it again.
        let expected: Vec<_> = [3 << 20, 8 << 20, 12 << 20]
            .into_iter()
            .filter(|at| *at <= written)
            .map(run)
            .collect();
        assert_eq!(dirty, expected);
        rounds.finish().await.unwrap();
        rounds.remove().await.unwrap();
        sweep(&qmp, &options.socket, |name| {
            !name.starts_with("longhaul-0a1b2c3d-")
        })
        .await
        .unwrap();
        assert_eq!(find_since(&qmp, &options.nodes).await.unwrap(), ids.map(Some));
    }

    let off = json!({ "node": options.nodes[0], "name": since_name(&ids[0]) });
    qmp.execute("block-dirty-bitmap-disable", off).await.unwrap();
    assert_eq!(
        find_since(&qmp, &options.nodes).await.unwrap(),
        [None, Some(ids[1])]
    );
    let rounds = Rounds::start(&qmp, options.clone()).await.unwrap();
    let lost = rounds.inherit(0, &since_name(&ids[0])).await.unwrap_err();
    assert!(matches!(lost, RoundsError::BitmapLost { .. }), "{lost}");
    rounds.remove().await.unwrap();
}
