//! Images as QEMU makes them: content and allocation, held against `qemu-img`'s own view.

#![allow(clippy::unwrap_used)] // A step that fails is a test that fails.

mod image_bench;

use std::path::Path;

use image_bench::{Bench, content_of, everything, random_content};
use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::image::{self, Allocation, Flatten, Format, OpenOptions, Run, SourceImage};
use longhaul_common::extent::Extent;

const MIB: u64 = 1 << 20;

fn open(bench: &Bench, path: &Path, format: &str, flatten: Flatten) -> SourceImage {
    let options = OpenOptions {
        format: Some(format.parse().unwrap()),
        flatten,
        ..OpenOptions::new(bench.run_dir(), &everything)
    };
    image::open(path, &options).unwrap()
}

/// The image reads as `raw` does, in one thread and in many; its allocation is right and what `qemu-img map`
/// says.
fn check(bench: &Bench, image: &SourceImage, raw: &[u8]) {
    assert_eq!(image.size(), raw.len() as u64, "{}", image.path().display());
    let whole = Extent::between(0, image.size());
    let runs = image.allocation(whole).unwrap();
    check_runs(&runs, whole, raw);
    assert_eq!(
        bench.zero_map(image.path(), image.format().name()),
        zero_map(&runs)
    );
    // An odd part of it, cut in the midst of runs.
    let part = Extent::between(4096 * 3 + 512, image.size() - 4096 * 5);
    check_runs(&image.allocation(part).unwrap(), part, raw);
    assert!(
        content_of(image) == raw,
        "{} reads differently",
        image.path().display()
    );
    read_in_parallel(image, raw);
    image.unchanged().unwrap();
}

fn check_runs(runs: &[Run], range: Extent, raw: &[u8]) {
    assert_eq!(runs.first().map(|run| run.extent.offset()), Some(range.offset()));
    assert_eq!(runs.last().map(|run| run.extent.end()), Some(range.end()));
    assert!(
        runs.windows(2)
            .all(|pair| pair[0].extent.end() == pair[1].extent.offset())
    );
    assert!(runs.windows(2).all(|pair| pair[0].state != pair[1].state));
    for run in runs.iter().filter(|run| run.state != Allocation::Data) {
        let inside = &raw[run.extent.offset() as usize..run.extent.end() as usize];
        assert!(inside.iter().all(|byte| *byte == 0), "{run:?} holds data");
    }
}

/// Ends of the runs, and whether they read as zero without being read.
fn zero_map(runs: &[Run]) -> Vec<(u64, bool)> {
    let mut map: Vec<(u64, bool)> = Vec::new();
    for run in runs {
        let is_zero = run.state != Allocation::Data;
        match map.last_mut() {
            Some(last) if last.1 == is_zero => last.0 = run.extent.end(),
            _ => map.push((run.extent.end(), is_zero)),
        }
    }
    map
}

fn read_in_parallel(image: &SourceImage, raw: &[u8]) {
    std::thread::scope(|scope| {
        for thread in 0..8usize {
            scope.spawn(move || {
                // Unaligned places and lengths on purpose.
                let mut buf = vec![0; 70_001];
                for step in 0..12usize {
                    let at = (thread * 7_919_113 + step * 1_299_709) % (raw.len() - buf.len());
                    image.read_exact_at(&mut buf, at as u64).unwrap();
                    assert!(
                        buf == raw[at..at + buf.len()],
                        "{} bytes at {at} differ",
                        buf.len()
                    );
                }
            });
        }
    });
}

#[test]
fn every_format_reads_as_its_raw_original() {
    let bench = Bench::new();
    let raw = random_content(24 * MIB, 1);
    let original = bench.write("disk.raw", &raw);
    for (format, options) in [
        ("qcow2", ""),
        ("qcow2", "compat=0.10"),
        ("qcow2", "cluster_size=4096"),
        ("qcow2", "extended_l2=on,cluster_size=128k"),
        ("vmdk", ""),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vhdx", ""),
        ("vdi", ""),
        ("vpc", "force_size=on"),
        ("qed", ""),
        ("parallels", ""),
    ] {
        let path = bench.path(&format!("disk.{}.{format}", options.replace(['=', ','], "-")));
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        bench.qemu_img(&arguments, &[&original, &path]);
        let image = open(&bench, &path, format, Flatten::Refuse);
        check(&bench, &image, &raw);
        assert_eq!(image.notes(), [] as [String; 0]);
        image.close();
    }
    assert_eq!(bench.leftovers(), [] as [String; 0]);
}

#[test]
fn compressed_clusters_are_read() {
    let bench = Bench::new();
    let raw = random_content(8 * MIB, 2);
    let original = bench.write("disk.raw", &raw);
    for method in ["zlib", "zstd"] {
        let path = bench.path(&format!("{method}.qcow2"));
        let option = format!("compression_type={method}");
        bench.qemu_img(
            &["convert", "-c", "-O", "qcow2", "-o", &option],
            &[&original, &path],
        );
        check(&bench, &open(&bench, &path, "qcow2", Flatten::Refuse), &raw);
    }
}

#[test]
fn data_in_another_file_is_read() {
    let bench = Bench::new();
    let raw = random_content(8 * MIB, 3);
    let original = bench.write("disk.raw", &raw);
    let path = bench.path("disk.qcow2");
    let option = format!("data_file={}", bench.path("disk.data").display());
    bench.qemu_img(&["convert", "-O", "qcow2", "-o", &option], &[&original, &path]);
    let image = open(&bench, &path, "qcow2", Flatten::Refuse);
    check(&bench, &image, &raw);
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::write(bench.path("disk.data"), "x").unwrap();
    let error = image.unchanged().unwrap_err().to_string();
    assert!(error.contains("disk.data changed since it was opened"), "{error}");
}

#[test]
fn a_chain_is_flattened_or_refused() {
    let bench = Bench::new();
    let mut raw = random_content(16 * MIB, 4);
    let original = bench.write("base.raw", &raw);
    let (middle, top) = (bench.path("middle.qcow2"), bench.path("top.qcow2"));
    let backing = |name: &str, format: &str| format!("backing_file={name},backing_fmt={format}");
    // One relative name, one absolute.
    bench.qemu_img(
        &["create", "-f", "qcow2", "-o", &backing("base.raw", "raw")],
        &[&middle],
    );
    bench.overwrite(&middle, "qcow2", 0x51, 3 * MIB, MIB, &mut raw);
    let absolute = middle.display().to_string();
    bench.qemu_img(
        &["create", "-f", "qcow2", "-o", &backing(&absolute, "qcow2")],
        &[&top],
    );
    bench.overwrite(&top, "qcow2", 0x52, 3 * MIB + 65_536, 4096, &mut raw);
    bench.overwrite(&top, "qcow2", 0, 9 * MIB, 2 * MIB, &mut raw);

    let image = open(&bench, &top, "qcow2", Flatten::Yes);
    check(&bench, &image, &raw);
    assert_eq!(image.notes(), ["a chain of 3 images was flattened"]);
    // The base is part of the source: a change there is a change of the image.
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::write(&original, &raw).unwrap();
    let error = image.unchanged().unwrap_err().to_string();
    assert!(
        error.contains("base.raw changed since it was opened: it was written to"),
        "{error}"
    );
    drop(image);

    let refused = OpenOptions {
        format: Some(Format::Qcow2),
        ..OpenOptions::new(bench.run_dir(), &everything)
    };
    let error = image::open(&top, &refused).unwrap_err().to_string();
    assert!(
        error.contains("has a backing file") && error.contains("middle.qcow2"),
        "{error}"
    );
}

#[test]
fn internal_snapshots_are_named() {
    let bench = Bench::new();
    let mut raw = random_content(4 * MIB, 5);
    let original = bench.write("disk.raw", &raw);
    let path = bench.path("disk.qcow2");
    bench.qemu_img(&["convert", "-O", "qcow2"], &[&original, &path]);
    bench.qemu_img(&["snapshot", "-c", "before upgrade"], &[&path]);
    bench.overwrite(&path, "qcow2", 0x77, MIB, MIB, &mut raw);
    let image = open(&bench, &path, "qcow2", Flatten::Yes);
    check(&bench, &image, &raw);
    assert!(image.notes()[0].contains("1 internal snapshots (before upgrade); the current state is copied"));
    drop(image);
    let refused = OpenOptions {
        format: Some(Format::Qcow2),
        ..OpenOptions::new(bench.run_dir(), &everything)
    };
    let error = image::open(&path, &refused).unwrap_err().to_string();
    assert!(
        error.contains("has 1 internal snapshots (before upgrade)"),
        "{error}"
    );
}

#[test]
fn raw_files_of_any_length_and_their_holes() {
    let bench = Bench::new();
    for len in [0, 1, 511, 4097, 3 * MIB + 1000] {
        let raw = random_content(len, 6);
        let path = bench.write(&format!("{len}.raw"), &raw);
        let image = open(&bench, &path, "raw", Flatten::Refuse);
        assert_eq!((image.size(), image.format()), (len, &Format::Raw));
        assert!(content_of(&image) == raw);
        if len > 0 {
            let whole = Extent::between(0, len);
            check_runs(&image.allocation(whole).unwrap(), whole, &raw);
        }
        let mut beyond = [0; 2];
        let error = image
            .read_exact_at(&mut beyond, len.saturating_sub(1))
            .unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
        assert!(image.allocation(Extent::between(0, len + 1)).is_err());
    }
    let raw = random_content(24 * MIB, 7);
    let path = bench.write_sparse("sparse.raw", &raw);
    let image = open(&bench, &path, "raw", Flatten::Refuse);
    check(&bench, &image, &raw);
    let holes = image.allocation(Extent::between(0, image.size())).unwrap();
    assert!(holes.iter().any(|run| run.state == Allocation::Hole));
}

#[test]
fn links_and_odd_names_lead_to_the_image() {
    use std::os::unix::ffi::OsStrExt;
    let bench = Bench::new();
    let raw = random_content(4 * MIB, 9);
    let odd = bench
        .path("")
        .join(std::ffi::OsStr::from_bytes(b"not utf-8 \xff, 100%.raw"));
    std::fs::write(&odd, &raw).unwrap();
    assert!(content_of(&open(&bench, &odd, "raw", Flatten::Refuse)) == raw);
    // Commas, colons and quotes mean something to QEMU.
    let original = bench.write("disk.raw", &raw);
    std::fs::create_dir(bench.path("links")).unwrap();
    for (name, options) in [
        ("a,b:c\"d.qcow2", "compat=1.1"),
        ("e f.vmdk", "subformat=twoGbMaxExtentFlat"),
    ] {
        let format = name.rsplit('.').next().unwrap();
        let target = bench.path(&format!("target.{format}"));
        bench.qemu_img(&["convert", "-O", format, "-o", options], &[&original, &target]);
        let named = if format == "qcow2" {
            bench.path(name)
        } else {
            target.clone()
        };
        std::fs::rename(&target, &named).unwrap();
        let link = bench.path("links").join(name);
        std::os::unix::fs::symlink(&named, &link).unwrap();
        for path in [&named, &link] {
            let image = open(&bench, path, format, Flatten::Refuse);
            assert!(content_of(&image) == raw);
            image.unchanged().unwrap();
        }
    }
}

#[test]
fn the_storage_daemon_stands_in() {
    let bench = Bench::new();
    let raw = random_content(8 * MIB, 8);
    let original = bench.write("disk.raw", &raw);
    let path = bench.path("disk.qcow2");
    bench.qemu_img(&["convert", "-O", "qcow2"], &[&original, &path]);
    let options = OpenOptions {
        format: Some(Format::Qcow2),
        qemu_nbd: "/nonexistent/qemu-nbd".into(),
        ..OpenOptions::new(bench.run_dir(), &everything)
    };
    check(&bench, &image::open(&path, &options).unwrap(), &raw);
}
