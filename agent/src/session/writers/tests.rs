//! What the gateway hears of a batch that comes too late.
//!
//! Owns the way from the inbox to the words. Leaves what a disk holds then to the tests of `disk::apply`.

use bytes::Bytes;
use longhaul_common::digest::{Digest, LEAF};
use longhaul_common::extent::Extent;
use longhaul_common::ids::JobId;
use longhaul_common::wire::batch::{self, Leaves};

use super::*;
use crate::disk::apply::TargetOptions;
use crate::session::arrivals::Room;

/// A batch of this round with what the disk begins with: a whole leaf, or a part of one.
fn batch(job: JobId, sequence: u64, round: u32, bytes: Vec<u8>) -> Arrived {
    let data = Bytes::from(bytes);
    let len = data.len() as u64;
    let leaves = if len == LEAF {
        let digests = vec![(0, Digest::of(&data))];
        Leaves {
            first: 0,
            count: 1,
            digests,
        }
    } else {
        Leaves::default()
    };
    let mut header = BatchHeader {
        job,
        attempt: Attempt(1),
        disk: DiskIndex(0),
        round: Round(round),
        sequence: Sequence(sequence),
        pieces: vec![batch::Piece {
            extent: Extent::new(0, len).unwrap(),
            content: Content::Data,
        }],
        leaves,
        ram: None,
        urgent: false,
        digest: Digest([0; 32]),
    };
    header.digest = header.digest_of(&data).unwrap();
    let _part = Room::new(1 << 30).take(header.credit(), len).unwrap();
    Arrived { header, data, _part }
}

/// The sender waits for it to be durable, and for its credit.
#[test]
fn a_batch_that_comes_too_late_is_left_out_and_counts_as_durable() {
    let dir = tempfile::tempdir().unwrap();
    let job = JobId::random();
    let path = dir.path().canonicalize().unwrap().join("web.img");
    let (target, _) = Target::open(&TargetOptions::raw(path, job), LEAF).unwrap();
    let (into, inbox) = mpsc::channel(8);
    let (say, mut heard) = mpsc::channel(64);
    let limits = LimitsSection {
        write_threads: 1,
        ..LimitsSection::default()
    };
    let disks = vec![Written::new(target)];
    let writers = Writers::start(disks, inbox, &limits, say, watch::Sender::default()).unwrap();
    let sent = [
        batch(job, 0, 0, vec![7; LEAF as usize]),
        batch(job, 1, 3, vec![3; 4096]),
        batch(job, 2, 2, vec![2; 4096]),
    ];
    let expected: u64 = sent.iter().map(|arrived| arrived.header.credit()).sum();
    for arrived in sent {
        assert!(into.try_send(arrived).is_ok());
    }
    drop(into);
    let targets = writers.stop(false).unwrap();

    let (mut credit, mut durable) = (0, BTreeSet::new());
    while let Some(message) = heard.blocking_recv() {
        match message {
            FromTarget::Credit(bytes) => credit += bytes,
            FromTarget::Durable(sequences) => {
                durable.extend(sequences.iter());
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((credit, durable.len()), (expected, 3));
    drop(targets);
    let mut files = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let partial = files.find(|path| path.to_string_lossy().ends_with("partial"));
    let content = std::fs::read(partial.unwrap()).unwrap();
    assert!(content[..4096] == [3; 4096] && content[4096..] == [7; LEAF as usize - 4096]);
}
