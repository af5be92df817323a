//! `benches/RESULTS.md` and its pictures, from the results.
//!
//! Owns the order of the page and which pictures there are. Leaves alone figures and drawing. Promises that the same results
//! give the same page.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use super::contestant::{Case, Contestant};
use super::figures::Standing;
use super::machine::QUIET;
use super::notes;
use super::plan::{Cell, Wanted};
use super::plot::{Bar, Look, bars};
use super::profile::PROFILES;
use super::record::Record;
use super::table::{failures, inside, meeting, number, sharing};
use crate::micro::Micro;

/// A picture: file name and content.
type Picture = (String, String);

/// The page and its pictures.
#[derive(Clone, Debug)]
pub struct Page {
    pub text: String,
    pub pictures: Vec<Picture>,
}

/// What people add to the figures.
const NOTES: &str = "notes.md";

/// Writes the page to `folder`/RESULTS.md and its pictures to `folder`/results.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write(folder: &Path, records: &[Record], micro: &[Micro]) -> io::Result<()> {
    let results = folder.join("results");
    fs::create_dir_all(&results)?;
    let notes = fs::read_to_string(results.join(NOTES)).unwrap_or_default();
    let page = make(records, micro, &notes);
    fs::write(folder.join("RESULTS.md"), page.text)?;
    for (name, content) in page.pictures {
        fs::write(results.join(name), content)?;
    }
    Ok(())
}

/// Makes it. Pure.
pub fn make(records: &[Record], micro: &[Micro], notes: &str) -> Page {
    let mut page = Page {
        text: head(records),
        pictures: Vec::new(),
    };
    let _ = write!(page.text, "## Targets\n\n{}\n", notes::targets(records));
    if !notes.trim().is_empty() {
        let _ = write!(page.text, "{}\n\n", notes.trim());
    }
    for cell in Wanted::default().cells() {
        let standings = standings(records, cell);
        if standings.is_empty() {
            continue;
        }
        page.cell(cell, &standings);
    }
    page.across(records);
    let failed = failures(records);
    if !failed.is_empty() {
        let _ = write!(page.text, "## Runs that failed\n\n{failed}\n");
    }
    if !micro.is_empty() {
        let _ = write!(page.text, "## Parts\n\n{}", crate::micro::table(micro));
    }
    page.text.truncate(page.text.trim_end().len());
    page.text.push('\n');
    page
}

fn standings(records: &[Record], cell: Cell) -> Vec<Standing<'_>> {
    let all = Wanted::default().contestants(cell).into_iter();
    all.filter_map(|contestant| Standing::of(records, cell, contestant))
        .collect()
}

fn head(records: &[Record]) -> String {
    let mut text = String::from(
        "# Results\n\n\
         Made by `make bench-wan` from `results/runs.jsonl`, where each line is one finished run; `target/release/bench-wan report`\n\
         makes this page again from it. Do not edit: what people have to say stands in `results/notes.md`.\n\n\
         Same guest, same disk, same emulated link for all: 4 GiB ext4 with a used Debian, 692 MB in use and 1.1 GB of deleted\n\
         files; 1 vCPU, 512 MiB, QEMU under software emulation on the same cores as everything else. Contestants alternate. Figures\n\
         are medians over the number of runs in the last column. \"Times\" is the whole time against Longhaul's. \"Heartbeat gap\" is the longest\n\
         silence of a guest that speaks every 50 ms, \"guest at\" what it got done during the move, \"link full\" what\n\
         the link carried in the middle of it. \"CPU\" is all programs together, the guest's own work included. A contestant is given up\n\
         at six times Longhaul's time, and not tried again there. QEMU alone means: `blockdev-mirror` to the target's NBD server with holes skipped and\n\
         zeros found at the source, then RAM over TCP, unencrypted, pausing before the switchover, downtime limit 300 ms unless said otherwise; XBZRLE with a\n\
         cache of the guest's memory, multifd with four channels. Rivals' TCP runs BBR where the kernel has it, with buffers of 16 MiB.\n\n",
    );
    if records.is_empty() {
        text += "**No run of the benchmark is in the results yet.**\n";
    }
    let dates: BTreeSet<_> = records.iter().filter_map(|record| record.at.get(..10)).collect();
    if let (Some(first), Some(last)) = (dates.first(), dates.last()) {
        let _ = writeln!(text, "- measured: {first} to {last}, {} runs", records.len());
    }
    let mut setting: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (name, value) in records.iter().flat_map(|record| &record.setting) {
        setting.entry(name).or_default().insert(value);
    }
    for (name, values) in setting {
        let values: Vec<_> = values.into_iter().collect();
        let _ = writeln!(text, "- {name}: {}", values.join("; "));
    }
    let loads = records.iter().filter_map(|record| record.load_before);
    let busy: Vec<_> = loads.filter(|load| *load > QUIET).collect();
    if let Some(most) = busy.iter().copied().reduce(f64::max) {
        let _ = writeln!(
            text,
            "- **{} of {} runs began on a machine that had other work to do** (load up to {}): their times and pauses are longer\n  \
             than they would be, for all contestants but not by the same amount",
            busy.len(),
            records.len(),
            number(most)
        );
    }
    if records.iter().any(|record| !record.emulated) {
        text += "- **some runs had no emulated link**: they ran over loopback and say nothing of a WAN\n";
    }
    text.push('\n');
    text
}

impl Page {
    fn cell(&mut self, cell: Cell, standings: &[Standing<'_>]) {
        let title = format!("{}: {}", cell.profile.title, cell.case.title());
        if cell.case == Case::Beside {
            let _ = write!(self.text, "## {title}\n\n{}\n", sharing(standings));
            return;
        }
        let _ = write!(self.text, "## {title}\n\n{}\n", meeting(standings));
        if standings.len() > 1 {
            let stem = format!("{}-{}", cell.profile.name, cell.case.name());
            let seconds: fn(&Standing<'_>) -> Option<f64> = |one| one.seconds().or_else(|| one.given_up());
            self.picture(
                &format!("{stem}-time.svg"),
                &title,
                "whole time in seconds",
                standings,
                seconds,
            );
            self.picture(
                &format!("{stem}-bytes.svg"),
                &title,
                "MB on the WAN",
                standings,
                |one| Some(one.wan_bytes()? / 1e6),
            );
            if cell.case.is_live() {
                self.picture(
                    &format!("{stem}-gap.svg"),
                    &title,
                    "longest silence of the guest in ms",
                    standings,
                    |one| one.median(|record| record.heartbeat_gap_ms),
                );
            }
        }
        let own = standings
            .iter()
            .find(|standing| standing.contestant.is_longhaul());
        if let Some(typical) = own.and_then(Standing::typical) {
            let _ = write!(
                self.text,
                "Inside Longhaul's typical run:\n\n{}\n",
                inside(typical)
            );
        }
        if let Some(bytes) = own.and_then(|own| own.median(|record| Some(record.first_wan_bytes? as f64))) {
            let _ = write!(
                self.text,
                "The first VM took {} MB before.\n\n",
                number(bytes / 1e6)
            );
        }
    }

    fn picture(
        &mut self,
        file: &str,
        title: &str,
        note: &str,
        standings: &[Standing<'_>],
        of: impl Fn(&Standing<'_>) -> Option<f64>,
    ) {
        let rows: Vec<_> = standings.iter().filter_map(|one| row(one, &of)).collect();
        if rows.len() > 1 {
            let _ = write!(self.text, "![{note}](results/{file})\n\n");
            self.pictures.push((file.to_owned(), bars(title, note, &rows)));
        }
    }

    /// The mixed guest on every link that was measured.
    fn across(&mut self, records: &[Record]) {
        let mut rows = Vec::new();
        for profile in PROFILES {
            let cell = Cell {
                profile,
                case: Case::Live("mixed"),
            };
            let seconds = |one: &Standing<'_>| one.seconds().or_else(|| one.given_up());
            let found = standings(records, cell);
            let found = found.iter().filter(|one| !is_ablation(one.contestant));
            let found: Vec<_> = found.filter_map(|one| row(one, &seconds)).collect();
            if found.len() > 1 {
                rows.push(Bar {
                    label: profile.title.to_owned(),
                    value: 0.0,
                    shown: String::new(),
                    look: Look::Group,
                });
                rows.extend(found);
            }
        }
        if rows.iter().filter(|row| row.look == Look::Group).count() > 1 {
            let picture = bars("The mixed guest on every link", "whole time in seconds", &rows);
            self.text += "## All links\n\n![whole time in seconds](results/all-links.svg)\n\n";
            self.pictures.push(("all-links.svg".to_owned(), picture));
        }
    }
}

fn is_ablation(contestant: Contestant) -> bool {
    super::contestant::ABLATIONS.contains(&contestant)
}

fn row(standing: &Standing<'_>, of: &impl Fn(&Standing<'_>) -> Option<f64>) -> Option<Bar> {
    let contestant = standing.contestant;
    let label = contestant.title.to_owned();
    let unfinished = standing.well.is_empty();
    if unfinished {
        let seconds = standing.given_up()?;
        return Some(Bar {
            label,
            value: of(standing).unwrap_or_default(),
            shown: format!("not done after {} s", number(seconds)),
            look: Look::GivenUp,
        });
    }
    let value = of(standing)?;
    Some(Bar {
        label,
        value,
        shown: number(value),
        look: if contestant.is_longhaul() {
            Look::Own
        } else {
            Look::Other
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::record::{End, parse};

    fn line(profile: &str, contestant: &str, end: End, seconds: f64) -> Record {
        Record {
            profile: profile.to_owned(),
            case: "mixed".to_owned(),
            contestant: contestant.to_owned(),
            run: 1,
            at: "2026-11-28T09:00:00Z".to_owned(),
            end,
            seconds,
            wan_bytes: 290_000_000,
            heartbeat_gap_ms: Some(210.0),
            emulated: true,
            load_before: Some(seconds / 100.0),
            setting: [("qemu".to_owned(), "QEMU 7.2".to_owned())].into(),
            ..Record::default()
        }
    }

    #[test]
    fn the_page_shows_each_meeting_with_its_pictures_and_says_what_was_run() {
        let records = [
            line("100-80", "longhaul", End::Well, 25.0),
            line("100-80", "qemu-xbzrle", End::Well, 200.0),
            line("100-80", "longhaul-no-xor", End::Well, 40.0),
            line("50-100", "longhaul", End::Well, 50.0),
            line("50-100", "qemu-xbzrle", End::GivenUp, 300.0),
        ];
        let page = make(&records, &[], "A word on it.");
        assert!(page.text.contains("measured: 2026-11-28 to 2026-11-28, 5 runs"));
        assert!(
            page.text
                .contains("**2 of 5 runs began on a machine that had other work to do** (load up to 3.0)")
        );
        assert!(page.text.contains("- qemu: QEMU 7.2\n") && page.text.contains("A word on it."));
        assert!(
            page.text.contains("| without differences | 40.0 | 1.6 |"),
            "{}",
            page.text
        );
        assert!(page.text.contains("not done after 300"));
        for (name, picture) in &page.pictures {
            assert!(page.text.contains(&format!("(results/{name})")), "{name}");
            assert!(picture.starts_with("<svg"), "{name}");
        }
        let all = page
            .pictures
            .iter()
            .find(|(name, _)| name == "all-links.svg")
            .unwrap();
        assert!(
            !all.1.contains("without differences"),
            "ideas switched off are shown on the main link only"
        );
    }

    #[test]
    fn results_on_disk_are_made_into_a_page_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let text: String = [
            line("100-80", "longhaul", End::Well, 25.0),
            line("100-80", "qemu-plain", End::GivenUp, 150.0),
        ]
        .iter()
        .map(|record| serde_json::to_string(record).unwrap() + "\n")
        .collect();
        write(folder.path(), &parse(&text).unwrap(), &[]).unwrap();
        let page = fs::read_to_string(folder.path().join("RESULTS.md")).unwrap();
        let picture = "results/100-80-mixed-time.svg";
        assert!(page.contains(picture) && folder.path().join(picture).exists());
    }

    #[test]
    fn without_a_run_there_is_a_page_that_says_so() {
        let page = make(&[], &[], "");
        assert!(page.text.contains("No run of the benchmark") && page.text.contains("not measured"));
        assert!(page.pictures.is_empty());
    }
}
