//! Block devices, and raw files behind loop devices. Needs the right to make loop devices; says so where it
//! is missing.

#![allow(clippy::unwrap_used)] // A step that fails is a test that fails.

mod image_bench;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use image_bench::{Bench, content_of, everything, random_content, run};
use longhaul_agent::disk::image::{self, Allocation, Format, ImageError, OpenOptions, SourceImage};
use longhaul_common::extent::Extent;

const MIB: u64 = 1 << 20;

/// A loop device that is detached with the test.
struct Loop {
    device: PathBuf,
    file: PathBuf,
}

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
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Some(Self {
            device,
            file: file.to_owned(),
        })
    }

    fn shows_the_file(&self) -> bool {
        let sys = Path::new("/sys/block")
            .join(self.device.file_name().unwrap())
            .join("loop/backing_file");
        std::fs::read_to_string(sys).is_ok_and(|backing| Path::new(backing.trim_end()) == self.file)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
        // It stays as long as anybody has it open, for instance a losetup that looks for a free one.
        for _ in 0..500 {
            if !self.shows_the_file() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
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
    let image = open(&bench, &device.device, Format::Raw).unwrap();
    assert!(content_of(&image) == raw);
    let runs = image.allocation(Extent::between(0, 8 * MIB)).unwrap();
    assert_eq!((runs.len(), runs[0].state), (1, Allocation::Data));
    image.unchanged().unwrap();
    // Nothing can be mounted from it meanwhile; a write is noticed.
    let again = open(&bench, &device.device, Format::Raw).unwrap_err().to_string();
    assert!(again.contains("is in use by"), "{again}");
    std::fs::File::options()
        .write(true)
        .open(&device.device)
        .unwrap()
        .write_all_at(&[1; 8192], 4096)
        .unwrap();
    let error = image.unchanged().unwrap_err().to_string();
    assert!(error.contains("bytes were written to it"), "{error}");
}

#[test]
fn a_device_may_be_allowed_by_its_link() {
    let bench = Bench::new();
    let file = bench.write("disk.raw", &random_content(MIB, 23));
    let Some(device) = Loop::attach(&file, &[]) else {
        return;
    };
    // As the links of logical volumes: in a directory of /dev.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let link = folder.path().join("volume");
    std::os::unix::fs::symlink(&device.device, &link).unwrap();
    let open_as = |path: &Path| {
        let allowed = |candidate: &Path| candidate == link;
        let format = Some(Format::Raw);
        image::open(
            path,
            &OpenOptions {
                format,
                ..OpenOptions::new(bench.run_dir(), &allowed)
            },
        )
    };
    open_as(&link).unwrap();
    assert!(matches!(
        open_as(&device.device),
        Err(ImageError::NotAllowed { .. })
    ));
    // Elsewhere, links count for what they lead to.
    let elsewhere = bench.path("volume");
    std::os::unix::fs::symlink(&device.device, &elsewhere).unwrap();
    assert!(matches!(open_as(&elsewhere), Err(ImageError::NotAllowed { .. })));
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
        .args([&original, &device.device]));
    let image = open(&bench, &device.device, Format::Qcow2).unwrap();
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
        device.device.display()
    );
    assert!(error.contains(&wanted), "{error}");
    let place = bench.path("mounted");
    std::fs::create_dir(&place).unwrap();
    run(Command::new("mount").args([&device.device, &place]));
    let mounted = Mounted(place);
    let error = open(&bench, &device.device, Format::Raw).unwrap_err().to_string();
    let wanted = format!("is in use by the file system mounted at {}", mounted.0.display());
    assert!(error.contains(&wanted), "{error}");
    drop(mounted);
    drop(device);
    // A loop device that cannot write does no harm.
    let _device = Loop::attach(&file, &["--read-only"]);
    open(&bench, &file, Format::Raw).unwrap();
}
