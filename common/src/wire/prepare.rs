//! What is asked of a source agent ahead of a run, and its answer.
//!
//! Owns these messages. Leaves a run's own to `session`. Promises that text in an answer is fit to be shown.

use serde::{Deserialize, Serialize};

use super::session::{Refusal, SourceDisk, SourceVm};
use super::words;

/// What the source agent is asked to do ahead of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrepareTask {
    /// Switch the dirty bitmaps of this VM's disks on.
    Begin(PrepareOpen),
    /// Take them away again.
    End(PrepareOpen),
    /// Say which VMs are prepared.
    List,
}

/// A VM that is to be prepared, or not any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareOpen {
    /// How people call it.
    #[serde(deserialize_with = "words::text")]
    pub name: String,
    pub disks: Vec<SourceDisk>,
    pub vm: SourceVm,
}

/// What the agent says to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrepareAnswer {
    /// The VM, or all of them.
    Prepared(Vec<PreparedVm>),
    Failed(Refusal),
}

/// A VM whose dirty bitmaps are on ahead of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedVm {
    #[serde(deserialize_with = "words::text")]
    pub name: String,
    /// Its monitor's socket.
    #[serde(deserialize_with = "words::text")]
    pub qmp: String,
    pub disks: u32,
    /// For so long it has run without a stop and with its bitmaps on, as far as the agent has seen.
    pub age_ms: Option<u64>,
    /// Bytes written since the bitmaps are on.
    pub dirty_bytes: Option<u64>,
    #[serde(deserialize_with = "words::list")]
    pub notes: Vec<String>,
}
