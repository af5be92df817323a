//! What Longhaul promises when something goes wrong: programs killed, the WAN cut, disks full, operators who change their mind.
//!
//! The matrix draws its cases from a seed, which is printed: `LONGHAUL_FAULT_SEED` plays one again, `LONGHAUL_FAULT_CASES` sets how
//! many (the long campaign: several hundred). Case n of a seed is always the same. Every story runs real programs over the lab's link.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests fail like tests

mod fault_support;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fault_support::{IN_FLIGHT_MAX, Setup, World, images};
use longhaul_lab::namespace;
use longhaul_lab::wan::link::Link;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

const PROGRAMS: [&str; 4] = ["source-agent", "source-gateway", "target-gateway", "target-agent"];
/// Cases of the default run.
const CASES: u64 = 10;

/// Whether the lab can emulate a link here; says so where not.
fn no_link() -> bool {
    let missing = namespace::missing_rights();
    if let Some(cause) = &missing {
        eprintln!("not tested here: {cause}");
    }
    missing.is_some()
}

#[derive(Clone, Debug)]
enum Moment {
    /// The job's progress in per cent.
    Progress(f64),
    /// So long after the job was first seen in this phase, or a later one.
    Phase(&'static str, Duration),
}

#[derive(Clone, Debug)]
enum Fault {
    Kill(&'static str),
    Cut(Duration),
}

#[derive(Clone, Debug)]
struct Case {
    rate: &'static str,
    rtt: &'static str,
    format: &'static str,
    faults: Vec<(Moment, Fault)>,
}

fn draw(seed: u64, number: u64) -> Case {
    let mut rng = StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut faults: Vec<_> = (0..rng.random_range(1..=2))
        .map(|_| (moment(&mut rng), fault(&mut rng)))
        .collect();
    faults.sort_by(|a, b| place(&a.0).total_cmp(&place(&b.0)));
    Case {
        rate: ["100mbit", "150mbit", "200mbit"].choose(&mut rng).unwrap(),
        rtt: ["20ms", "30ms", "40ms"].choose(&mut rng).unwrap(),
        format: ["raw", "raw", "raw", "qcow2"].choose(&mut rng).unwrap(),
        faults,
    }
}

fn moment(rng: &mut StdRng) -> Moment {
    let delay = Duration::from_millis(rng.random_range(0..60));
    match rng.random_range(0..10) {
        0 => Moment::Phase("scan", delay / 4),
        1 | 2 => Moment::Phase("verify", delay),
        3 | 4 => Moment::Phase("commit", delay / 2),
        _ => Moment::Progress(rng.random_range(1.0..99.0)),
    }
}

fn fault(rng: &mut StdRng) -> Fault {
    match rng.random_range(0..6) {
        0 => Fault::Cut(Duration::from_millis(rng.random_range(300..4000))),
        // Longer than a link lives without a word.
        1 if rng.random_bool(0.5) => Fault::Cut(Duration::from_secs(12)),
        _ => Fault::Kill(PROGRAMS.choose(rng).unwrap()),
    }
}

/// The order of moments in a job.
fn place(moment: &Moment) -> f64 {
    match moment {
        Moment::Progress(percent) => *percent,
        Moment::Phase("scan", _) => 0.0,
        Moment::Phase("verify", _) => 101.0,
        Moment::Phase(..) => 102.0,
    }
}

/// Whether the job has come to this moment.
fn reached(world: &World, job: &str, moment: &Moment) -> Option<()> {
    const PHASES: [&str; 6] = ["connect", "scan", "transfer", "verify", "commit", "done"];
    let record = world.record(job)?;
    if record["state"] == "completed" {
        return Some(());
    }
    let progress = &record["progress"];
    let at = PHASES.iter().position(|phase| progress["phase"] == *phase)?;
    let come = match moment {
        Moment::Progress(percent) => {
            let (done, used) = (progress["done_bytes"].as_f64()?, progress["used_bytes"].as_f64()?);
            at > 2 || (used > 0.0 && done * 100.0 >= used * percent)
        }
        Moment::Phase(phase, delay) => {
            let come = PHASES.iter().position(|name| name == phase)? <= at;
            if come {
                std::thread::sleep(*delay);
            }
            come
        }
    };
    come.then_some(())
}

fn play(case: &Case, number: u64) {
    let began = Instant::now();
    let mut world = World::new(&Setup {
        rate: case.rate,
        rtt: case.rtt,
        ..Setup::default()
    });
    images::mixed(&world.images.path().join("disk"), number);
    let text = world.job_text("vm", "", "", &[("disk", "copy", case.format)]);
    let job = world.submit_text("vm", &text);
    for (moment, fault) in &case.faults {
        world.until(&format!("{moment:?}"), |world| reached(world, &job, moment));
        match fault {
            Fault::Kill(program) => world.kill(program),
            Fault::Cut(length) => {
                world.say(format!("cut for {length:?}"));
                let window = format!("0ms..{}ms", length.as_millis()).parse().unwrap();
                world.lab.link().unwrap().cut_between(window).unwrap();
            }
        }
    }
    let record = world.until_state(&job, "completed");
    // A program that was killed at the very end comes back and finds nothing to do.
    world.until("all programs", |world| {
        let alive = |process: &longhaul_lab::process::Process| process.is_running();
        world.running.iter().all(alive).then_some(())
    });
    world.assert_arrived(&record, &["copy"]);
    world.assert_equal(("disk", "raw"), ("copy", case.format), &record);
    let resent = record["report"]["resent_bytes"].as_u64().unwrap();
    let bound = IN_FLIGHT_MAX * case.faults.len() as u64;
    assert!(
        resent <= bound,
        "{resent} bytes were sent again, more than {bound}\n{record:#}\n{}",
        world.story()
    );
    let attempts = &record["report"]["attempts"];
    eprintln!(
        "case {number}: {case:?}: {attempts} attempts, {resent} bytes sent again, {:.1?}",
        began.elapsed()
    );
}

#[test]
fn whatever_dies_the_job_arrives() {
    if no_link() {
        return;
    }
    let number_of = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number_of("LONGHAUL_FAULT_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    let cases = number_of("LONGHAUL_FAULT_CASES").unwrap_or(CASES);
    eprintln!("LONGHAUL_FAULT_SEED={seed} LONGHAUL_FAULT_CASES={cases}");
    let next = AtomicU64::new(number_of("LONGHAUL_FAULT_FIRST").unwrap_or(0));
    let end = next.load(Ordering::Relaxed) + cases;
    std::thread::scope(|scope| {
        let work = || loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= end {
                return;
            }
            let case = draw(seed, number);
            let outcome = std::panic::catch_unwind(|| play(&case, number));
            if outcome.is_err() {
                panic!(
                    "LONGHAUL_FAULT_SEED={seed} LONGHAUL_FAULT_FIRST={number} LONGHAUL_FAULT_CASES=1 plays it again: {case:?}"
                );
            }
        };
        let threads = [scope.spawn(work), scope.spawn(work)];
        let failed = threads.map(|thread| thread.join().is_err());
        assert!(!failed.contains(&true), "a case failed; its seed is above");
    });
}

#[test]
fn the_end_of_a_cut_is_noticed_soon() {
    if no_link() {
        return;
    }
    let mut world = World::new(&Setup {
        rtt: "40ms",
        ..Setup::default()
    });
    images::random_disk(&world.images.path().join("disk"), 48, 11);
    let job = world.submit("vm", "disk", "copy");
    world.until("a third", |world| reached(world, &job, &Moment::Progress(33.0)));
    // QUIC's own probes would come 2.5 and 5 s after the cut began, and then no sooner than after 10 s.
    world.lab.link().unwrap().set_cut(true).unwrap();
    std::thread::sleep(Duration::from_secs(6));
    // The link's own count: what a job says of its progress comes a second or more later.
    let link = world.lab.link().unwrap();
    let delivered = |link: &mut Link| link.stats().unwrap().forth.delivered_bytes;
    let before = delivered(link);
    link.set_cut(false).unwrap();
    let healed = Instant::now();
    while delivered(link) < before + (1 << 20) && healed.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let waited = healed.elapsed();
    eprintln!("{waited:?} after the cut it goes on");
    assert!(
        waited < Duration::from_millis(2500),
        "{waited:?}\n{}",
        world.story()
    );
    let record = world.until_state(&job, "completed");
    world.assert_arrived(&record, &["copy"]);
    assert_eq!(record["report"]["attempts"], 1, "{record:#}\n{}", world.story());
}

#[test]
fn a_full_disk_holds_the_job_up_until_there_is_room() {
    if no_link() {
        return;
    }
    let mut world = World::new(&Setup {
        disks_size: Some("40m"),
        ..Setup::default()
    });
    let disks = world.disks();
    images::random_disk(&world.images.path().join("disk"), 32, 3);
    // Somebody else takes the room that the space check found.
    let job = world.submit("vm", "disk", "copy");
    world.until("the transfer", |world| {
        reached(world, &job, &Moment::Progress(1.0))
    });
    fs::write(disks.join("other"), vec![1; 20 << 20]).unwrap();
    let record = world.until_state(&job, "waiting");
    let message = record["progress"]["message"].as_str().unwrap();
    assert!(message.contains("space") || message.contains("room"), "{message}");
    // A second fault on top: the gateway starts anew while the disk is full.
    world.kill("source-gateway");
    std::thread::sleep(Duration::from_secs(1));
    world.until("the gateway again", |world| world.record(&job));
    remount(&disks, "size=80m");
    let record = world.until_state(&job, "completed");
    fs::remove_file(disks.join("other")).unwrap();
    world.assert_arrived(&record, &["copy"]);
    world.assert_equal(("disk", "raw"), ("copy", "raw"), &record);
    let resent = record["report"]["resent_bytes"].as_u64().unwrap();
    assert!(resent <= IN_FLIGHT_MAX, "{resent} bytes sent again\n{record:#}");
}

/// Gives the file system another size, whoever has it mounted.
fn remount(folder: &Path, size: &str) {
    images::run(
        "mount",
        &["-o", &format!("remount,{size}"), folder.to_str().unwrap()],
    );
}

#[test]
fn pause_resume_and_cancel_do_what_they_say() {
    if no_link() {
        return;
    }
    let mut world = World::new(&Setup::default());
    images::random_disk(&world.images.path().join("disk"), 24, 4);
    let job = world.submit("vm", "disk", "copy");
    world.until("a third", |world| reached(world, &job, &Moment::Progress(33.0)));
    assert_eq!(world.operator(&["pause", &job]).0, 0);
    let paused = world.until_state(&job, "paused");
    std::thread::sleep(Duration::from_millis(700));
    let still = world.record(&job).unwrap();
    assert_eq!(
        still["progress"]["wan_bytes"], paused["progress"]["wan_bytes"],
        "it went on"
    );
    assert_eq!(world.operator(&["resume", &job]).0, 0);
    let record = world.until_state(&job, "completed");
    world.assert_arrived(&record, &["copy"]);
    world.assert_equal(("disk", "raw"), ("copy", "raw"), &record);
    assert!(
        record["report"]["resent_bytes"].as_u64().unwrap() <= IN_FLIGHT_MAX,
        "{record:#}"
    );
    let (code, _, errors) = world.operator(&["cancel", &job]);
    assert!(code == 4 && errors.contains("ompleted"), "{code} {errors}");

    // Cancelled while the other site cannot be reached, over a restart of the gateway: the partial copy goes all the same.
    let job = world.submit("other", "disk", "copy2");
    world.until("a third", |world| reached(world, &job, &Moment::Progress(33.0)));
    world.lab.link().unwrap().set_cut(true).unwrap();
    assert_eq!(world.operator(&["cancel", &job]).0, 0);
    world.until("the cancel in the journal", |world| {
        (world.record(&job)?["cancelling"] == true).then_some(())
    });
    world.kill("source-gateway");
    world.until("the gateway again", |world| world.record(&job));
    world.lab.link().unwrap().set_cut(false).unwrap();
    world.until_state(&job, "cancelled");
    world.assert_nothing_but(&["copy"]);
}

#[test]
fn a_cancelled_job_leaves_another_untouched() {
    if no_link() {
        return;
    }
    let mut world = World::new(&Setup::default());
    images::random_disk(&world.images.path().join("one"), 24, 5);
    images::random_disk(&world.images.path().join("two"), 24, 6);
    let one = world.submit("one", "one", "copy1");
    let two = world.submit("two", "two", "copy2");
    world.until("both at work", |world| {
        reached(world, &one, &Moment::Progress(20.0))
    });
    assert_eq!(world.operator(&["cancel", &one]).0, 0);
    world.until_state(&one, "cancelled");
    let record = world.until_state(&two, "completed");
    assert_eq!(
        (&record["report"]["attempts"], &record["report"]["resent_bytes"]),
        (&1.into(), &0.into()),
        "{record:#}"
    );
    world.assert_arrived(&record, &["copy2"]);
    world.assert_equal(("two", "raw"), ("copy2", "raw"), &record);
}

#[test]
fn a_vm_with_several_disks_and_formats_arrives_with_its_definition_and_its_hook() {
    if no_link() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (hook, said) = (folder.path().join("hook"), folder.path().join("said"));
    let script = format!(
        "#!/bin/sh\n{{ echo \"$LONGHAUL_NAME $LONGHAUL_JOB\"; echo \"$LONGHAUL_DISKS\"; cat \"$LONGHAUL_DEFINITION\"; }} >> {}\n",
        said.display()
    );
    fs::write(&hook, script).unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    let mut world = World::new(&Setup {
        target_agent: format!("[hooks]\nafter = \"{}\"\n", hook.display()),
        ..Setup::default()
    });
    let images_folder = world.images.path().canonicalize().unwrap();
    images::mixed(&images_folder.join("root"), 7);
    let data = images_folder.join("data.qcow2");
    images::run(
        "qemu-img",
        &[
            "convert",
            "-O",
            "qcow2",
            images_folder.join("root").to_str().unwrap(),
            data.to_str().unwrap(),
        ],
    );
    fs::write(images_folder.join("vm.xml"), "<domain>opaque</domain>\n").unwrap();
    let definition = format!("definition = \"{}\"\n", images_folder.join("vm.xml").display());
    let disks = [("root", "root.qcow2", "qcow2"), ("data.qcow2", "data", "raw")];
    let text = world.job_text("two-disks", &definition, "", &disks);
    let job = world.submit_text("vm", &text);
    // The agent dies somewhere in the commit, between the promotion of the two disks perhaps.
    world.until("the commit", |world| {
        reached(world, &job, &Moment::Phase("commit", Duration::from_millis(15)))
    });
    world.kill("target-agent");
    let record = world.until_state(&job, "completed");
    world.until("all programs", |world| {
        world
            .running
            .iter()
            .all(|process| process.is_running())
            .then_some(())
    });
    world.assert_arrived(&record, &["root.qcow2", "data"]);
    let half = serde_json::json!({"report": {"skipped_free_bytes": record["report"]["skipped_free_bytes"].as_u64().unwrap() / 2}});
    world.assert_equal(("root", "raw"), ("root.qcow2", "qcow2"), &half);
    world.assert_equal(("data.qcow2", "qcow2"), ("data", "raw"), &half);
    let said = fs::read_to_string(said).unwrap();
    assert!(said.contains(&format!("two-disks {job}")), "{said}");
    for part in ["root.qcow2\n", "/data\n", "<domain>opaque</domain>"] {
        assert!(said.contains(part), "{part} in {said}");
    }
}

#[test]
fn what_exists_is_not_overwritten_unless_told_to() {
    if no_link() {
        return;
    }
    let mut world = World::new(&Setup::default());
    images::random_disk(&world.images.path().join("disk"), 4, 8);
    fs::write(world.disks().join("copy"), "precious").unwrap();
    let job = world.submit("vm", "disk", "copy");
    let record = world.until_state(&job, "failed");
    let message = record["message"].as_str().unwrap();
    assert!(
        message.contains("copy") && message.contains("exists"),
        "{message}"
    );
    assert_eq!(fs::read(world.disks().join("copy")).unwrap(), b"precious");
    world.assert_nothing_but(&["copy"]);
    let text = world.job_text("told", "", "overwrite = true\n", &[("disk", "copy", "raw")]);
    let job = world.submit_text("told", &text);
    let record = world.until_state(&job, "completed");
    world.assert_arrived(&record, &["copy"]);
    world.assert_equal(("disk", "raw"), ("copy", "raw"), &record);
}

#[test]
fn an_image_that_changes_while_it_is_moved_is_refused_by_name() {
    if no_link() {
        return;
    }
    let mut world = World::new(&Setup::default());
    let image = world.images.path().join("disk");
    images::random_disk(&image, 16, 9);
    let job = world.submit("vm", "disk", "copy");
    world.until("half", |world| reached(world, &job, &Moment::Progress(50.0)));
    let file = fs::File::options().write(true).open(&image).unwrap();
    file.write_all_at(b"changed", 100).unwrap();
    let record = world.until_state(&job, "failed");
    let message = record["message"].as_str().unwrap();
    assert!(message.contains("disk") && message.contains("chang"), "{message}");
    assert!(
        !world.disks().join("copy").exists(),
        "a copy of a moving target was promoted"
    );
    assert_eq!(world.operator(&["cancel", &job]).0, 0);
    world.until_state(&job, "cancelled");
    world.assert_nothing_but(&[]);
}

#[test]
fn a_job_waits_for_its_agents_and_says_so() {
    if no_link() {
        return;
    }
    for missing in ["source-agent", "target-agent"] {
        let mut world = World::new(&Setup {
            without: vec![missing],
            ..Setup::default()
        });
        images::random_disk(&world.images.path().join("disk"), 4, 10);
        let job = world.submit("vm", "disk", "copy");
        world.until("the reason", |world| {
            let record = world.record(&job)?;
            let message = record["progress"]["message"].as_str()?;
            let told = message.contains(missing) && message.contains("not linked");
            (record["state"] == "waiting" && told).then_some(())
        });
        let (_, status, _) = world.operator(&["status", &job]);
        assert!(
            status.contains("not linked"),
            "the operator is not told why: {status}"
        );
        world.start(missing);
        let record = world.until_state(&job, "completed");
        world.assert_arrived(&record, &["copy"]);
    }
}
