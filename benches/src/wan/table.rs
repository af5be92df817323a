//! Figures as Markdown tables.
//!
//! Owns columns and how a figure is written. Leaves alone the page around. Promises that a contestant which never ended well
//! shows why, and not a figure.

use std::fmt::Write as _;

use super::figures::Standing;
use super::record::{End, Record};

/// One decimal below a hundred, none above.
pub fn number(value: f64) -> String {
    if value.abs() < 100.0 {
        format!("{value:.1}")
    } else {
        grouped(value.round() as i64)
    }
}

fn grouped(value: i64) -> String {
    let digits = value.abs().to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0 { format!("-{text}") } else { text }
}

fn shown(value: Option<f64>, factor: f64) -> String {
    value.map_or_else(|| "-".to_owned(), |value| number(value * factor))
}

fn percent(part: Option<f64>) -> String {
    part.map_or_else(|| "-".to_owned(), |part| format!("{:.0} %", part * 100.0))
}

/// Those who met in a cell, as a table; the first is what the others are held against.
pub fn meeting(standings: &[Standing<'_>]) -> String {
    let mut text = String::from(
        "| who | total s | times | WAN MB | heartbeat gap ms | pause by QMP ms | guest at | link full | CPU s | runs |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    let base = standings.first().and_then(Standing::seconds);
    for standing in standings {
        text += &row(standing, base);
    }
    text
}

fn row(standing: &Standing<'_>, base: Option<f64>) -> String {
    let title = standing.contestant.title;
    let Some(seconds) = standing.seconds() else {
        let why = why(standing);
        return format!(
            "| {title} | {why} | - | - | - | - | - | - | - | 0 of {} |\n",
            standing.badly.len()
        );
    };
    let times = base.map(|base| seconds / base);
    format!(
        "| {title} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
        number(seconds),
        shown(times, 1.0),
        shown(standing.wan_bytes(), 1e-6),
        shown(standing.median(|record| record.heartbeat_gap_ms), 1.0),
        shown(standing.median(|record| record.blackout_qmp_ms), 1.0),
        percent(standing.median(|record| record.guest_throughput)),
        percent(standing.median(|record| record.link_share)),
        shown(
            standing.median(|record| Some(record.cpu_seconds.values().sum())),
            1.0
        ),
        runs(standing),
    )
}

fn runs(standing: &Standing<'_>) -> String {
    let (well, all) = (standing.well.len(), standing.well.len() + standing.badly.len());
    if well == all {
        well.to_string()
    } else {
        format!("{well} of {all}")
    }
}

fn why(standing: &Standing<'_>) -> String {
    if let Some(seconds) = standing.given_up() {
        let sent = standing.badly.iter().map(|record| record.wan_bytes).max();
        let sent = sent.map_or(0.0, |bytes| bytes as f64 / 1e6);
        return format!("not done after {} ({} MB)", number(seconds), number(sent));
    }
    "failed".to_owned()
}

/// What TCP flows got beside Longhaul, as a table.
pub fn sharing(standings: &[Standing<'_>]) -> String {
    let mut text = String::from(
        "| mode | flow alone Mbit/s | flow keeps | Longhaul's part of the link | total s | runs |\n\
         |---|---:|---:|---:|---:|---:|\n",
    );
    for standing in standings {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            standing.contestant.title,
            shown(standing.median(|record| record.beside_alone_bit_per_s), 1e-6),
            percent(standing.median(|record| record.beside_kept)),
            percent(standing.median(|record| record.beside_share)),
            shown(standing.seconds(), 1.0),
            runs(standing),
        );
    }
    text
}

/// Runs that failed, each with its cause; empty where there was none.
pub fn failures(records: &[Record]) -> String {
    let mut text = String::new();
    for record in records.iter().filter(|record| record.end == End::Failed) {
        let cause = record.cause.as_deref().unwrap_or("no reason was given");
        let _ = writeln!(
            text,
            "- {} {} {}, run {}: {}",
            record.profile,
            record.case,
            record.contestant,
            record.run,
            cause.lines().next().unwrap_or_default()
        );
    }
    text
}

/// Where one run's time, bytes and CPU went.
pub fn inside(record: &Record) -> String {
    let list = |pairs: Vec<(String, String)>| {
        let words: Vec<_> = pairs
            .into_iter()
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        words.join(", ")
    };
    let seconds = record.phases_ms.iter();
    let mut phases: Vec<_> = seconds
        .map(|(name, ms)| (name.clone(), format!("{:.1} s", ms / 1e3)))
        .collect();
    phases.retain(|(_, value)| value != "0.0 s");
    let bytes = record.reduced_bytes.iter();
    let bytes = bytes.map(|(name, bytes)| (name.clone(), format!("{} MB", number(*bytes as f64 / 1e6))));
    let cpu = record.cpu_seconds.iter();
    let cpu = cpu.map(|(name, seconds)| (name.clone(), format!("{seconds:.1} s")));
    let memory = record.peak_rss_bytes.iter();
    let memory =
        memory.map(|(name, bytes)| (name.clone(), format!("{:.0} MiB", *bytes as f64 / 1_048_576.0)));
    let parts = [
        ("phases", phases),
        ("raw data by what became of it", bytes.collect()),
        ("CPU", cpu.collect()),
        ("peak memory", memory.collect()),
    ];
    let mut text = String::new();
    for (name, part) in parts {
        if !part.is_empty() {
            let _ = writeln!(text, "- {name}: {}", list(part));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::contestant::{LONGHAUL, QEMU};

    fn record(end: End, seconds: f64) -> Record {
        Record {
            end,
            seconds,
            wan_bytes: 2_095_000_000,
            heartbeat_gap_ms: Some(2090.0),
            ..Record::default()
        }
    }

    #[test]
    fn figures_are_written_as_they_are_read() {
        assert_eq!(number(2.345), "2.3");
        assert_eq!(number(1234.5), "1,235");
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(number(-1234.0), "-1,234");
    }

    #[test]
    fn the_slower_are_told_by_how_much_and_the_unfinished_why() {
        let (good, slow, bad) = (
            record(End::Well, 25.0),
            record(End::Well, 176.0),
            record(End::GivenUp, 150.0),
        );
        let of = |contestant, well: Vec<_>, badly: Vec<_>| Standing {
            contestant,
            well,
            badly,
        };
        let table = meeting(&[
            of(LONGHAUL, vec![&good], vec![]),
            of(QEMU[0], vec![&slow], vec![&bad]),
            of(QEMU[2], vec![], vec![&bad]),
        ]);
        let lines: Vec<_> = table.lines().collect();
        assert!(
            lines[3].starts_with("| QEMU, multifd zstd | 176 | 7.0 | 2,095 | 2,090 |"),
            "{}",
            lines[3]
        );
        assert!(lines[3].ends_with("| 1 of 2 |"));
        assert!(lines[4].contains("not done after 150 (2,095 MB)") && lines[4].ends_with("| 0 of 1 |"));
        let columns = |line: &str| line.matches('|').count();
        assert!(
            lines.iter().all(|line| columns(line) == columns(lines[0])),
            "{table}"
        );
    }

    #[test]
    fn failures_are_listed_with_their_cause() {
        let mut failed = record(End::Failed, 1.0);
        failed.cause = Some("no space\nand more".to_owned());
        let text = failures(&[record(End::Well, 1.0), failed, record(End::GivenUp, 1.0)]);
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains("no space") && !text.contains("and more"));
    }
}
