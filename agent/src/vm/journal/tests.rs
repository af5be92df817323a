//! Tests of the journal: what it keeps over crashes, and what it refuses.

use longhaul_common::digest::Digest;
use proptest::prelude::*;

use super::*;
use crate::vm::handover::{By, DiskRound, Facts, Generation, Reason, Stream};

fn job() -> JobId {
    "0123456789abcdef0123456789abcdef".parse().unwrap()
}

fn any_record() -> impl Strategy<Value = Record> {
    let stream = (any::<u64>(), any::<[u8; 32]>()).prop_map(|(len, hash)| Stream {
        len,
        hash: Digest(hash),
    });
    (any::<u32>(), 0..8u8, stream, any::<(u32, u32)>(), any::<bool>()).prop_map(
        |(n, kind, stream, (round, batches), flag)| {
            let disks = DiskRound { round, batches };
            let (generation, reason, by) = (Generation(n), Reason::LoadFailed, By::Operator);
            match kind {
                0 => Record::Began { generation },
                1 => Record::Kept {
                    generation,
                    reason,
                    gone: flag,
                },
                2 => Record::HandedOver {
                    generation,
                    facts: Facts { disks, stream },
                },
                3 => Record::TakenBack {
                    generation,
                    by,
                    reason,
                },
                4 => Record::Closed { generation },
                5 => Record::Loaded {
                    generation,
                    stream,
                    disks,
                },
                6 => Record::Running {
                    generation,
                    by,
                    boot: flag,
                },
                _ => Record::Aborted { generation, reason },
            }
        },
    )
}

fn filled(folder: &Path, records: &[Record]) -> PathBuf {
    let mut journal = Journal::open(folder, job(), Role::Target).unwrap();
    for record in records {
        journal.append(*record).unwrap();
    }
    journal.path().to_owned()
}

fn reopened(folder: &Path) -> Result<Vec<Record>, JournalError> {
    Journal::open(folder, job(), Role::Target).map(|journal| journal.records().to_vec())
}

fn three() -> Vec<Record> {
    let generation = Generation(1);
    vec![
        Record::Prepared { generation },
        Record::Running {
            generation,
            by: By::Protocol,
            boot: false,
        },
        Record::Started { generation },
    ]
}

#[test]
fn what_was_appended_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    filled(folder.path(), &three());
    assert_eq!(reopened(folder.path()).unwrap(), three());
    let mut journal = Journal::open(folder.path(), job(), Role::Target).unwrap();
    journal.rewrite(&three()[1..]).unwrap();
    journal.append(three()[2]).unwrap();
    drop(journal);
    assert_eq!(
        reopened(folder.path()).unwrap(),
        [three()[1], three()[2], three()[2]]
    );
    assert_eq!(list(folder.path()).unwrap(), [(job(), Role::Target)]);
}

#[test]
fn it_grows_beyond_the_space_it_took_and_has_an_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(folder.path(), job(), Role::Source).unwrap();
    let record = |n| Record::Began {
        generation: Generation(n),
    };
    let written = (0..2 * SLOTS_MAX as u32)
        .take_while(|n| journal.append(record(*n)).is_ok())
        .count();
    assert!((SLOTS_MAX - SLOTS_NEW..SLOTS_MAX).contains(&written), "{written}");
    drop(journal);
    let journal = Journal::open(folder.path(), job(), Role::Source).unwrap();
    assert_eq!(journal.records().len(), written);
    assert_eq!(journal.records()[100], record(100));
}

#[test]
fn a_second_agent_is_refused_while_the_first_lives() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = Journal::open(folder.path(), job(), Role::Source).unwrap();
    first.rewrite(&[]).unwrap();
    let error = Journal::open(folder.path(), job(), Role::Source).unwrap_err();
    assert!(matches!(error, JournalError::Locked(_)), "{error}");
    assert!(Journal::open(folder.path(), job(), Role::Target).is_ok());
    // One that is just ending is waited for.
    let ending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(first);
    });
    assert!(Journal::open(folder.path(), job(), Role::Source).is_ok());
    ending.join().unwrap();
}

/// A crash leaves a beginning of the last slot, or none of it: then what was synced before holds.
#[test]
fn every_torn_end_is_forgotten_and_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), &three());
    let whole = fs::read(&path).unwrap();
    let last = 3 * SLOT;
    for cut in 0..SLOT {
        let mut torn = whole.clone();
        torn[last + cut..last + SLOT].fill(0);
        fs::write(&path, &torn).unwrap();
        let read = reopened(folder.path());
        if cut <= slot_end() {
            assert_eq!(read.unwrap(), three()[..2], "cut at {cut}");
        } else {
            assert!(
                read.is_err(),
                "cut at {cut}: an end mark that is half there is damage"
            );
        }
    }
    fs::write(&path, &whole[..last + SLOT]).unwrap();
    fs::write(
        &path,
        [&whole[..last + 9], &vec![0; whole.len() - last - 9][..]].concat(),
    )
    .unwrap();
    let mut journal = Journal::open(folder.path(), job(), Role::Target).unwrap();
    journal.append(three()[2]).unwrap();
    drop(journal);
    assert_eq!(fs::read(&path).unwrap(), whole);
}

fn slot_end() -> usize {
    SLOT - 8
}

#[test]
fn every_flipped_bit_of_a_record_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), &three());
    let whole = fs::read(&path).unwrap();
    let header = fs::read(&path).unwrap()[6..100].to_vec();
    let header = &header[..header.iter().position(|byte| *byte == 0).unwrap()];
    for bit in 0..4 * SLOT * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(parse(&bytes, header).is_err(), "bit {bit}");
    }
    // Behind the end as well: nothing of ours writes there.
    for at in [5 * SLOT, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] = 1;
        assert_eq!(parse(&bytes, header).unwrap_err(), Damage::BehindEnd, "byte {at}");
    }
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let error = reopened(folder.path()).unwrap_err();
    assert!(error.to_string().contains("start it there by hand"), "{error}");
}

#[test]
fn records_cannot_be_taken_out_swapped_or_brought_from_another_job() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), &three());
    let whole = fs::read(&path).unwrap();
    let slot = |n: usize| whole[n * SLOT..(n + 1) * SLOT].to_vec();
    let rest = vec![0; whole.len() - 4 * SLOT];
    for order in [[0, 1, 3, 2], [0, 2, 3, 1], [0, 1, 1, 2], [1, 0, 2, 3]] {
        let bytes: Vec<u8> = order.iter().flat_map(|n| slot(*n)).chain(rest.clone()).collect();
        fs::write(&path, bytes).unwrap();
        assert!(reopened(folder.path()).is_err(), "{order:?}");
    }
    let other = JobId::random();
    fs::write(folder.path().join(file_name(other, Role::Target)), &whole).unwrap();
    let error = Journal::open(folder.path(), other, Role::Target).unwrap_err();
    assert!(
        matches!(
            error,
            JournalError::Damaged {
                damage: Damage::Header,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn files_of_other_names_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    for name in [
        "handover-x.source",
        "handover-0123456789abcdef0123456789abcdef.source.new",
        "other",
    ] {
        fs::write(folder.path().join(name), b"x").unwrap();
    }
    assert_eq!(list(folder.path()).unwrap(), []);
}

proptest! {
    #[test]
    fn every_record_fits_and_comes_back(records in prop::collection::vec(any_record(), 0..6)) {
        let mut last = Check::default();
        let mut bytes = Vec::new();
        let header = serde_json::to_vec(&Header { job: job().to_string(), role: Role::Source }).unwrap();
        let bodies = records.iter().map(|record| serde_json::to_vec(record).unwrap());
        for body in std::iter::once(header.clone()).chain(bodies) {
            let (slot, check) = slot::encode(&last, &body).unwrap();
            bytes.extend_from_slice(&slot);
            last = check;
        }
        prop_assert_eq!(parse(&bytes, &header).unwrap().0, records);
    }

    #[test]
    fn garbage_is_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..3 * SLOT), whole in any::<bool>()) {
        let mut bytes = bytes;
        if whole {
            bytes.resize(2 * SLOT, 0xa5);
        }
        let refused = parse(&bytes, b"x").is_err();
        prop_assert!(refused);
    }

    /// Even with right checksums, a body must be a record.
    #[test]
    fn forged_bodies_are_refused_or_records(body in prop::collection::vec(any::<u8>(), 0..500)) {
        let Some((first, check)) = slot::encode(&Check::default(), b"h") else { unreachable!() };
        if let Some((second, _)) = slot::encode(&check, &body) {
            let bytes = [first, second].concat();
            let read = parse(&bytes, b"h");
            let known = serde_json::from_slice::<Record>(&body).is_ok();
            prop_assert_eq!(read.is_ok(), known);
        }
    }
}
