//! FAT volumes made, filled and emptied by dosfstools and mtools, and two readings of them that are independent of ours.

use std::path::{Path, PathBuf};

use longhaul_common::extent::Extent;
use rand::Rng;
use rand::rngs::StdRng;
use tempfile::TempDir;

use super::bench::{Files, Free, content, must, run, text};

pub(crate) struct Volume {
    dir: TempDir,
    pub(crate) files: Files,
    dirs: Vec<String>,
    pub(crate) options: Vec<String>,
}

impl Volume {
    pub(crate) fn new(len: u64, options: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(len).unwrap();
        // Old data in every block, so that a block skipped by mistake shows.
        std::fs::write(&image, noise(len)).unwrap();
        must("mkfs.fat", "dosfstools", &[options, &[text(&image)]].concat());
        Self {
            dir,
            files: Files::new(),
            dirs: vec![String::new()],
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    /// A volume with options drawn at random; `None` where mkfs.fat does not accept the combination.
    pub(crate) fn random(rng: &mut StdRng) -> Option<Self> {
        let width = [12, 16, 32][rng.random_range(0..3)];
        let per_cluster = 1u64 << rng.random_range(0..6);
        let sector = [512, 512, 512, 1024, 4096][rng.random_range(0..5)];
        let clusters = match width {
            12 => rng.random_range(100..4000),
            16 => rng.random_range(4200..30_000),
            _ => rng.random_range(66_000..80_000),
        };
        let len = (clusters * per_cluster * sector).min(96 << 20) + rng.random_range(0..200) * 1024;
        let mut options = vec![
            "-F".to_owned(),
            width.to_string(),
            "-S".to_owned(),
            sector.to_string(),
        ];
        let mut option = |chance: f64, name: &str, value: String| {
            if rng.random_bool(chance) {
                options.extend(
                    [name.to_owned(), value]
                        .into_iter()
                        .filter(|word| !word.is_empty()),
                );
            }
        };
        option(0.8, "-s", per_cluster.to_string());
        option(0.3, "-f", "1".to_owned());
        option(0.3, "-a", String::new());
        option(0.3, "-n", "LABEL".to_owned());
        if width != 32 {
            option(0.3, "-r", (sector / 32 * (1 + clusters % 40)).to_string());
        } else {
            option(0.2, "-R", "40".to_owned());
        }
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(len).unwrap();
        let mut args: Vec<&str> = options.iter().map(String::as_str).collect();
        args.push(text(&image));
        if !run("mkfs.fat", "dosfstools", &args).status.success() {
            return None;
        }
        args.pop();
        Some(Self::new(len, &args))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub(crate) fn image(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    fn mtool(&self, tool: &str, args: &[&str]) -> bool {
        let image = self.path();
        let args = [&["-i", text(&image)], args].concat();
        run(tool, "mtools", &args).status.success()
    }

    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> bool {
        let from = self.dir.path().join("from");
        std::fs::write(&from, bytes).unwrap();
        let to = format!("::/{name}");
        let done = self.mtool("mcopy", &["-o", text(&from), &to]);
        if done {
            self.files.insert(name.to_owned(), bytes.to_vec());
        } else {
            // What mtools leaves of a file that did not fit is no concern of ours.
            self.mtool("mdel", &[&to]);
            self.files.remove(name);
        }
        done
    }

    pub(crate) fn delete(&mut self, name: &str) {
        assert!(self.mtool("mdel", &[&format!("::/{name}")]));
        self.files.remove(name);
    }

    pub(crate) fn make_dir(&mut self, name: &str) {
        if self.mtool("mmd", &[&format!("::/{name}")]) {
            self.dirs.push(format!("{name}/"));
        }
    }

    /// Beside the root.
    pub(crate) fn directories(&self) -> usize {
        self.dirs.len() - 1
    }

    /// Creates and deletes files and directories at random.
    pub(crate) fn stir(&mut self, rng: &mut StdRng, steps: u32, max: usize) {
        for step in 0..steps {
            let dir = self.dirs[rng.random_range(0..self.dirs.len())].clone();
            match rng.random_range(0..10) {
                0 if self.dirs.len() < 8 => self.make_dir(&format!("{dir}dir with a long name {step}")),
                1..4 if !self.files.is_empty() => {
                    let victim = rng.random_range(0..self.files.len());
                    let name = self.files.keys().nth(victim).unwrap().clone();
                    self.delete(&name);
                }
                _ => {
                    let bytes = content(rng, max);
                    self.write(&format!("{dir}file {step}.bin"), &bytes);
                }
            }
        }
    }

    /// Checks that `copy` is a sound volume with the same files.
    pub(crate) fn same_in(&self, copy: &[u8]) {
        let path = self.dir.path().join("copy");
        std::fs::write(&path, copy).unwrap();
        must("fsck.fat", "dosfstools", &["-n", text(&path)]);
        let out = TempDir::new_in(self.dir.path()).unwrap();
        let args = ["-s", "-n", "-i", text(&path), "::/", text(out.path())];
        assert!(
            self.files.is_empty() && self.dirs.len() == 1 || run("mcopy", "mtools", &args).status.success()
        );
        let mut found = Files::new();
        collect(out.path(), "", &mut found);
        assert!(
            found == self.files,
            "the files of the copy differ ({:?})",
            self.options
        );
    }

    /// Used clusters, as fsck.fat counts them.
    pub(crate) fn used(&self) -> u64 {
        let said = must("fsck.fat", "dosfstools", &["-n", "-v", text(&self.path())]);
        let said = String::from_utf8_lossy(&said).into_owned();
        let line = said
            .lines()
            .rfind(|line| line.contains("clusters"))
            .expect("fsck.fat counts clusters");
        let count = line
            .split_whitespace()
            .rev()
            .nth(1)
            .and_then(|word| word.split('/').next());
        count
            .and_then(|count| count.parse().ok())
            .expect("fsck.fat counts used clusters")
    }
}

fn collect(dir: &Path, prefix: &str, found: &mut Files) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            collect(&entry.path(), &format!("{name}/"), found);
        } else {
            found.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
}

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

/// A reading as plain as can be: the first table, entry by entry.
pub(crate) struct Plain {
    pub(crate) free: Free,
    pub(crate) cluster: u64,
    pub(crate) clusters: u64,
    /// Reserved area, tables and root directory.
    pub(crate) tables: Extent,
    pub(crate) root: Extent,
}

pub(crate) fn plain(image: &[u8]) -> Plain {
    let u16_at = |at: usize| u64::from(u16::from_le_bytes([image[at], image[at + 1]]));
    let u32_at = |at: usize| u16_at(at) | u16_at(at + 2) << 16;
    let (sector, fats) = (u16_at(11), u64::from(image[16]));
    let cluster = sector * u64::from(image[13]);
    let total = sector * [u16_at(19), u32_at(32)][usize::from(u16_at(19) == 0)];
    let wide = u16_at(22) == 0;
    let table_len = sector * if wide { u32_at(36) } else { u16_at(22) };
    let table = sector * u16_at(14);
    let root = table + fats * table_len;
    let data = root + u16_at(17) * 32;
    let clusters = (total - data) / cluster;
    let entry = |number: u64| match clusters {
        _ if wide => u32_at((table + number * 4) as usize) & 0x0fff_ffff,
        0..4085 => u16_at((table + number * 3 / 2) as usize) >> (number % 2 * 4) & 0xfff,
        _ => u16_at((table + number * 2) as usize),
    };
    let free = (2..clusters + 2).filter(|number| entry(*number) == 0);
    let extents = free.map(|number| Extent::new(data + (number - 2) * cluster, cluster).unwrap());
    Plain {
        free: Free::new(extents.collect()),
        cluster,
        clusters,
        tables: Extent::between(0, root),
        root: Extent::between(root, data),
    }
}
