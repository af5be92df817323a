//! Control messages of a job, on each hop.
//!
//! Owns the dialogue's words. Leaves alone what either end does about them. Each hop carries one bidirectional stream for each job
//! and attempt; its first frame says what the stream is for ([`AgentTask`] towards an agent, [`PeerTask`] towards a gateway), the
//! following ones go on as drawn in the parent module's header.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use super::live::{
    AgentWord, LinkForecast, LiveForecast, LiveOutcome, LivePolicy, LiveStage, LiveState, LiveSurvey,
    MediaRule, Place, ShadowId, SourceVm, TargetVm,
};
use super::operator::OperatorTask;
use super::prepare::PrepareTask;
pub use super::refusal::{Refusal, RefusalKind, chain};
use super::sequences::Sequences;
use super::window::WindowHello;
use super::words;
use crate::digest::Digest;
use crate::extent::Extent;
use crate::ids::{Attempt, DiskIndex, JobId};

/// Most disks of one VM.
pub const DISKS_MAX: usize = 256;
/// Most leaves in one [`FromTarget::Have`] frame.
pub const HAVE_MAX: usize = 8192;
/// Largest disk: keeps hostile sizes from costing memory, and sums over all disks of a VM within 64 bits.
pub const DISK_SIZE_MAX: u64 = 4 << 50;
/// Largest definition file of a VM, in bytes.
pub const DEFINITION_MAX: usize = 512 << 10;

/// First frame of a stream from a gateway to an agent of its site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentTask {
    Source(SourceOpen),
    Target(TargetOpen),
    /// Answered by one `PrepareAnswer`, and that is all.
    Prepare(PrepareTask),
    /// Answered by one `OperatorAnswer`, and that is all.
    Operator(OperatorTask),
}

/// First frame of a stream from the source gateway to the target gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerTask {
    /// The job's target side; `agent` is the name of the target agent.
    Target {
        #[serde(deserialize_with = "words::text")]
        agent: String,
        /// Whose window its payloads refer to; empty: that of all who name no tenant.
        #[serde(deserialize_with = "words::text")]
        tenant: String,
        open: TargetOpen,
    },
    /// About a tenant's window, or with an empty name that of all others. Answered by one `WindowAnswer`, and that is all.
    Window {
        #[serde(deserialize_with = "words::text")]
        tenant: String,
        hello: WindowHello,
    },
    /// Bytes follow, one at a time, that mean nothing: each is sent back. See `link::Silence`.
    Knock,
}

/// What the source agent is to read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceOpen {
    pub job: JobId,
    pub attempt: Attempt,
    pub disks: Vec<SourceDisk>,
    /// The VM's opaque definition file.
    pub definition: Option<PathBuf>,
    /// Whether free blocks of the guest's file systems stay behind.
    pub filter: bool,
    /// The running VM that the disks belong to; a cold move without it.
    pub live: Option<SourceVm>,
}

/// One disk to read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceDisk {
    pub path: PathBuf,
    /// "raw", "qcow2" ...; `None`: found out by the agent.
    pub format: Option<String>,
    /// Whether backing chains and internal snapshots are flattened; refused otherwise.
    pub flatten: bool,
}

/// One disk as the source agent found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedDisk {
    /// Guest-visible size in bytes.
    pub size: u64,
    #[serde(deserialize_with = "words::text")]
    pub format: String,
    /// Bytes that are no hole of the image.
    pub allocated: u64,
    /// Bytes proven free, over all parts; holes among them count as holes.
    pub free: u64,
    /// Bytes to be read: neither hole nor free.
    pub used: u64,
    pub parts: Vec<PartReport>,
    /// Facts a person should know, such as "2 internal snapshots are left behind".
    #[serde(deserialize_with = "words::list")]
    pub notes: Vec<String>,
    /// Milliseconds the scan took.
    pub scan_ms: u64,
    /// Bytes from the disk's start that earlier attempts have sent or passed over as durable, as far as the agent remembers.
    pub sent_before: u64,
    /// All that was written since this shadow was left is known here.
    pub since: Option<ShadowId>,
}

impl OpenedDisk {
    /// Whether its numbers fit together: sums over all disks of a VM then fit in 64 bits.
    pub fn is_sound(&self) -> bool {
        self.size <= DISK_SIZE_MAX
            && [self.allocated, self.free, self.used, self.sent_before]
                .iter()
                .all(|bytes| *bytes <= self.size)
    }
}

/// One part of a disk, and what the filter made of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartReport {
    /// "partition 2: ext4 'root'".
    #[serde(deserialize_with = "words::text")]
    pub name: String,
    pub extent: Extent,
    #[serde(deserialize_with = "words::text")]
    pub kind: String,
    /// The proof by which free blocks were skipped; `None`: copied whole.
    #[serde(deserialize_with = "words::maybe")]
    pub proof: Option<String>,
    pub free_bytes: u64,
    /// Why it was copied whole.
    #[serde(deserialize_with = "words::maybe")]
    pub reason: Option<String>,
}

/// What the source agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromSource {
    Opened {
        disks: Vec<OpenedDisk>,
        definition: Option<Vec<u8>>,
        /// Of a running VM.
        live: Option<Box<LiveSurvey>>,
    },
    /// Every batch of this disk was sent.
    DiskDone {
        disk: DiskIndex,
        digest: Digest,
        counts: DiskCounts,
    },
    /// The image did not change while it was read; the locks are held until the stream ends.
    Finished,
    /// For the target agent.
    Say(AgentWord),
    /// Where a live migration stands. Before `Opened` only where its handover is in doubt.
    Live(LiveState),
    /// The VM runs at the target, and this end has settled everything.
    Moved(Box<LiveOutcome>),
    Failed(Refusal),
}

/// What the source agent read of a disk, in bytes unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCounts {
    pub batches: u64,
    /// Data sent in this attempt.
    pub data: u64,
    /// Holes of the image.
    pub hole: u64,
    /// Read, and found to be zeros.
    pub zero: u64,
    /// Proven free.
    pub free: u64,
    /// Read, and found durable at the target with equal digest.
    pub kept: u64,
    /// Milliseconds spent reading, summed over threads.
    pub read_ms: u64,
    /// Milliseconds spent hashing, summed over threads.
    pub hash_ms: u64,
}

impl DiskCounts {
    /// Whether its numbers can be those of a disk of `size` bytes.
    pub fn is_sound(&self, size: u64) -> bool {
        let bytes = [self.data, self.hole, self.zero, self.free, self.kept];
        // No batch is empty; a century of milliseconds is enough for anybody.
        bytes.iter().all(|bytes| *bytes <= size)
            && self.batches <= size
            && [self.read_ms, self.hash_ms].iter().all(|ms| *ms < 1 << 42)
    }
}

/// What the source agent is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// Leaves that are durable at the target.
    Have(Have),
    /// All `Have` are said: read and send, within credit.
    Start,
    /// So many more bytes may be sent.
    Credit(u64),
    /// These batches are written and flushed at the target.
    Durable(Sequences),
    /// Check that nothing changed, and say `Finished`.
    Finish,
    /// From the target agent.
    Say(AgentWord),
    /// Give up, whatever stage it is at; answered by `Failed` once the VM runs on, or by `Moved` where it is too late.
    Cancel(Refusal),
    /// Of a running VM: what became of its data so far, now and then.
    Carried(Carried),
}

/// What became of a running VM's data in one attempt, as its gateway counts it. Bytes since the attempt began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// Data of the disks' rounds after the first, and what it was reduced to.
    pub dirty: (u64, u64),
    /// Reduced bytes of all kinds that the peer has restored.
    pub restored: u64,
    /// Whether more waited for the link just now than it had room for.
    pub limited: bool,
}

/// Durable leaves of one disk at the target: from `first` on `count` leaves, zeros but for `digests`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Have {
    pub disk: DiskIndex,
    pub first: u64,
    pub count: u64,
    pub digests: Vec<(u64, Digest)>,
    /// These leaves are as this shadow was left, whatever they hold; then without digests.
    pub shadow: Option<ShadowId>,
}

/// What the target agent is to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetOpen {
    pub job: JobId,
    pub attempt: Attempt,
    /// The job's name, for the hook.
    #[serde(deserialize_with = "words::text")]
    pub name: String,
    pub disks: Vec<TargetDisk>,
    pub definition: Option<Vec<u8>>,
    /// Only check: paths, space, hook; touch nothing and say `Opened`.
    pub dry_run: bool,
    /// A running VM is to arrive.
    pub live: Option<TargetVm>,
}

/// One disk to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetDisk {
    pub path: PathBuf,
    /// "raw" or "qcow2"; a path that is a block device is written as such.
    #[serde(deserialize_with = "words::text")]
    pub format: String,
    pub size: u64,
    /// Bytes that the content will take at most.
    pub needed: u64,
    pub preallocate: bool,
    pub overwrite: bool,
    /// A shadow may be what the copy begins with; it is used up then.
    pub shadow: bool,
    /// The shadow since which the source knows all changes.
    pub since: Option<ShadowId>,
}

/// What the target agent says, relayed by the target gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromTarget {
    Opened {
        #[serde(deserialize_with = "words::list")]
        notes: Vec<String>,
    },
    Have(Have),
    /// All `Have` are said.
    Ready,
    Credit(u64),
    /// By the target gateway: restored and checked; the source gateway may forget these.
    Accepted(Sequences),
    Durable(Sequences),
    /// The target cannot go on yet, such as for want of space; it tries again by itself.
    Waiting(Refusal),
    /// It goes on.
    Resumed,
    Verifying {
        disk: DiskIndex,
        bytes: u64,
    },
    Verified {
        disk: DiskIndex,
        digest: Digest,
        verify_ms: u64,
        flush_ms: u64,
    },
    Committed {
        paths: Vec<PathBuf>,
        #[serde(deserialize_with = "words::maybe")]
        hook: Option<String>,
    },
    Aborted,
    /// For the source agent.
    Say(AgentWord),
    Failed(Refusal),
    /// By the target gateway: these refer to blocks that it does not hold; the source gateway sends them again, plainly.
    Missing(Sequences),
}

/// What the target agent is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToTarget {
    /// Everything was sent and is durable: read it all back, and say `Verified` for each disk.
    Verify,
    /// Digests are equal: promote, call the hook.
    Commit { digests: Vec<Digest> },
    /// Remove what was written.
    Abort(Refusal),
    /// From the source agent.
    Say(AgentWord),
}
