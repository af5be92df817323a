//! The monitor's client against a real QEMU and against hostile ones; the facts of a real VM.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod vm_qemu;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use longhaul_agent::vm::attach::attach;
use longhaul_agent::vm::facts::{DiskKind, Subject, compare, refusals};
use longhaul_agent::vm::qmp::{ErrorClass, Event, Heard, Qmp, QmpError};
use serde_json::{Value, json};
use vm_qemu::{DISK, Qemu, UUID};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}"#;

#[tokio::test]
async fn commands_errors_events_and_descriptors() {
    let mut qemu = Qemu::start();
    let qmp = qemu.qmp().await;
    let mut events = qmp.events();
    let refused = qmp.execute("no-such-command", json!({})).await.unwrap_err();
    let QmpError::Refused { class, desc, .. } = &refused else {
        panic!("{refused}")
    };
    assert!(*class == ErrorClass::CommandNotFound && desc.contains("no-such-command"));
    assert!(refused.is_unknown_command());
    qmp.execute("stop", json!({})).await.unwrap();
    qmp.execute("cont", json!({})).await.unwrap();
    assert_eq!(events.next().await, Heard::Event(Event::Stop));
    assert_eq!(events.next().await, Heard::Event(Event::Resume));

    // Many at a time: each gets its own answer.
    let asked = (0..40).map(|n| {
        let qmp = qmp.clone();
        tokio::spawn(async move {
            let path = if n % 2 == 0 {
                "/machine"
            } else {
                "/machine/unattached"
            };
            let asked = json!({ "path": path, "property": "type" });
            qmp.query_with::<String>("qom-get", asked).await.unwrap()
        })
    });
    for (n, answer) in asked.collect::<Vec<_>>().into_iter().enumerate() {
        let expected = if n % 2 == 0 {
            "pc-q35-7.2-machine"
        } else {
            "container"
        };
        assert_eq!(answer.await.unwrap(), expected);
    }

    let (ours, theirs) = UnixStream::pair().unwrap();
    qmp.send_fd("longhaul-test", OwnedFd::from(theirs)).await.unwrap();
    qmp.execute("closefd", json!({ "fdname": "longhaul-test" }))
        .await
        .unwrap();
    let mut ours = ours;
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0, "QEMU had it, and closed it");

    // A caller that leaves does no harm.
    for _ in 0..20 {
        tokio::select! {
            biased;
            _ = qmp.query::<Value>("query-block") => {}
            () = tokio::task::yield_now() => {}
        }
    }
    qmp.query::<Value>("query-status").await.unwrap();

    qemu.kill();
    let lost = tokio::time::timeout(Duration::from_secs(5), qmp.lost())
        .await
        .unwrap();
    assert!(lost.is_lost() && qmp.is_lost());
    assert!(qmp.query::<Value>("query-status").await.unwrap_err().is_lost());
    assert!(Qmp::connect(&qemu.path("qmp.sock")).await.unwrap_err().is_lost());
}

#[tokio::test]
async fn a_monitor_that_another_program_holds_is_named() {
    let qemu = Qemu::start();
    let _first = qemu.qmp().await;
    let started = Instant::now();
    let error = Qmp::connect(&qemu.path("qmp.sock")).await.unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn the_facts_of_a_vm() {
    let vars = tempfile::NamedTempFile::new().unwrap();
    vars.as_file().set_len(64 << 10).unwrap();
    let iso = tempfile::NamedTempFile::new().unwrap();
    iso.as_file().set_len(1 << 20).unwrap();
    let flash = format!("if=pflash,unit=0,format=raw,file={}", vars.path().display());
    let cd = format!(
        "if=none,id=c0,media=cdrom,format=raw,file={}",
        iso.path().display()
    );
    let more = [
        "-drive",
        &cd,
        "-device",
        "ide-cd,drive=c0,id=cd0",
        "-device",
        "e1000,id=nic0,addr=5.0",
    ];
    // A firmware of zeros does not boot; the facts do not mind.
    let qemu = Qemu::with(&[&more[..], &["-drive", &flash, "-S"]].concat());
    drop(qemu.qmp().await);
    let attached = attach(&qemu.path("qmp.sock")).await.unwrap();
    let facts = &attached.facts;
    assert_eq!(attached.process, Some(qemu.id()));
    assert_eq!(
        (facts.machine.as_str(), facts.kvm, facts.name.as_str()),
        ("pc-q35-7.2", false, "web")
    );
    assert_eq!((facts.uuid.as_str(), facts.ram), (UUID, 32 << 20));
    assert_eq!((facts.cpu.model.as_str(), facts.cpu.count), ("qemu64", 1));
    assert!(facts.cpu.features.len() > 10 && facts.host.digest.is_some());
    let ram = facts
        .ram_blocks
        .iter()
        .find(|block| block.name == "pc.ram")
        .unwrap();
    assert_eq!((ram.used, ram.total), (32 << 20, 32 << 20));
    assert_eq!(facts.devices["nic0"], "e1000");
    assert!(
        facts
            .pci
            .iter()
            .any(|device| (device.slot, device.id.as_str()) == (5, "nic0"))
    );
    let disk = |name: &str| facts.disks.iter().find(|disk| disk.name == name).unwrap();
    assert_eq!(
        (
            disk("vd0").size,
            disk("vd0").format.as_str(),
            disk("vd0").is_live()
        ),
        (DISK, "raw", true)
    );
    assert_eq!((disk("vd1").size, disk("vd1").format.as_str()), (DISK, "qcow2"));
    assert_eq!(
        (disk("cd0").kind, disk("cd0").is_live()),
        (DiskKind::Cdrom, false)
    );
    let flash = facts
        .disks
        .iter()
        .find(|disk| disk.kind == DiskKind::Flash)
        .unwrap();
    assert_eq!((flash.size, flash.is_live()), (64 << 10, true));
    let found: Vec<_> = refusals(facts)
        .into_iter()
        .map(|finding| finding.subject)
        .collect();
    assert_eq!(found, [Subject::State]);
}

#[tokio::test]
async fn a_twin_fits_and_a_stranger_does_not() {
    let source = Qemu::start();
    let twin = Qemu::with(&["-S", "-incoming", "defer"]);
    let stranger = [
        "-S",
        "-incoming",
        "defer",
        "-smp",
        "2",
        "-m",
        "48",
        "-device",
        "e1000,id=nic0",
    ];
    let stranger = Qemu::with(&stranger);
    let mut all = Vec::new();
    for qemu in [&source, &twin, &stranger] {
        drop(qemu.qmp().await);
        all.push(attach(&qemu.path("qmp.sock")).await.unwrap().facts);
    }
    assert_eq!(refusals(&all[0]), []);
    assert_eq!(compare(&all[0], &all[1]), []);
    let found = compare(&all[0], &all[2]);
    for subject in [Subject::Cpu, Subject::Ram, Subject::Device] {
        assert!(
            found.iter().any(|f| f.is_refusal() && f.subject == subject),
            "{subject:?}: {found:?}"
        );
    }
}

/// A monitor that sends `first` to its first client, then what `answer` makes of each line.
fn hostile(
    folder: &Path,
    first: &str,
    answer: impl Fn(&Value) -> Vec<u8> + Send + 'static,
) -> std::path::PathBuf {
    let socket = folder.join("hostile.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let first = first.to_owned();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(first.as_bytes());
        let lines = std::io::BufRead::lines(std::io::BufReader::new(stream.try_clone().unwrap()));
        for line in lines.map_while(Result::ok) {
            if stream
                .write_all(&answer(&serde_json::from_str(&line).unwrap()))
                .is_err()
            {
                return;
            }
        }
    });
    socket
}

fn reply(asked: &Value, value: &Value) -> Vec<u8> {
    format!("{}\r\n", json!({ "return": value, "id": asked["id"] })).into_bytes()
}

#[tokio::test]
async fn replies_out_of_order_and_of_strangers_are_sorted_out() {
    let folder = tempfile::tempdir().unwrap();
    let held = std::sync::Mutex::new(None::<Value>);
    let socket = hostile(folder.path(), &format!("{GREETING}\r\n"), move |asked| {
        if asked["execute"] == "slow" {
            *held.lock().unwrap() = Some(asked.clone());
            return b"{\"return\": 1, \"id\": 777}\n{\"return\": {}}\n{\"event\": \"X\"}\n".to_vec();
        }
        let mut both = reply(asked, &asked["execute"]);
        both.extend(
            held.lock()
                .unwrap()
                .take()
                .map(|slow| reply(&slow, &json!("slow")))
                .unwrap_or_default(),
        );
        both
    });
    let qmp = Qmp::connect(&socket).await.unwrap();
    let slow = tokio::spawn({
        let qmp = qmp.clone();
        async move { qmp.query::<String>("slow").await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(qmp.query::<String>("fast").await.unwrap(), "fast");
    assert_eq!(slow.await.unwrap().unwrap(), "slow");
    let limit = Duration::from_millis(50);
    let late = qmp.execute_within("slow", json!({}), limit).await.unwrap_err();
    assert!(matches!(late, QmpError::Timeout { .. }), "{late}");
    assert_eq!(
        qmp.query::<String>("fast").await.unwrap(),
        "fast",
        "a late reply does no harm"
    );
}

#[tokio::test]
async fn hostile_monitors_end_the_connection_only() {
    for bad in [&b"nonsense\n"[..], b"{}\n", b"\xff\xfe\n", b"[[[[[[[[\n"] {
        let folder = tempfile::tempdir().unwrap();
        let socket = hostile(folder.path(), &format!("{GREETING}\n"), move |asked| {
            let setup = asked["execute"] == "qmp_capabilities";
            if setup {
                reply(asked, &json!({}))
            } else {
                bad.to_vec()
            }
        });
        let qmp = Qmp::connect(&socket).await.unwrap();
        let error = qmp.query::<Value>("query-status").await.unwrap_err();
        assert!(
            error.is_lost() && error.to_string().contains("QMP message"),
            "{error}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = hostile(folder.path(), &"x".repeat(5 << 20), |_| Vec::new());
    let error = Qmp::connect(&socket).await.unwrap_err();
    assert!(error.to_string().contains("line of more than"), "{error}");
}
