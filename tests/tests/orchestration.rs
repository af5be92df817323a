//! The lab's own work, with stand-ins for Longhaul's programs: running a job, faults, judging the outcome,
//! cleaning up.
//!
//! The stand-ins are scripts that copy a file and print what the real programs would; some of them lie. So a
//! lab that trusts what it is told, or leaves something behind, is found here and not in a story that happens
//! to go well.

#![allow(clippy::unwrap_used)] // helpers of tests fail like tests

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use longhaul_lab::namespace;
use longhaul_lab::usage::wait_until;
use serde_json::Value;

/// A gateway that opens its API socket, and an agent that only runs.
const GATEWAY: &str = r#"#!/bin/sh
socket=$(sed -n 's/^socket = "\(.*\)"/\1/p' "$2")
exec perl -MIO::Socket::UNIX -e 'unlink $ARGV[0]; $s = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 9) or die; sleep 600 while 1' "$socket"
"#;
const AGENT: &str = "#!/bin/sh\nexec sleep 600\n";
/// An operator's program that copies the disk, then does MISDEED to the copy, then reports success.
const OPERATOR: &str = r#"#!/bin/sh
[ "$1" = pki ] && exit 0
[ "$3" = status ] && { [ -S "$2" ] && echo '{"agents":["source-agent","target-agent"]}'; exit; }
job=$4
source=$(sed -n 's/^source = "\(.*\)"/\1/p' "$job")
target=$(sed -n 's/^target = "\(.*\)"/\1/p' "$job")
cp "$source" "$target"
echo '{"event":"progress","progress":{"done_bytes":40,"used_bytes":100}}'
sleep SECONDS
MISDEED
echo '{"event":"progress","progress":{"done_bytes":100,"used_bytes":100}}'
echo '{"event":"report","job":{"state":"completed","report":{"ok":true,"raw_bytes":1048576,"source_digest":"d","target_digest":"d"}}}'
"#;

struct Stage {
    directory: tempfile::TempDir,
}

impl Stage {
    fn new(seconds: &str, misdeed: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let operator = OPERATOR.replace("SECONDS", seconds).replace("MISDEED", misdeed);
        for (name, text) in [
            ("longhaul", operator.as_str()),
            ("longhaul-agent", AGENT),
            ("longhaul-gateway", GATEWAY),
        ] {
            let program = directory.path().join(name);
            fs::write(&program, text).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let content: Vec<u8> = (0..1 << 20)
            .map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8 | 1)
            .collect();
        fs::write(directory.path().join("disk"), content).unwrap();
        fs::create_dir(directory.path().join("labs")).unwrap();
        Self { directory }
    }

    fn labs(&self) -> PathBuf {
        self.directory.path().join("labs")
    }

    fn lab(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        command
            .args(["move", "--json", "--rtt=2ms", "--image"])
            .arg(self.directory.path().join("disk"));
        command.arg("--directory").arg(self.labs()).args(words);
        command
            .env("LONGHAUL_BIN", self.directory.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> (Output, Value) {
        let output = self.lab(words).output().unwrap();
        let report = serde_json::from_slice(&output.stdout);
        let report =
            report.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        (output, report)
    }
}

#[test]
fn a_faithful_copy_is_ok_and_nothing_is_left() {
    let stage = Stage::new("0.3", "");
    let (output, report) = stage.run(&[]);
    assert!(output.status.success(), "{report:#}");
    assert_eq!(
        (&report["ok"], &report["equal"]),
        (&Value::Bool(true), &Value::Bool(true))
    );
    assert!(
        report["programs"]["source-agent"]["peak_rss_bytes"]
            .as_u64()
            .unwrap()
            > 0,
        "{report:#}"
    );
    assert_eq!(
        report["emulated"],
        report["not_emulated"].as_array().unwrap().is_empty()
    );
    assert_eq!(
        fs::read_dir(stage.labs()).unwrap().count(),
        0,
        "the lab's directory is still there"
    );
}

#[test]
fn a_copy_that_differs_is_found_whatever_the_programs_say() {
    for misdeed in [
        "printf '\\000' | dd of=\"$target\" bs=1 seek=700000 conv=notrunc 2>&1",
        "truncate -s 1000000 \"$target\"",
        "dd if=/dev/zero of=\"$target\" bs=4096 seek=9 count=1 conv=notrunc 2>&1",
    ] {
        let (output, report) = Stage::new("0", misdeed).run(&[]);
        assert_eq!(output.status.code(), Some(1), "{misdeed}");
        assert_eq!(report["equal"], false, "{misdeed}");
        assert!(
            report["cause"].as_str().unwrap().contains("comparison"),
            "{report:#}"
        );
    }
}

#[test]
fn a_job_without_report_is_a_failure_with_its_cause() {
    let (output, report) = Stage::new("0", "echo 'the disk is on fire' >&2; exit 3").run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        report["cause"].as_str().unwrap().contains("on fire"),
        "{report:#}"
    );
}

#[test]
fn killed_programs_are_started_again() {
    let words = [
        "--kill=source-gateway@30%",
        "--kill=target-agent@40",
        "--kill=source-agent@99.5%",
    ];
    let (_, report) = Stage::new("1.6", "").run(&words);
    for (name, kills) in [("source-gateway", 1), ("target-agent", 1), ("target-gateway", 0)] {
        assert_eq!(report["programs"][name]["kills"], kills, "{name} in {report:#}");
        assert_eq!(report["programs"][name]["deaths"], 0, "{name} in {report:#}");
    }
    assert_eq!(report["ok"], true, "{report:#}");
}

#[test]
fn a_lab_killed_with_9_leaves_nothing() {
    let stage = Stage::new("60", "");
    let mut lab = stage.lab(&[]).stdout(Stdio::null()).spawn().unwrap();
    let pid = lab.id();
    let copied = wait_until(Duration::from_secs(30), || {
        copy_exists(&stage.labs()).then_some(())
    });
    let programs = descendants(pid);
    lab.kill().unwrap();
    lab.wait().unwrap();
    assert!(copied.is_some(), "the job never ran");
    assert!(programs.len() >= 5, "{programs:?}");
    let gone = wait_until(Duration::from_secs(10), || {
        let programs = programs.iter().all(|pid| !runs(*pid));
        let namespaces = !["a", "b"]
            .iter()
            .any(|end| namespace::path(&format!("lh-{pid}-0-{end}")).exists());
        let directory = fs::read_dir(stage.labs()).unwrap().count() == 0;
        (programs && namespaces && directory).then_some(())
    });
    let left: Vec<_> = programs.iter().filter(|pid| runs(**pid)).collect();
    assert!(
        gone.is_some(),
        "processes {left:?}, files {:?}",
        fs::read_dir(stage.labs()).unwrap().flatten().collect::<Vec<_>>()
    );
}

#[test]
fn an_interrupted_lab_leaves_nothing() {
    let stage = Stage::new("60", "");
    let mut lab = stage
        .lab(&[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert!(
        wait_until(Duration::from_secs(30), || copy_exists(&stage.labs())
            .then_some(()))
        .is_some()
    );
    interrupt(&lab);
    lab.wait().unwrap();
    let empty = || (fs::read_dir(stage.labs()).unwrap().count() == 0).then_some(());
    assert!(wait_until(Duration::from_secs(10), empty).is_some());
}

#[test]
fn what_a_dead_lab_left_is_removed_by_the_next() {
    let stage = Stage::new("0", "");
    // No process has this number: it is above the kernel's largest.
    let (stale, kept) = (
        stage.labs().join("longhaul-lab-4194305-0"),
        stage.labs().join("longhaul-lab-4194305-1"),
    );
    for directory in [&stale, &kept] {
        fs::create_dir(directory).unwrap();
    }
    fs::write(kept.join(".keep"), "").unwrap();
    stage.run(&[]);
    assert!(!stale.exists() && kept.exists());
}

fn copy_exists(labs: &Path) -> bool {
    let labs = fs::read_dir(labs).into_iter().flatten().flatten();
    labs.into_iter()
        .any(|lab| lab.path().join("target-agent/disks/disk").exists())
}

fn interrupt(lab: &Child) {
    let pid = rustix::process::Pid::from_raw(lab.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}

/// Whether a process runs; a dead one that nobody has waited for does not.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// All processes below this one.
fn descendants(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children: Vec<u32> = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect();
    children
        .iter()
        .flat_map(|child| descendants(*child))
        .chain(children.iter().copied())
        .collect()
}
