//! A progress log whose bytes anybody may have written: the entry for fuzzing.
//!
//! Owns nothing of the log; plays what an agent does with one that it finds: header, records, durable leaves.

use std::io::{Seek, Write};
use std::sync::Arc;

use longhaul_common::digest::{Digest, LEAF};
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round};

use super::board::{LeafState, LeafStates};
use super::progress_log::Records;
use super::record::{HEADER, Header, Kind, Record, Version};
use super::replay;

/// Largest disk played with, in leaves: what the header says is bounded by the disk that is really there.
const LEAVES_MAX: u64 = 1 << 20;

/// Reads the log as an agent that takes a job up again. Whatever the bytes are, this returns, without a panic.
pub fn replay_log(log: &[u8]) {
    let Some(header) = log.get(..HEADER).and_then(Header::decode) else {
        return;
    };
    let leaves = header.leaves();
    let Some(file) = file_of(log).filter(|_| leaves <= LEAVES_MAX) else {
        return;
    };
    let records = || Records::new(Arc::clone(&file), log.len() as u64, leaves);
    let mut states = LeafStates::new(leaves, LeafState::default());
    if replay::states(records(), &mut states).is_ok() {
        for range in replay::windows(leaves) {
            let _ = replay::window(records(), &range);
        }
    }
}

fn file_of(log: &[u8]) -> Option<Arc<std::fs::File>> {
    let created = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    let mut file = std::fs::File::from(created);
    file.write_all(log).ok()?;
    file.rewind().ok()?;
    Some(Arc::new(file))
}

/// A good log of a small disk.
pub fn example_log() -> Vec<u8> {
    let header = Header {
        job: JobId::random(),
        disk: DiskIndex(0),
        size: 9 * LEAF,
        bound: Digest([7; 32]),
    };
    let mut log = header.encode();
    let record = |kind, leaves, digests| Record {
        kind,
        version: Version::new(Attempt(1), Round(0)).unwrap_or_default(),
        leaves,
        digests,
    };
    record(
        Kind::Written,
        0..5,
        vec![(1, Digest([1; 32])), (3, Digest([2; 32]))],
    )
    .encode(&mut log);
    record(Kind::Void, 1..2, vec![]).encode(&mut log);
    log
}
