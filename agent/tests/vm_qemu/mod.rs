//! A real QEMU for tests: no guest but its BIOS, little RAM, ended when dropped.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use longhaul_agent::vm::qmp::Qmp;
use tempfile::TempDir;

/// Size of each test disk.
pub const DISK: u64 = 16 << 20;
pub const UUID: &str = "6b2c7f1e-6d1c-4b77-9c53-0123456789ab";

/// The program under test: `LONGHAUL_QEMU`, or the one in PATH.
pub fn program() -> String {
    std::env::var("LONGHAUL_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into())
}

pub struct Qemu {
    pub folder: TempDir,
    pub disks: Vec<PathBuf>,
    child: Child,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path("log")).unwrap_or_default();
            eprintln!("QEMU ({ended:?}) said: {log}");
        }
    }
}

impl Qemu {
    /// A running QEMU with two disks, `d0` raw and `d1` qcow2, both empty.
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// The same whose guest dirties RAM; see [`wait_busy`].
    pub fn busy() -> Self {
        let mut sector = vec![0; 512];
        sector[..BUSY.len()].copy_from_slice(&BUSY);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        Self::launch(&[], &sector)
    }

    /// The same with further arguments.
    pub fn with(more: &[&str]) -> Self {
        Self::launch(more, &[])
    }

    fn launch(more: &[&str], boot: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disks = vec![raw(folder.path(), "d0.raw"), qcow2(folder.path(), "d1.qcow2")];
        let file = File::options().write(true).open(&disks[0]).unwrap();
        file.write_all_at(boot, 0).unwrap();
        let mut command = Command::new(program());
        command.args(arguments(&disks[0], &disks[1], &folder.path().join("qmp.sock")));
        command.args(more);
        let log = File::create(folder.path().join("log")).unwrap();
        let child = command
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("qemu-system-x86_64 of the Debian package qemu-system-x86");
        Self { folder, disks, child }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub async fn qmp(&self) -> Qmp {
        let socket = self.path("qmp.sock");
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match Qmp::connect(&socket).await {
                Ok(qmp) => return qmp,
                Err(error) if Instant::now() > until => {
                    let log = fs::read_to_string(self.path("log")).unwrap_or_default();
                    panic!("{error}; {log}")
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// What both sides are started with.
pub fn arguments(raw: &Path, qcow2: &Path, qmp: &Path) -> Vec<String> {
    let (raw, qcow2, qmp) = (raw.display(), qcow2.display(), qmp.display());
    let text = format!(
        "-M pc-q35-7.2 -accel tcg -cpu qemu64 -m 32 -nodefaults -display none -vga none -name web -uuid {UUID} \
         -drive file={raw},format=raw,if=none,id=d0 -device virtio-blk-pci,drive=d0,id=vd0 \
         -drive file={qcow2},format=qcow2,if=none,id=d1 -device virtio-blk-pci,drive=d1,id=vd1 \
         -qmp unix:{qmp},server=on,wait=off"
    );
    text.split_whitespace().map(str::to_owned).collect()
}

pub fn raw(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    File::create(&path).unwrap().set_len(DISK).unwrap();
    path
}

pub fn qcow2(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(DISK.to_string())
        .status()
        .expect("qemu-img of the Debian package qemu-utils");
    assert!(made.success());
    path
}

/// A boot sector that dirties half a MiB of RAM for ever: an idle guest would be ready to switch over at once.
const BUSY: [u8; 25] = [
    0xb8, 0x00, 0x10, // mov ax, 1000h
    0x8e, 0xd8, // each segment: mov ds, ax
    0x31, 0xdb, // xor bx, bx
    0xff, 0x07, // each page: inc word [bx]
    0x81, 0xc3, 0x00, 0x10, // add bx, 1000h
    0x75, 0xf8, // jnz each page
    0x05, 0x00, 0x10, // add ax, 1000h
    0x3d, 0x00, 0x90, // cmp ax, 9000h
    0x72, 0xec, // jb each segment
    0xeb, 0xe7, // jmp to the start
];

/// Waits until the guest of [`Qemu::busy`] is at it.
pub async fn wait_busy(qmp: &Qmp) {
    let until = Instant::now() + Duration::from_secs(20);
    let counter = || qmp.human("xp /1hx 0x80000");
    let mut last = counter().await.unwrap();
    for same in 0.. {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = counter().await.unwrap();
        if now != last && same > 0 {
            return;
        }
        last = now;
        assert!(Instant::now() < until, "the guest does not run: {last}");
    }
}

/// Lets the guest's disk be written, as its guest would.
pub async fn write(qmp: &Qmp, drive: &str, pattern: u8, offset: u64, len: u64) {
    // What qemu-io has to say goes to QEMU's log.
    qmp.human(&format!("qemu-io {drive} \"write -P {pattern} {offset} {len}\""))
        .await
        .unwrap();
}

/// A file's bytes.
pub fn bytes(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut buf, offset).unwrap();
    buf
}
