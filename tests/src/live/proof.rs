//! What a guest has to show when its migration is over.
//!
//! Owns asking it for its memory, its end, and the offline look at the disk that it had last. Leaves alone who owns it (`run`) and what the
//! disk must hold (`check`). Promises that a guest which says nothing, or does not go off, counts as a bad one.

use std::io;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::args::LiveArgs;
use super::check::{Ended, check};
use super::settings;
use super::stage::{self, Stage};
use super::verdict::LiveReport;
use crate::compare;
use crate::lab::End;
use crate::move_disk::Moment;
use crate::usage::wait_until;

/// How long the guest may take to look at its memory, and to power off.
const VERIFY_LIMIT: Duration = Duration::from_secs(240);

/// Has the guest look at its memory and go off, then looks at its disk.
///
/// # Errors
/// When the lab itself cannot look.
pub(super) fn prove(
    args: &LiveArgs,
    stage: &Stage,
    report: &mut LiveReport,
    watch: &mut dyn FnMut(Moment),
) -> io::Result<()> {
    let end = match report.owner.as_str() {
        "source" => End::Source,
        "target" => End::Target,
        _ => return Ok(()),
    };
    watch(Moment::Step(format!(
        "the guest at the {} looks at its memory and goes off",
        end.name()
    )));
    let from = stage.consoles.now();
    let consoles = &stage.consoles;
    let asked = consoles.say(end, "verify");
    let said = asked
        .and_then(|()| consoles.wait_for("LONGHAUL-GUEST-RAM", from, VERIFY_LIMIT))
        .and_then(|said| {
            consoles.wait_for("LONGHAUL-GUEST-VERIFIED", from, VERIFY_LIMIT)?;
            Ok(said)
        });
    report.guest_memory = Some(said.unwrap_or_else(|error| format!("bad: {error}")));
    // A guest that has crashed takes no more words; then nothing of it can be proved.
    let _ = consoles.say(end, "stop");
    let stopped = consoles.wait_for("LONGHAUL-GUEST-STOPPED", from, VERIFY_LIMIT);
    let monitor = stage.monitor(end);
    let off = wait_until(VERIFY_LIMIT, || (!monitor.is_connected()).then_some(()));
    if stopped.is_err() || off.is_none() {
        let stuck = consoles.hearing().said("LONGHAUL-GUEST-STUCK", from);
        let stuck = stuck.map_or(String::new(), |(_, who)| {
            format!(": stuck in an operation: {who}")
        });
        report.report.cause = Some(format!("the guest did not go off{stuck}"));
    }
    if off.is_none() {
        // Nothing is said of a disk that somebody still writes.
        if let Some(pid) = monitor.pid().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = kill_process(pid, Signal::KILL);
        }
        wait_until(VERIFY_LIMIT, || (!monitor.is_connected()).then_some(()));
    }
    watch(Moment::Step(
        "looking for every acknowledged record on its disk".to_owned(),
    ));
    let work = tempfile::tempdir_in(stage.lab.directory())?;
    let format = match end {
        End::Source => args.format.as_str(),
        End::Target => args.target_format(),
    };
    let raw = compare::as_raw(&stage.disk(end), format, &work.path().join("raw"))?;
    let acknowledged = stage.consoles.hearing().acknowledged().clone();
    let ended = if off.is_some() {
        Ended::Cleanly
    } else {
        Ended::PowerLoss
    };
    let seed = args.link.seed;
    let records = check(&raw, args.fs, work.path(), seed, &acknowledged, ended);
    let vars = settings::disk(stage.lab.directory(), end, 1);
    let spoilt = args.vars && std::fs::read(&vars)? != stage::vars();
    match records {
        Ok(records) => report.records = records,
        Err(error) => report.records.problems.push(error.to_string()),
    }
    if spoilt {
        let problem = "the store of firmware variables is not what it was".to_owned();
        report.records.problems.push(problem);
    }
    Ok(())
}
