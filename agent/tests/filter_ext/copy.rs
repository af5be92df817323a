//! A copy that holds only what is not free is as good as the original.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::free_map::FreeMap;
use longhaul_common::extent::Extent;

use crate::image::{Image, run, scan};

/// Copies what is not free, at the free map's granularity; gives the number of bytes skipped.
fn copy_used(image: &Image, target: &Path) -> u64 {
    let volume = image.volume();
    let mut map = FreeMap::new(volume.size());
    for range in scan(&volume).unwrap().unwrap().ranges {
        map.mark(&Extent::between(range.start, range.end));
    }
    let file = File::create(target).unwrap();
    file.set_len(volume.size()).unwrap();
    let mut at = 0;
    while at < volume.size() {
        let (free, run) = map.run(at, volume.size());
        if !free {
            let mut content = vec![0; run.len() as usize];
            volume.read_exact_at(&mut content, run.offset()).unwrap();
            file.write_all_at(&content, run.offset()).unwrap();
        }
        at = run.end();
    }
    map.free_bytes()
}

/// The content of every file, as debugfs reads it.
fn contents(image: &Image, path: &Path) -> Vec<Vec<u8>> {
    let out = tempfile::tempdir().unwrap();
    let script = out.path().join("script");
    let line = |name: &String| format!("dump {name} {}\n", out.path().join(name).display());
    std::fs::write(&script, image.files().iter().map(line).collect::<String>()).unwrap();
    run(
        "debugfs",
        &["-f", script.to_str().unwrap(), path.to_str().unwrap()],
        &[0],
    );
    let read = |name: &String| std::fs::read(out.path().join(name)).unwrap();
    image.files().iter().map(read).collect()
}

fn check_copy(options: &str) {
    let mut image = Image::make(64 << 10, options, 7);
    image.age(80, 120_000);
    image.settle();
    let target = image.dir().join("copy");
    let skipped = copy_used(&image, &target);
    assert!(skipped > 10 << 20, "{options}: only {skipped} bytes skipped");
    run("e2fsck", &["-f", "-n", target.to_str().unwrap()], &[0]);
    let (before, after) = (contents(&image, &image.path()), contents(&image, &target));
    assert!(before.len() > 30 && before.iter().any(|content| content.len() > 100_000));
    assert!(before == after, "{options}: the copy's files differ");
}

#[test]
fn a_copy_without_free_blocks_is_clean_and_has_the_same_files() {
    for options in [
        "-t ext4 -b 4096",
        "-t ext4 -b 1024",
        "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg",
        "-t ext4 -b 2048 -O bigalloc -C 16384",
        "-t ext4 -b 65536",
        "-t ext3 -b 1024",
        "-t ext2 -b 4096",
    ] {
        check_copy(options);
    }
}
