//! What a site already has: a first VM of the same template, moved running through the same programs before the guest is.
//!
//! Owns that VM and its job: how it differs from the guest, its move, its end there. Leaves alone the guest, and the measuring of what comes
//! after. Promises an error where the first VM did not arrive: then nothing that follows would mean what it says.

use std::fs::{self, File};
use std::io;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::args::LiveArgs;
use super::machine::{self, Machine};
use super::settings;
use super::stage::Stage;
use crate::guest::workload::command_line;
use crate::lab::End;
use crate::programs::{JOB_FILE, Line, Programs, job_number, read_line};
use crate::usage::wait_until;

/// What it and its job are called.
const NAME: &str = "first";
/// Its load draws from another seed: nothing that it writes is the guest's.
const SEED: u64 = 0x66_6972_7374;
/// How long its QEMUs may take to end.
const END: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(20);

/// The first VM: the guest's machine with a name and a load of its own.
pub(super) fn first(guest: &Machine, args: &LiveArgs) -> Machine {
    let append = command_line("/dev/vda", args.fs, args.workload, args.link.seed ^ SEED);
    guest.renamed(NAME, append)
}

/// The guest, which takes its place.
fn second(first: &Machine, args: &LiveArgs) -> Machine {
    let append = command_line("/dev/vda", args.fs, args.workload, args.link.seed);
    first.renamed(machine::NAME, append)
}

/// Moves the first VM, ends it, and starts the guest; gives how many bytes the first one cost on the WAN.
///
/// # Errors
/// When the first VM did not arrive, or the guest does not come up.
pub(super) fn move_first(args: &LiveArgs, stage: &mut Stage, programs: &Programs) -> io::Result<u64> {
    let report = run_job(args, stage, programs)?;
    let directory = stage.lab.directory().to_owned();
    // The last answer may be lost with its QEMU.
    let _ = stage.monitor(End::Target).execute("quit", Value::Null);
    let there = stage.monitor(End::Target).clone();
    let ended = wait_until(END, || (!there.is_connected()).then_some(())).is_some();
    if !(ended && stage.source.wait_ended(END)) {
        return Err(io::Error::other("the first VM does not end"));
    }
    let job = report["job"].as_str().unwrap_or_default();
    let forgotten = programs
        .order(&stage.lab, End::Source, &["forget", job])
        .output()?;
    if !forgotten.status.success() {
        let said = String::from_utf8_lossy(&forgotten.stderr);
        return Err(io::Error::other(format!(
            "the first VM's shadow stays: {}",
            said.trim()
        )));
    }
    fs::remove_file(settings::disk(&directory, End::Target, 0))?;
    let guest = second(&stage.machine, args);
    settings::write_job(&directory, &guest, args)?;
    stage.replace(args, guest)?;
    let bytes = report["wan_bytes"].as_u64();
    bytes.ok_or_else(|| io::Error::other("the first VM's job does not say what it sent"))
}

/// Runs its job to the end; gives the report, with the job's number as `job`.
fn run_job(args: &LiveArgs, stage: &mut Stage, programs: &Programs) -> io::Result<Value> {
    let log = stage.lab.directory().join("first.log");
    let said = File::create(&log)?;
    let mut operator = programs.run_job(&stage.lab, JOB_FILE);
    let mut operator = operator
        .stdin(Stdio::null())
        .stderr(said.try_clone()?)
        .stdout(said)
        .spawn()?;
    stage.lab.adopt(operator.id())?;
    let began = Instant::now();
    while operator.try_wait()?.is_none() {
        stage.tend()?;
        if began.elapsed() > args.limit.0 {
            operator.kill()?;
        }
        std::thread::sleep(TICK);
    }
    read_report(&fs::read_to_string(&log)?)
}

fn read_report(said: &str) -> io::Result<Value> {
    let report = said.lines().rev().find_map(|line| match read_line(line) {
        Line::Report(report) => Some(report),
        _ => None,
    });
    let mut report = report.ok_or_else(|| io::Error::other("the first VM's job gave no report"))?;
    if report["ok"] != true {
        let cause = report["cause"].as_str().unwrap_or("no reason was given");
        return Err(io::Error::other(format!("the first VM was not moved: {cause}")));
    }
    report["job"] = job_number(said)?.into();
    Ok(report)
}
