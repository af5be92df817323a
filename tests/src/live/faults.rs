//! What is to be killed in a live migration, and in which phase.
//!
//! Owns the words `WHO@PHASE` and the decision what is due. Leaves alone how a program is killed and who
//! names phases: the operator program's progress, the source QEMU's migration states, and `stop` and `resume`
//! of the guest. Promises that each fault happens at most once.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use longhaul_common::units::Span;

use crate::faults::PROGRAMS;

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
        let who = who.to_owned();
        if let Some(percent) = when.strip_suffix('%') {
            let percent: f64 = percent.trim().parse().map_err(|_| refused())?;
            if !(0.0..=100.0).contains(&percent) {
                return Err(refused());
            }
            return Ok(Self {
                who,
                when: When::Percent(percent),
            });
        }
        let (phase, later) = when.split_once('+').unwrap_or((when, "0ms"));
        let later = later.parse::<Span>().map_err(|_| refused())?.0;
        if phase.is_empty() || !phase.chars().all(|c| c.is_ascii_lowercase() || "-_".contains(c)) {
            return Err(refused());
        }
        Ok(Self {
            who,
            when: When::Phase(phase.replace('_', "-"), later),
        })
    }
}

impl std::fmt::Display for Kill {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.when {
            When::Percent(percent) => write!(f, "{}@{percent}%", self.who),
            When::Phase(phase, later) if later.is_zero() => write!(f, "{}@{phase}", self.who),
            When::Phase(phase, later) => write!(f, "{}@{phase}+{}ms", self.who, later.as_millis()),
        }
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
        let name = name.replace('_', "-");
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
    waiting: Vec<Kill>,
}

impl Faults {
    /// All of these.
    pub fn new(kills: &[Kill]) -> Self {
        Self {
            waiting: kills.to_vec(),
        }
    }

    /// The faults that are due; they will not be given again.
    pub fn due(&mut self, now: Duration, percent: f64, phases: &Phases) -> Vec<Kill> {
        let is_due = |kill: &Kill| match &kill.when {
            When::Percent(at) => percent >= *at,
            When::Phase(phase, later) => phases.seen(phase).is_some_and(|at| now >= at + *later),
        };
        let (due, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(is_due);
        self.waiting = waiting;
        due
    }

    /// Faults that have not happened.
    pub fn waiting(&self) -> &[Kill] {
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
        let kills = ["source-agent@pre_switchover+20ms", "target-qemu@50%"].map(|text| text.parse().unwrap());
        let mut faults = Faults::new(&kills);
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
