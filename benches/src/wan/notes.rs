//! What must be reached, and whether it is.
//!
//! Owns the targets as numbers and their judgement on the results. Leaves alone why one is missed: that is written by people,
//! in `benches/results/notes.md`. Promises that a target which nothing was measured for says so.

use super::contestant::{Case, Contestant, LONGHAUL, NEIGHBOURS, QEMU, TOOLS};
use super::figures::Standing;
use super::plan::Cell;
use super::profile::{MAIN, Profile};
use super::record::Record;
use super::table::number;

/// A target, what was measured, and whether that reaches it.
struct Target {
    what: String,
    wanted: String,
    measured: Option<(f64, bool)>,
    unit: &'static str,
    /// Why there is nothing to measure by.
    none: &'static str,
}

/// Nobody has run it.
const NOT_MEASURED: &str = "not measured";

/// The table of all targets.
pub fn targets(records: &[Record]) -> String {
    let mut text = String::from("| target | wanted | measured | |\n|---|---|---:|---|\n");
    for target in all(records) {
        let (measured, word) = match target.measured {
            None => ("-".to_owned(), target.none),
            Some((value, reached)) => {
                let word = if reached { "reached" } else { "**missed**" };
                (format!("{} {}", number(value), target.unit), word)
            }
        };
        text += &format!("| {} | {} | {measured} | {word} |\n", target.what, target.wanted);
    }
    text
}

fn all(records: &[Record]) -> Vec<Target> {
    let mut all = Vec::new();
    let mixed = Case::Live("mixed");
    let mut most =
        |profile: &str, what: &str, unit, wanted: f64, of: &dyn Fn(&Standing<'_>) -> Option<f64>| {
            let profile = Profile::named(profile);
            let value = profile.and_then(|profile| of(&longhaul(records, profile, mixed)?));
            all.push(Target {
                what: format!("{what}, {}", profile.map_or("", |profile| profile.title)),
                wanted: format!("at most {} {unit}", number(wanted)),
                measured: value.map(|value| (value, value <= wanted)),
                unit,
                none: NOT_MEASURED,
            });
        };
    most(MAIN, "whole time", "s", 30.0, &|own| own.seconds());
    most(MAIN, "bytes on the WAN", "MB", 300.0, &|own| {
        Some(own.wan_bytes()? / 1e6)
    });
    most(MAIN, "heartbeat gap", "ms", 250.0, &|own| {
        own.median(|record| record.heartbeat_gap_ms)
    });
    most("50-100", "whole time", "s", 60.0, &|own| own.seconds());
    all.extend(beside_others(records));
    let limited = || {
        super::profile::PROFILES
            .into_iter()
            .filter(|one| one.rate.is_some())
    };
    all.extend(limited().map(|profile| full(records, profile, Case::Noise)));
    all.extend(limited().map(|profile| full(records, profile, mixed)));
    all.push(part(
        records,
        "second VM of a template, of the bytes of the first",
        12.0,
        Case::Template,
        &|record| Some(record.wan_bytes as f64 / record.first_wan_bytes? as f64),
    ));
    all.push(part(
        records,
        "going straight back, of the bytes of the way there",
        2.0,
        Case::Back,
        &|record| Some(record.back_wan_bytes? as f64 / record.wan_bytes as f64),
    ));
    all.push(part(
        records,
        "pages and blocks sent again after small writes, of their raw size",
        3.0,
        mixed,
        &|record| Some(record.rewritten_payload_bytes? as f64 / record.rewritten_bytes? as f64),
    ));
    all.extend(NEIGHBOURS.into_iter().filter_map(|mode| neighbour(records, mode)));
    all
}

/// Against whoever else was given the same to do.
fn beside_others(records: &[Record]) -> Vec<Target> {
    let mixed = Case::Live("mixed");
    let mut all = Vec::new();
    for (profile, times) in [
        ("20-200", 5.0),
        ("50-100", 5.0),
        ("100-300", 5.0),
        (MAIN, 5.0),
        ("200-40", 3.0),
        ("250-2", 1.3),
        ("veth", 1.0),
    ] {
        let profile = Profile::named(profile);
        all.extend(profile.map(|profile| faster(records, Cell { profile, case: mixed }, &QEMU, times)));
    }
    let others = ["idle", "redis", "fsync"].map(Case::Live);
    let other_cells = || {
        let profiles = [MAIN, "50-100"].into_iter().filter_map(Profile::named);
        profiles.flat_map(|profile| others.map(|case| Cell { profile, case }))
    };
    all.extend(other_cells().map(|cell| faster(records, cell, &QEMU, 5.0)));
    let cold = |profile| {
        let case = Case::Cold;
        faster(records, Cell { profile, case }, &TOOLS, 5.0)
    };
    all.extend(Profile::named(MAIN).map(cold));
    let mixed_cells = super::profile::PROFILES
        .into_iter()
        .map(|profile| Cell { profile, case: mixed });
    all.extend(
        mixed_cells
            .chain(other_cells())
            .map(|cell| shorter(records, cell)),
    );
    all
}

fn longhaul(records: &[Record], profile: Profile, case: Case) -> Option<Standing<'_>> {
    Standing::of(records, Cell { profile, case }, LONGHAUL)
}

fn rivals<'a>(records: &'a [Record], cell: Cell, rivals: &[Contestant]) -> Vec<Standing<'a>> {
    rivals
        .iter()
        .filter_map(|rival| Standing::of(records, cell, *rival))
        .collect()
}

/// Link and guest, as they are told.
fn title(cell: Cell) -> String {
    format!("{}, {}", cell.profile.title, cell.case.title())
}

/// How many times faster than the best rival that finishes; where none does, than what the longest was given.
fn faster(records: &[Record], cell: Cell, against: &[Contestant], wanted: f64) -> Target {
    let rivals = rivals(records, cell, against);
    let own = longhaul(records, cell.profile, cell.case).and_then(|own| own.seconds());
    let best = rivals.iter().filter_map(Standing::seconds).reduce(f64::min);
    let waited = rivals.iter().filter_map(Standing::given_up).reduce(f64::max);
    let measured = own.zip(best.or(waited)).map(|(own, best)| best / own);
    let what = match (cell.case, best.is_none() && waited.is_some()) {
        (Case::Cold, false) => "faster than the best other tool",
        (_, false) => "faster than QEMU's best",
        (_, true) => "faster than what others were given, and did not end in",
    };
    Target {
        what: format!("{what}, {}", title(cell)),
        wanted: format!("at least {wanted} times"),
        measured: measured.map(|times| (times, times >= wanted)),
        unit: "times",
        none: NOT_MEASURED,
    }
}

/// Longhaul's heartbeat gap as a part of the rivals' shortest.
fn shorter(records: &[Record], cell: Cell) -> Target {
    let gap = |standing: &Standing<'_>| standing.median(|record| record.heartbeat_gap_ms);
    let own = longhaul(records, cell.profile, cell.case).and_then(|own| gap(&own));
    let rivals = rivals(records, cell, &QEMU);
    let best = rivals.iter().filter_map(gap).reduce(f64::min);
    Target {
        what: format!("heartbeat gap against the shortest of QEMU's, {}", title(cell)),
        wanted: "less than 100 %".to_owned(),
        measured: own.zip(best).map(|(own, best)| (own / best * 100.0, own < best)),
        unit: "%",
        none: if rivals.is_empty() {
            NOT_MEASURED
        } else {
            "none of QEMU's ended"
        },
    }
}

/// How full the link is in the middle of a run: with headers on both sides of the division. With noise this is what the link allows; with
/// a running guest, the processors and its round trips say a word too.
fn full(records: &[Record], profile: Profile, case: Case) -> Target {
    let wanted = if profile.name == "100-300" { 85.0 } else { 93.0 };
    let own = longhaul(records, profile, case);
    let share = own.and_then(|own| own.median(|record| record.link_share));
    Target {
        what: format!("link full, {}, {}", case.title(), profile.title),
        wanted: format!("at least {wanted} %"),
        measured: share.map(|share| (share * 100.0, share * 100.0 >= wanted)),
        unit: "%",
        none: NOT_MEASURED,
    }
}

/// A part in every run that must not be larger than so many percent.
fn part(
    records: &[Record],
    what: &str,
    most: f64,
    case: Case,
    of: &dyn Fn(&Record) -> Option<f64>,
) -> Target {
    let own = Profile::named(MAIN).and_then(|profile| longhaul(records, profile, case));
    let part = own.and_then(|own| own.median(of));
    Target {
        what: what.to_owned(),
        wanted: format!("at most {most} %"),
        measured: part.map(|part| (part * 100.0, part * 100.0 <= most)),
        unit: "%",
        none: NOT_MEASURED,
    }
}

/// What a TCP flow keeps beside `background`, and what `shared` takes of the link beside one.
fn neighbour(records: &[Record], mode: Contestant) -> Option<Target> {
    let profile = Profile::named(MAIN)?;
    let case = Case::Beside;
    let standing = Standing::of(records, Cell { profile, case }, mode);
    let (what, wanted, value, range) = if mode.name.starts_with("background") {
        let kept = standing.and_then(|one| one.median(|record| record.beside_kept));
        ("what a TCP flow keeps", "at least 90 %", kept, 0.9..=f64::MAX)
    } else {
        let share = standing.and_then(|one| one.median(|record| record.beside_share));
        ("Longhaul's part of the link", "35 to 65 %", share, 0.35..=0.65)
    };
    Some(Target {
        what: format!("{what}, {}", mode.title),
        wanted: wanted.to_owned(),
        measured: value.map(|part| (part * 100.0, range.contains(&part))),
        unit: "%",
        none: NOT_MEASURED,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::record::End;

    fn record(contestant: &str, end: End, seconds: f64) -> Record {
        Record {
            profile: MAIN.to_owned(),
            case: "mixed".to_owned(),
            contestant: contestant.to_owned(),
            end,
            seconds,
            wan_bytes: 310_000_000,
            heartbeat_gap_ms: Some(200.0),
            ..Record::default()
        }
    }

    #[test]
    fn each_target_is_reached_missed_or_not_measured() {
        let records = [
            record("longhaul", End::Well, 25.0),
            record("qemu-xbzrle", End::Well, 200.0),
            record("qemu-plain", End::GivenUp, 150.0),
        ];
        let text = targets(&records);
        let line = |what: &str| text.lines().find(|line| line.contains(what)).unwrap_or_default();
        assert!(line("whole time, 100").contains("25.0 s | reached"), "{text}");
        assert!(
            line("bytes on the WAN, 100").contains("310 MB | **missed**"),
            "{text}"
        );
        assert!(line("whole time, 50").contains("- | not measured"), "{text}");
        assert!(
            line("faster than QEMU's best, 100 Mbit/s, 80").contains("8.0 times | reached"),
            "{text}"
        );
        // Equal is not shorter.
        assert!(
            line("shortest of QEMU's, 100 Mbit/s, 80").contains("100 % | **missed**"),
            "{text}"
        );
    }

    #[test]
    fn a_neighbour_is_judged_by_what_it_keeps_and_a_sharer_by_what_it_takes() {
        let beside = |contestant: &str, kept, share| Record {
            case: "beside".to_owned(),
            beside_kept: Some(kept),
            beside_share: Some(share),
            ..record(contestant, End::Well, 25.0)
        };
        let records = [
            beside("background-bbr", 0.93, 0.05),
            beside("background-cubic", 0.85, 0.2),
            beside("shared-bbr", 0.3, 0.7),
            beside("shared-cubic", 0.5, 0.5),
        ];
        let text = targets(&records);
        for (what, word) in [
            ("keeps, background, beside BBR", "93.0 % | reached"),
            ("keeps, background, beside Cubic", "85.0 % | **missed**"),
            ("the link, shared, beside BBR", "70.0 % | **missed**"),
            ("the link, shared, beside Cubic", "50.0 % | reached"),
        ] {
            let line = text.lines().find(|line| line.contains(what)).unwrap_or_default();
            assert!(line.contains(word), "{line}");
        }
    }

    #[test]
    fn where_no_rival_ends_the_time_that_it_was_given_counts() {
        let records = [
            record("longhaul", End::Well, 25.0),
            record("qemu-plain", End::GivenUp, 150.0),
        ];
        let text = targets(&records);
        let ended = "did not end in, 100 Mbit/s, 80 ms, running guest, mixed workload | at least 5 times | 6.0 times | reached";
        assert!(text.contains(ended), "{text}");
        let silence = "shortest of QEMU's, 100 Mbit/s, 80 ms, running guest, mixed workload | less than 100 % | - | none of QEMU's ended";
        assert!(text.contains(silence), "{text}");
    }
}
