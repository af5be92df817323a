//! The NBD client against QEMU's own server: writing, zeroing, trimming, flushing, states and dirty bitmaps.

#![allow(clippy::unwrap_used)] // A step that fails is a test that fails.

mod image_bench;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use image_bench::{Bench, random_content, run};
use longhaul_agent::disk::image::nbd::{
    BASE_ALLOCATION, ConnectOptions, Connection, NbdError, STATE_DIRTY, STATE_HOLE, STATE_ZERO,
};
use longhaul_common::extent::Extent;

const MIB: u64 = 1 << 20;

/// `qemu-nbd` on a socket, ended with the test.
struct Server {
    process: Child,
    socket: PathBuf,
}

impl Server {
    fn start(bench: &Bench, arguments: &[&str], image: &str) -> Self {
        let socket = bench.path("sock");
        let _ = std::fs::remove_file(&socket);
        let process = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=8", "--export-name=disk", "--socket"])
            .arg(&socket)
            .args(arguments)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd comes with the Debian package qemu-utils");
        let server = Self { process, socket };
        let deadline = Instant::now() + Duration::from_secs(20);
        while server.connect(&ConnectOptions::default()).is_err() {
            assert!(Instant::now() < deadline, "qemu-nbd did not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    fn connect(&self, options: &ConnectOptions) -> Result<Connection, NbdError> {
        Connection::connect_with(&self.socket, "disk", options)
    }

    fn open(&self) -> Connection {
        self.connect(&ConnectOptions::default()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn states(connection: &mut Connection, context: &str, range: Extent) -> Vec<(u64, u64)> {
    let runs = connection.block_status(context, range).unwrap();
    runs.iter().map(|run| (run.extent.end(), run.flags)).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_qcow2_image_is_written_through_several_connections() {
    let bench = Bench::new();
    let image = bench.path("target.qcow2");
    bench.qemu_img(&["create", "-f", "qcow2"], &[&image, Path::new("256M")]);
    let server = Server::start(&bench, &["--format=qcow2", "--discard=unmap"], text(&image));
    let mut raw = random_content(64 * MIB, 31);
    let flags = server.open().export().flags;
    assert!(
        !flags.read_only() && flags.flush() && flags.trim() && flags.write_zeroes() && flags.multi_conn()
    );
    // One write is larger than what one request may carry.
    std::thread::scope(|scope| {
        for (part, content) in [(0, &raw[..40 << 20]), (40 * MIB, &raw[40 << 20..])] {
            let server = &server;
            scope.spawn(move || {
                let mut connection = server.open();
                connection.write(content, part).unwrap();
                connection.flush().unwrap();
                connection.disconnect().unwrap();
            });
        }
    });
    let mut connection = server.open();
    // Zeroes over data: kept allocated, or given back.
    connection
        .write_zeroes(Extent::between(2 * MIB, 3 * MIB), true)
        .unwrap();
    connection
        .write_zeroes(Extent::between(4 * MIB, 5 * MIB), false)
        .unwrap();
    connection
        .write_zeroes(Extent::between(100 * MIB, 240 * MIB), false)
        .unwrap();
    connection.trim(Extent::between(8 * MIB, 9 * MIB)).unwrap();
    connection.flush().unwrap();
    for zeroed in [2, 4, 8] {
        raw[zeroed << 20..(zeroed + 1) << 20].fill(0);
    }
    // QEMU calls zeroed clusters holes whether or not they keep their place.
    let hole = STATE_ZERO | STATE_HOLE;
    for start in [2 * MIB, 4 * MIB] {
        let zeroed = Extent::between(start, start + MIB);
        assert_eq!(
            states(&mut connection, BASE_ALLOCATION, zeroed),
            [(start + MIB, hole)]
        );
    }
    let rest = states(
        &mut connection,
        BASE_ALLOCATION,
        Extent::between(64 * MIB, 256 * MIB),
    );
    assert_eq!(rest, [(256 * MIB, hole)]);

    let mut back = vec![1; 64 << 20];
    connection.read(&mut back, 0).unwrap();
    assert!(back == raw);
    assert!(matches!(
        connection.read(&mut back, 250 * MIB),
        Err(NbdError::OutOfRange { .. })
    ));
    connection.disconnect().unwrap();
    drop(server);
    raw.resize(256 << 20, 0);
    let expected = bench.write_sparse("expected.raw", &raw);
    bench.qemu_img(&["compare", "-f", "raw", "-F", "qcow2"], &[&expected, &image]);
    run(Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2"])
        .arg(&image));
}

#[test]
fn a_full_disk_is_an_orderly_error() {
    let bench = Bench::new();
    let path = bench.write("disk.raw", &vec![0; 1 << 20]);
    let image = format!(
        r#"json:{{"driver":"raw","file":{{"driver":"blkdebug","image":{{"driver":"file","filename":"{}"}},
        "inject-error":[{{"event":"none","iotype":"write","errno":28,"once":false}}]}}}}"#,
        text(&path)
    );
    let server = Server::start(&bench, &[], &image);
    let mut connection = server.open();
    let error = connection.write(&[1; 4096], 8192).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert!(
        error
            .to_string()
            .starts_with("the NBD server could not write 4096 bytes at 8192: no space left"),
        "{error}"
    );
    let mut buf = [1; 4096];
    connection.read(&mut buf, 8192).unwrap();
    assert_eq!(buf, [0; 4096]);
}

#[test]
fn a_server_with_large_blocks_is_read_anywhere_and_written_in_blocks() {
    let bench = Bench::new();
    let raw = random_content(4 * MIB, 32);
    let path = bench.write("disk.raw", &raw);
    let file = format!(
        "driver=blkdebug,align=4096,image.driver=raw,image.file.driver=file,image.file.filename={}",
        text(&path)
    );
    let server = Server::start(&bench, &["--image-opts"], &file);
    let mut connection = server.open();
    assert_eq!(connection.export().block.min, 4096);
    for (offset, len) in [
        (0, 1),
        (1, 4095),
        (4095, 2),
        (100, 20_000),
        (4096, 8192),
        (4 * MIB as usize - 3, 3),
    ] {
        let mut buf = vec![0; len];
        connection.read(&mut buf, offset as u64).unwrap();
        assert!(buf == raw[offset..offset + len], "{len} bytes at {offset}");
    }
    let part = Extent::between(1, 4 * MIB - 1);
    let runs = connection.block_status(BASE_ALLOCATION, part).unwrap();
    assert_eq!(
        (runs[0].extent.offset(), runs.last().unwrap().extent.end()),
        (1, 4 * MIB - 1)
    );
    assert!(matches!(
        connection.write(&[1; 512], 4096),
        Err(NbdError::Misaligned { min: 4096, .. })
    ));
    connection.write(&[1; 4096], 4096).unwrap();
}

#[test]
fn a_dirty_bitmap_is_one_more_context() {
    let bench = Bench::new();
    let image = bench.path("disk.qcow2");
    bench.qemu_img(&["create", "-f", "qcow2"], &[&image, Path::new("8M")]);
    run(Command::new("qemu-img")
        .args(["bitmap", "--add"])
        .arg(&image)
        .arg("round1"));
    bench.overwrite(&image, "qcow2", 5, 3 * MIB, MIB, &mut vec![0; 8 << 20]);
    let server = Server::start(
        &bench,
        &["--read-only", "--format=qcow2", "--bitmap=round1"],
        text(&image),
    );
    let dirty = "qemu:dirty-bitmap:round1".to_owned();
    let contexts = vec![
        BASE_ALLOCATION.to_owned(),
        dirty.clone(),
        "qemu:dirty-bitmap:none".into(),
    ];
    let mut connection = server
        .connect(&ConnectOptions {
            contexts,
            ..ConnectOptions::default()
        })
        .unwrap();
    assert_eq!(connection.export().contexts.len(), 2);
    let whole = Extent::between(0, 8 * MIB);
    assert_eq!(
        states(&mut connection, &dirty, whole),
        [(3 * MIB, 0), (4 * MIB, STATE_DIRTY), (8 * MIB, 0)]
    );
    let allocation = states(&mut connection, BASE_ALLOCATION, whole);
    assert_eq!(
        allocation.iter().map(|run| run.0).collect::<Vec<_>>(),
        [3 * MIB, 4 * MIB, 8 * MIB]
    );
    let missing = connection
        .block_status("qemu:dirty-bitmap:none", whole)
        .unwrap_err();
    assert!(
        missing.to_string().contains("gave no metadata context"),
        "{missing}"
    );
}

#[test]
fn an_unknown_export_is_named() {
    let bench = Bench::new();
    let path = bench.write("disk.raw", &[0; 4096]);
    let server = Server::start(&bench, &["--format=raw"], text(&path));
    let error = Connection::connect(&server.socket, "other")
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("the NBD server refused the export \"other\": it has no export of this name"),
        "{error}"
    );
}
