//! A guest agent of the tests' own: what it hears, in which order, and what it says.

use std::path::Path;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use super::*;
use crate::vm::guest_agent::{Pci, told};

fn fs(name: &str, point: &str, kind: &str, disks: &[i32]) -> FsInfo {
    FsInfo {
        name: name.into(),
        mountpoint: point.into(),
        kind: kind.into(),
        disks: disks.iter().map(|slot| told("virtio", *slot, 0)).collect(),
    }
}

#[test]
fn only_what_is_frozen_and_surely_on_the_disk_is_chosen() {
    let place = |slot| {
        let (bus, function) = (0, 0);
        Some(DiskPlace::Device(Pci { bus, slot, function }))
    };
    let all = [
        fs("vda1", "/", "ext4", &[3]),
        fs("vda1", "/mnt/again", "ext4", &[3]),
        fs("vdb", "/srv", "xfs", &[4]),
        fs("vda2", "/boot/efi", "vfat", &[3]),
        fs("vda3", "/win", "ntfs", &[3]),
        fs("dm-0", "/both", "ext4", &[3, 4]),
        fs("vdc", "/elsewhere", "ext4", &[9]),
        fs("tmpfs", "/tmp", "tmpfs", &[]),
    ];
    let chosen = choose(&all, &[place(3), None, place(4)]);
    assert_eq!(chosen.points, ["/", "/srv"]);
    let names = chosen.mounts.iter().map(|mounts| mounts.iter());
    let names: Vec<Vec<_>> = names
        .map(|mounts| mounts.map(|mount| mount.device.as_str()).collect())
        .collect();
    assert_eq!(names, [vec!["vda1"], vec![], vec!["vdb"]]);
}

/// What a guest agent answers to each command; `None`: nothing, for ever.
type Answer = Box<dyn Fn(&str, usize) -> Option<Value> + Send>;

/// Listens as QEMU does for a guest agent, which hears one client at a time. Gives what it hears, with whether a record of the freeze was
/// on the disk then.
fn guest(folder: &Path, answer: Answer) -> Arc<std::sync::Mutex<Vec<(String, bool)>>> {
    let heard = Arc::<std::sync::Mutex<Vec<(String, bool)>>>::default();
    let listener = UnixListener::bind(folder.join("ga")).unwrap();
    let (records, hearing) = (folder.join("freezing"), Arc::clone(&heard));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).await.unwrap_or(0) > 0 {
                let text = line.rsplit(|&byte| byte == 0xff).next().unwrap();
                let asked: Value = serde_json::from_slice(text).unwrap();
                let command = asked["execute"].as_str().unwrap().to_owned();
                let reply = if command == "guest-sync-delimited" {
                    let mut reply = vec![0xff];
                    reply.extend(json!({ "return": asked["arguments"]["id"] }).to_string().bytes());
                    Some(reply)
                } else {
                    let journaled = std::fs::read_dir(&records).is_ok_and(|mut files| files.next().is_some());
                    let count = {
                        let mut hearing = hearing.lock().unwrap();
                        hearing.push((command.clone(), journaled));
                        hearing.iter().filter(|(known, _)| *known == command).count()
                    };
                    answer(&command, count).map(|answer| answer.to_string().into_bytes())
                };
                line.clear();
                let Some(mut reply) = reply else { continue };
                reply.push(b'\n');
                if stream.get_mut().write_all(&reply).await.is_err() {
                    break;
                }
            }
        }
    });
    heard
}

const PLACE: DiskPlace = DiskPlace::Device(Pci {
    bus: 0,
    slot: 3,
    function: 0,
});

fn fs_info() -> Value {
    json!({ "return": [{ "name": "vda", "mountpoint": "/disk", "type": "ext4", "disk": [{
        "bus-type": "virtio", "bus": 0, "target": 0, "unit": 0,
        "pci-controller": { "domain": 0, "bus": 0, "slot": 3, "function": 0 } }] }] })
}

fn wish(folder: &Path, confirm_ms: u64) -> Wish {
    Wish {
        job: JobId::random(),
        record: Freezing {
            guest_agent: folder.join("ga"),
            // Nobody listens there, yet the guest agent does: its QEMU counts as running.
            qmp: folder.join("qmp"),
        },
        places: vec![Some(PLACE)],
        images: Vec::new(),
        confirm: Duration::from_millis(confirm_ms),
    }
}

/// Freezes a guest that answers so; gives what came of it, what the guest heard, and the list of those that may be frozen.
async fn play(
    folder: &Path,
    confirm_ms: u64,
    answer: Answer,
) -> (Result<Frozen, FreezeError>, Vec<(String, bool)>, Arc<Thaws>) {
    let heard = guest(folder, answer);
    let thaws = Arc::new(Thaws::new(folder.to_owned()));
    let ended = freeze(&thaws, wish(folder, confirm_ms)).await;
    let heard = heard.lock().unwrap().clone();
    (ended, heard, thaws)
}

fn count(number: u64) -> Option<Value> {
    Some(json!({ "return": number }))
}

#[tokio::test]
async fn a_freeze_is_journaled_before_and_forgotten_after_the_thaw() {
    let folder = tempfile::tempdir().unwrap();
    let answer = |command: &str, _| match command {
        "guest-get-fsinfo" => Some(fs_info()),
        _ => count(1),
    };
    let (ended, heard, thaws) = play(folder.path(), 5000, Box::new(answer)).await;
    assert_eq!(ended.unwrap().mounts[0][0].device, "vda");
    let expected = [
        ("guest-get-fsinfo", false),
        ("guest-fsfreeze-freeze-list", true),
        ("guest-fsfreeze-thaw", true),
    ];
    assert_eq!(heard, expected.map(|(command, on)| (command.to_owned(), on)));
    assert!(!thaws.is_awaited(&folder.path().join("ga")));
    assert_eq!(Freezing::all(folder.path()).len(), 0);
}

#[tokio::test]
async fn what_was_thawed_too_early_or_frozen_in_part_proves_nothing_and_is_thawed() {
    // Of one file system asked for: frozen, thawed, and how the error begins.
    let refused = json!({ "error": { "class": "GenericError", "desc": "not allowed" } });
    let cases = [
        (count(1), count(0), "of 1 frozen"),
        (count(0), count(0), "the guest's agent froze 0"),
        (count(2), count(2), "the guest's agent froze 2"),
        (Some(refused), count(0), "the guest agent refused"),
    ];
    for (frozen, thawed, words) in cases {
        let folder = tempfile::tempdir().unwrap();
        let answer = move |command: &str, _| match command {
            "guest-get-fsinfo" => Some(fs_info()),
            "guest-fsfreeze-freeze-list" => frozen.clone(),
            _ => thawed.clone(),
        };
        let (ended, heard, thaws) = play(folder.path(), 5000, Box::new(answer)).await;
        let said = ended.err().unwrap().to_string();
        assert!(said.starts_with(words), "{said}");
        assert_eq!(heard.last().unwrap().0, "guest-fsfreeze-thaw", "{words}");
        assert!(!thaws.is_awaited(&folder.path().join("ga")), "{words}");
    }
}

#[tokio::test]
async fn an_unconfirmed_thaw_is_asked_for_until_it_is_confirmed_and_nothing_is_frozen_until_then() {
    let folder = tempfile::tempdir().unwrap();
    // Two thaws are refused: somebody has to look, perhaps.
    let answer = |command: &str, times: usize| match command {
        "guest-get-fsinfo" => Some(fs_info()),
        "guest-fsfreeze-thaw" if times < 3 => {
            Some(json!({ "error": { "class": "GenericError", "desc": "busy" } }))
        }
        _ => count(1),
    };
    let (ended, _, thaws) = play(folder.path(), 100, Box::new(answer)).await;
    assert!(matches!(ended, Err(FreezeError::Unconfirmed)));
    assert!(thaws.is_awaited(&folder.path().join("ga")));
    assert_eq!(Freezing::all(folder.path()).len(), 1);
    let again = freeze(&thaws, wish(folder.path(), 100)).await;
    assert!(matches!(again, Err(FreezeError::Earlier)));
    let limit = Instant::now() + Duration::from_secs(20);
    while thaws.is_awaited(&folder.path().join("ga")) {
        assert!(Instant::now() < limit, "it was never confirmed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(Freezing::all(folder.path()).len(), 0);
}

#[tokio::test]
async fn the_first_act_after_a_crash_is_the_thaw() {
    let folder = tempfile::tempdir().unwrap();
    let record = wish(folder.path(), 0).record;
    record.save(folder.path(), JobId::random()).unwrap();
    let heard = guest(folder.path(), Box::new(|_, _| count(1)));
    let thaws = Arc::new(Thaws::new(folder.path().to_owned()));
    thaw::after_crash(&thaws).await;
    assert!(thaws.is_awaited(&record.guest_agent));
    let limit = Instant::now() + Duration::from_secs(20);
    while thaws.is_awaited(&record.guest_agent) {
        assert!(Instant::now() < limit, "it was never confirmed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let heard = heard.lock().unwrap().clone();
    assert_eq!(heard, [("guest-fsfreeze-thaw".to_owned(), true)]);
    assert_eq!(Freezing::all(folder.path()).len(), 0);
}

#[tokio::test]
async fn a_vm_that_is_gone_is_not_thawed_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let record = wish(folder.path(), 0).record;
    let job = JobId::random();
    let thaws = Arc::new(Thaws::new(folder.path().to_owned()));
    thaw::expect(&thaws, job, &record).await.unwrap();
    let thawed = thaw::until_confirmed(&thaws, job, &record, None).await;
    assert_eq!(thawed, 0);
    assert!(!thaws.is_awaited(&record.guest_agent));
}
