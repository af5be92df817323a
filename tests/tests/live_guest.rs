//! The lab's guests and ears are tried on QEMU alone: what a guest acknowledged is on its disk after a power
//! loss, damage is found, and a migration by QEMU itself is measured as it was.
//!
//! Needs qemu-system-x86, e2fsprogs, busybox-static, cpio's format from busybox, and Debian's cloud kernel
//! once (it is kept in the lab's cache). Software emulation only.

#![allow(clippy::unwrap_used, reason = "a test that cannot work has failed")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use longhaul_lab::guest::Fs;
use longhaul_lab::guest::workload::{Workload, workload_kernel};
use longhaul_lab::guest::{self, Kind};
use longhaul_lab::janitor::Janitor;
use longhaul_lab::lab::End;
use longhaul_lab::live::check::{Ended, Records, check};
use longhaul_lab::live::console::Consoles;
use longhaul_lab::live::machine::{Disk, Machine};
use longhaul_lab::live::monitor::Monitor;
use longhaul_lab::live::pause::pause;
use longhaul_lab::live::plain;
use longhaul_lab::live::vm::Vm;

const BOOT: Duration = Duration::from_secs(90);
const ANSWER: Duration = Duration::from_secs(30);

/// A directory with a tiny guest's disk and the ears for it.
struct Bench {
    /// Ends the guest and removes the directory even where the test is killed.
    janitor: Mutex<Janitor>,
    directory: tempfile::TempDir,
    consoles: Consoles,
    machine: Machine,
}

fn bench(workload: Workload, seed: u64) -> Bench {
    let say = |step: &str| eprintln!("{step} ...");
    let directory = tempfile::tempdir().unwrap();
    let mut janitor = Janitor::start().unwrap();
    janitor.directory(directory.path()).unwrap();
    let kernel = workload_kernel(&say).unwrap();
    let image = directory.path().join("disk.raw");
    guest::copy(&guest::disk(Kind::Tiny, &say).unwrap(), &image).unwrap();
    let consoles = Consoles::listen(directory.path()).unwrap();
    let disk = Disk {
        path: image.display().to_string(),
        format: "raw".to_owned(),
    };
    let mut machine = Machine::new(directory.path(), &kernel, disk, Fs::Ext4, workload, seed);
    machine.console = consoles.socket(End::Source).display().to_string();
    Bench {
        janitor: Mutex::new(janitor),
        directory,
        consoles,
        machine,
    }
}

impl Bench {
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self, machine: &Machine, end: End) -> Vm {
        let monitor = Monitor::listen(Path::new(&machine.lab_qmp)).unwrap();
        let log = self.path(&format!("{}-qemu.log", end.name()));
        let vm = Vm::start(machine, &monitor, |program| Command::new(program), &log).unwrap();
        self.janitor.lock().unwrap().process(vm.pid()).unwrap();
        vm
    }

    fn ready(&self) {
        let said = self
            .consoles
            .wait_for("LONGHAUL-GUEST-READY", Duration::ZERO, BOOT);
        said.unwrap();
    }

    fn ask(&self, end: End, words: &str, answer: &str) -> String {
        let from = self.consoles.now();
        self.consoles.say(end, words).unwrap();
        self.consoles.wait_for(answer, from, ANSWER).unwrap()
    }

    fn checked(&self, image: &str, seed: u64, ended: Ended) -> Records {
        let work = tempfile::tempdir().unwrap();
        let acknowledged = self.consoles.hearing().acknowledged().clone();
        check(
            &self.path(image),
            Fs::Ext4,
            work.path(),
            seed,
            &acknowledged,
            ended,
        )
        .unwrap()
    }

    /// Runs debugfs on an image of this directory and gives its output.
    fn debugfs(&self, image: &str, words: &str) -> String {
        let mut debugfs = Command::new("debugfs");
        let output = debugfs
            .args(["-w", "-R", words])
            .arg(self.path(image))
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn what_was_acknowledged_survives_a_power_loss_and_damage_is_found() {
    let bench = bench(Workload::Fsync, 11);
    let mut vm = bench.start(&bench.machine, End::Source);
    bench.ready();
    std::thread::sleep(Duration::from_secs(4));
    vm.kill();
    // What was said before the end may still be on its way through the socket.
    std::thread::sleep(Duration::from_millis(200));

    let acknowledged: u64 = bench.consoles.hearing().acknowledged().values().sum();
    assert!(acknowledged > 100, "only {acknowledged} steps in 4 s");
    let records = bench.checked("disk.raw", 11, Ended::PowerLoss);
    assert!(
        records.is_good() && records.acknowledged == acknowledged,
        "{records:?}"
    );
    let wrong_seed = bench.checked("disk.raw", 12, Ended::PowerLoss);
    assert!(wrong_seed.lost > 0, "{wrong_seed:?}");

    // From here on on a disk whose journal is replayed: offline damage must not be undone by it.
    let fsck = Command::new("e2fsck")
        .arg("-p")
        .arg(bench.path("disk.raw"))
        .output()
        .unwrap();
    assert!(matches!(fsck.status.code(), Some(0 | 1)), "{fsck:?}");
    let listing = bench.debugfs("disk.raw", "ls -p /longhaul-load/w1");
    // The oldest files: what was heard of them cannot be newer than what was heard. Two, for the step at which the guest ended may have
    // been to delete one of them.
    let number = |name: &str| {
        name.split('.')
            .next()
            .and_then(|digits| digits.parse::<u64>().ok())
    };
    let files = listing.split('/').filter_map(|word| word.strip_prefix('f'));
    let mut files: Vec<_> = files.filter_map(|name| Some((number(name)?, name))).collect();
    files.sort_unstable();
    let path = |name: &str| format!("/longhaul-load/w1/f{name}");
    let block: u64 = bench
        .debugfs("disk.raw", &format!("bmap {} 0", path(files[0].1)))
        .trim()
        .parse()
        .unwrap();

    guest::copy(&bench.path("disk.raw"), &bench.path("torn.raw")).unwrap();
    let torn = File::options().write(true).open(bench.path("torn.raw")).unwrap();
    torn.write_all_at(&[0xa5; 8], block * 4096 + 100).unwrap();
    let records = bench.checked("torn.raw", 11, Ended::PowerLoss);
    assert!(records.lost > 0 && records.torn > 0, "{records:?}");

    for (_, name) in &files[..2] {
        bench.debugfs("disk.raw", &format!("rm {}", path(name)));
    }
    let records = bench.checked("disk.raw", 11, Ended::PowerLoss);
    assert!(records.lost > 0, "{records:?}");
    // By its number only: a step that nobody heard of may have renamed it.
    let named = |text: &String| {
        files[..2]
            .iter()
            .any(|(number, _)| text.starts_with(&format!("f{number}.")))
    };
    assert!(records.problems.iter().any(named), "{records:?}");
}

#[test]
fn a_guest_moved_by_qemu_itself_is_whole_and_its_pause_is_measured() {
    let bench = bench(Workload::Mixed, 21);
    let source_disk = bench.path("disk.raw");
    let target_disk = bench.path("target.raw");
    let mut source = bench.start(&bench.machine, End::Source);
    bench.ready();
    guest::copy(&source_disk, &target_disk).unwrap();
    let mut target = bench
        .machine
        .template(&bench.consoles.socket(End::Target), &bench.path("lab-b.sock"));
    target.disks[0].path = target_disk.display().to_string();
    (target.name, target.qmp) = (
        bench.machine.name.clone(),
        bench.path("b.sock").display().to_string(),
    );
    target.pidfile = bench.path("b.pid").display().to_string();
    let mut target = bench.start(&target, End::Target);
    std::thread::sleep(Duration::from_secs(2));

    let began = bench.consoles.now();
    plain::migrate(
        source.monitor(),
        target.monitor(),
        &bench.path("stream"),
        // Slow enough for several passes over what the guest writes meanwhile.
        24_000_000,
        &mut || plain::copy_changes(&source_disk, &target_disk).map(|_| ()),
    )
    .unwrap();
    std::thread::sleep(Duration::from_millis(2500));

    assert_eq!(source.monitor().run_state().as_deref(), Some("postmigrate"));
    assert_eq!(target.monitor().run_state().as_deref(), Some("running"));
    let pause = pause(&source.monitor().events(), &target.monitor().events(), 0.0).unwrap();
    let hearing = bench.consoles.hearing().clone();
    let gap = hearing.longest_gap(began, bench.consoles.now()).unwrap().length;
    let gap_ms = gap.as_secs_f64() * 1e3;
    eprintln!("pause {:.0} ms by QMP, {gap_ms:.0} ms by heartbeat", pause.ms());
    assert!(
        pause.ms() > 0.0 && gap_ms > pause.ms() - 60.0,
        "{} {gap_ms}",
        pause.ms()
    );
    assert_eq!(hearing.last_beat().unwrap().end, End::Target);
    assert_eq!(hearing.irregular_beats(), 0, "a heartbeat was lost or said twice");
    source.kill();

    let found = bench.ask(End::Target, "verify", "LONGHAUL-GUEST-RAM");
    let writes: u64 = found.strip_prefix("ok ").expect(&found).parse().unwrap();
    assert!(writes > 1000, "{writes}");
    bench.ask(End::Target, "corrupt", "LONGHAUL-GUEST-CORRUPTED");
    let found = bench.ask(End::Target, "verify", "LONGHAUL-GUEST-RAM");
    assert!(found.starts_with("bad"), "{found}");
    bench.ask(End::Target, "stop", "LONGHAUL-GUEST-STOPPED");
    assert!(target.wait_ended(ANSWER), "the guest did not power off");
    let records = bench.checked("target.raw", 21, Ended::Cleanly);
    assert!(records.is_good() && records.acknowledged > 50, "{records:?}");
}
