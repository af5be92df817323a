//! What Longhaul promises of a running VM: it moves with a short pause and nothing is lost; cuts, kills and a cancel
//! leave exactly one owner; what cannot work is refused in one sentence before anything is touched.
//!
//! Each story is one `lab live` in words, so that a failure can be played again by hand. Needs what the lab needs; the
//! guests are emulated.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests fail like tests

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use clap::Parser;
use longhaul_lab::lab::End;
use longhaul_lab::live::args::LiveArgs;
use longhaul_lab::live::back::BackReport;
use longhaul_lab::live::machine::MACHINE_TYPE;
use longhaul_lab::live::stage::Stage;
use longhaul_lab::live::verdict::LiveReport;
use longhaul_lab::live::{run, settings};
use longhaul_lab::move_disk::Moment;
use longhaul_lab::namespace;
use longhaul_lab::programs::{JOB_FILE, Line, Programs, read_line};
use longhaul_lab::usage::wait_until;
use serde_json::{Value, json};

/// Guests are emulated on few cores: more than two stories at once only slow each other down.
static PLACES: [Mutex<()>; 2] = [const { Mutex::new(()) }; 2];

#[derive(Debug, Parser)]
#[command(args_override_self = true)]
#[command(no_binary_name = true)]
struct Words {
    #[command(flatten)]
    args: LiveArgs,
}

fn args(words: &str) -> LiveArgs {
    let usual = "--kind tiny --rate 300mbit --rtt 20ms --before 3s --after 2s --limit 3min";
    let words = format!("{usual} {words}");
    Words::try_parse_from(words.split_whitespace()).unwrap().args
}

/// Waits for a place; stories are spread over both by their name.
fn place(name: &str) -> std::sync::MutexGuard<'static, ()> {
    for place in &PLACES {
        if let Ok(place) = place.try_lock() {
            return place;
        }
    }
    let at = name.bytes().map(usize::from).sum::<usize>() % PLACES.len();
    PLACES[at].lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the lab can emulate a link here; says so where not.
fn no_link() -> bool {
    let missing = namespace::missing_rights();
    if let Some(cause) = &missing {
        eprintln!("not tested here: {cause}");
    }
    missing.is_some()
}

/// Plays one story; whatever was asked for, the guest must be whole and have one owner.
fn play(words: &str) -> LiveReport {
    play_in(words).0
}

/// As [`play`]; gives also where the lab is kept, if the words ask for that.
fn play_in(words: &str) -> (LiveReport, Option<PathBuf>) {
    let _place = place(words);
    eprintln!("lab live {words}");
    let mut kept = None;
    let report = run::run(&args(words), &mut |moment| {
        if let Moment::Step(step) = moment {
            eprintln!("  {step}");
            kept = kept
                .take()
                .or_else(|| step.strip_prefix("kept in ").map(PathBuf::from));
        }
    });
    let report = report.unwrap();
    let shown = longhaul_lab::live::page::page(&report);
    eprintln!("{words}\n{shown}\n{:#?}", report.decisions);
    assert!(report.safe, "{words}: not safe: {:?}", report.report.cause);
    assert_eq!(report.records_lost, 0, "{words}");
    assert_eq!(report.leftovers, [""; 0], "{words}");
    assert_eq!(report.report.faults_missed, [""; 0], "{words}");
    (report, kept)
}

fn moved(words: &str) -> LiveReport {
    let report = play(words);
    assert!(
        report.report.ok && report.report.equal,
        "{words}: {:?}",
        report.report.cause
    );
    assert_eq!(report.owner, "target", "{words}");
    report
}

#[test]
fn a_running_vm_moves_with_a_short_pause_and_loses_nothing() {
    if no_link() {
        return;
    }
    let report = moved("--workload fsync --seed 3");
    assert!(
        report.records_acknowledged > 100,
        "{} records",
        report.records_acknowledged
    );
    let qmp = report.blackout_qmp_ms.unwrap();
    let heard = report.blackout_heartbeat_ms.unwrap();
    let predicted = report.predicted_blackout_ms.unwrap();
    // Machines of a test run are slow and shared: what is held here is that nobody hangs, and that the forecast is one.
    assert!(qmp > 0.0 && qmp < 3000.0, "stopped for {qmp} ms");
    assert!(
        heard + 60.0 > qmp && heard < 5000.0,
        "silent for {heard} ms, stopped for {qmp} ms"
    );
    assert!(
        predicted > 0.0 && predicted < 2000.0,
        "{predicted} ms were forecast"
    );
    assert!(report.rounds.is_some_and(|rounds| rounds > 0));
    assert!(
        report.steps_ms.iter().any(|(name, _)| name == "target's answer"),
        "{:?}",
        report.steps_ms
    );
}

/// What QEMU does by itself is measured, too. Given up while its memory flows, it once went on, and the guest left after somebody had looked where it runs.
#[test]
fn a_migration_by_qemu_itself_that_is_given_up_leaves_the_guest_where_it_is() {
    if no_link() {
        return;
    }
    let report = play("--by qemu --limit 12s --after 8s --seed 8");
    let cause = report.report.cause.as_deref();
    assert_eq!(cause, Some("the job was given up after 12 s"));
    assert_eq!(report.owner, "source");
}

/// The lab fails where the bulk is over first: the VM must not wait for it.
#[test]
fn a_vm_is_handed_over_in_the_midst_of_others_bulk() {
    if no_link() {
        return;
    }
    let report = moved("--workload mixed --rate 100mbit --rtt 80ms --bulk 600MiB --seed 3");
    // The round trip and its steps take some 200 ms here; behind bulk that is written already they would take 500.
    let predicted = report.predicted_blackout_ms.unwrap();
    assert!(predicted <= 300.0, "{predicted}");
}

#[test]
fn a_cut_link_during_ram_holds_the_move_and_it_goes_on() {
    if no_link() {
        return;
    }
    moved("--workload mixed --seed 4 --cut ram+200ms/3s");
}

#[test]
fn a_gateway_killed_during_ram_is_taken_up_again() {
    if no_link() {
        return;
    }
    moved("--workload mixed --seed 5 --kill source-gateway@ram+200ms");
}

#[test]
fn a_source_agent_killed_during_the_copy_is_taken_up_again() {
    if no_link() {
        return;
    }
    moved("--workload idle --seed 6 --kill source-agent@copy+200ms");
}

/// When an agent first logged `words`, in seconds of its day.
fn logged(log: &str, words: &str) -> f64 {
    let line = log.lines().find(|line| line.contains(words));
    let line = line.unwrap_or_else(|| panic!("{words:?} is not in the log:\n{log}"));
    let (_, time) = line.split_once('T').unwrap();
    let time = time.split_once('Z').unwrap().0;
    time.split(':')
        .fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().unwrap())
}

#[test]
fn a_source_agent_killed_during_ram_settles_within_a_second() {
    if no_link() {
        return;
    }
    let (report, kept) = play_in("--workload mixed --seed 9 --kill source-agent@ram+200ms --keep");
    let kept = kept.unwrap();
    let log = fs::read_to_string(kept.join("source-agent.log")).unwrap();
    fs::remove_dir_all(kept).unwrap();
    assert!(report.report.ok, "{:?}", report.report.cause);
    let took =
        logged(&log, "nothing of ours is left in its QEMU") - logged(&log, "settling a VM that was leaving");
    // Over midnight it is negative.
    assert!(took.rem_euclid(86_400.0) < 1.0, "{took} s:\n{log}");
}

#[test]
fn a_cancel_during_ram_leaves_the_vm_running_and_nothing_behind() {
    if no_link() {
        return;
    }
    let report = play("--workload mixed --seed 7 --cancel ram+100ms");
    assert_eq!(report.owner, "source");
    let cause = report.report.cause.unwrap_or_default();
    assert!(cause.contains("cancelled"), "{cause}");
}

#[test]
fn a_cancel_that_comes_too_late_ends_with_the_vm_at_its_target() {
    if no_link() {
        return;
    }
    // The target has just begun to run the VM; the source waits for its word.
    let report = moved("--workload mixed --seed 10 --cancel resume+1ms");
    assert!(report.report.seconds < 60.0, "{} s", report.report.seconds);
}

#[test]
fn a_target_whose_qemu_dies_says_so_and_gets_another() {
    if no_link() {
        return;
    }
    let report = moved("--workload compile --seed 6 --kill target-qemu@ram+500ms");
    let job = &report.report.job;
    let given_up = report
        .decisions
        .iter()
        .any(|words| words.contains("the target gave the VM up"));
    assert!(given_up, "{:?}", report.decisions);
    assert!(
        report.report.seconds < 45.0,
        "{} s: {job:#}",
        report.report.seconds
    );
}

#[test]
fn a_target_agent_that_dies_as_the_vm_arrives_is_sent_nothing_that_it_cannot_place() {
    if no_link() {
        return;
    }
    // It comes back with copies of which it does not hold all; what counts is its word that it gave the VM up.
    let report = moved(
        "--fs xfs --rtt 80ms --format qcow2 --target-format raw --workload fsync --seed 104 --guest-agent \
         --kill source-agent@freeze+51ms --kill target-agent@completed+5ms",
    );
    assert!(report.report.seconds < 90.0, "{} s", report.report.seconds);
}

#[test]
fn what_a_dead_gateway_held_of_the_last_memory_goes_again() {
    if no_link() {
        return;
    }
    // The last of RAM and of the disks goes into the void, and its source hands over before that is noticed.
    let report =
        moved("--workload mixed --rate 60mbit --rtt 80ms --seed 5 --kill target-gateway@pre-switchover");
    let gap = report.blackout_heartbeat_ms.unwrap_or(f64::MAX);
    assert!(gap < 10_000.0, "the guest was silent for {gap} ms");
}

#[test]
fn what_died_with_the_source_agent_is_not_waited_for() {
    if no_link() {
        return;
    }
    // It hands over while a cut link holds up the last of RAM, and dies with it.
    let report = moved(
        "--workload mixed --fs xfs --rate 300mbit --rtt 80ms --seed 108 --kill source-agent@pre-switchover+98ms --cut device+7ms/765ms",
    );
    let gap = report.blackout_heartbeat_ms.unwrap_or(f64::MAX);
    assert!(gap < 10_000.0, "the guest was silent for {gap} ms");
}

/// There and back: what arrived is what was left, and most of the disk did not have to go.
fn came_back(words: &str) -> BackReport {
    let report = play(words);
    assert!(report.report.ok, "{words}: {:?}", report.report.cause);
    assert_eq!(report.owner, "source", "{words}");
    let back = report.back.unwrap();
    eprintln!("{:#?}", (&back.notes, &back.decisions));
    assert_eq!(back.differing_bytes, 0);
    assert!(
        back.compared_bytes > 32 << 20,
        "{} bytes compared",
        back.compared_bytes
    );
    assert!(back.kept_bytes > 8 << 20, "{} bytes were there", back.kept_bytes);
    back
}

#[test]
fn a_vm_that_comes_back_ships_only_what_it_wrote_since() {
    if no_link() {
        return;
    }
    let back = came_back("--workload fsync --seed 8 --back");
    assert!(
        back.sent_raw_bytes < back.kept_bytes / 2,
        "{} bytes sent",
        back.sent_raw_bytes
    );
    let known = back
        .notes
        .iter()
        .any(|note| note.contains("knows what was written since"));
    assert!(known, "{:?}", back.notes);
}

#[test]
fn a_vm_that_comes_back_with_unknown_changes_ships_what_differs() {
    if no_link() {
        return;
    }
    let back = came_back("--workload fsync --seed 9 --format qcow2 --back --forget-changes");
    let compared = back
        .notes
        .iter()
        .any(|note| note.contains("digests are compared"));
    assert!(compared, "{:?}", back.notes);
}

#[test]
fn a_vm_that_cannot_converge_is_told_so_and_runs_on_when_its_time_is_over() {
    if no_link() {
        return;
    }
    // No handover takes less than a round trip: such a pause is never reached, however calm the VM is.
    let report = play("--workload idle --seed 8 --rtt 60ms --blackout 40ms --give-up 12s");
    assert_eq!(report.owner, "source");
    let cause = report.report.cause.unwrap_or_default();
    assert!(
        cause.contains("did not converge") && cause.contains("of 40 ms allowed"),
        "{cause}"
    );
    let said = |words: &str| report.decisions.iter().any(|decision| decision.contains(words));
    assert!(
        said("even the shortest blackout would be too long"),
        "{:?}",
        report.decisions
    );
    assert!(said("only the disks are kept in sync"), "{:?}", report.decisions);
}

#[test]
fn a_store_of_firmware_variables_moves_with_the_vm() {
    if no_link() {
        return;
    }
    moved("--workload idle --seed 9 --vars");
}

/// A stage whose job file is written anew for each refusal.
struct Refusing {
    stage: Stage,
    programs: Programs,
    job: String,
}

impl Refusing {
    fn new() -> Self {
        let programs = Programs::find().unwrap();
        let args = args("--workload idle --loopback");
        let stage = Stage::build(&args, Some(&programs), &mut |step| eprintln!("  {step}")).unwrap();
        let job = fs::read_to_string(stage.lab.directory().join("job.toml")).unwrap();
        Self { stage, programs, job }
    }

    /// What a job gets to hear.
    fn refusal(&mut self, job: &str) -> String {
        fs::write(self.stage.lab.directory().join("job.toml"), job).unwrap();
        let mut operator = self.programs.run_job(&self.stage.lab, JOB_FILE);
        let output = operator.stdin(Stdio::null()).output().unwrap();
        let lines = BufReader::new(&output.stdout[..]).lines().map_while(Result::ok);
        let mut reports = lines.filter_map(|line| match read_line(&line) {
            Line::Report(report) => Some(report),
            _ => None,
        });
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        reports.next().map_or(said, |report| {
            assert!(report["ok"] == false, "{report}");
            report["cause"].as_str().unwrap_or_default().to_owned()
        })
    }

    /// What a plan says; nothing of it is left in any QEMU, and nothing on the disks.
    fn plan(&mut self, job: &str) -> Value {
        let files = || -> Vec<_> {
            let folder = settings::disk(self.stage.lab.directory(), End::Target, 0);
            let folder = fs::read_dir(folder.parent().unwrap()).unwrap();
            folder.map(|entry| entry.unwrap().file_name()).collect()
        };
        let before = files();
        fs::write(self.stage.lab.directory().join("job.toml"), job).unwrap();
        let mut operator = self.programs.plan_job(&self.stage.lab);
        let output = operator.stdin(Stdio::null()).output().unwrap();
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        eprintln!("planned: {plan:#}");
        assert_eq!(files(), before);
        let good = plan["ready"] == true && plan["live"]["converges"] != false;
        assert_eq!(output.status.success(), good, "{plan}");
        let gone = wait_until(Duration::from_secs(5), || {
            (bitmaps(&self.stage, "longhaul-") == 0).then_some(())
        });
        assert!(gone.is_some(), "a bitmap is left");
        assert_eq!(self.stage.owners(), [End::Source]);
        plan
    }

    /// The target's agent with another config.
    fn restart_target(&mut self, config: &str) {
        fs::write(self.stage.lab.directory().join("target-agent.toml"), config).unwrap();
        let mut running = self.stage.running.iter_mut();
        let agent = running.find(|process| process.name() == "target-agent").unwrap();
        agent.kill(std::time::Instant::now()).unwrap();
        let up = wait_until(Duration::from_secs(10), || {
            self.stage.tend().unwrap();
            let mut running = self.stage.running.iter();
            running.all(|process| process.is_running()).then_some(())
        });
        assert!(up.is_some(), "the target agent did not come back");
    }

    fn expect(&mut self, job: &str, words: &[&str]) {
        let said = self.refusal(job);
        eprintln!("refused: {said}");
        for word in words {
            assert!(said.contains(word), "'{word}' is not in: {said}");
        }
        assert!(!said.trim().contains('\n'), "more than one sentence: {said}");
        assert_eq!(self.stage.owners(), [End::Source]);
    }
}

impl Refusing {
    /// The VMs that are prepared, as the operator is shown them.
    fn prepared(&self) -> Vec<Value> {
        let mut command = self.programs.status(&self.stage.lab, End::Source);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        status["prepared"].as_array().cloned().unwrap_or_default()
    }
}

/// A QEMU whose machine type is an alias of another one than the target's.
fn alias(qmp: &Path, disk: &str) -> Child {
    let program = std::env::var("LONGHAUL_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
    let child = Command::new(program)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-m",
            "64",
            "-machine",
            "pc",
        ])
        .args([
            "-accel",
            "tcg",
            "-blockdev",
            &format!("driver=raw,node-name=node0,file.driver=file,file.filename={disk}"),
        ])
        .args(["-device", "virtio-blk-pci,id=disk0,drive=node0"])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    wait_until(Duration::from_secs(20), || qmp.exists().then_some(())).unwrap();
    child
}

#[test]
fn what_cannot_work_is_refused_in_one_sentence() {
    let _place = place("refused");
    let mut lab = Refusing::new();
    let job = lab.job.clone();
    let directory = lab.stage.lab.directory().to_owned();

    let plan = lab.plan(&job);
    assert_eq!(plan["ready"], true, "{plan}");
    let live = &plan["live"];
    assert!(live["sampled_ms"].as_u64().unwrap() >= 2000, "{plan}");
    let ram = lab.stage.machine.ram_kib();
    assert_eq!(live["ram_bytes"], ram << 10, "{plan}");
    assert!(live["ram_dirty_bytes_per_s"].is_u64(), "{plan}");
    assert!(live["disks_dirty_bytes_per_s"][0].is_u64(), "{plan}");
    assert!(!live["verdict"].as_str().unwrap().is_empty(), "{plan}");
    let hopeless = job.replace("[live]\n", "[live]\nblackout = \"10 ms\"\n");
    let plan = lab.plan(&hopeless);
    assert_ne!(plan["live"]["converges"], true, "{plan}");

    lab.expect(
        &job.replace("source = \"disk0\"", "source = \"disk7\""),
        &["disk7", "disk0"],
    );

    let qmp = lab.stage.machine.qmp.clone();
    let outside = directory.join("web.qmp");
    lab.expect(&job.replace(&qmp, &outside.display().to_string()), &["paths.qmp"]);

    let other = settings::qmp_folder(&directory, End::Source).join("other.qmp");
    let empty = settings::disk(&directory, End::Source, 9);
    fs::File::create(&empty).unwrap().set_len(16 << 20).unwrap();
    let mut machine = alias(&other, &empty.display().to_string());
    let said = lab.refusal(&job.replace(&qmp, &other.display().to_string()));
    machine.kill().unwrap();
    machine.wait().unwrap();
    eprintln!("refused: {said}");
    assert!(
        said.contains("pc-i440fx-") && said.contains(MACHINE_TYPE) && said.contains("-machine"),
        "{said}"
    );
    assert!(!said.trim().contains('\n'), "more than one sentence: {said}");

    let config = fs::read_to_string(directory.join("target-agent.toml")).unwrap();
    // The target's QEMU is looked at before a byte moves, by a plan and by a run.
    let memory = config.replace(&format!("{ram}k"), &format!("{}k", ram + (64 << 10)));
    assert_ne!(memory, config);
    lab.restart_target(&memory);
    let plan = lab.plan(&job);
    assert!(
        plan["problems"][0].as_str().unwrap().contains("RAM block"),
        "{plan}"
    );
    lab.expect(&job, &["RAM block", "-m"]);
    lab.restart_target(&config.replace(MACHINE_TYPE, "q35"));
    lab.expect(&job, &["q35", "alias", MACHINE_TYPE]);

    let (without, _) = config.split_once("[vm]\n").unwrap();
    lab.restart_target(without);
    lab.expect(&job, &["vm.command"]);
}

/// The proofs by which free blocks of the guest's disk stayed behind, and how many bytes.
fn proofs(report: &LiveReport) -> (Vec<String>, u64) {
    let disks = report.report.job["disks"].as_array().cloned().unwrap_or_default();
    let parts = disks
        .iter()
        .flat_map(|disk| disk["parts"].as_array().into_iter().flatten());
    let proofs = parts.filter_map(|part| part["proof"].as_str().map(str::to_owned));
    let notes = &report.report.job["notes"];
    eprintln!("{disks:#?}\n{notes}");
    (
        proofs.collect(),
        disks
            .iter()
            .filter_map(|disk| disk["skipped_free_bytes"].as_u64())
            .sum(),
    )
}

#[test]
fn a_guest_with_its_agent_is_frozen_for_an_instant_and_loses_nothing() {
    if no_link() {
        return;
    }
    let report = moved("--workload fsync --seed 31 --guest-agent");
    let (proofs, skipped) = proofs(&report);
    assert_eq!(proofs, ["frozen"]);
    assert!(skipped > 150 << 20, "{skipped} bytes stayed behind");
    assert!(report.records_acknowledged > 100);
}

#[test]
fn xfs_under_load_leaves_its_free_blocks_behind_once_it_was_frozen() {
    if no_link() {
        return;
    }
    let report = moved("--workload fsync --seed 32 --guest-agent --fs xfs");
    let (proofs, skipped) = proofs(&report);
    assert_eq!(proofs, ["frozen"]);
    assert!(skipped > 150 << 20, "{skipped} bytes stayed behind");
    assert!(report.records_acknowledged > 100);
}

/// ntfs-3g keeps no journal, cannot be frozen, and leaves the volume looking clean while it is written: nothing may be believed of it.
#[test]
fn ntfs_under_load_goes_whole_and_loses_nothing() {
    if no_link() {
        return;
    }
    let report = moved("--workload fsync --seed 35 --guest-agent --fs ntfs");
    let (proofs, skipped) = proofs(&report);
    assert!(
        proofs.is_empty() && skipped == 0,
        "{proofs:?}, {skipped} bytes stayed behind"
    );
    assert!(report.records_acknowledged > 100);
}

#[test]
fn an_agent_that_dies_while_the_guest_is_frozen_thaws_it_first() {
    if no_link() {
        return;
    }
    let report = moved("--workload fsync --seed 33 --guest-agent --kill source-agent@freeze");
    // A guest that had stayed frozen would have acknowledged nothing any more.
    assert!(report.guest_after_per_s.is_some_and(|rate| rate > 1.0));
}

#[test]
fn a_vm_that_was_prepared_leaves_free_blocks_behind_by_their_age() {
    if no_link() {
        return;
    }
    let report = moved("--workload idle --seed 34 --prepare 32s --proof-age 30s");
    let (proofs, skipped) = proofs(&report);
    assert_eq!(proofs, ["age"]);
    assert!(skipped > 150 << 20, "{skipped} bytes stayed behind");
}

/// How many bitmaps of that name's beginning the source's QEMU has.
fn bitmaps(stage: &Stage, prefix: &str) -> usize {
    let nodes = stage
        .monitor(End::Source)
        .execute("query-named-block-nodes", json!({ "flat": true }))
        .unwrap();
    let nodes = nodes.as_array().cloned().unwrap_or_default();
    let bitmaps = nodes
        .iter()
        .flat_map(|node| node["dirty-bitmaps"].as_array().cloned().unwrap_or_default());
    let ours = |bitmap: &Value| {
        let name = bitmap["name"].as_str();
        name.is_some_and(|name| name.starts_with(prefix))
    };
    bitmaps.filter(ours).count()
}

/// The bitmaps of a prepared VM that its QEMU has.
fn prepared_bitmaps(stage: &Stage) -> usize {
    bitmaps(stage, "longhaul-prepared-")
}

#[test]
fn a_prepared_vm_is_shown_outlives_its_agent_and_is_left_clean() {
    let _place = place("prepared");
    let mut lab = Refusing::new();
    fs::write(lab.stage.lab.directory().join("job.toml"), &lab.job).unwrap();
    let ask = |lab: &Refusing, words: &[&str]| {
        let output = lab
            .programs
            .with_job(&lab.stage.lab, words)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    };
    assert_eq!(ask(&lab, &["prepare"]), (true, String::new()));
    assert_eq!(prepared_bitmaps(&lab.stage), 1);
    // Once more is as good as once; a plan leaves it alone.
    assert_eq!(ask(&lab, &["prepare"]), (true, String::new()));
    assert_eq!(ask(&lab, &["plan"]), (true, String::new()));
    assert_eq!(prepared_bitmaps(&lab.stage), 1);
    let shown = lab.prepared();
    assert_eq!(shown[0]["agent"], "source-agent");
    assert!(
        shown[0]["age_seconds"].is_u64() && shown[0]["dirty_bytes"].is_u64(),
        "{shown:?}"
    );

    let mut running = lab.stage.running.iter_mut();
    let agent = running.find(|process| process.name() == "source-agent").unwrap();
    agent.kill(std::time::Instant::now()).unwrap();
    let again = wait_until(Duration::from_secs(30), || {
        lab.stage.tend().unwrap();
        let shown = lab.prepared();
        shown.first().filter(|vm| vm["age_seconds"].is_u64()).map(|_| ())
    });
    assert!(
        again.is_some(),
        "the agent has forgotten it: {:?}",
        lab.prepared()
    );
    assert_eq!(prepared_bitmaps(&lab.stage), 1);

    assert_eq!(ask(&lab, &["prepare", "--end"]), (true, String::new()));
    assert_eq!(prepared_bitmaps(&lab.stage), 0);
    assert!(lab.prepared().is_empty());
    let (ended, said) = ask(&lab, &["prepare", "--end"]);
    assert!(!ended && said.contains("is not prepared"), "{said}");

    // A QEMU that ends takes its bitmaps with it.
    assert!(ask(&lab, &["prepare"]).0);
    lab.stage.source.kill();
    let gone = wait_until(Duration::from_secs(30), || {
        lab.prepared().is_empty().then_some(())
    });
    assert!(gone.is_some(), "{:?}", lab.prepared());
}
