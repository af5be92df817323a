//! A report as a page for people: 80 columns, colour only on a terminal that wants it.
//!
//! Owns words, columns and colours. Leaves alone every figure: it shows what the report says. Promises plain
//! text where output is no terminal or NO_COLOR is set.

use std::fmt::Write as _;
use std::io::IsTerminal;

use crate::guest::boot::Booted;
use crate::report::Report;

/// Width of the bars.
const BAR: usize = 30;

/// Whether to use colour.
#[derive(Clone, Copy, Debug)]
pub struct Paint(bool);

impl Paint {
    /// As standard output wants it.
    pub fn detect() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var("TERM").is_ok_and(|term| term == "dumb");
        Self(std::io::stdout().is_terminal() && !refused && !dumb)
    }

    /// Never.
    pub fn none() -> Self {
        Self(false)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    fn verdict(self, good: bool, text: &str) -> String {
        self.with(if good { "32" } else { "31;1" }, text)
    }
}

/// The whole page; `booted` is what the copy did when it was started.
pub fn page(report: &Report, booted: Option<&Booted>, paint: Paint) -> String {
    let mut page = String::new();
    heading(&mut page, paint, "What had to be moved");
    for (name, bytes) in shares(report) {
        let _ = writeln!(
            page,
            "  {name:<26}{:>10}  {}",
            size(bytes),
            bar(bytes, report.raw_bytes)
        );
    }
    heading(&mut page, paint, "How it went");
    for (name, value) in journey(report) {
        let _ = writeln!(page, "  {name:<26}{value}");
    }
    heading(&mut page, paint, "What it took");
    for (name, part) in &report.programs {
        let memory = size(part.usage.peak_rss_bytes);
        let ends = if part.kills + part.deaths > 0 {
            format!("   killed {}, died {}", part.kills, part.deaths)
        } else {
            String::new()
        };
        let _ = writeln!(
            page,
            "  {name:<26}{memory:>10}  memory at most {:>7.1} s CPU{ends}",
            part.usage.cpu_seconds
        );
    }
    heading(&mut page, paint, "Proof");
    proof(&mut page, report, booted, paint);
    page
}

fn heading(page: &mut String, paint: Paint, text: &str) {
    let _ = writeln!(page, "\n{}", paint.bold(text));
}

/// Where the bytes of the disk went.
fn shares(report: &Report) -> Vec<(String, u64)> {
    let mut shares = vec![("the whole disk".to_owned(), report.raw_bytes)];
    if report.skipped_by_proof.is_empty() {
        shares.push(("free, proven: skipped".to_owned(), report.skipped_free_bytes));
    }
    for (proof, bytes) in report.skipped_by_proof.iter().filter(|(_, bytes)| **bytes > 0) {
        shares.push((format!("free, proof {proof}"), *bytes));
    }
    shares.push((
        "holes and zeros".to_owned(),
        report.hole_bytes + report.zero_bytes,
    ));
    shares.push((
        "data in use".to_owned(),
        report.used_bytes.saturating_sub(report.zero_bytes),
    ));
    shares.push(("on the wire, compressed".to_owned(), report.wan_bytes));
    shares
}

fn journey(report: &Report) -> Vec<(&'static str, String)> {
    let mut lines = vec![("time", span(report.seconds))];
    let rate = report.link.as_ref().map_or(0, |link| link.rate_bit_per_s);
    if rate > 0 {
        let raw = report.raw_bytes as f64 * 8.0 / rate as f64;
        let times = raw / report.seconds.max(1e-3);
        lines.push((
            "sending the raw image",
            format!("{} at best: this was {times:.1} times as fast", span(raw)),
        ));
    }
    if let Some(link) = &report.link {
        let loss = if link.loss > 0.0 {
            format!(", {} % loss", link.loss * 100.0)
        } else {
            String::new()
        };
        lines.push((
            "link",
            format!("{}, {:.0} ms round trip{loss}", bits(rate as f64), link.rtt_ms),
        ));
        if let (Some(steady), Some(share)) = (link.steady_bit_per_s, link.steady_share) {
            lines.push((
                "link in use",
                format!("{}, {:.0} % of the rate", bits(steady), share * 100.0),
            ));
        }
    }
    if let Some(beside) = &report.beside {
        let (now, alone) = (bits(beside.beside_bit_per_s), bits(beside.alone_bit_per_s));
        let (kept, share) = (beside.kept * 100.0, beside.share * 100.0);
        lines.push((
            "a TCP flow beside it",
            format!("{}: {now} of {alone} alone, {kept:.0} %", beside.congestion),
        ));
        lines.push(("the job's part of the link", format!("{share:.0} %")));
    }
    lines.push(("data in use moved at", bits(report.goodput_bit_per_s)));
    if report.resent_bytes > 0 {
        lines.push(("sent again", size(report.resent_bytes)));
    }
    lines.extend(
        report
            .not_emulated
            .iter()
            .map(|missing| ("not emulated", missing.clone())),
    );
    lines.extend(
        report
            .faults_missed
            .iter()
            .map(|fault| ("did not happen", fault.clone())),
    );
    lines
}

fn proof(page: &mut String, report: &Report, booted: Option<&Booted>, paint: Paint) {
    let digests = !report.source_digest.is_empty() && report.source_digest == report.target_digest;
    let mut line = |good: bool, text: String| {
        let mark = paint.verdict(good, if good { "yes" } else { "NO " });
        let _ = writeln!(page, "  {mark}  {text}");
    };
    let short: String = report.source_digest.chars().take(16).collect();
    line(digests, format!("both agents state the same digest ({short}...)"));
    if let Some(compared) = &report.comparison {
        let oracle = if compared.oracle.is_empty() {
            "no oracle"
        } else {
            "dumpe2fs"
        };
        let free = size(compared.zeroed_free_bytes + compared.zeroed_unknown_bytes);
        line(
            compared.equal,
            format!("every block compared; {free} of old data left out ({oracle})"),
        );
    }
    if let Some(booted) = booted {
        let text = match booted.ok {
            true => format!(
                "the copy booted and proved {} of its files in {}",
                booted.files,
                span(booted.seconds)
            ),
            false => "the copy did not boot and prove its files".to_owned(),
        };
        line(booted.ok, text);
    }
    if let Some(cause) = &report.cause {
        let _ = writeln!(page, "\n  {}", paint.verdict(false, cause));
    }
}

/// A share of a whole, drawn.
pub(crate) fn bar(part: u64, whole: u64) -> String {
    let length = (part as f64 / whole.max(1) as f64 * BAR as f64).round() as usize;
    let length = if part > 0 { length.clamp(1, BAR) } else { 0 };
    format!(
        "{}{} {:>3.0} %",
        "#".repeat(length),
        ".".repeat(BAR - length),
        part as f64 * 100.0 / whole.max(1) as f64
    )
}

/// Decimal megabytes and gigabytes, as links count them.
pub fn size(bytes: u64) -> String {
    match bytes as f64 {
        value if value >= 1e9 => format!("{:.2} GB", value / 1e9),
        value if value >= 1e6 => format!("{:.1} MB", value / 1e6),
        value => format!("{:.1} kB", value / 1e3),
    }
}

/// A rate.
pub fn bits(rate: f64) -> String {
    if rate >= 1e9 {
        format!("{:.2} Gbit/s", rate / 1e9)
    } else {
        format!("{:.1} Mbit/s", rate / 1e6)
    }
}

/// A time.
pub fn span(seconds: f64) -> String {
    if seconds < 90.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{:.0} min {:02.0} s", (seconds / 60.0).floor(), seconds % 60.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::LinkReport;

    fn report() -> Report {
        let link = LinkReport {
            rate_bit_per_s: 100_000_000,
            rtt_ms: 80.0,
            steady_bit_per_s: Some(95e6),
            steady_share: Some(0.95),
            ..LinkReport::default()
        };
        Report {
            raw_bytes: 1 << 30,
            used_bytes: 200_000_000,
            skipped_free_bytes: 500_000_000,
            zero_bytes: 300_000_000,
            wan_bytes: 70_000_000,
            seconds: 7.5,
            source_digest: "ab".repeat(32),
            target_digest: "ab".repeat(32),
            link: Some(link),
            ..Report::default()
        }
    }

    #[test]
    fn the_page_fits_eighty_columns_and_is_plain() {
        let booted = Booted {
            ok: true,
            files: 4766,
            seconds: 9.7,
            console: Vec::new(),
        };
        let page = page(&report(), Some(&booted), Paint::none());
        assert!(page.is_ascii() && !page.contains('\x1b'));
        for line in page.lines() {
            assert!(line.len() <= 80, "{} columns: {line}", line.len());
        }
        for part in ["85.9 s at best", "11.5 times", "95 %", "4766", "70.0 MB"] {
            assert!(page.contains(part), "{part} in {page}");
        }
    }

    #[test]
    fn what_went_wrong_is_said() {
        let mut report = report();
        report.target_digest = "cd".to_owned();
        report.cause = Some("the agents' digests differ".to_owned());
        let page = page(&report, Some(&Booted::default()), Paint::none());
        assert!(
            page.contains("NO   both agents")
                && page.contains("digests differ")
                && page.contains("did not boot")
        );
    }
}
