//! What an agent must know of running VMs after a crash: small files below the state folder.
//!
//! Owns their names and content. Leaves who may run a VM to the handover journal. Promises that a file is there before anything of a job
//! is in a QEMU, and that it is whole or not there (temporary name, sync, rename).

use std::path::{Path, PathBuf};

use longhaul_common::ids::JobId;
use longhaul_common::wire::session::{LiveOutcome, SourceVm, TargetOpen, TargetVm};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::disks::VmDisk;
use crate::session::target_disks::write_durably;
use crate::vm::io_limit::SavedLimits;
use crate::vm::media::Medium;
use crate::vm::outgoing::Saved;

/// A VM that leaves this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Leaving {
    pub job: String,
    pub vm: SourceVm,
    /// The monitor's socket, after links were resolved.
    pub qmp: PathBuf,
    pub nbd: PathBuf,
    pub disks: Vec<VmDisk>,
    /// QEMU's settings before its migration, while it runs.
    pub saved: Option<Saved>,
    /// The drives' limits before the guest's writes were held down, while they are.
    #[serde(default)]
    pub limits: Vec<SavedLimits>,
    /// Media that are out of their drives.
    #[serde(default)]
    pub ejected: Vec<Medium>,
    /// It was moved, and this came of it.
    pub outcome: Option<LiveOutcome>,
    /// The VM's definition on this host.
    #[serde(default)]
    pub definition: Option<PathBuf>,
    /// Hooks began to run.
    #[serde(default)]
    pub hooked: bool,
    /// The hook after the move has run to its end.
    #[serde(default)]
    pub told: bool,
    /// Once it was moved: what is left of it here, in the order of `disks`.
    #[serde(default)]
    pub shadows: Vec<Shadow>,
}

/// What a moved VM left of one disk at its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shadow {
    /// The name that the image had.
    pub file: PathBuf,
    /// The name that it has now; none for a block device, which keeps its own.
    pub shadow: Option<PathBuf>,
    /// Its inode: another file of that name is none of ours.
    pub inode: u64,
}

/// A VM that arrives at this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Arriving {
    pub open: TargetOpen,
    pub vm: TargetVm,
}

/// A guest whose file systems may be frozen by us.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Freezing {
    /// Its guest agent's socket, after links were resolved.
    pub guest_agent: PathBuf,
    /// The monitor's socket: it tells whether there is still a QEMU that could be frozen.
    pub qmp: PathBuf,
}

/// A VM whose dirty bitmaps were switched on ahead of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Prepared {
    /// How its people call the VM.
    pub name: String,
    pub qmp: PathBuf,
    /// The block nodes that have the bitmap.
    pub nodes: Vec<String>,
    pub bitmap: String,
}

const LEAVING: &str = "leaving";
const ARRIVING: &str = "arriving";
const FREEZING: &str = "freezing";
const PREPARED: &str = "prepared";

fn path(state: &Path, kind: &str, job: JobId) -> PathBuf {
    state.join(kind).join(format!("{job}.json"))
}

pub(super) fn save(state: &Path, kind: &str, job: JobId, content: &impl Serialize) -> Result<(), String> {
    let path = path(state, kind, job);
    let said =
        |error: &dyn std::fmt::Display| format!("the record {} cannot be written: {error}", path.display());
    let text = serde_json::to_vec_pretty(content).map_err(|error| said(&error))?;
    write_durably(&path, &text).map_err(|error| said(&error))
}

/// One job's record, where it is there and can be used.
pub(super) fn one<T: DeserializeOwned>(state: &Path, kind: &str, job: JobId) -> Option<T> {
    let text = std::fs::read(path(state, kind, job)).ok()?;
    serde_json::from_slice(&text).ok()
}

pub(super) fn all<T: DeserializeOwned>(state: &Path, kind: &str) -> Vec<(JobId, T)> {
    let Ok(folder) = std::fs::read_dir(state.join(kind)) else {
        return Vec::new();
    };
    let read = |entry: std::fs::DirEntry| {
        let path = entry.path();
        let job = path.file_stem()?.to_str()?.parse().ok()?;
        let text = std::fs::read(&path)
            .ok()
            .filter(|_| path.extension().is_some_and(|end| end == "json"))?;
        match serde_json::from_slice(&text) {
            Ok(record) => Some((job, record)),
            Err(error) => {
                tracing::error!(
                    "the record {} cannot be used: {error}; look after that VM by hand",
                    path.display()
                );
                None
            }
        }
    };
    folder.flatten().filter_map(read).collect()
}

pub(super) fn remove(state: &Path, kind: &str, job: JobId) {
    let path = path(state, kind, job);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("the record {} cannot be removed: {error}", path.display());
    }
}

impl Leaving {
    /// Blocks.
    pub(super) fn save(&self, state: &Path, job: JobId) -> Result<(), String> {
        save(state, LEAVING, job, self)
    }

    /// Blocks.
    pub(super) fn all(state: &Path) -> Vec<(JobId, Self)> {
        all(state, LEAVING)
    }

    /// Blocks.
    pub(super) fn remove(state: &Path, job: JobId) {
        remove(state, LEAVING, job);
    }
}

impl Arriving {
    /// Blocks.
    pub(super) fn save(&self, state: &Path, job: JobId) -> Result<(), String> {
        save(state, ARRIVING, job, self)
    }

    /// Blocks.
    pub(super) fn all(state: &Path) -> Vec<(JobId, Self)> {
        all(state, ARRIVING)
    }

    /// Blocks.
    pub(super) fn remove(state: &Path, job: JobId) {
        remove(state, ARRIVING, job);
    }
}

impl Freezing {
    /// Blocks.
    pub(super) fn save(&self, state: &Path, job: JobId) -> Result<(), String> {
        save(state, FREEZING, job, self)
    }

    /// Blocks.
    pub(super) fn all(state: &Path) -> Vec<(JobId, Self)> {
        all(state, FREEZING)
    }

    /// Blocks.
    pub(super) fn remove(state: &Path, job: JobId) {
        remove(state, FREEZING, job);
    }
}

impl Prepared {
    /// Blocks.
    pub(super) fn save(&self, state: &Path, job: JobId) -> Result<(), String> {
        save(state, PREPARED, job, self)
    }

    /// Blocks.
    pub(super) fn all(state: &Path) -> Vec<(JobId, Self)> {
        all(state, PREPARED)
    }

    /// Blocks.
    pub(super) fn remove(state: &Path, job: JobId) {
        remove(state, PREPARED, job);
    }
}
