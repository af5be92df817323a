//! Real QEMUs: one that runs a guest and migrates, one that takes a stream in.
//!
//! The guest is a boot sector: it fills 4 MiB with noise, then counts up the first word of each of its pages for ever. The QEMU is
//! `qemu-system-x86_64`, or that of `LONGHAUL_QEMU`; it emulates, so that no test depends on KVM.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const BOOT: &str = concat!(
    "fa31c08ed8660f0116847c0f20c00c010f22c066ea1b7c0000080066b810008ed88ec08ed0bf00002000b900001000b8",
    "7856341289c2c1e20d31d089c2c1ea1131d089c2c1e20531d0abe2e8bf00002000ff07b900040000e2fe81c700100000",
    "81ff0000600072e9ebe266900000000000000000ffff0000009acf00ffff00000092cf0017006c7c",
);
/// Where the guest writes, last page.
const LAST: u64 = 0x5f_f000;
/// Over the guest's memory: the first, then what it wrote meanwhile.
const PASSES: u64 = 4;
const PATIENCE: Duration = Duration::from_secs(60);

/// A QEMU and its QMP socket.
pub(crate) struct Vm {
    child: Child,
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    pub(crate) folder: PathBuf,
    pub(crate) ram_mib: u64,
}

/// How a VM is to be.
#[derive(Clone, Copy)]
pub(crate) struct Kind<'a> {
    pub(crate) machine: &'a str,
    pub(crate) ram_mib: u64,
    pub(crate) more: &'a [&'a str],
}

/// What was sent, and what RAM held when it was.
pub(crate) struct Captured {
    pub(crate) stream: Vec<u8>,
    pub(crate) memory: blake3::Hash,
}

impl Vm {
    pub(crate) fn started(kind: &Kind<'_>, folder: &Path, name: &str, more: &[&str]) -> Self {
        let disk = folder.join(format!("{name}.img"));
        std::fs::write(&disk, boot_sector()).unwrap();
        let socket = folder.join(format!("{name}.qmp"));
        let qemu = std::env::var("LONGHAUL_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
        let child = Command::new(&qemu)
            .args(["-M", kind.machine, "-accel", "tcg", "-cpu", "qemu64"])
            .args(["-m", &kind.ram_mib.to_string()])
            .args(["-display", "none", "-nodefaults", "-vga", "std"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-drive")
            .arg(format!(
                "file={},format=raw,if=none,id=drive,node-name=d0",
                disk.display()
            ))
            .args(["-device", "virtio-blk-pci,drive=drive,bootindex=1"])
            .args(kind.more)
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{qemu} does not start ({error}): install Debian's qemu-system-x86")
            });
        let stream = connected(&socket);
        let mut vm = Self {
            child,
            reader: BufReader::new(stream.try_clone().unwrap()),
            writer: stream,
            folder: folder.to_owned(),
            ram_mib: kind.ram_mib,
        };
        vm.line();
        vm.say("qmp_capabilities", json!({}));
        vm
    }

    pub(crate) fn say(&mut self, command: &str, arguments: Value) -> Value {
        let mut request = json!({"execute": command});
        request["arguments"] = arguments;
        self.writer.write_all(request.to_string().as_bytes()).unwrap();
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("QEMU said '{line}': {error}"))
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < end, "waited too long for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The guest has written all of its memory once.
    pub(crate) fn wait_for_guest(&mut self) {
        self.until("the guest", |vm| {
            let command = format!("xp /1xw {LAST}");
            let words = vm.say("human-monitor-command", json!({"command-line": command}));
            !words
                .as_str()
                .unwrap_or_default()
                .trim_end()
                .ends_with("0x00000000")
        });
    }

    pub(crate) fn set_capabilities(&mut self, names: &[&str]) {
        let all: Vec<_> = names
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        self.say("migrate-set-capabilities", json!({"capabilities": all}));
    }

    /// Two dirty bitmaps on the disk.
    pub(crate) fn add_bitmaps(&mut self) {
        for (name, granularity) in [("one", 65536), ("two", 512)] {
            let arguments = json!({"node": "d0", "name": name, "granularity": granularity});
            self.say("block-dirty-bitmap-add", arguments);
        }
    }

    fn migration(&mut self) -> (String, u64) {
        let status = self.say("query-migrate", json!({}));
        let syncs = status.pointer("/ram/dirty-sync-count").and_then(Value::as_u64);
        let state = status.get("status").and_then(Value::as_str).unwrap_or_default();
        assert_ne!(state, "failed", "{status}");
        (state.to_owned(), syncs.unwrap_or(0))
    }

    /// Waits until the migration, outgoing or incoming, is complete.
    pub(crate) fn wait_for_completion(&mut self) {
        self.until("the migration", |vm| vm.migration().0 == "completed");
    }

    /// Migrates into a buffer, with a few passes over what the guest wrote meanwhile.
    pub(crate) fn capture(&mut self, passes: u64) -> Captured {
        let path = self.folder.join("stream.sock");
        let streams = listening(&path);
        self.say(
            "migrate-set-parameters",
            json!({"max-bandwidth": 24 << 20, "downtime-limit": 1}),
        );
        self.say("migrate", json!({"uri": format!("unix:{}", path.display())}));
        self.until("passes", |vm| {
            let (state, syncs) = vm.migration();
            syncs >= passes || state == "completed"
        });
        self.say("migrate-set-parameters", json!({"downtime-limit": 10_000}));
        self.wait_for_completion();
        Captured {
            stream: main_channel(&streams),
            memory: self.memory(),
        }
    }

    /// All of RAM.
    pub(crate) fn memory(&mut self) -> blake3::Hash {
        let path = self.folder.join("memory");
        let size = self.ram_mib << 20;
        let name = path.display().to_string();
        self.say("pmemsave", json!({"val": 0, "size": size, "filename": name}));
        let content = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        blake3::hash(&content)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes every connection and reads it to its end. The thread ends with the test's program: more channels may come at any time.
fn listening(path: &Path) -> Receiver<Vec<u8>> {
    let listener = UnixListener::bind(path).unwrap();
    let (sender, streams) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = stream.unwrap().read_to_end(&mut bytes);
                let _ = sender.send(bytes);
            });
        }
    });
    streams
}

/// Of all connections, that which carries the migration stream: a multifd channel begins otherwise.
fn main_channel(streams: &Receiver<Vec<u8>>) -> Vec<u8> {
    loop {
        let stream = streams.recv_timeout(PATIENCE).unwrap();
        if stream.starts_with(b"QEVM") {
            return stream;
        }
    }
}

/// Starts a VM, lets its guest write and takes its stream.
pub(crate) fn captured(kind: &Kind<'_>, capabilities: &[&str], prepare: impl FnOnce(&mut Vm)) -> Captured {
    let folder = tempfile::tempdir().unwrap();
    let mut vm = Vm::started(kind, folder.path(), "source", &[]);
    vm.wait_for_guest();
    vm.set_capabilities(capabilities);
    prepare(&mut vm);
    vm.capture(PASSES)
}

/// Gives `stream` to a new QEMU and tells what its RAM holds then.
pub(crate) fn loaded(kind: &Kind<'_>, chunks: impl IntoIterator<Item = bytes::Bytes>) -> blake3::Hash {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("in.sock");
    let incoming = format!("unix:{}", socket.display());
    let mut vm = Vm::started(kind, folder.path(), "target", &["-S", "-incoming", "defer"]);
    vm.say("migrate-incoming", json!({"uri": incoming}));
    let mut stream = connected(&socket);
    for chunk in chunks {
        stream.write_all(&chunk).unwrap();
    }
    drop(stream);
    vm.wait_for_completion();
    vm.memory()
}

fn connected(socket: &Path) -> UnixStream {
    let end = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "{}: {error}", socket.display()),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn boot_sector() -> Vec<u8> {
    let digits = BOOT.as_bytes().chunks_exact(2);
    let code = digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
    let mut sector: Vec<u8> = code.collect();
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}
