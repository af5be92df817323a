//! External tools as makers of images and as oracles.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use longhaul_common::extent::Extent;

/// Runs a tool to its end with `input`; its output. `package` is named where the tool is missing.
pub(crate) fn run(package: &str, command: &mut Command, input: &str) -> String {
    let (ok, output) = attempt(package, command, input);
    assert!(ok, "{command:?} failed: {output}");
    output
}

/// The same; whether it succeeded, and all it said.
pub(crate) fn attempt(package: &str, command: &mut Command, input: &str) -> (bool, String) {
    let tool = command.get_program().to_string_lossy().into_owned();
    let spawned = command
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child =
        spawned.unwrap_or_else(|e| panic!("{tool} does not start ({e}): apt-get install {package}"));
    // A tool that wants no input may be gone already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let said = match output.status.success() {
        true => output.stdout,
        false => [output.stdout, output.stderr].concat(),
    };
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// Partitions an empty image with sfdisk; image and partitions as sfdisk lists them.
pub(crate) fn sfdisk(size: u64, script: &str) -> (Vec<u8>, Vec<(String, Extent)>) {
    let (_dir, path) = sparse(size);
    run("fdisk", Command::new("/sbin/sfdisk").arg("-q").arg(&path), script);
    let json = run("fdisk", Command::new("/sbin/sfdisk").arg("-J").arg(&path), "");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let rows = json["partitiontable"]["partitions"].as_array().unwrap();
    let parts = rows.iter().map(|row| {
        let (start, len) = (row["start"].as_u64().unwrap(), row["size"].as_u64().unwrap());
        let number = row["node"]
            .as_str()
            .unwrap()
            .strip_prefix(path.to_str().unwrap())
            .unwrap();
        (
            format!("partition {number}"),
            Extent::new(start * 512, len * 512).unwrap(),
        )
    });
    (fs::read(&path).unwrap(), parts.collect())
}

/// The same with fdisk, for sectors of 4096 bytes; `keys` are what a person would type.
pub(crate) fn fdisk_4096(size: u64, keys: &str) -> (Vec<u8>, Vec<(String, Extent)>) {
    let (_dir, path) = sparse(size);
    run(
        "fdisk",
        Command::new("/sbin/fdisk").args(["-b", "4096"]).arg(&path),
        keys,
    );
    let mut list = Command::new("/sbin/fdisk");
    let list = run(
        "fdisk",
        list.args(["-b", "4096", "-l", "-o", "Start,Sectors"]).arg(&path),
        "",
    );
    let rows = list
        .lines()
        .skip_while(|line| !line.starts_with("Start") && !line.contains("Start Sectors"));
    let parts = (1..).zip(rows.skip(1)).map(|(number, row)| {
        let mut numbers = row
            .split_whitespace()
            .map(|word| word.parse::<u64>().unwrap() * 4096);
        let extent = Extent::new(numbers.next().unwrap(), numbers.next().unwrap()).unwrap();
        (format!("partition {number}"), extent)
    });
    let parts = parts.collect();
    (fs::read(&path).unwrap(), parts)
}

fn sparse(size: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    (dir, path)
}

/// An image as a block device, as long as this lives. Needs root.
pub(crate) struct Loop {
    pub(crate) node: PathBuf,
}

impl Loop {
    /// The node is made in `dir` with a number that no other test should have, and tried again with another where one has.
    pub(crate) fn attach(dir: &Path, image: &Path) -> Self {
        let mut last = String::new();
        for _ in 0..50 {
            let number = 64 + rand::random_range(0..128u32);
            let node = dir.join(format!("loop{number}"));
            if node.exists() {
                // Another device of this very test.
                continue;
            }
            let mut mknod = Command::new("mknod");
            run(
                "coreutils",
                mknod.arg(&node).args(["b", "7", &number.to_string()]),
                "",
            );
            let (ok, said) = attempt("mount", Command::new("/sbin/losetup").arg(&node).arg(image), "");
            if ok {
                return Self { node };
            }
            last = said;
            fs::remove_file(&node).unwrap();
        }
        panic!("no loop device to be had (this test needs root): {last}");
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // In a failing test there is nobody left to tell.
        let _ = Command::new("/sbin/losetup").arg("-d").arg(&self.node).status();
    }
}

/// LVM's tools, without device-mapper, seeing only the devices of one directory.
pub(crate) struct Lvm {
    /// Before the directory: fields are dropped in this order, and the nodes lie in it.
    devices: Vec<Loop>,
    images: Vec<PathBuf>,
    dir: tempfile::TempDir,
}

impl Lvm {
    /// One device for each image.
    pub(crate) fn new(images: &[Vec<u8>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let nodes = dir.path().join("dev");
        fs::create_dir(&nodes).unwrap();
        fs::write(dir.path().join("lvm.conf"), "").unwrap();
        let (mut devices, mut paths) = (Vec::new(), Vec::new());
        for (i, bytes) in images.iter().enumerate() {
            let path = dir.path().join(format!("image{i}"));
            write_sparse(&path, bytes);
            devices.push(Loop::attach(&nodes, &path));
            paths.push(path);
        }
        Self {
            dir,
            devices,
            images: paths,
        }
    }

    pub(crate) fn node(&self, i: usize) -> &str {
        self.devices[i].node.to_str().unwrap()
    }

    /// Runs one of LVM's commands, words separated by blanks; `{0}` is the first device.
    pub(crate) fn run(&self, command: &str) -> String {
        let dir = self.dir.path().display();
        let config = format!(
            "devices {{ dir=\"{dir}/dev\" scan=[\"{dir}/dev\"] use_devicesfile=0 hints=\"none\" sysfs_scan=0 }} \
             global {{ locking_dir=\"{dir}/lock\" }} backup {{ backup=0 archive=0 }} \
             activation {{ udev_sync=0 udev_rules=0 }}"
        );
        let mut words = command.split_whitespace().map(|word| {
            let index = word.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
            index.map_or(word, |index| self.node(index.parse().unwrap()))
        });
        let mut lvm = Command::new("/sbin/lvm");
        lvm.arg(words.next().unwrap())
            .args(["--driverloaded", "n", "--config", &config])
            .args(words);
        lvm.env("LVM_SYSTEM_DIR", self.dir.path())
            .env("LVM_SUPPRESS_FD_WARNINGS", "1");
        run("lvm2", &mut lvm, "")
    }

    /// Segments of every physical volume as `pvs` sees them: (device, first extent, extents, logical volume or nothing, type).
    pub(crate) fn segments(&self) -> Vec<(String, u64, u64, String, String)> {
        let text = self.run(
            "pvs --reportformat json --segments -o pv_name,pvseg_start,pvseg_size,lv_name,segtype --all",
        );
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let rows = json["report"][0]["pvseg"].as_array().cloned().unwrap_or_default();
        let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_owned();
        let number = |row: &serde_json::Value, key: &str| text(row, key).parse().unwrap();
        rows.iter()
            .map(|row| {
                let place = (number(row, "pvseg_start"), number(row, "pvseg_size"));
                (
                    text(row, "pv_name"),
                    place.0,
                    place.1,
                    text(row, "lv_name"),
                    text(row, "segtype"),
                )
            })
            .collect()
    }

    /// The images as the tools left them.
    pub(crate) fn images(&self) -> Vec<Vec<u8>> {
        let sync = |device: &Loop| fs::File::open(&device.node).unwrap().sync_all().unwrap();
        self.devices.iter().for_each(sync);
        self.images.iter().map(|path| fs::read(path).unwrap()).collect()
    }
}

/// Writes only what is not zero.
fn write_sparse(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (i, chunk) in bytes.chunks(65536).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            file.write_all_at(chunk, i as u64 * 65536).unwrap();
        }
    }
}
