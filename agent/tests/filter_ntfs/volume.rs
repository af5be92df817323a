//! NTFS volumes made by mkntfs, filled and emptied through ntfs-3g, and a reading of their bitmap that is independent of ours.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use longhaul_common::extent::Extent;
use rand::Rng;
use rand::rngs::StdRng;
use tempfile::TempDir;

use super::bench::{Files, Free, content, must, run, text};

const PACKAGE: &str = "ntfs-3g";

pub(crate) struct Volume {
    dir: TempDir,
    pub(crate) files: Files,
    dirs: Vec<String>,
    pub(crate) options: Vec<String>,
}

impl Volume {
    pub(crate) fn new(len: u64, options: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("image"), noise(len)).unwrap();
        Self::format(dir, options)
    }

    /// A volume that takes no more space than its metadata.
    pub(crate) fn sparse(len: u64, options: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        fs::File::create(dir.path().join("image"))
            .unwrap()
            .set_len(len)
            .unwrap();
        Self::format(dir, options)
    }

    fn format(dir: TempDir, options: &[&str]) -> Self {
        let image = dir.path().join("image");
        let args = [&["-F", "-Q", "-q"], options, &[text(&image)]].concat();
        must("mkntfs", PACKAGE, &args);
        Self {
            dir,
            files: Files::new(),
            dirs: vec![String::new()],
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    /// A volume with options drawn at random.
    pub(crate) fn random(rng: &mut StdRng) -> Self {
        let sector = [512u64, 512, 512, 1024, 4096][rng.random_range(0..5)];
        let cluster = (512u64 << rng.random_range(0..9)).max(sector);
        let cluster = if rng.random_bool(0.1) { 2 << 20 } else { cluster };
        let least = (8 << 20u64).max(cluster * 40);
        let len = rng.random_range(least..least * 2) / 512 * 512;
        let (sector, cluster) = (sector.to_string(), cluster.to_string());
        let mut options = vec!["-s", &sector, "-c", &cluster];
        let zone = rng.random_range(1..5).to_string();
        options.extend(["-z", &zone]);
        if rng.random_bool(0.3) {
            options.extend(["-L", "Das Volume"]);
        }
        if rng.random_bool(0.3) {
            options.push("-C");
        }
        Self::new(len, &options)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub(crate) fn image(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    pub(crate) fn mount(&self) -> Mount {
        Mount::new(&self.path(), "rw")
    }

    /// Creates and deletes files and directories at random, in one mount.
    pub(crate) fn stir(&mut self, rng: &mut StdRng, steps: u32, max: usize) {
        let mount = self.mount();
        self.stir_in(&mount, rng, steps, max);
    }

    pub(crate) fn stir_in(&mut self, mount: &Mount, rng: &mut StdRng, steps: u32, max: usize) {
        let round: u32 = rng.random();
        for step in 0..steps {
            let dir = self.dirs[rng.random_range(0..self.dirs.len())].clone();
            match rng.random_range(0..12) {
                0 if self.dirs.len() < 8 => {
                    let name = format!("{dir}directory {round} {step}");
                    if fs::create_dir(mount.path().join(&name)).is_ok() {
                        self.dirs.push(format!("{name}/"));
                    }
                }
                1..5 if !self.files.is_empty() => {
                    let victim = rng.random_range(0..self.files.len());
                    let name = self.files.keys().nth(victim).unwrap().clone();
                    fs::remove_file(mount.path().join(&name)).unwrap();
                    self.files.remove(&name);
                }
                5 if !self.files.is_empty() => {
                    let target = rng.random_range(0..self.files.len());
                    let (name, bytes) = self.files.iter().nth(target).unwrap();
                    let (name, bytes) = (name.clone(), bytes.clone());
                    let link = format!("{dir}a hard link with a rather long name {round} {step}");
                    if fs::hard_link(mount.path().join(name), mount.path().join(&link)).is_ok() {
                        self.files.insert(link, bytes);
                    }
                }
                6 => {
                    let name = format!("{dir}sparse {round} {step}");
                    let mut bytes = content(rng, max);
                    let hole = bytes.len() + rng.random_range(0..max);
                    bytes.resize(hole, 0);
                    let done = fs::File::create(mount.path().join(&name)).and_then(|file| {
                        use std::os::unix::fs::FileExt;
                        file.write_all_at(bytes.split_at(hole.min(100)).0, 0)?;
                        file.set_len(hole as u64)
                    });
                    bytes[hole.min(100)..].fill(0);
                    self.keep(mount, name, bytes, done.is_ok());
                }
                _ => {
                    let name = format!("{dir}file {round} {step} ünïcode");
                    let bytes = content(rng, max);
                    let done = fs::write(mount.path().join(&name), &bytes).is_ok();
                    self.keep(mount, name, bytes, done);
                }
            }
        }
    }

    fn keep(&mut self, mount: &Mount, name: String, bytes: Vec<u8>, done: bool) {
        if done {
            self.files.insert(name, bytes);
        } else {
            let _ = fs::remove_file(mount.path().join(&name));
        }
    }

    /// Puts `bytes` into a file of the root directory, with ntfscp.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        let from = self.dir.path().join("from");
        fs::write(&from, bytes).unwrap();
        must("ntfscp", PACKAGE, &["-f", text(&self.path()), text(&from), name]);
    }

    /// Makes a file system of another size of it: ntfsresize leaves it marked for a check, ntfsfix takes the mark away.
    pub(crate) fn resize(&self, len: u64) {
        let image = self.path();
        let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
        let before = file.metadata().unwrap().len();
        file.set_len(len.max(before)).unwrap();
        let resized = run(
            "ntfsresize",
            PACKAGE,
            &["-f", "-f", "-P", "-s", &len.to_string(), text(&image)],
        );
        let said = String::from_utf8_lossy(&resized.stdout);
        let done = resized.status.success() && !said.contains("Nothing to do");
        file.set_len(if done { len } else { before }).unwrap();
        println!("resized from {before} to {len}: {done}");
        must("ntfsfix", PACKAGE, &["-d", text(&image)]);
    }

    /// Checks that `copy` is a sound volume with the same files.
    pub(crate) fn same_in(&self, copy: &[u8]) {
        let path = self.dir.path().join("copy");
        fs::write(&path, copy).unwrap();
        must("ntfsfix", PACKAGE, &["-n", text(&path)]);
        let mount = Mount::new(&path, "ro");
        assert!(
            mount.files() == self.files,
            "the files of the copy differ ({:?})",
            self.options
        );
    }

    /// What `$Bitmap` calls free, as ntfscat reads it.
    pub(crate) fn free(&self) -> Free {
        let image = self.path();
        let bitmap = must("ntfscat", PACKAGE, &["-f", "-i", "6", text(&image)]);
        let boot = self.image();
        let sector = u64::from(u16::from_le_bytes([boot[11], boot[12]]));
        let per_cluster = match boot[13] {
            code @ ..=128 => u64::from(code),
            code => 1 << (256 - u64::from(code)),
        };
        let sectors = u64::from_le_bytes(boot[0x28..0x30].try_into().unwrap());
        let cluster = sector * per_cluster;
        let free = (0..sectors / per_cluster).filter(|lcn| bitmap[(lcn / 8) as usize] >> (lcn % 8) & 1 == 0);
        Free::new(
            free.map(|lcn| Extent::new(lcn * cluster, cluster).unwrap())
                .collect(),
        )
    }

    /// Where the value of an attribute of a record lies, as ntfsinfo prints it: byte extents by attribute type.
    pub(crate) fn extents(&self, record: u32) -> BTreeMap<String, Vec<Extent>> {
        let said = must(
            "ntfsinfo",
            PACKAGE,
            &["-f", "-v", "-i", &record.to_string(), text(&self.path())],
        );
        let boot = self.image();
        let cluster = u64::from(u16::from_le_bytes([boot[11], boot[12]])) * u64::from(boot[13]);
        let (mut extents, mut kind) = (BTreeMap::<_, Vec<_>>::new(), String::new());
        for line in String::from_utf8_lossy(&said).lines() {
            if let Some(rest) = line.strip_prefix("Dumping attribute ") {
                kind = rest.split_whitespace().next().unwrap_or_default().to_owned();
            }
            let numbers: Vec<_> = line
                .split_whitespace()
                .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16))
                .collect();
            if let [Ok(_), Ok(lcn), Ok(len)] = numbers[..] {
                extents
                    .entry(kind.clone())
                    .or_default()
                    .push(Extent::new(lcn * cluster, len * cluster).unwrap());
            }
        }
        extents
    }
}

/// An image mounted by a ntfs-3g of its own, which has gone when this is dropped.
pub(crate) struct Mount {
    point: TempDir,
    driver: Child,
}

impl Mount {
    pub(crate) fn new(image: &Path, mode: &str) -> Self {
        let point = TempDir::new().unwrap();
        assert!(
            Path::new("/dev/fuse").exists(),
            "/dev/fuse is missing: these tests mount images through FUSE"
        );
        let driver = Command::new("ntfs-3g")
            .args([
                "-o",
                &format!("{mode},no_detach,streams_interface=none"),
                text(image),
                text(point.path()),
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("ntfs-3g cannot be run ({error}): install the Debian package {PACKAGE}")
            });
        let mut mount = Self { point, driver };
        let outside = fs::metadata(mount.point.path().parent().unwrap()).unwrap().dev();
        for _ in 0..1000 {
            if fs::metadata(mount.point.path()).is_ok_and(|inside| inside.dev() != outside) {
                return mount;
            }
            if let Some(status) = mount.driver.try_wait().unwrap() {
                panic!("ntfs-3g did not mount the image ({status}): it takes root and /dev/fuse");
            }
            sleep(Duration::from_millis(10));
        }
        panic!("ntfs-3g did not mount the image within 10 s");
    }

    pub(crate) fn path(&self) -> &Path {
        self.point.path()
    }

    pub(crate) fn files(&self) -> Files {
        let mut found = Files::new();
        collect(self.path(), "", &mut found);
        found
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        for _ in 0..50 {
            if run("umount", "mount", &[text(self.point.path())])
                .status
                .success()
            {
                break;
            }
            sleep(Duration::from_millis(20));
        }
        let _ = self.driver.wait();
    }
}

fn collect(dir: &Path, prefix: &str, found: &mut Files) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            collect(&entry.path(), &format!("{name}/"), found);
        } else {
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
}

/// Old data in every block, so that a block skipped by mistake shows.
fn noise(len: u64) -> Vec<u8> {
    let mut state = 1u64;
    let words = (0..len.div_ceil(8)).flat_map(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state | 1).to_le_bytes()
    });
    words.take(len as usize).collect()
}
