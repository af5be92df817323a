//! Block devices, and raw files behind loop devices. Needs the right to make loop devices; says so where it is missing.

mod image_bench;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use image_bench::{Bench, content_of, everything, random_content, run};
use longhaul_agent::disk::image::{self, Allocation, Format, ImageError, OpenOptions, SourceImage};
use longhaul_common::extent::Extent;

const MIB: u64 = 1 << 20;

/// A loop device that is detached with the test.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &Path, options: &[&str]) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(file)
            .output()
            .unwrap();
        if !output.status.success() {
            eprintln!(
                "not tested: no loop device ({})",
                String::from_utf8_lossy(&output.stderr).trim()
            );
            return None;
        }
        Some(Self(PathBuf::from(
            String::from_utf8(output.stdout).unwrap().trim(),
        )))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A mounted file system that is unmounted with the test.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn open(bench: &Bench, path: &Path, format: Format) -> Result<SourceImage, ImageError> {
    image::open(
        path,
        &OpenOptions {
            format: Some(format),
            ..OpenOptions::new(bench.run_dir(), &everything)
        },
    )
}

#[test]
fn a_block_device_is_read_and_watched() {
    let bench = Bench::new();
    let raw = random_content(8 * MIB, 21);
    let file = bench.write("disk.raw", &raw);
    let Some(device) = Loop::attach(&file, &[]) else {
        return;
    };
    let image = open(&bench, &device.0, Format::Raw).unwrap();
    assert!(content_of(&image) == raw);
    let runs = image.allocation(Extent::between(0, 8 * MIB)).unwrap();
    assert_eq!((runs.len(), runs[0].state), (1, Allocation::Data));
    image.unchanged().unwrap();
    // Nothing can be mounted from it meanwhile; a write is noticed.
    let again = open(&bench, &device.0, Format::Raw).unwrap_err().to_string();
    assert!(again.contains("is in use by"), "{again}");
    std::fs::File::options()
        .write(true)
        .open(&device.0)
        .unwrap()
        .write_all_at(&[1; 8192], 4096)
        .unwrap();
    let error = image.unchanged().unwrap_err().to_string();
    assert!(error.contains("bytes were written to it"), "{error}");
}

#[test]
fn an_image_format_on_a_block_device_is_read() {
    let bench = Bench::new();
    let raw = random_content(8 * MIB, 22);
    let original = bench.write("disk.raw", &raw);
    let file = bench.path("volume");
    std::fs::File::create(&file).unwrap().set_len(16 * MIB).unwrap();
    let Some(device) = Loop::attach(&file, &[]) else {
        return;
    };
    run(Command::new("qemu-img")
        .args(["convert", "-O", "qcow2"])
        .args([&original, &device.0]));
    let image = open(&bench, &device.0, Format::Qcow2).unwrap();
    assert!(content_of(&image) == raw);
    image.unchanged().unwrap();
}

#[test]
fn a_mounted_device_and_its_file_are_refused() {
    let bench = Bench::new();
    let file = bench.path("disk.raw");
    std::fs::File::create(&file).unwrap().set_len(16 * MIB).unwrap();
    run(Command::new("mkfs.ext4").arg("-q").arg(&file));
    let Some(device) = Loop::attach(&file, &[]) else {
        return;
    };
    let error = open(&bench, &file, Format::Raw).unwrap_err().to_string();
    let wanted = format!(
        "in use by {}: the loop device may write to it",
        device.0.display()
    );
    assert!(error.contains(&wanted), "{error}");
    let place = bench.path("mounted");
    std::fs::create_dir(&place).unwrap();
    run(Command::new("mount").args([&device.0, &place]));
    let mounted = Mounted(place);
    let error = open(&bench, &device.0, Format::Raw).unwrap_err().to_string();
    let wanted = format!("is in use by the file system mounted at {}", mounted.0.display());
    assert!(error.contains(&wanted), "{error}");
    drop(mounted);
    drop(device);
    // A loop device that cannot write does no harm.
    let _device = Loop::attach(&file, &["--read-only"]);
    open(&bench, &file, Format::Raw).unwrap();
}
