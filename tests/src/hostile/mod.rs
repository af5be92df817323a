//! Every parser and decoder of Longhaul, as a function from hostile bytes to nothing.
//!
//! Owns the list of entries that the fuzz targets (`tests/fuzz`) and the short test of each (`tests/fuzz_smoke.rs`) share, with
//! seeds that reach behind the first check of each. Leaves alone what is right or wrong about a result: an entry only promises that
//! it returns, soon, without a panic and with little memory.

mod disks;
mod ram;
mod text;
mod wire;

use std::io;

/// One parser or decoder.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Name of the fuzz target, too.
    pub name: &'static str,
    /// Feeds it.
    pub run: fn(&[u8]),
    /// Good input, from which fuzzing starts.
    pub seeds: fn() -> io::Result<Vec<Vec<u8>>>,
}

/// All of them.
pub const ENTRIES: &[Entry] = &[
    Entry {
        name: "frame",
        run: wire::frame,
        seeds: wire::frames,
    },
    Entry {
        name: "batch",
        run: wire::batch,
        seeds: wire::batches,
    },
    Entry {
        name: "payload",
        run: wire::payload,
        seeds: wire::payloads,
    },
    Entry {
        name: "scan",
        run: disks::scan,
        seeds: disks::all,
    },
    Entry {
        name: "ext",
        run: disks::ext,
        seeds: disks::ext_images,
    },
    Entry {
        name: "xfs",
        run: disks::xfs,
        seeds: disks::xfs_images,
    },
    Entry {
        name: "ntfs",
        run: disks::ntfs,
        seeds: disks::ntfs_images,
    },
    Entry {
        name: "fat",
        run: disks::fat,
        seeds: disks::fat_images,
    },
    Entry {
        name: "nbd",
        run: disks::nbd,
        seeds: disks::nbd_sessions,
    },
    Entry {
        name: "image_header",
        run: disks::image_header,
        seeds: disks::image_headers,
    },
    Entry {
        name: "progress_log",
        run: disks::progress_log,
        seeds: disks::progress_logs,
    },
    Entry {
        name: "settings",
        run: text::settings,
        seeds: text::configs,
    },
    Entry {
        name: "units",
        run: text::units,
        seeds: text::unit_texts,
    },
    Entry {
        name: "identity",
        run: text::identity,
        seeds: text::identities,
    },
    Entry {
        name: "job_json",
        run: text::job_json,
        seeds: text::job_jsons,
    },
    Entry {
        name: "ram_stream",
        run: ram::stream,
        seeds: ram::streams,
    },
    Entry {
        name: "ram_parts",
        run: ram::parts,
        seeds: ram::part_lists,
    },
];

/// Feeds `bytes` to the entry of this name.
///
/// # Panics
/// Where there is no such entry, and where fuzzing has found something.
pub fn run(name: &str, bytes: &[u8]) {
    let entry = ENTRIES.iter().find(|entry| entry.name == name);
    let Some(entry) = entry else {
        panic!("there is no entry '{name}'")
    };
    (entry.run)(bytes);
}
