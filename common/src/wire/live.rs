//! Running VMs: what is asked of the agents, found, and told of a live migration.
//!
//! Owns these messages. Leaves the dialogue that they are part of to `session`, and what one agent says to the other past the gateways to
//! the agents.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::session::PartReport;
use super::words;
use crate::digest::Digest;
use crate::ids::{DiskIndex, JobId};

/// A running VM to be moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceVm {
    /// Socket of a QMP monitor of its QEMU.
    pub qmp: PathBuf,
    /// Socket of its guest agent, where it has one.
    pub guest_agent: Option<PathBuf>,
    /// Have the guest trim its file systems first.
    pub fstrim: bool,
    pub policy: LivePolicy,
    /// The job's name, for hooks.
    #[serde(deserialize_with = "words::text")]
    pub name: String,
    /// The target, for hooks.
    pub target: Place,
    /// What becomes of read-only media that are not among the disks.
    pub media: MediaRule,
    /// Only look: sample how fast the VM changes, say `Opened` with the forecast for this link, and leave nothing behind.
    pub plan: Option<LinkForecast>,
}

/// An agent at a site, as hooks are told of the other side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    #[serde(deserialize_with = "words::text")]
    pub site: String,
    #[serde(deserialize_with = "words::text")]
    pub agent: String,
}

/// What becomes of a read-only medium that is not copied as a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MediaRule {
    /// The VM is not moved while one is there.
    #[default]
    Refuse,
    /// Taken out of its drive before RAM moves; put back where the VM stays.
    Eject,
    /// The target's QEMU has the same medium in the same drive already.
    Map,
}

/// What the way to the target is held to give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkForecast {
    /// Bytes of payload per second; `None`: nobody knows.
    pub bytes_per_s: Option<u64>,
    pub rtt_us: u64,
}

/// What a live migration may do to reach its end. Times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LivePolicy {
    /// Longest blackout that is aimed at.
    pub blackout_ms: u64,
    /// The guest's CPUs may be slowed down.
    pub auto_converge: bool,
    /// The guest's writes may be slowed down.
    pub io_throttle: bool,
    /// So long a job that does not converge keeps the disks in sync before it gives up; `None`: for ever.
    pub give_up_ms: Option<u64>,
    /// So long a broken link may hold the RAM stream before the migration is cancelled and begun anew.
    pub hold_ms: u64,
    /// Granularity of the dirty bitmaps, in bytes; 0: by the size of the disks.
    pub granularity: u32,
    /// Free blocks without a proof newer than the first bitmap count as free after this time; `None`: never.
    pub free_proof_age_ms: Option<u64>,
}

/// What the source agent found of a running VM, before a byte has moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveSurvey {
    /// For the target agent: what the VM is, to be compared with the QEMU that it would arrive in.
    pub vm: AgentWord,
    /// What a person should know.
    #[serde(deserialize_with = "words::list")]
    pub notes: Vec<String>,
    /// For a plan.
    pub forecast: Option<LiveForecast>,
}

/// What moving a running VM would take. Times in milliseconds, sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveForecast {
    /// Of each disk, bytes per second that become dirty, as sampled.
    pub disks_dirty: Vec<u64>,
    pub ram: u64,
    /// Bytes of RAM per second that become dirty, as sampled; `None`: QEMU cannot say.
    pub ram_dirty: Option<u64>,
    /// How long was sampled.
    pub sampled_ms: u64,
    /// Reduced bytes on the WAN, disks and RAM together.
    pub wan_bytes: u64,
    pub time_ms: u64,
    /// Rounds of the disks, with round 0 and the last.
    pub rounds: u32,
    /// Passes over RAM.
    pub passes: u32,
    pub blackout_ms: u64,
    /// Whether the blackout gets short enough; `None`: cannot be told.
    pub converges: Option<bool>,
    /// The verdict in one sentence.
    #[serde(deserialize_with = "words::text")]
    pub why: String,
}

/// From one agent to the other; gateways do not look into it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentWord(pub Vec<u8>);

/// Where a live migration stands, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveState {
    pub stage: LiveStage,
    /// The newest pass over the dirty bitmaps.
    pub round: u32,
    /// Bytes of the disks that are yet to be sent.
    pub disk_left: u64,
    /// Bytes of RAM that are yet to be sent, as QEMU counts them.
    pub ram_left: u64,
    /// What was decided last, and why.
    #[serde(deserialize_with = "words::text")]
    pub decision: String,
}

/// The stages of a live migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LiveStage {
    /// Round 0: what the disks use.
    #[default]
    Copy,
    /// Rounds over the dirty bitmaps.
    Rounds,
    /// RAM, beside the rounds.
    Ram,
    /// The VM is stopped.
    Handover,
    /// Handed over, and nothing heard from the target since.
    InDoubt,
    Done,
}

/// What a live migration came to. Times in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveOutcome {
    pub rounds: u32,
    pub generation: u32,
    pub predicted_blackout_ms: u64,
    /// From QEMU's STOP at the source to the target's word that the VM runs; by this host's clock, so it includes the word's way.
    pub blackout_ms: u64,
    /// Bytes of QEMU's RAM stream.
    pub stream_bytes: u64,
    /// Over the RAM stream, as QEMU wrote it and as the target's QEMU was given it: equal, or the VM would not run there.
    pub stream_digest: Digest,
    /// Of each step its name and how long it took.
    pub steps_ms: Vec<(String, u64)>,
    /// Every decision, in words.
    #[serde(deserialize_with = "words::list")]
    pub decisions: Vec<String>,
    #[serde(deserialize_with = "words::list")]
    pub notes: Vec<String>,
    /// Of each disk: bytes of data in rounds after the first.
    pub dirty_bytes: Vec<u64>,
    /// Of each disk its parts, with the free blocks that were left behind and by which proof.
    pub parts: Vec<Vec<PartReport>>,
    /// Of each disk: bytes that its image stores and that were left behind; empty where they were not counted.
    pub skipped_bytes: Vec<u64>,
}

/// The VM that is to arrive running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetVm {
    /// A QEMU that waits for it already (`-incoming defer`); started by the agent's template without it.
    pub qmp: Option<PathBuf>,
    /// The source, for hooks. The target's gateway sets the site, from the peer's certificate.
    pub source: Place,
    /// What the source agent says of the VM, for a comparison before a byte moves; not known where the source has moved it already.
    pub vm: Option<AgentWord>,
}

/// A disk's copy that stayed behind when its VM was moved while it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowId {
    /// The job that moved the VM away.
    pub job: JobId,
    /// Which of its RAM streams the VM was moved by.
    pub generation: u32,
    /// The disk's number in that job.
    pub disk: DiskIndex,
}

impl fmt::Display for ShadowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.job, self.generation, self.disk)
    }
}
