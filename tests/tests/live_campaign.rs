//! Running VMs moved again and again, with kills and cuts drawn from a seed: whatever happens, exactly one machine owns
//! the guest and nothing that it acknowledged is lost.
//!
//! `LONGHAUL_LIVE_SEED` and `LONGHAUL_LIVE_CASES` set which cases and how many, `LONGHAUL_LIVE_FIRST` where to go on: case
//! n of a seed is always the same. `LONGHAUL_LIVE_SIZE=full` takes the guest of the standard run, over its link. Each case is
//! printed as the words of one `lab live`. `LONGHAUL_LIVE_KEEP=1` keeps the lab of a case that did not keep the promise: logs, config
//! files, disks. The default run is a short slice.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests fail like tests

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use longhaul_lab::guest::boot::accelerator;
use longhaul_lab::live::args::LiveArgs;
use longhaul_lab::live::run;
use longhaul_lab::live::verdict::LiveReport;
use longhaul_lab::move_disk::Moment;
use longhaul_lab::namespace;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Cases of the default run.
const CASES: u64 = 1;

#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Words {
    #[command(flatten)]
    args: LiveArgs,
}

fn number(name: &str, usual: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(usual, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is no number: {text}"))
    })
}

/// Which guest, over which link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// 128 MiB of RAM, 1 GiB of disk, 300 Mbit/s
    Small,
    /// 512 MiB of RAM, 4 GiB of disk, 100 Mbit/s, 80 ms
    Full,
}

impl Size {
    fn told() -> Self {
        match std::env::var("LONGHAUL_LIVE_SIZE").as_deref() {
            Err(_) | Ok("small") => Self::Small,
            Ok("full") => Self::Full,
            Ok(other) => panic!("LONGHAUL_LIVE_SIZE is small or full, not {other}"),
        }
    }
}

/// A moment of the move, the short phases more often than their length would say.
fn moment(rng: &mut StdRng, size: Size) -> String {
    let (phase, most_ms) = *[
        ("copy", 2500),
        ("rounds", 300),
        ("ram", 2500),
        ("ram", 2500),
        ("pre-switchover", 40),
        ("pre-switchover", 250),
        ("device", 60),
        ("completed", 60),
        ("completed", 300),
        ("resume", 40),
    ]
    .choose(rng)
    .unwrap();
    // Those that carry the data are longer; the others are not.
    let most_ms = match (size, phase) {
        (Size::Full, "copy" | "ram") => most_ms * 4,
        _ => most_ms,
    };
    format!("{phase}+{}ms", rng.random_range(0..most_ms))
}

/// The guest and the link of a case.
fn setting(rng: &mut StdRng, size: Size) -> String {
    let format = ["raw", "raw", "raw", "qcow2"].choose(rng).unwrap();
    let target = ["raw", "raw", "raw", "qcow2"].choose(rng).unwrap();
    let (workloads, rest): (&[&str], _) = match size {
        Size::Small => {
            let rtt = ["5ms", "20ms", "80ms"].choose(rng).unwrap();
            let fs = ["ext4", "ext4", "ext4", "xfs", "xfs", "ntfs"]
                .choose(rng)
                .unwrap();
            (
                &["mixed", "mixed", "fsync", "fsync", "compile", "idle"],
                format!("--kind tiny --fs {fs} --rate 300mbit --rtt {rtt} --limit 4min"),
            )
        }
        Size::Full => (
            &["mixed", "mixed", "redis", "fsync"],
            "--kind standard --rate 100mbit --rtt 80ms --limit 10min".to_owned(),
        ),
    };
    let workload = workloads.choose(rng).unwrap();
    format!("{rest} --workload {workload} --format {format} --target-format {target} --before 2s --after 2s")
}

/// Whether something is to happen, or to go on, while the VM is handed over.
fn strikes_the_handover(words: &str) -> bool {
    const LATE: [&str; 4] = ["pre-switchover", "device", "completed", "resume"];
    words.contains(" --cut") || LATE.iter().any(|phase| words.contains(phase))
}

/// The words of case `number`.
fn draw(seed: u64, number: u64, size: Size) -> String {
    let rng = &mut StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut words = format!("{} --seed {number}", setting(rng, size));
    const PROGRAMS: [&str; 4] = ["source-agent", "target-agent", "source-gateway", "target-gateway"];
    for _ in 0..rng.random_range(0..=2) {
        let when = moment(rng, size);
        match rng.random_range(0..10) {
            0..=1 => words += &format!(" --cut {when}/{}ms", rng.random_range(200..6000)),
            2 => words += &format!(" --cut {when}/14s"),
            3 => words += " --kill target-qemu@ram+1s",
            _ => words += &format!(" --kill {}@{when}", PROGRAMS.choose(rng).unwrap()),
        }
    }
    if rng.random_range(0..10) == 0 {
        words += &format!(" --cancel {}", moment(rng, size));
    }
    // Half of the guests have their agent and are frozen at the start; a freeze is a moment of its own to be killed in.
    if rng.random_bool(0.5) {
        words += " --guest-agent";
        if rng.random_range(0..4) == 0 {
            words += &format!(" --kill source-agent@freeze+{}ms", rng.random_range(0..150));
        }
    }
    // Holding the handover would move the moments at which it is struck; a hook has no time for more memory.
    if size == Size::Small && !strikes_the_handover(&words) {
        words += " --compare-memory";
    }
    words
}

/// How a case ended.
enum Verdict {
    Kept,
    /// Both agents saw one stream, byte for byte, and QEMU had not put every page into it as it was last. Its software emulation does
    /// that at times: a write is missed where the page is being marked clean at the same moment (`notdirty_write` in accel/tcg/cputlb.c).
    LeftOut(u64),
    Broken(String),
}

/// What became of a case. Its lab is kept where something is, if that is asked for.
fn play(words: &str) -> (String, Verdict) {
    let mut args = Words::try_parse_from(words.split_whitespace()).unwrap().args;
    args.keep = std::env::var_os("LONGHAUL_LIVE_KEEP").is_some();
    let mut kept = None;
    let report = run::run(&args, &mut |moment| {
        if let Moment::Step(step) = moment
            && let Some(place) = step.strip_prefix("kept in ")
        {
            kept = Some(PathBuf::from(place));
        }
    });
    let (story, mut verdict) = match report {
        Ok(report) => judge(&report),
        Err(error) => {
            return (
                "the lab did not work".to_owned(),
                Verdict::Broken(error.to_string()),
            );
        }
    };
    match (&mut verdict, kept) {
        (Verdict::Broken(wrong), Some(place)) => {
            *wrong += &format!("; its lab is kept in {}", place.display());
        }
        (_, Some(place)) => std::fs::remove_dir_all(place).unwrap(),
        (_, None) => {}
    }
    (story, verdict)
}

/// The case in a line, and how it ended.
fn judge(report: &LiveReport) -> (String, Verdict) {
    let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0}"));
    let mut story = format!(
        "{} {:.0} s, at the {}, blackout {}/{} ms, {} records",
        if report.report.ok { "moved" } else { "not moved" },
        report.report.seconds,
        report.owner,
        ms(report.blackout_qmp_ms),
        ms(report.blackout_heartbeat_ms),
        report.records_acknowledged,
    );
    let tries = ["called off", "gave the VM up"];
    for decision in &report.decisions {
        if tries.iter().any(|words| decision.contains(words)) {
            story += &format!("\n  {decision}");
        }
    }
    let cause = report.report.cause.clone().unwrap_or_default();
    let compared = report.memory_compared.as_ref();
    let left_out = compared.map_or(0, |both| both.differing_pages);
    let verdict = match (report.safe, report.leftovers.first()) {
        (false, _) if left_out > 0 && accelerator() == "tcg" => Verdict::LeftOut(left_out),
        (false, _) => {
            let job = report.report.job["cause"]
                .as_str()
                .unwrap_or("it has no complaint");
            Verdict::Broken(format!("NOT SAFE: {cause}; the job: {job}; {:?}", report.records))
        }
        (true, Some(left)) => Verdict::Broken(format!("left behind: {left}")),
        (true, None) => Verdict::Kept,
    };
    let story = if report.report.ok {
        story
    } else {
        format!("{story}; {cause}")
    };
    (story, verdict)
}

#[test]
fn whatever_fails_one_machine_owns_the_guest_and_nothing_is_lost() {
    if let Some(cause) = namespace::missing_rights() {
        eprintln!("not tested here: {cause}");
        return;
    }
    let seed = number("LONGHAUL_LIVE_SEED", 1);
    let size = Size::told();
    let first = number("LONGHAUL_LIVE_FIRST", 1);
    let cases = number("LONGHAUL_LIVE_CASES", CASES);
    let limit = Duration::from_secs(number("LONGHAUL_LIVE_SECONDS", u64::MAX / 4));
    let start = Instant::now();
    let mut failed = Vec::new();
    let (mut played, mut left_out) = (0, 0);
    for case in first..first.saturating_add(cases) {
        if start.elapsed() > limit {
            eprintln!("the time is over; go on with LONGHAUL_LIVE_FIRST={case}");
            break;
        }
        let words = draw(seed, case, size);
        eprintln!("case {case} of seed {seed}: lab live {words}");
        let (story, verdict) = play(&words);
        played += 1;
        eprintln!("  {story}");
        match verdict {
            Verdict::Kept => {}
            Verdict::LeftOut(pages) => {
                left_out += 1;
                eprintln!("  QEMU itself left out {pages} pages of memory");
            }
            Verdict::Broken(wrong) => {
                eprintln!("  {wrong}");
                failed.push(format!("case {case}: {wrong}\n    lab live {words}"));
            }
        }
    }
    eprintln!(
        "{} of {played} cases kept the promise; in {left_out} QEMU's own stream lacked pages",
        played - left_out - failed.len() as u64
    );
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    // Seen in 1 of 100 and fewer, on a machine with much more to do than it can.
    assert!(left_out <= 1 + played / 20, "{left_out} of {played}");
}
