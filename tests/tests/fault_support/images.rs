//! Disks with a bit of everything: a file system with deleted files, random data, zeros, holes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

const MIB: u64 = 1 << 20;

/// A raw disk: 20 MiB of ext4 with files, some of them deleted; behind it random data, a hole, written zeros, random data again.
pub(crate) fn mixed(path: &Path, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let file = File::create(path).unwrap();
    file.set_len(20 * MIB).unwrap();
    run(
        "mkfs.ext4",
        &["-q", "-F", "-E", "lazy_itable_init=0", path.to_str().unwrap()],
    );
    let folder = tempfile::tempdir().unwrap();
    let mut orders = String::new();
    for n in 0..6u64 {
        let name = folder.path().join(n.to_string());
        fs::write(&name, random(&mut rng, 2 * MIB + n * 1000)).unwrap();
        orders += &format!("write {} f{n}\n", name.display());
    }
    orders += "rm f1\nrm f4\n";
    let script = folder.path().join("orders");
    fs::write(&script, orders).unwrap();
    run(
        "debugfs",
        &["-w", "-f", script.to_str().unwrap(), path.to_str().unwrap()],
    );
    let size = 20 * MIB + 8 * MIB + 4 * MIB + 2 * MIB + 6 * MIB + 512 * rng.random_range(0..64);
    file.set_len(size).unwrap();
    file.write_all_at(&random(&mut rng, 8 * MIB), 20 * MIB).unwrap();
    file.write_all_at(&vec![0; 2 * MIB as usize], 32 * MIB).unwrap();
    file.write_all_at(&random(&mut rng, size - 34 * MIB), 34 * MIB)
        .unwrap();
}

/// A raw disk of random data.
pub(crate) fn random_disk(path: &Path, mib: u64, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    fs::write(path, random(&mut rng, mib * MIB)).unwrap();
}

fn random(rng: &mut StdRng, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// Runs a tool.
pub(crate) fn run(program: &str, words: &[&str]) {
    let mut command = Command::new(program);
    command
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let ended = command.status();
    let hint = "install the Debian packages e2fsprogs and qemu-utils";
    assert!(
        ended
            .unwrap_or_else(|e| panic!("{program}: {e}; {hint}"))
            .success(),
        "{program} {words:?}"
    );
}
