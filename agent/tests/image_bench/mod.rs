//! What the image tests share: a temporary directory with QEMU's tools at hand, and content to write.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

pub(crate) mod fake;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use longhaul_agent::disk::ReadAt;
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};

pub(crate) fn everything(_: &Path) -> bool {
    true
}

/// A place for images; removed at the end.
pub(crate) struct Bench(tempfile::TempDir);

impl Bench {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// What is left in the directory for sockets.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.run_dir()).into_iter().flatten();
        entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    pub(crate) fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Writes all but the zeroes.
    pub(crate) fn write_sparse(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(content.len() as u64).unwrap();
        for (index, block) in content
            .chunks(65_536)
            .enumerate()
            .filter(|(_, block)| block.iter().any(|b| *b != 0))
        {
            file.write_all_at(block, index as u64 * 65_536).unwrap();
        }
        path
    }

    pub(crate) fn qemu_img(&self, arguments: &[&str], paths: &[&Path]) -> String {
        run(Command::new("qemu-img")
            .arg(arguments[0])
            .args(quiet(arguments[0]))
            .args(&arguments[1..])
            .args(paths))
    }

    /// Lets QEMU fill a range with one byte, and does the same to `raw`.
    pub(crate) fn overwrite(
        &self,
        path: &Path,
        format: &str,
        byte: u8,
        offset: u64,
        len: u64,
        raw: &mut [u8],
    ) {
        let write = if byte == 0 {
            format!("write -z {offset} {len}")
        } else {
            format!("write -P {byte} {offset} {len}")
        };
        run(Command::new("qemu-io")
            .args(["-f", format, "-c", &write])
            .arg(path));
        raw[offset as usize..(offset + len) as usize].fill(byte);
    }

    /// What `qemu-img map` says: ends of runs, and whether they are known to read as zero.
    pub(crate) fn zero_map(&self, path: &Path, format: &str) -> Vec<(u64, bool)> {
        let text = self.qemu_img(&["map", "--output=json", "--force-share", "-f", format], &[path]);
        let entries: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        let mut map: Vec<(u64, bool)> = Vec::new();
        for entry in entries {
            let end = entry["start"].as_u64().unwrap() + entry["length"].as_u64().unwrap();
            let is_zero = entry["zero"].as_bool().unwrap();
            match map.last_mut() {
                Some(last) if last.1 == is_zero => last.0 = end,
                _ => map.push((end, is_zero)),
            }
        }
        map
    }
}

fn quiet(command: &str) -> &'static [&'static str] {
    if matches!(command, "create" | "convert") {
        &["-q"]
    } else {
        &[]
    }
}

pub(crate) fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| {
        panic!(
            "{:?} cannot be run ({error}); it comes with the Debian package qemu-utils",
            command.get_program()
        )
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Random runs of random bytes, of one byte and of zeroes, at odd places. The seed is changed by
/// LONGHAUL_SEED.
pub(crate) fn random_content(len: u64, seed: u64) -> Vec<u8> {
    let base: u64 =
        std::env::var("LONGHAUL_SEED").map_or(0, |seed| seed.parse().expect("LONGHAUL_SEED is a number"));
    println!("content of {len} bytes: LONGHAUL_SEED={base}, {seed}");
    let mut random = StdRng::seed_from_u64(base.wrapping_mul(1000).wrapping_add(seed));
    let mut content = vec![0; len as usize];
    let mut at = 0;
    while at < content.len() {
        let end = content.len().min(at + random.random_range(1..600_000));
        match random.random_range(0..3) {
            0 => random.fill_bytes(&mut content[at..end]),
            1 => content[at..end].fill(random.random()),
            _ => {}
        }
        at = end;
    }
    content
}

pub(crate) fn content_of(image: &dyn ReadAt) -> Vec<u8> {
    let mut content = vec![0; image.size() as usize];
    for (index, piece) in content.chunks_mut(1 << 20).enumerate() {
        image.read_exact_at(piece, (index as u64) << 20).unwrap();
    }
    content
}
