//! What is run, and what is run next. Pure.
//!
//! Owns which contestants meet where, their order, and when one is given up. Leaves alone running. Promises that the next
//! run follows from the results alone, so that a benchmark that was stopped goes on where it was; that contestants of one
//! cell alternate and none is always the first; and that one which was given up is not tried again on that link.

use std::time::Duration;

use super::contestant::{ABLATIONS, CASES, Case, Contestant, LONGHAUL, NEIGHBOURS, QEMU, TOOLS};
use super::figures::median;
use super::profile::{MAIN, PROFILES, Profile};
use super::record::{End, Record};

/// A contestant is given up at so many times Longhaul's time.
pub const PATIENCE: f64 = 6.0;
/// And never before this.
const LEAST: Duration = Duration::from_secs(60);
/// While Longhaul's time is not known.
const UNKNOWN: Duration = Duration::from_secs(1800);

/// One link and what is moved over it: those who meet here are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    pub profile: Profile,
    pub case: Case,
}

/// One run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub cell: Cell,
    pub contestant: Contestant,
    /// From 1.
    pub number: u32,
    pub limit: Duration,
}

/// What somebody asks for; an empty list is all there is.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    pub profiles: Vec<String>,
    pub cases: Vec<String>,
    pub contestants: Vec<String>,
    pub runs: u32,
}

impl Wanted {
    fn wants(list: &[String], name: &str) -> bool {
        list.is_empty() || list.iter().any(|wanted| wanted == name)
    }

    /// A name in any of the lists that nothing is called.
    pub fn unknown(&self) -> Option<&str> {
        let unknown =
            |list: &[String], is_known: &dyn Fn(&str) -> bool| list.iter().position(|name| !is_known(name));
        let profile = unknown(&self.profiles, &|name| Profile::named(name).is_some());
        let case = unknown(&self.cases, &|name| Case::named(name).is_some());
        let contestant = unknown(&self.contestants, &|name| Contestant::named(name).is_some());
        profile
            .map(|at| &*self.profiles[at])
            .or_else(|| case.map(|at| &*self.cases[at]))
            .or_else(|| contestant.map(|at| &*self.contestants[at]))
    }

    /// Where contestants meet, most telling first.
    pub fn cells(&self) -> Vec<Cell> {
        let all = cells().into_iter();
        all.filter(|cell| {
            Self::wants(&self.profiles, cell.profile.name) && Self::wants(&self.cases, cell.case.name())
        })
        .collect()
    }

    /// Who meets in a cell, Longhaul first.
    pub fn contestants(&self, cell: Cell) -> Vec<Contestant> {
        let all = contestants(cell).into_iter();
        all.filter(|contestant| Self::wants(&self.contestants, contestant.name))
            .collect()
    }

    /// The next run, after all that is done.
    pub fn next(&self, done: &[Record]) -> Option<Run> {
        self.cells().into_iter().find_map(|cell| self.next_in(cell, done))
    }

    fn next_in(&self, cell: Cell, done: &[Record]) -> Option<Run> {
        let contestants = self.contestants(cell);
        (1..=self.runs).find_map(|number| {
            let turn = (number - 1) as usize % contestants.len().max(1);
            let order = contestants[turn..].iter().chain(&contestants[..turn]);
            let open = order.into_iter().find(|one| is_open(cell, **one, number, done));
            open.map(|contestant| Run {
                cell,
                contestant: *contestant,
                number,
                limit: limit(cell, *contestant, done),
            })
        })
    }
}

/// Whether a run is neither done nor in vain.
fn is_open(cell: Cell, contestant: Contestant, number: u32, done: &[Record]) -> bool {
    let is = |record: &&Record| is_of(record, cell) && record.contestant == contestant.name;
    let mut own = done.iter().filter(is);
    !own.any(|record| record.run == number || record.end == End::GivenUp)
}

/// Whether a record is of this cell.
pub fn is_of(record: &Record, cell: Cell) -> bool {
    record.profile == cell.profile.name && record.case == cell.case.name()
}

/// How long a contestant is given: six times what Longhaul took there.
pub fn limit(cell: Cell, contestant: Contestant, done: &[Record]) -> Duration {
    let is = |record: &&Record| {
        is_of(record, cell) && record.contestant == LONGHAUL.name && record.end == End::Well
    };
    let longhaul = median(done.iter().filter(is).map(|record| record.seconds));
    match longhaul {
        Some(seconds) if !contestant.is_longhaul() => Duration::from_secs_f64(seconds * PATIENCE).max(LEAST),
        _ => UNKNOWN,
    }
}

/// Every cell: the mixed guest on every link, noise on every one that is limited, the other workloads on two, the rest on the main one.
fn cells() -> Vec<Cell> {
    let main_first = |profile: &Profile| profile.name != MAIN;
    let mut profiles = PROFILES;
    profiles.sort_by_key(main_first);
    let cell = |case, profile: &Profile| Cell {
        profile: *profile,
        case,
    };
    let at_main = CASES.iter().map(|case| cell(*case, &profiles[0]));
    let elsewhere = profiles[1..].iter().map(|profile| cell(CASES[0], profile));
    let is_noisy = |profile: &&Profile| profile.rate.is_some();
    let noisy = profiles[1..].iter().filter(is_noisy);
    let noisy = noisy.map(|profile| cell(Case::Noise, profile));
    let thin = Profile::named("50-100");
    let loads = CASES
        .iter()
        .filter(|case| matches!(case, Case::Live(_)) && **case != CASES[0]);
    let at_thin = loads.flat_map(|case| thin.map(|profile| cell(*case, &profile)));
    at_main.chain(elsewhere).chain(at_thin).chain(noisy).collect()
}

/// Everybody on the main link under the mixed load; elsewhere Longhaul and QEMU's best two there.
fn contestants(cell: Cell) -> Vec<Contestant> {
    let mut all = vec![LONGHAUL];
    match cell.case {
        // Nobody is to be faster here.
        Case::Beside => return NEIGHBOURS.to_vec(),
        Case::Cold => all.extend(TOOLS),
        Case::Template | Case::Back => {}
        Case::Noise => all.extend(ABLATIONS.into_iter().filter(|one| one.name == "longhaul-cubic")),
        Case::Live("mixed") if cell.profile.name == MAIN => all.extend(QEMU.into_iter().chain(ABLATIONS)),
        // XBZRLE helps where the link is slower than the guest writes; on a faster one it is work for nothing.
        Case::Live(_) if cell.profile.rate.is_none_or(|rate| rate >= 200) => {
            all.extend([QEMU[0], QEMU[2]]);
        }
        Case::Live(_) => all.extend([QEMU[0], QEMU[1]]),
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(profiles: &[&str], cases: &[&str], contestants: &[&str], runs: u32) -> Wanted {
        let own = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
        Wanted {
            profiles: own(profiles),
            cases: own(cases),
            contestants: own(contestants),
            runs,
        }
    }

    fn record(run: &Run, end: End, seconds: f64) -> Record {
        Record {
            profile: run.cell.profile.name.to_owned(),
            case: run.cell.case.name().to_owned(),
            contestant: run.contestant.name.to_owned(),
            run: run.number,
            end,
            seconds,
            ..Record::default()
        }
    }

    fn play(wanted: &Wanted, done: &mut Vec<Record>, end: impl Fn(&Run) -> (End, f64)) -> Vec<String> {
        let mut order = Vec::new();
        while let Some(run) = wanted.next(done) {
            order.push(format!("{}#{}", run.contestant.name, run.number));
            let (end, seconds) = end(&run);
            done.push(record(&run, end, seconds));
        }
        order
    }

    #[test]
    fn contestants_alternate_and_each_round_begins_with_another() {
        let wanted = wanted(
            &["100-80"],
            &["mixed"],
            &["longhaul", "qemu-xbzrle", "qemu-plain"],
            3,
        );
        let order = play(&wanted, &mut Vec::new(), |_| (End::Well, 20.0));
        let expected = [
            "longhaul#1",
            "qemu-xbzrle#1",
            "qemu-plain#1",
            "qemu-xbzrle#2",
            "qemu-plain#2",
            "longhaul#2",
            "qemu-plain#3",
            "longhaul#3",
            "qemu-xbzrle#3",
        ];
        assert_eq!(order, expected);
    }

    #[test]
    fn a_benchmark_that_was_stopped_anywhere_ends_with_the_same_runs() {
        let wanted = wanted(&["100-80", "50-100"], &["mixed", "idle"], &[], 2);
        let mut whole = Vec::new();
        let order = play(&wanted, &mut whole, |_| (End::Well, 20.0));
        for stopped in 0..whole.len() {
            let mut done = whole[..stopped].to_vec();
            assert_eq!(play(&wanted, &mut done, |_| (End::Well, 20.0)), order[stopped..]);
        }
        let mut keys: Vec<_> = whole.iter().map(Record::key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), whole.len(), "nothing is run twice");
    }

    #[test]
    fn who_is_given_up_once_is_not_tried_again_there_but_elsewhere() {
        let wanted = wanted(&["100-80", "50-100"], &["mixed"], &["longhaul", "qemu-xbzrle"], 2);
        let mut done = Vec::new();
        let slow = |run: &Run| match run.contestant.is_longhaul() {
            true => (End::Well, 20.0),
            false => (End::GivenUp, 120.0),
        };
        let order = play(&wanted, &mut done, slow);
        assert_eq!(order.iter().filter(|one| one.starts_with("qemu")).count(), 2);
        assert_eq!(order.iter().filter(|one| one.starts_with("longhaul")).count(), 4);
    }

    #[test]
    fn a_failed_run_counts_as_run_and_the_next_is_tried() {
        let wanted = wanted(&["100-80"], &["mixed"], &["longhaul"], 3);
        let order = play(&wanted, &mut Vec::new(), |run| match run.number {
            1 => (End::Failed, 3.0),
            _ => (End::Well, 20.0),
        });
        assert_eq!(order, ["longhaul#1", "longhaul#2", "longhaul#3"]);
    }

    #[test]
    fn patience_is_six_times_the_median_of_what_longhaul_took_there() {
        let cell = wanted(&["100-80"], &["mixed"], &[], 1).cells()[0];
        let run = |number| Run {
            cell,
            contestant: LONGHAUL,
            number,
            limit: UNKNOWN,
        };
        let mut done = vec![
            record(&run(1), End::Well, 20.0),
            record(&run(2), End::Well, 30.0),
            record(&run(3), End::Well, 90.0),
        ];
        assert_eq!(limit(cell, QEMU[0], &done), Duration::from_secs(180));
        assert_eq!(limit(cell, LONGHAUL, &done), UNKNOWN);
        assert_eq!(limit(cell, QEMU[0], &done[..1]), Duration::from_secs(120));
        done.iter_mut().for_each(|record| record.end = End::Failed);
        assert_eq!(
            limit(cell, QEMU[0], &done),
            UNKNOWN,
            "a failure says nothing of time"
        );
    }

    #[test]
    fn everybody_meets_on_the_main_link_and_the_best_two_elsewhere() {
        let all = Wanted {
            runs: 3,
            ..Wanted::default()
        };
        let cells = all.cells();
        assert_eq!(all.contestants(cells[0]).len(), 1 + QEMU.len() + ABLATIONS.len());
        assert_eq!((cells[0].profile.name, cells[0].case.name()), ("100-80", "mixed"));
        let is_race = |cell: &&Cell| cell.case != Case::Beside;
        let mut races = cells.iter().filter(is_race);
        assert!(races.all(|cell| all.contestants(*cell)[0].is_longhaul()));
        let mixed = cells.iter().filter(|cell| cell.case.name() == "mixed").count();
        assert_eq!((mixed, cells.len()), (PROFILES.len(), 23));
        let mut other = all.clone();
        other.contestants.push("scp".to_owned());
        assert_eq!((all.unknown(), other.unknown()), (None, Some("scp")));
    }
}
