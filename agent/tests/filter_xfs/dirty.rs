//! File systems that were not cleanly unmounted, made by editing fresh ones.

use std::fs::File;

use longhaul_agent::disk::fs::Unproven;

use super::image::{Image, SMALL};
use super::oracle;
use super::volume::{Patched, scan};

const NEEDS_REPAIR: u32 = 1 << 4;

fn require_not_clean(volume: &Patched<'_>, what: &str) {
    match scan(volume) {
        Err(Unproven::NotClean { .. }) => {}
        Err(other) => panic!("{what}: {other}"),
        Ok(_) => panic!("{what}: proven"),
    }
}

#[test]
fn a_fresh_log_is_clean_and_each_edit_of_it_is_not() {
    for options in [
        &["-m", "crc=0"][..],
        &["-m", "crc=0", "-l", "version=1"],
        &[],
        &["-l", "su=64k"],
    ] {
        let image = Image::fresh(SMALL, options);
        let volume = image.volume();
        scan(&volume).unwrap();
        let log = oracle::log(&image).offset;
        let edit = |what: &str, at: u64, bytes: &[u8]| {
            require_not_clean(
                &Patched::new(&volume).write(log + at, bytes),
                &format!("{options:?}: {what}"),
            );
        };
        edit("zeroed", 0, &[0; 1 << 20]);
        edit("no header", 0, &[0; 4]);
        edit("another cycle", 4, &[0, 0, 0, 2]);
        edit("another version", 8, &[0, 0, 0, 9]);
        edit("a longer record", 12, &[0, 0, 4, 1]);
        edit("an endless record", 12, &[0xff; 4]);
        edit("another place", 16, &[0, 0, 0, 1, 0, 0, 0, 7]);
        edit("a tail before the head", 24, &[0, 0, 0, 2]);
        edit("a wrong checksum", 32, &[1, 2, 3, 4]);
        edit("two operations", 40, &[0, 0, 0, 2]);
        edit("another file system", 304, &[1; 16]);
        if !options.contains(&"version=1") {
            edit("larger buffers", 320, &[0x7f, 0, 0, 0]);
        }
        // A header block for each 32 KiB of the writer's buffers, where the log's version has that.
        let buffers = u32::from_be_bytes(Patched::new(&volume).get(log + 320)).div_ceil(32 << 10);
        let operation = 512 * u64::from(buffers.max(1));
        edit("another client", operation + 8, &[0x69]);
        edit("no unmount record", operation + 9, &[0]);
        edit("a torn write behind it", 200 * 512, &[0, 0, 0, 1]);
        edit("a block of a later lap", 200 * 512, &[0, 0, 0, 2]);
    }
}

/// What a mount writes first: a transaction behind the unmount record.
#[test]
fn a_transaction_behind_the_unmount_record_is_dirty() {
    let image = Image::fresh(SMALL, &[]);
    let volume = image.volume();
    let log = oracle::log(&image).offset;
    let mut dirty = Patched::new(&volume);
    let mut header = dirty.get::<512>(log);
    header[16..24].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 2]);
    dirty.put(log + 1024, &header);
    dirty.put(log + 1536, &[0, 0, 0, 1, 0, 0, 0, 16, 0x69, 0x01]);
    require_not_clean(&dirty, "a transaction");
    // A second unmount record instead: the next clean unmount.
    dirty.put(log + 1536, &[0, 0, 0, 1, 0, 0, 0, 8, 0xaa, 0x20]);
    scan(&dirty).unwrap();
}

#[test]
fn a_log_on_another_device_cannot_be_checked() {
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().set_len(SMALL).unwrap();
    let path = other.path().to_str().unwrap();
    let image = Image::fresh(SMALL, &["-l", &format!("logdev={path},size=64m")]);
    let volume = image.volume();
    require_not_clean(&Patched::new(&volume), "an external log");
}

#[test]
fn an_unfinished_copy_and_a_volume_in_need_of_repair_are_refused() {
    let image = Image::fresh(SMALL, &[]);
    let volume = image.volume();
    let mut unfinished = Patched::new(&volume).write(126, &[1]);
    unfinished.seal(0, 512, 224);
    require_not_clean(&unfinished, "in progress");
    let mut broken = Patched::new(&volume);
    let incompat = u32::from_be_bytes(broken.get(216)) | NEEDS_REPAIR;
    broken.put(216, &incompat.to_be_bytes());
    broken.seal(0, 512, 224);
    assert!(matches!(scan(&broken), Err(Unproven::Inconsistent { .. })));
}

#[test]
fn a_real_time_device_is_an_unknown_feature() {
    let image = {
        let other = tempfile::NamedTempFile::new().unwrap();
        File::set_len(other.as_file(), SMALL).unwrap();
        let path = other.path().to_str().unwrap();
        Image::fresh(SMALL, &["-m", "reflink=0", "-r", &format!("rtdev={path}")])
    };
    assert!(matches!(
        scan(&image.volume()),
        Err(Unproven::UnknownFeature { .. })
    ));
}
