//! What is to go wrong in a live migration, and in which phase: kills, cuts of the link, the operator's cancel.
//!
//! Owns the words `WHO@PHASE` and the decision what is due. Leaves alone how a program is killed and who
//! names phases: the operator program's progress, the source QEMU's migration states, and `stop` and `resume`
//! of the guest. Promises that each fault happens at most once.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use longhaul_common::units::Span;

use crate::faults::PROGRAMS;
use crate::wan::spec::CutWindow;

/// The two machines, which can be killed like programs.
pub const SOURCE_QEMU: &str = "source-qemu";
pub const TARGET_QEMU: &str = "target-qemu";

/// Something to kill.
#[derive(Clone, Debug, PartialEq)]
pub struct Kill {
    pub who: String,
    pub when: When,
}

/// The moment of a fault.
#[derive(Clone, Debug, PartialEq)]
pub enum When {
    /// So long after this phase was first seen.
    Phase(String, Duration),
    /// At this progress of the job, 0 to 100.
    Percent(f64),
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("'{text}' is no moment; write it like \"ram\", \"device+20ms\" or \"30%\"");
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.trim().parse().map_err(|_| refused())?;
            return (0.0..=100.0)
                .contains(&percent)
                .then_some(Self::Percent(percent))
                .ok_or_else(refused);
        }
        let (phase, later) = text.split_once('+').unwrap_or((text, "0ms"));
        let later = later.parse::<Span>().map_err(|_| refused())?.0;
        if phase.is_empty() || !phase.chars().all(|c| c.is_ascii_lowercase() || "-_".contains(c)) {
            return Err(refused());
        }
        Ok(Self::Phase(phase.replace('_', "-"), later))
    }
}

impl std::fmt::Display for When {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Phase(phase, later) if later.is_zero() => f.write_str(phase),
            Self::Phase(phase, later) => write!(f, "{phase}+{}ms", later.as_millis()),
        }
    }
}

impl FromStr for Kill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || {
            format!(
                "'{text}' is no fault; write it like \"source-agent@ram\", \"target-agent@device+20ms\" or \"source-gateway@30%\""
            )
        };
        let (who, when) = text.split_once('@').ok_or_else(refused)?;
        if !PROGRAMS.contains(&who) && ![SOURCE_QEMU, TARGET_QEMU].contains(&who) {
            return Err(format!(
                "'{who}' is nothing that can be killed; known are {}, {SOURCE_QEMU}, {TARGET_QEMU}",
                PROGRAMS.join(", ")
            ));
        }
        Ok(Self {
            who: who.to_owned(),
            when: when.parse().map_err(|_| refused())?,
        })
    }
}

/// A time without a link.
#[derive(Clone, Debug, PartialEq)]
pub enum Cut {
    /// Counted from the job's start.
    Window(CutWindow),
    /// From this moment on, for so long.
    From(When, Duration),
}

impl FromStr for Cut {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((when, length)) = text.split_once('/') else {
            let window = text.parse().map(Self::Window);
            return window.map_err(|error| format!("{error}, or \"ram+1s/10s\""));
        };
        let length = length.parse::<Span>().map_err(|error| error.to_string())?;
        Ok(Self::From(when.parse()?, length.0))
    }
}

/// Anything that waits for its moment.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    Kill(Kill),
    /// The link is cut for so long.
    Cut(When, Duration),
    /// The operator cancels the job.
    Cancel(When),
}

impl Fault {
    fn when(&self) -> &When {
        match self {
            Self::Kill(kill) => &kill.when,
            Self::Cut(when, _) | Self::Cancel(when) => when,
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kill(kill) => kill.fmt(f),
            Self::Cut(when, length) => write!(f, "cut@{when}/{}ms", length.as_millis()),
            Self::Cancel(when) => write!(f, "cancel@{when}"),
        }
    }
}

impl std::fmt::Display for Kill {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.who, self.when)
    }
}

/// Phases in the order in which they were first seen, with that time.
#[derive(Clone, Debug, Default)]
pub struct Phases {
    seen: Vec<(String, Duration)>,
}

impl Phases {
    /// A phase is or was there.
    pub fn see(&mut self, name: &str, now: Duration) {
        // The program's word for round 0, and everybody else's.
        let name = if name == "transfer" {
            "copy".to_owned()
        } else {
            name.replace('_', "-")
        };
        if self.seen.iter().all(|(seen, _)| *seen != name) {
            self.seen.push((name, now));
        }
    }

    /// When a phase was first seen.
    pub fn seen(&self, name: &str) -> Option<Duration> {
        let seen = self.seen.iter().find(|(seen, _)| seen == name);
        seen.map(|(_, at)| *at)
    }

    /// Milliseconds from each phase to the next, and from the last to `end`.
    pub fn lengths_ms(&self, end: Duration) -> BTreeMap<String, f64> {
        let ends = self.seen.iter().skip(1).map(|(_, at)| *at).chain([end]);
        let pairs = self.seen.iter().zip(ends);
        pairs
            .map(|((name, at), end)| (name.clone(), end.saturating_sub(*at).as_secs_f64() * 1e3))
            .collect()
    }
}

/// Faults that have not happened yet.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    waiting: Vec<Fault>,
}

impl Faults {
    /// All of these.
    pub fn new(faults: Vec<Fault>) -> Self {
        Self { waiting: faults }
    }

    /// The faults that are due; they will not be given again.
    pub fn due(&mut self, now: Duration, percent: f64, phases: &Phases) -> Vec<Fault> {
        let is_due = |fault: &Fault| match fault.when() {
            When::Percent(at) => percent >= *at,
            When::Phase(phase, later) => phases.seen(phase).is_some_and(|at| now >= at + *later),
        };
        let (due, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(is_due);
        self.waiting = waiting;
        due
    }

    /// Faults that have not happened.
    pub fn waiting(&self) -> &[Fault] {
        &self.waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_fault_happens_once_and_in_its_phase() {
        let kills = ["source-agent@pre_switchover+20ms", "target-qemu@50%"]
            .map(|text| Fault::Kill(text.parse().unwrap()));
        let mut faults = Faults::new(kills.to_vec());
        let mut phases = Phases::default();
        phases.see("ram", ms(10));
        assert!(faults.due(ms(500), 49.0, &phases).is_empty());
        phases.see("pre-switchover", ms(500));
        phases.see("pre-switchover", ms(600));
        assert!(faults.due(ms(519), 0.0, &phases).is_empty());
        assert_eq!(faults.due(ms(520), 0.0, &phases), [kills[0].clone()]);
        assert_eq!(faults.due(ms(521), 60.0, &phases), [kills[1].clone()]);
        assert!(faults.waiting().is_empty());
        let lengths = phases.lengths_ms(ms(800));
        assert_eq!((lengths["ram"], lengths["pre-switchover"]), (490.0, 300.0));
        assert_eq!(kills[0].to_string(), "source-agent@pre-switchover+20ms");
    }

    #[test]
    fn nonsense_is_refused_with_a_remedy() {
        assert!("agent@ram".parse::<Kill>().unwrap_err().contains("source-qemu"));
        assert!("ram".parse::<Cut>().unwrap_err().contains("ram+1s/10s"));
        assert_eq!(
            "ram+1s/10s".parse::<Cut>(),
            Ok(Cut::From(When::Phase("ram".to_owned(), ms(1000)), ms(10_000)))
        );
        assert!(matches!("2s..4s".parse::<Cut>(), Ok(Cut::Window(_))));
        for text in ["ram/", "/2s", "ram+1s/x", "RAM/2s", "4s..2s"] {
            assert!(text.parse::<Cut>().is_err(), "{text}");
        }
        for text in [
            "source-agent",
            "source-agent@",
            "source-agent@RAM",
            "source-agent@ram+",
            "source-agent@ram+x",
            "source-agent@101%",
            "source-agent@NaN%",
        ] {
            assert!(text.parse::<Kill>().is_err(), "{text}");
        }
    }
}
