//! One disk as a guest has it - GPT with an EFI system partition, ext4, and LVM with XFS, ext4 and swap - through the real file
//! systems: what the free map calls free against what each file system's own tool calls free, and a copy without those blocks
//! against fsck and file by file.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "shared with filter_disk, which uses all of it")]
#[path = "filter_disk/tools.rs"]
mod tools;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::scan::{Proof, Scan, scan};
use longhaul_common::extent::{BLOCK, Extent};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tools::{Lvm, run, sfdisk};

const MIB: u64 = 1 << 20;
const PHYSICAL_EXTENT: u64 = 4 * MIB;

/// A volume of the disk: an image of its own, and where its bytes lie.
struct Volume {
    name: &'static str,
    image: PathBuf,
    /// In volume order.
    places: Vec<Extent>,
    /// Free bytes by the file system's own tool.
    free: u64,
}

impl Volume {
    fn size(&self) -> u64 {
        self.places.iter().map(Extent::len).sum()
    }

    /// Copies between the volume's image and its places on the disk.
    fn transfer(&self, disk: &File, to_disk: bool) {
        let image = File::options().read(true).write(true).open(&self.image).unwrap();
        let mut buf = vec![0; MIB as usize];
        let mut at = 0;
        for place in &self.places {
            for offset in (place.offset()..place.end()).step_by(buf.len()) {
                let buf = &mut buf[..(place.end() - offset).min(MIB) as usize];
                let (from, to) = if to_disk {
                    ((&image, at), (disk, offset))
                } else {
                    ((disk, offset), (&image, at))
                };
                from.0.read_exact_at(buf, from.1).unwrap();
                if !to_disk || buf.iter().any(|byte| *byte != 0) {
                    to.0.write_all_at(buf, to.1).unwrap();
                }
                at += buf.len() as u64;
            }
        }
    }
}

struct Image(File);

impl ReadAt for Image {
    fn size(&self) -> u64 {
        self.0.metadata().map_or(0, |meta| meta.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        FileExt::read_exact_at(&self.0, buf, offset)
    }
}

fn tool(package: &str, line: &str, path: &Path) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut command = Command::new(words[0]);
    let args = words[1..].iter().map(|word| {
        if *word == "{}" {
            path.to_str().unwrap()
        } else {
            word
        }
    });
    run(package, command.env("MTOOLS_SKIP_CHECK", "1").args(args), "")
}

/// Files of odd sizes with random content; every third is deleted later.
fn files(dir: &Path, count: u32, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    fs::create_dir(dir).unwrap();
    for i in 0..count {
        let mut bytes = vec![0; rng.random_range(1..400_000)];
        rng.fill_bytes(&mut bytes);
        fs::write(dir.join(format!("f{i}")), bytes).unwrap();
    }
}

fn number_after(text: &str, key: &str) -> u64 {
    let rest = text
        .split_once(key)
        .unwrap_or_else(|| panic!("no {key:?} in {text}"))
        .1;
    let digits: String = rest
        .trim_start()
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().unwrap()
}

fn make_ext4(volume: &mut Volume, dir: &Path, options: &str) {
    tool(
        "e2fsprogs",
        &format!("/sbin/mkfs.ext4 -q {options} -d {} {{}}", dir.display()),
        &volume.image,
    );
    let removed: String = (0..60).step_by(3).map(|i| format!("rm /f{i}\n")).collect();
    let mut debugfs = Command::new("/sbin/debugfs");
    run(
        "e2fsprogs",
        debugfs.args(["-w", "-f", "-"]).arg(&volume.image),
        &removed,
    );
    tool("e2fsprogs", "/sbin/e2fsck -fp {}", &volume.image);
    let said = tool("e2fsprogs", "/sbin/dumpe2fs -h {}", &volume.image);
    volume.free = number_after(&said, "Free blocks:") * number_after(&said, "Block size:");
}

fn make_fat(volume: &mut Volume, dir: &Path) {
    tool("dosfstools", "/sbin/mkfs.vfat -F 32 -s 1 {}", &volume.image);
    for i in 0..60 {
        tool(
            "mtools",
            &format!("mcopy -i {{}} {}/f{i} ::f{i}", dir.display()),
            &volume.image,
        );
    }
    for i in (0..60).step_by(3) {
        tool("mtools", &format!("mdel -i {{}} ::f{i}"), &volume.image);
    }
    let said = tool("dosfstools", "/sbin/fsck.vfat -n -v {}", &volume.image);
    let cluster = said
        .lines()
        .find(|line| line.contains("bytes per cluster"))
        .unwrap();
    let cluster: u64 = cluster.split_whitespace().next().unwrap().parse().unwrap();
    let (used, total) = said.lines().last().unwrap().rsplit_once('/').unwrap();
    let used: u64 = used.rsplit(' ').next().unwrap().parse().unwrap();
    volume.free = (number_after(total, "") - used) * cluster;
}

fn make_xfs(volume: &mut Volume, dir: &Path) {
    let mut proto = "/dev/null\n1 1\nd--755 0 0\n".to_owned();
    for i in 0..60 {
        proto += &format!("f{i} ---644 0 0 {}/f{i}\n", dir.display());
    }
    let path = dir.with_extension("proto");
    fs::write(&path, proto + "$\n").unwrap();
    tool(
        "xfsprogs",
        &format!("/sbin/mkfs.xfs -q -p {} {{}}", path.display()),
        &volume.image,
    );
    let said = xfs_db(&volume.image, &["freesp -s"]);
    volume.free = number_after(&said, "total free blocks") * 4096;
}

/// The ranges of a logical volume on a physical one at `base`, in the order of the logical volume.
fn places(lvm: &Lvm, name: &str, base: u64) -> Vec<Extent> {
    let text = lvm.run(&format!(
        "lvs --noheadings --segments -o seg_start_pe,seg_pe_ranges vg/{name}"
    ));
    let mut rows: Vec<(u64, u64, u64)> = text
        .lines()
        .map(|row| {
            let (at, range) = row.trim().split_once(' ').unwrap();
            let (first, last) = range.rsplit_once(':').unwrap().1.split_once('-').unwrap();
            (at.parse().unwrap(), first.parse().unwrap(), last.parse().unwrap())
        })
        .collect();
    rows.sort_unstable();
    rows.iter()
        .map(|(_, first, last)| {
            Extent::between(
                base + first * PHYSICAL_EXTENT,
                base + (last + 1) * PHYSICAL_EXTENT,
            )
        })
        .collect()
}

struct Guest {
    disk: File,
    volumes: Vec<Volume>,
    free_extents: u64,
    physical: Extent,
}

/// A volume group on `physical`; LVM's view of it, where extent 0 lies, and its free bytes.
fn make_group(disk: &File, physical: Extent) -> (Lvm, u64, u64) {
    let lvm = Lvm::new(&[vec![0; physical.len() as usize]]);
    lvm.run("vgcreate -s 4m vg {0}");
    lvm.run("lvcreate -an -Zn -Wn -n xfs -L 400m vg");
    lvm.run("lvcreate -an -Zn -Wn -n home -L 100m vg");
    lvm.run("lvcreate -an -Zn -Wn -n swap -L 40m vg");
    lvm.run("lvextend -L 240m vg/home");
    let base = physical.offset()
        + lvm
            .run("pvs --noheadings --nosuffix --units b -o pe_start {0}")
            .trim()
            .parse::<u64>()
            .unwrap();
    let free_extents = lvm
        .run("pvs --noheadings --nosuffix --units b -o pv_free {0}")
        .trim()
        .parse()
        .unwrap();
    disk.write_all_at(&lvm.images()[0][..2 * MIB as usize], physical.offset())
        .unwrap();
    (lvm, base, free_extents)
}

fn make_guest(dir: &Path) -> Guest {
    let script =
        "label: gpt\nsize=100M, type=U\nsize=600M\nsize=900M, type=E6D6D379-F507-44C2-A23C-238F2A3DF928\n";
    let (table, parts) = sfdisk(1700 * MIB, script);
    let [esp, root, physical] = [parts[0].1, parts[1].1, parts[2].1];
    let disk = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.join("disk"))
        .unwrap();
    disk.set_len(table.len() as u64).unwrap();
    for end in [0, table.len() as u64 - MIB] {
        disk.write_all_at(&table[end as usize..][..MIB as usize], end)
            .unwrap();
    }
    drop(table);

    let (lvm, base, free_extents) = make_group(&disk, physical);
    let new = |name, places| Volume {
        name,
        image: dir.join(name),
        places,
        free: 0,
    };
    let mut volumes = vec![
        new("esp", vec![esp]),
        new("root", vec![root]),
        new("xfs", places(&lvm, "xfs", base)),
        new("home", places(&lvm, "home", base)),
        new("swap", places(&lvm, "swap", base)),
    ];
    assert_eq!(volumes[3].places.len(), 2, "home has two segments");
    let content = dir.join("content");
    files(&content, 60, 1);
    for volume in &mut volumes {
        File::create(&volume.image)
            .unwrap()
            .set_len(volume.size())
            .unwrap();
        match volume.name {
            "esp" => make_fat(volume, &content),
            "root" => make_ext4(volume, &content, ""),
            "home" => make_ext4(volume, &content, "-b 1024 -O ^has_journal"),
            "xfs" => make_xfs(volume, &content),
            _ => drop(tool("util-linux", "/sbin/mkswap {}", &volume.image)),
        }
        volume.transfer(&disk, true);
    }
    Guest {
        disk,
        volumes,
        free_extents,
        physical,
    }
}

/// Skipped bytes inside `ranges`.
fn skipped(scan: &Scan, ranges: &[Extent]) -> u64 {
    let mut sum = 0;
    for range in ranges {
        let mut at = range.offset();
        while at < range.end() {
            let (free, run) = scan.free.run(at, range.end());
            sum += if free { run.len() } else { 0 };
            at = run.end();
        }
    }
    sum
}

#[test]
fn a_guests_disk_is_skipped_where_it_is_free_and_whole_where_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let guest = make_guest(dir.path());
    let image = Image(guest.disk.try_clone().unwrap());
    let start = std::time::Instant::now();
    let scan = scan(&image);
    println!("scanned in {:?}", start.elapsed());
    assert_eq!(scan.shortfalls, [""; 0]);

    let mut oracle = guest.free_extents;
    for volume in &guest.volumes {
        let found = skipped(&scan, &volume.places);
        println!("{}: {found} of {} free bytes skipped", volume.name, volume.free);
        // A block of the disk that is only partly free is not skipped: 1 KiB and 512-byte clusters fall short of their tool's sum.
        assert!(
            found <= volume.free,
            "{}: {found} of {}: {:#?}",
            volume.name,
            volume.free,
            scan.parts
        );
        oracle += volume.free;
    }
    let free = scan.free.free_bytes();
    println!("{free} of {oracle} free bytes skipped");
    assert!(
        free as f64 >= oracle as f64 * 0.999,
        "{free} of {oracle}: {:#?}",
        scan.parts
    );
    let in_volumes: u64 = guest
        .volumes
        .iter()
        .map(|volume| skipped(&scan, &volume.places))
        .sum();
    assert_eq!(
        skipped(&scan, &[guest.physical])
            + skipped(&scan, &guest.volumes[0].places)
            + skipped(&scan, &guest.volumes[1].places),
        free
    );
    assert_eq!(free - in_volumes, guest.free_extents);
    let proofs = scan
        .parts
        .iter()
        .filter(|part| part.proof == Some(Proof::Unmounted))
        .count();
    assert_eq!(proofs, 4, "{:#?}", scan.parts);
    assert!(
        scan.parts
            .iter()
            .any(|part| part.kind == "swap" && part.free_bytes == 0)
    );

    copy_and_compare(&guest, &scan, dir.path());
}

/// Fills every skipped block with garbage, as if it had never been copied; then all must be as before.
fn copy_and_compare(guest: &Guest, scan: &Scan, dir: &Path) {
    let size = guest.disk.metadata().unwrap().len();
    let mut at = 0;
    let garbage = vec![0xa5; 4 * MIB as usize];
    while at < size {
        let (free, run) = scan.free.run(at, size);
        let mut rest = run;
        while free && !rest.is_empty() {
            let len = rest.len().min(garbage.len() as u64);
            guest
                .disk
                .write_all_at(&garbage[..len as usize], rest.offset())
                .unwrap();
            rest = Extent::between(rest.offset() + len, rest.end());
        }
        at = run.end();
    }
    let content = dir.join("content");
    for volume in &guest.volumes {
        let before = fs::read(&volume.image).unwrap();
        volume.transfer(&guest.disk, false);
        let check = match volume.name {
            "esp" => "/sbin/fsck.vfat -n {}",
            "root" | "home" => "/sbin/e2fsck -fn {}",
            "xfs" => "/sbin/xfs_repair -n {}",
            _ => {
                assert_eq!(fs::read(&volume.image).unwrap(), before);
                continue;
            }
        };
        tool("dosfstools e2fsprogs xfsprogs", check, &volume.image);
        for i in (0..60).filter(|i| volume.name == "xfs" || i % 3 != 0) {
            let name = format!("f{i}");
            let out = dir.join("out");
            extract(volume, &name, &out);
            let same = fs::read(&out).unwrap() == fs::read(content.join(&name)).unwrap();
            assert!(same, "{name} on {} has changed", volume.name);
        }
    }
}

fn extract(volume: &Volume, name: &str, out: &Path) {
    let target = out.display();
    match volume.name {
        "esp" => {
            tool(
                "mtools",
                &format!("mcopy -n -o -i {{}} ::{name} {target}"),
                &volume.image,
            );
        }
        "xfs" => fs::write(out, xfs_file(&volume.image, name)).unwrap(),
        _ => {
            let mut debugfs = Command::new("/sbin/debugfs");
            run(
                "e2fsprogs",
                debugfs
                    .args(["-R", &format!("dump /{name} {target}")])
                    .arg(&volume.image),
                "",
            );
        }
    }
}

fn xfs_db(image: &Path, commands: &[&str]) -> String {
    let mut db = Command::new("/sbin/xfs_db");
    db.arg("-r");
    for command in commands {
        db.args(["-c", command]);
    }
    run("xfsprogs", db.arg(image), "")
}

/// Reads a file by the extents that `xfs_db` lists.
fn xfs_file(image: &Path, name: &str) -> Vec<u8> {
    let said = xfs_db(image, &[&format!("path /{name}"), "print core.size", "bmap"]);
    let size = number_after(&said, "core.size =");
    let shape = xfs_db(image, &["sb 0", "print agblocks"]);
    let agblocks = number_after(&shape, "agblocks =");
    let file = File::open(image).unwrap();
    let mut bytes = Vec::new();
    for row in said.lines().filter(|line| line.starts_with("data offset")) {
        let count = number_after(row, "count");
        let (ag, block) = row
            .split_once('(')
            .unwrap()
            .1
            .split_once(')')
            .unwrap()
            .0
            .split_once('/')
            .unwrap();
        let start = ag.parse::<u64>().unwrap() * agblocks + block.parse::<u64>().unwrap();
        let mut part = vec![0; (count * BLOCK) as usize];
        file.read_exact_at(&mut part, start * BLOCK).unwrap();
        bytes.extend(part);
    }
    bytes.truncate(size as usize);
    bytes
}

/// No checksum protects an MBR, and file systems keep copies of their headers in their own middle: a flipped bit may move a
/// partition onto one of these.
#[test]
fn a_flipped_bit_in_an_mbr_never_frees_a_used_block() {
    let dir = tempfile::tempdir().unwrap();
    let script = "label: dos\nstart=2048, size=64M\nsize=64M\nstart=280576, size=400M, type=5\nstart=282624, size=320M\nstart=941504, size=40M\n";
    let (table, parts) = sfdisk(600 * MIB, script);
    let disk = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.path().join("disk"))
        .unwrap();
    disk.set_len(table.len() as u64).unwrap();
    let records: Vec<u64> = parts[3..].iter().map(|(_, range)| range.offset() - MIB).collect();
    for at in records.iter().chain([&0]) {
        disk.write_all_at(&table[*at as usize..][..512], *at).unwrap();
    }
    drop(table);
    let content = dir.path().join("content");
    files(&content, 60, 2);
    for (i, name) in [(0, "esp"), (1, "root"), (3, "xfs"), (4, "ntfs")] {
        let mut volume = Volume {
            name,
            image: dir.path().join(name),
            places: vec![parts[i].1],
            free: 0,
        };
        File::create(&volume.image)
            .unwrap()
            .set_len(volume.size())
            .unwrap();
        match name {
            "esp" => make_fat(&mut volume, &content),
            "root" => make_ext4(
                &mut volume,
                &content,
                "-b 1024 -O ^metadata_csum,^has_journal,^64bit",
            ),
            "xfs" => make_xfs(&mut volume, &content),
            _ => drop(tool("ntfs-3g", "/sbin/mkntfs -q -F -f {}", &volume.image)),
        }
        volume.transfer(&disk, true);
    }
    let image = Image(disk);
    let clean = scan(&image);
    let proofs = clean
        .parts
        .iter()
        .filter(|part| part.proof == Some(Proof::Unmounted))
        .count();
    assert_eq!(proofs, 4, "{:#?}", clean.parts);
    let places = records
        .iter()
        .chain([&0])
        .flat_map(|record| record + 446..record + 512);
    for at in places {
        let mut byte = [0];
        image.read_exact_at(&mut byte, at).unwrap();
        for mask in [1, 2, 4, 8, 16, 32, 64, 128, 6, 255] {
            image.0.write_all_at(&[byte[0] ^ mask], at).unwrap();
            assert_within(&scan(&image), &clean, &format!("byte {at} ^ {mask:#x}"));
        }
        image.0.write_all_at(&byte, at).unwrap();
    }
}

/// What `found` skips, `clean` skips too.
fn assert_within(found: &Scan, clean: &Scan, context: &str) {
    let size = 600 * MIB;
    let mut at = 0;
    while at < size {
        let (free, run) = found.free.run(at, size);
        if free {
            let (also, inside) = clean.free.run(at, run.end());
            assert!(
                also && inside == run,
                "{context}: {run:?} is in use: {:#?}",
                found.parts
            );
        }
        at = run.end();
    }
}
