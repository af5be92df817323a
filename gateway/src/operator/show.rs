//! What people read: status, plan, history, report.
//!
//! Owns words and columns; 80 columns are enough. Pure: values in, text out.

use std::fmt::Write;

use longhaul_common::units::{ByteSize, Rate};

use crate::api::Status;
use crate::job::plan::{LivePlan, Plan};
use crate::job::prepare::PreparedReport;
use crate::job::progress::JobState;
use crate::job::report::{DiskReport, Report};
use crate::store::JobRecord;

/// Bytes as people say them.
pub(super) fn bytes(count: u64) -> String {
    ByteSize(count).to_string()
}

fn per_cent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".to_owned(),
        whole => format!("{:.1} %", part as f64 * 100.0 / whole as f64),
    }
}

fn line(out: &mut String, name: &str, value: &str, rest: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "  {name:<22}{value:>12}  {rest}");
}

/// A state in one word.
pub(super) fn state(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Running => "running",
        JobState::Waiting => "waiting",
        JobState::Paused => "paused",
        JobState::Completed => "completed",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

/// A finished job.
pub(super) fn report(record: &JobRecord) -> String {
    let mut out = String::new();
    let Some(report) = record
        .report
        .as_ref()
        .filter(|_| record.state == JobState::Completed)
    else {
        let why = record.message.as_deref().unwrap_or("no reason was given");
        let _ = writeln!(out, "{} is {}: {why}", record.spec.name, state(record.state));
        if record.state == JobState::Failed {
            let _ = writeln!(out, "Mend the cause, then: longhaul resume {}", &record.id[..8]);
        }
        return out;
    };
    let _ = writeln!(
        out,
        "{} has arrived at site {}.\n",
        record.spec.name, record.spec.target.site
    );
    sizes(&mut out, report);
    if let Some(live) = &report.live {
        let foretold = format!("{} ms were foretold", live.predicted_blackout_ms);
        line(
            &mut out,
            "pause of the VM",
            &format!("{} ms", live.blackout_ms),
            &foretold,
        );
        let rounds = format!("{} rounds after the first", live.rounds);
        line(&mut out, "written meanwhile", &bytes(live.dirty_bytes), &rounds);
        let stream = bytes(live.ram_stream_bytes);
        line(
            &mut out,
            "RAM, on the WAN",
            &bytes(live.ram_wan_bytes),
            &format!("of a stream of {stream}"),
        );
    }
    let _ = writeln!(out);
    for disk in &report.disks {
        disk_lines(&mut out, disk);
    }
    let equal = if report.equal {
        "source and target are equal"
    } else {
        "SOURCE AND TARGET DIFFER"
    };
    let _ = writeln!(out, "\n  {equal}: {}", report.target_digest);
    if let Some(hook) = &report.hook {
        let _ = writeln!(out, "  The VM has arrived, but {hook}.");
    }
    for note in &report.notes {
        let _ = writeln!(out, "  Note: {note}.");
    }
    out
}

fn sizes(out: &mut String, report: &Report) {
    let raw = report.raw_bytes;
    let share = |part| per_cent(part, raw);
    line(out, "size of the disks", &bytes(raw), "");
    line(out, "holes", &bytes(report.hole_bytes), &share(report.hole_bytes));
    line(
        out,
        "free, left behind",
        &bytes(report.skipped_free_bytes),
        &share(report.skipped_free_bytes),
    );
    line(out, "zeros", &bytes(report.zero_bytes), &share(report.zero_bytes));
    line(
        out,
        "sent, raw",
        &bytes(report.sent_raw_bytes),
        &share(report.sent_raw_bytes),
    );
    line(
        out,
        "sent, on the WAN",
        &bytes(report.wan_bytes),
        &share(report.wan_bytes),
    );
    if report.resent_bytes > 0 {
        line(
            out,
            "of it sent again",
            &bytes(report.resent_bytes),
            "after a program or a link was lost",
        );
    }
    let pace = format!("{} of raw data", Rate(report.goodput_bit_per_s));
    line(out, "time", &format!("{:.1} s", report.seconds), &pace);
    let stages: Vec<_> = report
        .stages_ms
        .iter()
        .map(|(name, ms)| format!("{name} {:.1} s", *ms as f64 / 1e3))
        .collect();
    let _ = writeln!(out, "  {}", stages.join(", "));
    if report.attempts > 1 {
        let _ = writeln!(
            out,
            "  {} attempts, {} packets lost on the WAN",
            report.attempts, report.wan_lost_packets
        );
    }
}

fn disk_lines(out: &mut String, disk: &DiskReport) {
    let _ = writeln!(out, "  {} ({}) -> {}", disk.source, disk.format, disk.target);
    for part in &disk.parts {
        match (&part.proof, &part.reason) {
            (Some(proof), _) => {
                let skipped = bytes(part.skipped_free_bytes);
                let _ = writeln!(out, "    {}: {skipped} free, proof: {proof}", part.name);
            }
            (None, Some(reason)) => {
                let _ = writeln!(out, "    {}: copied whole, {reason}", part.name);
            }
            (None, None) => {
                let _ = writeln!(out, "    {}: copied whole", part.name);
            }
        }
    }
}

/// What a run would do.
pub(super) fn plan(plan: &Plan) -> String {
    let mut out = String::new();
    let share = |part| per_cent(part, plan.raw_bytes);
    if !plan.disks.is_empty() {
        line(&mut out, "size of the disks", &bytes(plan.raw_bytes), "");
        line(
            &mut out,
            "holes",
            &bytes(plan.hole_bytes),
            &share(plan.hole_bytes),
        );
        line(
            &mut out,
            "free, stays behind",
            &bytes(plan.skipped_free_bytes),
            &share(plan.skipped_free_bytes),
        );
        line(
            &mut out,
            "to be read",
            &bytes(plan.used_bytes),
            &share(plan.used_bytes),
        );
        let (least, most) = plan.wan_bytes;
        let _ = writeln!(out, "  on the WAN: {} to {}", bytes(least), bytes(most));
        match plan.seconds {
            Some((least, most)) => {
                let _ = writeln!(
                    out,
                    "  time at the configured rate: {} to {}",
                    span(least),
                    span(most)
                );
            }
            None => out.push_str("  time: unknown, the link to the site has no configured rate\n"),
        }
        if let Some(live) = &plan.live {
            live_plan(&mut out, live);
        }
        for disk in &plan.disks {
            disk_lines(&mut out, disk);
        }
    }
    for note in &plan.notes {
        let _ = writeln!(out, "  Note: {note}.");
    }
    for problem in &plan.problems {
        let _ = writeln!(out, "  Problem: {problem}");
    }
    out.push_str(match (plan.ready, plan.is_hopeless()) {
        (true, false) => "Ready to run.\n",
        (true, true) => "It would begin, but not come to its end.\n",
        (false, _) => "Not ready.\n",
    });
    out
}

/// What following a running VM would take.
fn live_plan(out: &mut String, live: &LivePlan) {
    let rate = |per_s: u64| format!("{}/s", bytes(per_s));
    let disks: u64 = live.disks_dirty_bytes_per_s.iter().sum();
    let ram = live
        .ram_dirty_bytes_per_s
        .map_or_else(|| "unknown".to_owned(), rate);
    let sampled = format!("sampled for {:.1} s", live.sampled_ms as f64 / 1e3);
    let _ = writeln!(out, "  the VM while it runs");
    line(out, "RAM", &bytes(live.ram_bytes), "");
    line(out, "disks change", &rate(disks), &sampled);
    line(out, "RAM changes", &ram, &sampled);
    let rtt = format!("round trip {:.0} ms", live.rtt_ms);
    match (live.link_bit_per_s, &live.link_known_by) {
        (Some(rate), Some(by)) => {
            line(out, "link", &Rate(rate).to_string(), &format!("{by}, {rtt}"));
            let passes = format!(
                "{} rounds of the disks, {} passes over RAM",
                live.rounds, live.passes
            );
            line(
                out,
                "expected on the WAN",
                &bytes(live.wan_bytes),
                "disks and RAM",
            );
            line(out, "expected time", &span(live.time_ms.div_ceil(1000)), &passes);
            let blackout = format!("{} ms", live.blackout_ms);
            line(
                out,
                "expected pause",
                &blackout,
                &format!("{} ms allowed", live.blackout_allowed_ms),
            );
        }
        _ => line(out, "link", "unknown", &rtt),
    }
    let _ = writeln!(out, "  Verdict: {}.", live.verdict);
}

/// Seconds as people say them.
pub(super) fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// The gateway at one moment.
pub(super) fn status(status: &Status) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{} (version {})", status.identity, status.version);
    let agents = if status.agents.is_empty() {
        "none".to_owned()
    } else {
        status.agents.join(", ")
    };
    let _ = writeln!(out, "agents: {agents}");
    for peer in &status.peers {
        match &peer.problem {
            Some(problem) => {
                let _ = writeln!(out, "site {}: not linked: {problem}", peer.site);
            }
            None => {
                let (connections, rtt) = (peer.connections, peer.rtt_ms);
                let level = |lane: &str| peer.levels.get(lane).map_or("-", String::as_str);
                let _ = writeln!(
                    out,
                    "site {}: {connections} connections, round trip {rtt} ms; disks are reduced with {}, changes with {}, memory with {}",
                    peer.site,
                    level("bulk"),
                    level("dirty"),
                    level("ram"),
                );
            }
        }
    }
    for vm in &status.prepared {
        out.push_str(&prepared(vm));
    }
    out.push('\n');
    out.push_str(&history(&status.jobs));
    out
}

/// A VM that is prepared for a run.
pub(super) fn prepared(vm: &PreparedReport) -> String {
    let age = vm.age_seconds.map_or_else(
        || "not seen to run".to_owned(),
        |seconds| format!("for {}", span(seconds)),
    );
    let written = vm
        .dirty_bytes
        .map(|count| format!(", {} written since", bytes(count)));
    let mut out = format!(
        "prepared: {} at {} ({} disks), {age}{}\n",
        vm.name,
        vm.agent,
        vm.disks,
        written.unwrap_or_default()
    );
    for note in &vm.notes {
        let _ = writeln!(out, "  Note: {note}.");
    }
    out
}

/// Jobs, one line each.
pub(super) fn history(jobs: &[JobRecord]) -> String {
    let mut out = format!(
        "{:<9} {:<20} {:<10} {:>7} {:>11}  {}\n",
        "JOB", "NAME", "STATE", "DONE", "WAN", ""
    );
    for job in jobs {
        let progress = &job.progress;
        let done = match job.state {
            JobState::Completed => "100 %".to_owned(),
            _ => per_cent(progress.done_bytes, progress.used_bytes),
        };
        let wan = bytes(
            job.report
                .as_ref()
                .map_or(progress.wan_bytes, |report| report.wan_bytes),
        );
        let message = job
            .message
            .as_deref()
            .or(progress.message.as_deref())
            .unwrap_or("");
        let (id, state) = (&job.id[..job.id.len().min(8)], state(job.state));
        let _ = writeln!(
            out,
            "{id:<9} {:<20} {state:<10} {done:>7} {wan:>11}  {message}",
            job.spec.name
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned() -> Plan {
        Plan {
            ready: true,
            raw_bytes: 4 << 30,
            used_bytes: 700 << 20,
            disks: vec![DiskReport::default()],
            live: Some(LivePlan {
                ram_bytes: 512 << 20,
                disks_dirty_bytes_per_s: vec![1 << 20, 1 << 20],
                ram_dirty_bytes_per_s: Some(5 << 20),
                sampled_ms: 3040,
                link_bit_per_s: Some(100_000_000),
                link_known_by: Some("measured".to_owned()),
                rtt_ms: 80.0,
                wan_bytes: 500 << 20,
                time_ms: 44_100,
                rounds: 4,
                passes: 3,
                blackout_ms: 240,
                blackout_allowed_ms: 300,
                converges: Some(true),
                verdict: "will converge: it does".to_owned(),
            }),
            ..Plan::default()
        }
    }

    #[test]
    fn a_plan_of_a_running_vm_says_how_it_changes_and_whether_it_ends() {
        let said = plan(&planned());
        for words in [
            "2 MiB/s",
            "5 MiB/s",
            "sampled for 3.0 s",
            "100 Mbit/s",
            "measured, round trip 80 ms",
            "4 rounds of the disks, 3 passes over RAM",
            "45 s",
            "240 ms",
            "300 ms allowed",
            "Verdict: will converge: it does.",
            "Ready to run.",
        ] {
            assert!(said.contains(words), "'{words}' is not in:\n{said}");
        }
    }

    #[test]
    fn what_is_not_known_and_what_is_hopeless_are_said() {
        let mut unknown = planned();
        if let Some(live) = &mut unknown.live {
            (live.link_bit_per_s, live.link_known_by) = (None, None);
            (live.ram_dirty_bytes_per_s, live.converges) = (None, None);
        }
        let said = plan(&unknown);
        assert!(said.contains("RAM changes") && said.contains("unknown"), "{said}");
        assert!(
            !said.contains("240 ms") && said.contains("Ready to run."),
            "{said}"
        );
        let mut hopeless = planned();
        if let Some(live) = &mut hopeless.live {
            live.converges = Some(false);
        }
        assert!(plan(&hopeless).ends_with("It would begin, but not come to its end.\n"));
    }
}
