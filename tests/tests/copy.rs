//! What the lab promises of others: a copy by another tool arrives whole and is counted, one that takes too long is given up and
//! says so, and a TCP flow beside a job is watched and ends.
//!
//! One tool stands for all: the others need packages that only the benchmark asks for.

#![allow(clippy::unwrap_used)] // helpers of tests fail like tests

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use clap::Parser;
use longhaul_lab::cold_rival::{CopyArgs, run};
use longhaul_lab::move_disk::{self, MoveArgs};
use longhaul_lab::namespace;
use longhaul_lab::report::Report;

#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Words {
    #[command(flatten)]
    args: CopyArgs,
}

#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Beside {
    #[command(flatten)]
    args: MoveArgs,
}

/// 64 MiB with `used` MiB that no tool can shrink, and holes.
fn disk(path: &Path, used: u64) {
    let file = File::create(path).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut state = 1_u64;
    for mib in 0..used {
        let mut block = vec![0_u8; 1 << 20];
        for word in block.chunks_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
        }
        file.write_all_at(&block, (3 * mib) << 20).unwrap();
    }
}

fn copy(used: u64, words: &str) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.raw");
    disk(&image, used);
    let words = format!("--by qemu-img --image {} {words}", image.display());
    let args = Words::try_parse_from(words.split_whitespace()).unwrap().args;
    run(&args, &mut |_| ()).unwrap()
}

#[test]
fn a_copy_by_another_tool_arrives_whole_and_its_bytes_are_counted() {
    let report = copy(8, "--rate 400mbit --rtt 4ms");
    assert!(report.ok && report.equal, "{:?}", report.cause);
    assert!(report.tcp.is_some() && report.programs["sender"].usage.cpu_seconds >= 0.0);
    if report.emulated {
        let sent = report.wan_bytes >> 20;
        assert!((8..16).contains(&sent), "{sent} MiB: what is used, and no holes");
    }
}

#[test]
fn a_copy_that_takes_too_long_is_given_up() {
    let report = copy(16, "--rate 8mbit --rtt 4ms --limit 2s");
    if report.emulated {
        assert!(
            !report.ok && report.cause.as_ref().unwrap().contains("was given up after"),
            "{:?}",
            report.cause
        );
        assert!((2.0..10.0).contains(&report.seconds));
    }
}

#[test]
fn a_job_of_a_tenant_keeps_to_its_cap() {
    if let Some(cause) = namespace::missing_rights() {
        return eprintln!("not tested here: {cause}");
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.raw");
    disk(&image, 6);
    let words = format!(
        "--rate 100mbit --rtt 10ms --job-rate 8mbit --tenant acme --image {}",
        image.display()
    );
    let args = Beside::try_parse_from(words.split_whitespace()).unwrap().args;
    let report = move_disk::run(&args, &mut |_| (), &mut |_| Ok(())).unwrap();
    assert!(report.ok && report.equal, "{:?}", report.cause);
    // 6 MiB at 7.6 Mbit/s of payload take 6.6 s; the link alone would take 0.6.
    assert!(
        (5.5..20.0).contains(&report.seconds),
        "{} s, {} bytes",
        report.seconds,
        report.wan_bytes
    );
}

#[test]
fn a_flow_beside_a_job_gets_what_the_mode_leaves() {
    if let Some(cause) = namespace::missing_rights() {
        return eprintln!("not tested here: {cause}");
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.raw");
    disk(&image, 20);
    let report = |mode: &str| {
        let words = format!(
            "--rate 8mbit --rtt 40ms --congestion {mode} --beside cubic --image {}",
            image.display()
        );
        let args = Beside::try_parse_from(words.split_whitespace()).unwrap().args;
        move_disk::run(&args, &mut |_| (), &mut |_| Ok(())).unwrap()
    };
    let reports = std::thread::scope(|scope| {
        let both = ["shared", "background"].map(|mode| scope.spawn(move || report(mode)));
        both.map(|one| one.join().unwrap())
    });
    for report in &reports {
        assert!(report.ok && report.equal, "{:?}", report.cause);
    }
    let [shared, background] = reports.map(|report| report.beside.unwrap());
    eprintln!("{shared:?}\n{background:?}");
    // How much each mode takes is what `congestion_rivals` asserts, on paths where no other program takes the CPU.
    for beside in [&shared, &background] {
        let whole = beside.kept + beside.share;
        assert!(
            (0.75..1.25).contains(&whole),
            "the flow and the job share one link: {beside:?}"
        );
        assert!((5.0..40.0).contains(&beside.seconds), "{beside:?}");
    }
    assert!(background.kept > 0.6, "{background:?}");
}
