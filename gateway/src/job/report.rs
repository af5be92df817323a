//! What a finished job has to say, for programs and for people.
//!
//! Owns the report's keys, which stay stable: scripts and the lab read them. Leaves layout to the operator program.

use std::collections::BTreeMap;

use longhaul_common::digest::Digest;
use longhaul_common::wire::session::{DiskCounts, LiveOutcome, OpenedDisk, PartReport};
use serde::{Deserialize, Serialize};

/// One finished job. All sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Report {
    pub ok: bool,
    /// Source and target stated the same digest for every disk.
    pub equal: bool,
    /// Size of all disks as the guest sees them.
    pub raw_bytes: u64,
    /// What was read: neither a hole nor proven free.
    pub used_bytes: u64,
    /// Left behind because it is proven free.
    pub skipped_free_bytes: u64,
    /// Holes of the images.
    pub hole_bytes: u64,
    /// Read, and found to be zeros.
    pub zero_bytes: u64,
    /// Data handed to the WAN in this job, raw; with what was sent again.
    pub sent_raw_bytes: u64,
    /// What crossed the WAN for this job: reduced data and its headers, with what was sent again.
    pub wan_bytes: u64,
    /// Raw data that was sent more than once, after a program or a link was lost.
    pub resent_bytes: u64,
    /// From the start of the run to the commit; pauses included.
    pub seconds: f64,
    /// Raw data made durable per second of transfer.
    pub goodput_bit_per_s: u64,
    /// Packets that QUIC lost and sent again on the WAN, while this job ran.
    pub wan_lost_packets: u64,
    pub attempts: u32,
    /// One digest over all disks, at the source.
    pub source_digest: String,
    /// One digest over all disks, read back at the target.
    pub target_digest: String,
    /// Time of each stage, in milliseconds.
    pub stages_ms: BTreeMap<String, u64>,
    pub disks: Vec<DiskReport>,
    /// Why the hook at the target failed, if it did.
    pub hook: Option<String>,
    /// Of a VM that was moved while it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<LiveReport>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// What moving a running VM came to. Times in milliseconds, sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LiveReport {
    /// Passes over the dirty bitmaps.
    pub rounds: u32,
    /// How often the RAM stream was begun.
    pub generations: u32,
    pub predicted_blackout_ms: u64,
    /// From the VM's stop at the source to the word, heard there, that it runs at the target.
    pub blackout_ms: u64,
    /// QEMU's RAM stream.
    pub ram_stream_bytes: u64,
    /// Page contents and device state of it, zero pages left out.
    pub ram_sent_bytes: u64,
    pub ram_wan_bytes: u64,
    /// What the guest wrote while its disks were copied, raw.
    pub dirty_bytes: u64,
    pub dirty_wan_bytes: u64,
    /// Each step of the handover, in its order.
    pub steps_ms: Vec<(String, u64)>,
    /// Every decision on the way, in words.
    pub decisions: Vec<String>,
}

impl LiveReport {
    /// What the source agent knows.
    pub fn new(outcome: &LiveOutcome) -> Self {
        Self {
            rounds: outcome.rounds,
            generations: outcome.generation,
            predicted_blackout_ms: outcome.predicted_blackout_ms,
            blackout_ms: outcome.blackout_ms,
            ram_stream_bytes: outcome.stream_bytes,
            dirty_bytes: outcome.dirty_bytes.iter().sum(),
            steps_ms: outcome.steps_ms.clone(),
            decisions: outcome.decisions.clone(),
            ..Self::default()
        }
    }
}

/// One disk of a finished job. All sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DiskReport {
    pub source: String,
    pub target: String,
    pub format: String,
    pub raw_bytes: u64,
    pub used_bytes: u64,
    pub skipped_free_bytes: u64,
    pub hole_bytes: u64,
    pub zero_bytes: u64,
    /// Raw data sent in the last attempt.
    pub sent_raw_bytes: u64,
    /// Data that the last attempt found durable already.
    pub kept_bytes: u64,
    pub wan_bytes: u64,
    pub source_digest: String,
    pub target_digest: String,
    pub scan_ms: u64,
    pub read_ms: u64,
    pub hash_ms: u64,
    pub flush_ms: u64,
    pub verify_ms: u64,
    pub parts: Vec<Part>,
}

/// One part of a disk, and what the filter made of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Part {
    pub name: String,
    pub kind: String,
    pub bytes: u64,
    pub skipped_free_bytes: u64,
    /// By which proof blocks were skipped.
    pub proof: Option<String>,
    /// Why nothing was skipped.
    pub reason: Option<String>,
}

impl From<&PartReport> for Part {
    fn from(part: &PartReport) -> Self {
        Self {
            name: part.name.clone(),
            kind: part.kind.clone(),
            bytes: part.extent.len(),
            skipped_free_bytes: part.free_bytes,
            proof: part.proof.clone(),
            reason: part.reason.clone(),
        }
    }
}

impl DiskReport {
    /// What the source agent knows of a disk before it is read.
    pub fn opened(source: &str, target: &str, disk: &OpenedDisk) -> Self {
        Self {
            source: source.to_owned(),
            target: target.to_owned(),
            format: disk.format.clone(),
            raw_bytes: disk.size,
            used_bytes: disk.used,
            skipped_free_bytes: disk.free,
            hole_bytes: disk.size.saturating_sub(disk.allocated),
            scan_ms: disk.scan_ms,
            parts: disk.parts.iter().map(Part::from).collect(),
            ..Self::default()
        }
    }

    /// What of a running VM's disk was proven free in the end; the rest of what was put off has been sent. `skipped`: how much of it
    /// the image stores, where the agent has counted it.
    pub fn left_behind(&mut self, parts: &[PartReport], skipped: Option<u64>) {
        let stored = self.raw_bytes.saturating_sub(self.hole_bytes);
        let proven: u64 = parts
            .iter()
            .map(|part| part.free_bytes)
            .fold(0, u64::saturating_add);
        let skipped = skipped.unwrap_or_else(|| proven.min(self.skipped_free_bytes));
        self.skipped_free_bytes = skipped.min(stored);
        self.used_bytes = stored - self.skipped_free_bytes;
        self.parts = parts.iter().map(Part::from).collect();
    }

    /// Adds what the source agent knows after it has read the disk.
    pub fn read(&mut self, digest: Digest, counts: &DiskCounts) {
        self.source_digest = digest.to_string();
        self.zero_bytes = counts.zero;
        self.sent_raw_bytes = counts.data;
        self.kept_bytes = counts.kept;
        self.read_ms = counts.read_ms;
        self.hash_ms = counts.hash_ms;
    }
}

/// One digest for several disks: that of the disk itself where there is one.
pub fn joint_digest(digests: &[Digest]) -> String {
    match digests {
        [one] => one.to_string(),
        several => {
            let bytes: Vec<u8> = several.iter().flat_map(|digest| digest.0).collect();
            Digest::of(&bytes).to_string()
        }
    }
}
