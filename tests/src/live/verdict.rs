//! The report of a live migration.
//!
//! Owns the names and meaning of its fields, those of a move's report included, and the judgement. Leaves
//! alone how things were measured. Promises that `safe` is true only when exactly one machine owns the guest
//! and nothing that it had acknowledged is lost, and `ok` only when it also is where it should be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::back::BackReport;
use super::check::Records;
use super::memory::Compared;
use crate::report::Report;

/// Everything a run gave. Times in milliseconds unless the name says otherwise.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveReport {
    #[serde(flatten)]
    pub report: Report,
    /// Exactly one machine owned the guest at the end, its memory was right, and no acknowledged record is
    /// lost or torn: also true when the migration was given up and the guest runs on at the source.
    pub safe: bool,
    /// Who runs the guest at the end: "source", "target", "both" or "nobody".
    pub owner: String,
    /// From QEMU's STOP at the source to RESUME at the target.
    pub blackout_qmp_ms: Option<f64>,
    /// The longest time without a heartbeat during the job, heard across both consoles.
    pub blackout_heartbeat_ms: Option<f64>,
    /// The same where the guest left one console for the other: at the handover.
    pub handover_heartbeat_ms: Option<f64>,
    /// The longest times without a heartbeat, longest first: when each began, in seconds since the job did, and how many ms it took.
    pub silences: Vec<(f64, f64)>,
    /// The longest time without a heartbeat before the job: what the guest alone does.
    pub heartbeat_before_ms: Option<f64>,
    /// As the job forecast it just before.
    pub predicted_blackout_ms: Option<f64>,
    /// Handovers that were given up: how long the guest stood still at the source.
    pub interruptions_ms: Vec<f64>,
    /// Heartbeats whose number did not follow the one before: said and lost, or said twice.
    pub irregular_heartbeats: u64,
    pub rounds: Option<u64>,
    /// The handover, step by step, from the moment in which the guest stood.
    pub steps_ms: Vec<(String, u64)>,
    /// What the job decided on its way, in its words.
    pub decisions: Vec<String>,
    /// What the source's gateway made of the data, raw bytes by kind: zero, reference, xor, compressed, raw.
    pub reduced_bytes: BTreeMap<String, u64>,
    /// What the raw bytes of kind xor came to.
    pub xor_payload_bytes: u64,
    /// Raw bytes of kind xor in payloads that hold differences from the same places' earlier content only, and what these came to.
    pub rewritten_bytes: u64,
    pub rewritten_payload_bytes: u64,
    /// What the job should have cleared up and did not: names of files, bitmaps, exports, machines.
    pub leftovers: Vec<String>,
    /// Guest operations per second.
    pub guest_before_per_s: Option<f64>,
    pub guest_during_per_s: Option<f64>,
    pub guest_after_per_s: Option<f64>,
    /// During the job, as a part of before.
    pub guest_throughput_ratio: Option<f64>,
    pub records_acknowledged: u64,
    pub records_lost: u64,
    pub records: Records,
    /// What the guest said of its memory: "ok N" or "bad WHY".
    pub guest_memory: Option<String>,
    /// Both sides' memory at the handover, where it was to be compared.
    pub memory_compared: Option<Compared>,
    /// Time in each phase, as the job reports it, else as the lab saw it.
    pub phases_ms: BTreeMap<String, f64>,
    /// Bytes of IP that the emulated link delivered during the job: towards the target, and back.
    pub link_bytes: Option<(u64, u64)>,
    /// What a first VM of the same template took on the WAN, where one was moved before.
    pub first_wan_bytes: Option<u64>,
    pub workload: String,
    pub ram_mib: u64,
    pub seed: u64,
    /// Who migrated: "longhaul" or "qemu".
    pub by: String,
    /// The way back, where it was asked for.
    pub back: Option<BackReport>,
}

impl LiveReport {
    /// Takes over what the job says of itself.
    pub fn read_job(&mut self, job: Value) {
        // QEMU's own migration is reported by the lab, without this part.
        let live = if job["live"].is_object() {
            &job["live"]
        } else {
            &job
        };
        self.predicted_blackout_ms = live["predicted_blackout_ms"].as_f64();
        self.rounds = live["rounds"]
            .as_u64()
            .or_else(|| Some(live["rounds"].as_array()?.len() as u64));
        self.steps_ms = serde_json::from_value(live["steps_ms"].clone()).unwrap_or_default();
        self.decisions = serde_json::from_value(live["decisions"].clone()).unwrap_or_default();
        if let Some(phases) = job["phases_ms"].as_object() {
            let phases = phases
                .iter()
                .filter_map(|(name, ms)| Some((name.clone(), ms.as_f64()?)));
            self.phases_ms = phases.collect();
        }
        self.report.read_job(job);
    }

    /// Judges the run.
    pub fn conclude(&mut self) {
        self.records_acknowledged = self.records.acknowledged;
        self.records_lost = self.records.lost;
        if let (Some(before), Some(during)) = (self.guest_before_per_s, self.guest_during_per_s) {
            self.guest_throughput_ratio = (before > 0.0).then(|| during / before);
        }
        let one = matches!(self.owner.as_str(), "source" | "target");
        let memory = self
            .guest_memory
            .as_ref()
            .is_some_and(|said| said.starts_with("ok"))
            && self
                .memory_compared
                .as_ref()
                .is_none_or(|both| both.differing_pages == 0);
        self.safe = one && memory && self.records.is_good();
        let report = &mut self.report;
        if report.wan_bytes == 0 {
            report.wan_bytes = self.link_bytes.map_or(0, |(forth, _)| forth);
        }
        let digests = report.source_digest == report.target_digest;
        let back = self.back.as_ref();
        let home = if back.is_some() { "source" } else { "target" };
        let went_back = back.is_none_or(BackReport::is_good);
        report.equal = self.safe && self.owner == home && digests && went_back;
        let said = report.job["ok"] == Value::Bool(true) && report.cause.is_none();
        report.ok = report.equal && said && self.leftovers.is_empty();
        report.goodput_bit_per_s = report.used_bytes as f64 * 8.0 / report.seconds.max(1e-3);
        if report.cause.is_none() && !report.ok {
            let cause = cause(self, one, memory, digests);
            self.report.cause = Some(cause);
        }
    }
}

fn cause(report: &LiveReport, one: bool, memory: bool, digests: bool) -> String {
    let job = report.report.job["cause"].as_str();
    if !one {
        return format!("the guest is run by {}", report.owner);
    }
    if !memory {
        let said = report.guest_memory.as_deref().unwrap_or("nothing");
        return format!("the guest says of its memory: {said}");
    }
    if !report.records.is_good() {
        let first = report.records.problems.first().map_or("damage", String::as_str);
        return format!("records are lost or the disk is damaged: {first}");
    }
    if let Some(cause) = job {
        return cause.to_owned();
    }
    if let Some(back) = report.back.as_ref().filter(|back| !back.is_good()) {
        return format!(
            "the way back: {}",
            back.cause.as_deref().unwrap_or("the disks differ")
        );
    }
    if let Some(first) = report.leftovers.first() {
        return format!("something is left behind: {first}");
    }
    if !digests {
        return "the agents' digests differ".to_owned();
    }
    "the job does not say that it ended well".to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn good() -> LiveReport {
        let mut report = LiveReport {
            owner: "target".to_owned(),
            guest_memory: Some("ok 5".to_owned()),
            records: Records {
                acknowledged: 10,
                clean: true,
                ..Records::default()
            },
            guest_before_per_s: Some(400.0),
            guest_during_per_s: Some(380.0),
            ..LiveReport::default()
        };
        report.read_job(
            json!({"ok": true, "phases_ms": {"ram": 12.5}, "live": {"rounds": 4, "predicted_blackout_ms": 210,
                "steps_ms": [["last round read", 7]], "decisions": ["0.1 s: a round"]}}),
        );
        report
    }

    #[test]
    fn ok_needs_everything() {
        let mut report = good();
        report.conclude();
        assert!(report.report.ok && report.safe && report.report.cause.is_none());
        assert_eq!(
            (report.rounds, report.guest_throughput_ratio),
            (Some(4), Some(0.95))
        );
        assert_eq!(
            (report.predicted_blackout_ms, report.phases_ms["ram"]),
            (Some(210.0), 12.5)
        );
        assert_eq!(report.steps_ms, [("last round read".to_owned(), 7)]);
        assert_eq!(report.decisions, ["0.1 s: a round"]);
        type Spoil = fn(&mut LiveReport);
        let spoil: [(Spoil, bool); 8] = [
            (|report| report.owner = "both".to_owned(), false),
            (|report| report.owner = "nobody".to_owned(), false),
            (|report| report.owner = "source".to_owned(), true),
            (|report| report.guest_memory = None, false),
            (|report| report.records.lost = 1, false),
            (|report| report.records.clean = false, false),
            (|report| report.report.target_digest = "x".to_owned(), true),
            (|report| report.leftovers.push("a bitmap".to_owned()), true),
        ];
        for (number, (spoil, safe)) in spoil.into_iter().enumerate() {
            let mut report = good();
            spoil(&mut report);
            report.conclude();
            assert!(!report.report.ok && report.report.cause.is_some(), "{number}");
            assert_eq!(report.safe, safe, "{number}");
        }
    }

    #[test]
    fn the_stable_names_are_there() {
        let mut report = good();
        report.conclude();
        let value = serde_json::to_value(report).unwrap();
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
            "blackout_qmp_ms",
            "blackout_heartbeat_ms",
            "predicted_blackout_ms",
            "rounds",
            "guest_throughput_ratio",
            "records_acknowledged",
            "records_lost",
            "phases_ms",
            "programs",
            "safe",
        ] {
            assert!(value.get(name).is_some(), "{name}");
        }
    }
}
