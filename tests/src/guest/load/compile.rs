//! The `compile` workload: many small files written, read again and turned into others, as a build does.
//!
//! Owns the rhythm: a tree of sources, an object for each, an archive of all, a line in a log that is
//! made durable, and the tree of four builds before removed. Promises that a build in the log is complete.

use std::fs::{self, File};
use std::io::{self, Write};

use super::chance::{checksum, fill, mix};
use super::{Guest, record, worker};

/// The log's stream number and name.
pub const BUILD_STREAM: u32 = 101;
pub const BUILDS: &str = "builds";
const PAYLOAD: usize = 64;
/// Sources of one build, in folders of eight.
const SOURCES: u64 = 48;
/// Builds that are kept.
const KEPT: u64 = 4;

pub(super) fn start(guest: &Guest) -> io::Result<()> {
    worker(guest, BUILDS, run);
    Ok(())
}

fn run(guest: &Guest) -> io::Result<()> {
    let folder = &guest.order.folder;
    let mut log = File::create_new(folder.join(BUILDS))?;
    File::open(folder)?.sync_all()?;
    let mut number = 0;
    while guest.gate.is_open() {
        number += 1;
        build(guest, number)?;
        log.write_all(&record::encode(guest.order.seed, BUILD_STREAM, number, PAYLOAD))?;
        log.sync_data()?;
        guest.console.acknowledge(BUILDS, number);
        if number > KEPT {
            fs::remove_dir_all(folder.join(format!("b{}", number - KEPT)))?;
        }
    }
    Ok(())
}

fn build(guest: &Guest, number: u64) -> io::Result<()> {
    let tree = guest.order.folder.join(format!("b{number}"));
    let mut archive = Vec::new();
    for source in 0..SOURCES {
        let folder = tree.join(format!("d{}", source / 8));
        fs::create_dir_all(&folder)?;
        let seed = mix(guest.order.seed ^ mix((source << 32) | (number % 7)));
        let mut text = vec![0; 1000 + (seed % 19_000) as usize];
        fill(&mut text, seed);
        // Text has few different characters.
        text.iter_mut().for_each(|byte| *byte = b'a' + (*byte & 15));
        let path = folder.join(format!("s{source}"));
        fs::write(&path, &text)?;
        let read = fs::read(&path)?;
        if read != text {
            return Err(io::Error::other(format!(
                "{} is not what was written",
                path.display()
            )));
        }
        let object: Vec<u8> = read
            .chunks(32)
            .flat_map(|line| checksum(line).to_le_bytes())
            .collect();
        fs::write(folder.join(format!("o{source}")), &object)?;
        archive.extend_from_slice(&object);
        guest.console.count(1);
    }
    fs::write(tree.join("archive"), archive)
}
