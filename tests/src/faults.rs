//! What is to go wrong, and when.
//!
//! Owns the words `WHO@PERCENT` and the decision which faults are due. Leaves alone how a program is killed.
//! Promises that each fault happens at most once, and that one whose moment was jumped over still happens.

use std::str::FromStr;

/// The programs that can be killed.
pub const PROGRAMS: [&str; 4] = ["source-agent", "source-gateway", "target-gateway", "target-agent"];

/// A program to kill when the job's progress reaches a share.
#[derive(Clone, Debug, PartialEq)]
pub struct Kill {
    pub program: String,
    /// Progress of the job, 0 to 100.
    pub percent: f64,
}

impl FromStr for Kill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("'{text}' is no fault; write it like \"source-gateway@30%\"");
        let (program, percent) = text.split_once('@').ok_or_else(refused)?;
        if !PROGRAMS.contains(&program) {
            return Err(format!(
                "'{program}' is no program of the lab; known are {}",
                PROGRAMS.join(", ")
            ));
        }
        let percent: f64 = percent
            .trim_end_matches('%')
            .trim()
            .parse()
            .map_err(|_| refused())?;
        if !(0.0..=100.0).contains(&percent) {
            return Err(refused());
        }
        Ok(Self {
            program: program.to_owned(),
            percent,
        })
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

    /// The faults that are due at this progress; they will not be given again.
    pub fn due(&mut self, percent: f64) -> Vec<Kill> {
        let (due, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|kill| kill.percent <= percent);
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

    #[test]
    fn a_fault_happens_once_even_when_its_moment_is_jumped_over() {
        let kill = |text: &str| text.parse::<Kill>().unwrap();
        let mut faults = Faults::new(&[kill("source-agent@30%"), kill("target-agent@60")]);
        assert!(faults.due(29.9).is_empty());
        assert_eq!(faults.due(45.0), [kill("source-agent@30%")]);
        assert!(faults.due(50.0).is_empty());
        assert_eq!(faults.due(100.0).len(), 1);
        assert!(faults.waiting().is_empty());
    }

    #[test]
    fn nonsense_is_refused_with_a_remedy() {
        assert!(
            "gateway@30%"
                .parse::<Kill>()
                .unwrap_err()
                .contains("source-gateway")
        );
        for text in [
            "source-agent",
            "source-agent@x",
            "source-agent@130%",
            "source-agent@-1",
            "source-agent@NaN",
        ] {
            assert!(text.parse::<Kill>().is_err(), "{text}");
        }
    }
}
