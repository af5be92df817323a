//! The report of a live migration as a page for people.
//!
//! Owns words and columns. Leaves alone every figure: it shows what the report says.

use std::fmt::Write as _;

use super::verdict::LiveReport;
use crate::page::{bar, bits, size, span};

/// Width of the page, and how many decisions it shows.
const COLUMNS: usize = 80;
const DECISIONS_MAX: usize = 12;

/// The whole page.
pub fn page(live: &LiveReport) -> String {
    let mut page = String::new();
    let report = &live.report;
    heading(&mut page, "The guest");
    let beat = ms(live.heartbeat_before_ms);
    row(
        &mut page,
        "workload",
        format!(
            "{}, {} MiB of memory, seed {}",
            live.workload, live.ram_mib, live.seed
        ),
    );
    row(
        &mut page,
        "its own longest silence",
        format!("{beat} before the migration"),
    );
    moved(&mut page, live);
    heading(&mut page, "What its users noticed");
    row(&mut page, "longest silence", ms(live.blackout_heartbeat_ms));
    if live.handover_heartbeat_ms.is_some() {
        row(
            &mut page,
            "silence at the handover",
            ms(live.handover_heartbeat_ms),
        );
    }
    row(&mut page, "stopped, as QEMU says", ms(live.blackout_qmp_ms));
    if live.predicted_blackout_ms.is_some() {
        row(&mut page, "forecast just before", ms(live.predicted_blackout_ms));
    }
    for interruption in &live.interruptions_ms {
        row(&mut page, "a handover given up", format!("{interruption:.0} ms"));
    }
    row(&mut page, "speed of its work", speed(live));
    heading(&mut page, "How it went");
    journey(&mut page, live);
    heading(&mut page, "What it took");
    for (name, part) in &report.programs {
        let memory = size(part.usage.peak_rss_bytes);
        let cpu = part.usage.cpu_seconds;
        let ends = if part.kills + part.deaths > 0 {
            format!("   killed {}, died {}", part.kills, part.deaths)
        } else {
            String::new()
        };
        row(
            &mut page,
            name,
            format!("{memory:>10}  memory at most {cpu:>7.1} s CPU{ends}"),
        );
    }
    heading(&mut page, "Proof");
    proof(&mut page, live);
    page
}

/// Where the bytes went: on the disk, in memory, on the wire.
fn moved(page: &mut String, live: &LiveReport) {
    let report = &live.report;
    if report.raw_bytes == 0 {
        return;
    }
    heading(page, "What had to be moved");
    let whole = report.raw_bytes + (live.ram_mib << 20);
    let mut share = |name: &str, bytes: u64| {
        let _ = writeln!(page, "  {name:<26}{:>10}  {}", size(bytes), bar(bytes, whole));
    };
    let job = &report.job["live"];
    let count = |name: &str| job[name].as_u64().unwrap_or(0);
    share("its disk", report.raw_bytes);
    share("  holes and zeros", report.hole_bytes + report.zero_bytes);
    share("  free, proven: left out", report.skipped_free_bytes);
    share(
        "  data in use",
        report.used_bytes.saturating_sub(report.zero_bytes),
    );
    share("  written meanwhile", count("dirty_bytes"));
    share("its memory", live.ram_mib << 20);
    share("  sent, with changes", count("ram_sent_bytes"));
    for (kind, words) in [
        ("reference", "known there: only named"),
        ("xor", "sent as a difference"),
        ("compressed", "compressed"),
        ("raw", "sent as it is"),
    ] {
        if let Some(bytes) = live.reduced_bytes.get(kind).filter(|bytes| **bytes > 0) {
            share(words, *bytes);
        }
    }
    let wire = live.link_bytes.map_or(report.wan_bytes, |(forth, _)| forth);
    share("on the wire, all of it", wire);
}

/// What was decided and when, cut to the page.
fn decided(page: &mut String, live: &LiveReport) {
    for decision in live.decisions.iter().take(DECISIONS_MAX) {
        // The figures behind the colon are in the report for programs.
        let (when, words) = decision.split_once(": ").unwrap_or(("", decision));
        let words = words.split(": ").next().unwrap_or(words);
        let mut line = format!("  {when:>8}  {words}");
        if line.len() > COLUMNS {
            line.truncate(line.floor_char_boundary(COLUMNS - 3));
            line.push_str("...");
        }
        let _ = writeln!(page, "{line}");
    }
    if live.decisions.len() > DECISIONS_MAX {
        let _ = writeln!(
            page,
            "            ... and {} more",
            live.decisions.len() - DECISIONS_MAX
        );
    }
}

fn journey(page: &mut String, live: &LiveReport) {
    let report = &live.report;
    row(page, "time", span(report.seconds));
    if let Some(link) = &report.link {
        let rate = bits(link.rate_bit_per_s as f64);
        let loss = if link.loss > 0.0 {
            format!(", {} % loss", link.loss * 100.0)
        } else {
            String::new()
        };
        row(
            page,
            "link",
            format!("{rate}, {:.0} ms round trip{loss}", link.rtt_ms),
        );
    }
    if let Some((forth, back)) = live.link_bytes {
        row(
            page,
            "on the link",
            format!("{}, and {} back", size(forth), size(back)),
        );
    }
    if let Some(rounds) = live.rounds {
        row(page, "rounds", rounds.to_string());
    }
    for (phase, ms) in &live.phases_ms {
        row(page, &format!("  {phase}"), format!("{:>9.0} ms", ms));
    }
    steps(page, live);
    decided(page, live);
}

/// The handover's steps, each with the time since the guest stood and what it took itself.
fn steps(page: &mut String, live: &LiveReport) {
    let (mut before, mut there) = (0, false);
    for (name, ms) in &live.steps_ms {
        if name == "round 0" {
            row(page, "  copy of the disks", format!("{ms:>9} ms"));
            continue;
        }
        // The target counts from its own first step.
        let name = match name.strip_prefix("at the target: ") {
            Some(name) => {
                if !std::mem::replace(&mut there, true) {
                    before = 0;
                    let _ = writeln!(page, "      at the target");
                }
                format!("      {name}")
            }
            None => format!("    {name}"),
        };
        let took = ms.saturating_sub(std::mem::replace(&mut before, *ms));
        let _ = writeln!(page, "  {name:<33}{ms:>6} ms  (+{took})");
    }
}

fn row(page: &mut String, name: &str, value: impl std::fmt::Display) {
    let _ = writeln!(page, "  {name:<26}{value}");
}

fn proof(page: &mut String, live: &LiveReport) {
    let report = &live.report;
    let _ = writeln!(page, "  the guest is run by       {}", live.owner);
    let memory = live.guest_memory.as_deref().unwrap_or("nobody could be asked");
    let _ = writeln!(page, "  its memory                {memory}");
    if let Some(both) = &live.memory_compared {
        let (mib, pages) = (both.bytes >> 20, both.differing_pages);
        let _ = writeln!(
            page,
            "  compared at the handover  {mib} MiB of it, {pages} pages differ"
        );
    }
    let records = &live.records;
    let _ = writeln!(
        page,
        "  records                   {} acknowledged, {} lost, {} torn; file system {}",
        records.acknowledged,
        records.lost,
        records.torn,
        if records.clean { "clean" } else { "NOT clean" }
    );
    for problem in &records.problems {
        let _ = writeln!(page, "    {problem}");
    }
    for left in &live.leftovers {
        let _ = writeln!(page, "  left behind               {left}");
    }
    for missing in &report.faults_missed {
        let _ = writeln!(page, "  did not happen            {missing}");
    }
    let verdict = match (report.ok, live.safe) {
        (true, _) => "The guest is at the other site, and nothing is missing.".to_owned(),
        (false, true) => format!(
            "Not moved, but safe: {}",
            report.cause.as_deref().unwrap_or("no reason was given")
        ),
        _ => format!(
            "FAILED: {}",
            report.cause.as_deref().unwrap_or("no reason was given")
        ),
    };
    let _ = writeln!(page, "\n{verdict}");
}

fn heading(page: &mut String, text: &str) {
    let _ = writeln!(page, "\n{text}");
}

fn ms(value: Option<f64>) -> String {
    value.map_or_else(|| "not seen".to_owned(), |value| format!("{value:.0} ms"))
}

fn speed(live: &LiveReport) -> String {
    let rate = |rate: Option<f64>| rate.map_or_else(|| "?".to_owned(), |rate| format!("{rate:.0}"));
    let share = live
        .guest_throughput_ratio
        .map_or_else(String::new, |ratio| format!(" ({:.0} %)", ratio * 100.0));
    format!(
        "{} a second before, {} during{share}, {} after",
        rate(live.guest_before_per_s),
        rate(live.guest_during_per_s),
        rate(live.guest_after_per_s)
    )
}
