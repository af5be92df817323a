//! The report of a lab run: for programs one JSON object, for people a page of 80 columns.
//!
//! Owns the names and the meaning of the fields, which stay stable: fields may be added, none is renamed or
//! changes its unit. Leaves alone how they were measured. Promises that `ok` is true only when the job said
//! so and the lab's own comparison agrees.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::beside::BesideReport;
use crate::compare::Comparison;
use crate::process::Process;
use crate::usage::Usage;
use crate::wan::control::Stats;
use crate::wan::spec::LinkSpec;

/// Everything a run gave.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// The job ended well and the lab's own comparison found source and target equal.
    pub ok: bool,
    /// Both agents' digests are equal, and so is the lab's own comparison.
    pub equal: bool,
    /// Size of the disk.
    pub raw_bytes: u64,
    /// Bytes that were read: neither a hole nor skipped as free.
    pub used_bytes: u64,
    /// Bytes skipped because they were proven free.
    pub skipped_free_bytes: u64,
    /// The same by proof.
    pub skipped_by_proof: BTreeMap<String, u64>,
    /// Bytes in holes of the image.
    pub hole_bytes: u64,
    /// Bytes that were read and not sent because they are zero.
    pub zero_bytes: u64,
    /// Bytes sent to the peer gateway, as the programs count them.
    pub wan_bytes: u64,
    /// From the operator's command until its end.
    pub seconds: f64,
    /// Bits of data in use moved per second.
    pub goodput_bit_per_s: f64,
    /// Bytes that had to be sent again.
    pub resent_bytes: u64,
    /// BLAKE3 over the content, as each agent states it.
    pub source_digest: String,
    pub target_digest: String,
    /// What the lab itself found in both disks.
    pub comparison: Option<Comparison>,
    /// Whether there was an emulated link; if not, what was not emulated.
    pub emulated: bool,
    pub not_emulated: Vec<String>,
    /// What the emulator counted during the job.
    pub link: Option<LinkReport>,
    /// The congestion control of TCP, where a rival used TCP.
    #[serde(default)]
    pub tcp: Option<String>,
    /// What a TCP flow got beside the job, where one was asked for.
    #[serde(default)]
    pub beside: Option<BesideReport>,
    /// Memory and CPU of each program.
    pub programs: BTreeMap<String, ProgramReport>,
    /// Faults that were to happen and did not, because the job ended before.
    pub faults_missed: Vec<String>,
    /// Why it is not ok.
    pub cause: Option<String>,
    /// The programs' own report, as they gave it.
    pub job: Value,
}

/// One program's part.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ProgramReport {
    #[serde(flatten)]
    pub usage: Usage,
    /// Times it was killed on command.
    pub kills: u32,
    /// Times it ended by itself.
    pub deaths: u32,
}

impl ProgramReport {
    /// Of one that has ended.
    pub fn of(process: &Process) -> Self {
        let (kills, deaths) = process.ends();
        Self {
            usage: process.usage(),
            kills,
            deaths,
        }
    }
}

/// The link's part.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LinkReport {
    pub rate_bit_per_s: u64,
    pub rtt_ms: f64,
    pub loss: f64,
    /// Bits of IP delivered per second towards the target, from the 3rd second of the job to the last but
    /// one.
    pub steady_bit_per_s: Option<f64>,
    /// That as a part of the rate.
    pub steady_share: Option<f64>,
    #[serde(flatten)]
    pub stats: Stats,
}

impl LinkReport {
    /// From the emulator's count; the job ran from `start` to `end`, in seconds of the emulator.
    pub fn new(spec: &LinkSpec, stats: Stats, start: f64, end: f64) -> Self {
        let (forth, _) = spec.shapes();
        let steady = steady(&stats.forth_per_second, start, end);
        let rate = forth.rate_bit_per_s;
        Self {
            rate_bit_per_s: rate,
            rtt_ms: spec.rtt.0.as_secs_f64() * 1e3,
            loss: forth.loss,
            steady_bit_per_s: steady,
            steady_share: steady.filter(|_| rate > 0).map(|steady| steady / rate as f64),
            stats,
        }
    }
}

/// Mean of the whole seconds from the 3rd of the job to the last but one.
fn steady(per_second: &[u64], start: f64, end: f64) -> Option<f64> {
    let (first, last) = (
        start.ceil() as usize + 2,
        end.floor() as usize - usize::from(end >= 1.0),
    );
    let seconds = per_second.get(first..last.min(per_second.len()))?;
    (!seconds.is_empty()).then(|| seconds.iter().sum::<u64>() as f64 * 8.0 / seconds.len() as f64)
}

impl Report {
    /// Takes over what the programs reported: the stable names at the top, or the sum over `disks`.
    pub fn read_job(&mut self, job: Value) {
        let sum = |name: &str| match (&job[name], job["disks"].as_array()) {
            (Value::Number(number), _) => number.as_u64().unwrap_or(0),
            (_, Some(disks)) => disks.iter().filter_map(|disk| disk[name].as_u64()).sum(),
            _ => 0,
        };
        self.raw_bytes = sum("raw_bytes");
        self.used_bytes = sum("used_bytes");
        self.skipped_free_bytes = sum("skipped_free_bytes");
        self.hole_bytes = sum("hole_bytes");
        self.zero_bytes = sum("zero_bytes");
        self.wan_bytes = sum("wan_bytes");
        self.resent_bytes = sum("resent_bytes");
        let words = |name: &str| {
            let value = if job[name].is_string() {
                &job[name]
            } else {
                &job["disks"][0][name]
            };
            value.as_str().unwrap_or_default().to_owned()
        };
        self.source_digest = words("source_digest");
        self.target_digest = words("target_digest");
        let disks = job["disks"].as_array().into_iter().flatten();
        for part in disks.flat_map(|disk| disk["parts"].as_array().into_iter().flatten()) {
            if let (Some(proof), Some(bytes)) = (part["proof"].as_str(), part["skipped_free_bytes"].as_u64())
            {
                *self.skipped_by_proof.entry(proof.to_owned()).or_default() += bytes;
            }
        }
        self.job = job;
    }

    /// Judges the run.
    pub fn conclude(&mut self, comparison: Option<Comparison>) {
        let digests = !self.source_digest.is_empty() && self.source_digest == self.target_digest;
        let compared = comparison.as_ref().is_some_and(|comparison| comparison.equal);
        self.equal = digests && compared;
        self.ok = self.equal && self.job["ok"] == Value::Bool(true) && self.cause.is_none();
        if self.cause.is_none() && !self.ok {
            let cause = match (self.job["cause"].as_str(), digests, compared) {
                (Some(cause), ..) => cause,
                (_, false, _) => "the agents' digests differ or are missing",
                (_, _, false) => "the lab's own comparison found a difference",
                _ => "the job says that it failed",
            };
            self.cause = Some(cause.to_owned());
        }
        self.comparison = comparison;
        self.goodput_bit_per_s = self.used_bytes as f64 * 8.0 / self.seconds.max(1e-3);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job() -> Value {
        json!({"ok": true, "disks": [
            {"raw_bytes": 100, "used_bytes": 40, "skipped_free_bytes": 10, "source_digest": "d", "target_digest": "d",
             "parts": [{"proof": "unmounted", "skipped_free_bytes": 10}, {"proof": null, "skipped_free_bytes": 0}]},
        ]})
    }

    fn concluded(job: Value, equal: Option<bool>) -> Report {
        let mut report = Report {
            seconds: 2.0,
            ..Report::default()
        };
        report.read_job(job);
        report.conclude(equal.map(|equal| Comparison {
            equal,
            ..Comparison::default()
        }));
        report
    }

    #[test]
    fn ok_needs_the_job_the_digests_and_the_labs_own_look() {
        let good = concluded(job(), Some(true));
        assert!(good.ok && good.equal && good.cause.is_none());
        assert_eq!(
            (
                good.raw_bytes,
                good.skipped_by_proof["unmounted"],
                good.goodput_bit_per_s
            ),
            (100, 10, 160.0)
        );
        assert!(!concluded(job(), Some(false)).ok);
        assert!(!concluded(job(), None).ok);
        let mut failed = job();
        failed["ok"] = json!(false);
        assert!(!concluded(failed, Some(true)).ok);
        let mut differs = job();
        differs["disks"][0]["target_digest"] = json!("e");
        assert!(!concluded(differs, Some(true)).equal);
    }

    #[test]
    fn the_stable_names_are_there() {
        let value = serde_json::to_value(concluded(job(), Some(true))).unwrap();
        for name in [
            "ok",
            "equal",
            "raw_bytes",
            "used_bytes",
            "skipped_free_bytes",
            "zero_bytes",
            "wan_bytes",
            "seconds",
            "goodput_bit_per_s",
            "resent_bytes",
            "source_digest",
            "target_digest",
            "emulated",
            "not_emulated",
            "programs",
        ] {
            assert!(value.get(name).is_some(), "{name}");
        }
    }

    #[test]
    fn the_steady_rate_leaves_out_start_and_end() {
        let seconds = [9, 9, 1, 1, 5, 5, 5, 1, 9];
        assert_eq!(steady(&seconds, 1.5, 8.2), Some(40.0));
        assert_eq!(steady(&seconds, 1.5, 3.0), None);
        assert_eq!(steady(&[], 0.0, 0.5), None);
    }
}
