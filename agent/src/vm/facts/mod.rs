//! What a VM is: everything that decides whether it can move, and to where.
//!
//! Owns the facts, gathered over QMP from either side (`gather`), and two pure judgements: what keeps a VM from moving at all
//! (`refusals`) and what makes two QEMUs unlike (`compare`). Leaves alone space, paths and the forecast.
//!
//! Promises: the facts are bounded in size and hold plain text only, so that they can be sent to the other site; each finding
//! names its cause and a remedy.

mod compare;
mod cpu;
mod disks;
mod gather;
mod ramblock;
mod refusals;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::vm::qmp::{QmpError, Version};

pub use self::compare::compare;
pub use self::cpu::HostCpu;
pub use self::disks::{DiskFacts, DiskKind};
pub use self::gather::gather;
pub use self::ramblock::RamBlock;
pub use self::refusals::{machine_option, refusals};

/// What one VM is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFacts {
    pub version: Version,
    /// QEMU's run state, such as `running`.
    pub status: String,
    /// The guest's name; may be empty.
    pub name: String,
    /// 36 characters; all zeros where none was given.
    pub uuid: String,
    /// Machine type, resolved: `pc-q35-7.2`, never `q35`.
    pub machine: String,
    /// Whether KVM runs it; else it is emulated (TCG).
    pub kvm: bool,
    pub cpu: CpuFacts,
    pub host: HostCpu,
    /// Bytes of RAM that the guest was started with and that were plugged in.
    pub ram: u64,
    pub ram_blocks: Vec<RamBlock>,
    /// Devices with a name of their own: id to type.
    pub devices: BTreeMap<String, String>,
    /// Types of devices without a name, in the order of their making.
    pub nameless: Vec<String>,
    /// Types of the machine's own devices, with their number.
    pub built_in: BTreeMap<String, u32>,
    pub pci: Vec<PciFacts>,
    pub disks: Vec<DiskFacts>,
    /// Why QEMU itself says that it cannot be migrated.
    pub blockers: Vec<String>,
    /// Active block jobs: type and device.
    pub block_jobs: Vec<String>,
    /// Models of TPMs.
    pub tpms: Vec<String>,
    /// State of an outgoing or incoming migration, `none` where there is none.
    pub migration: String,
    /// Migration capabilities that are on.
    pub capabilities: Vec<String>,
}

/// What the guest sees of its CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFacts {
    /// Such as `Skylake-Server`, `host`, `max`.
    pub model: String,
    pub count: u32,
    /// Whether QEMU calls the model the same on every host; unknown where it lists none.
    pub is_migration_safe: Option<bool>,
    /// The CPUID words that the guest sees, by leaf, subleaf and register.
    pub features: BTreeMap<String, u32>,
}

/// A PCI device, by its place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PciFacts {
    pub bus: u32,
    pub slot: u32,
    pub function: u32,
    pub vendor: u32,
    pub device: u32,
    /// Its id; may be empty.
    pub id: String,
}

/// Whether a finding ends the move before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Severity {
    /// The report says it.
    Warn,
    /// No byte moves.
    Refuse,
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Subject {
    Machine,
    Cpu,
    Ram,
    Device,
    Accelerator,
    Identity,
    Version,
    Blocker,
    BlockJob,
    Tpm,
    Passthrough,
    State,
    Disk,
}

/// One reason against a move, with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub severity: Severity,
    pub subject: Subject,
    /// A sentence without its full stop.
    pub cause: String,
    /// What to do: an imperative.
    pub remedy: String,
}

impl Finding {
    pub(super) fn refuse(subject: Subject, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Severity::Refuse, subject, cause, remedy)
    }

    pub(super) fn warn(subject: Subject, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Severity::Warn, subject, cause, remedy)
    }

    fn new(
        severity: Severity,
        subject: Subject,
        cause: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            severity,
            subject,
            cause: cause.into(),
            remedy: remedy.into(),
        }
    }

    /// Whether it ends the move before it begins.
    pub const fn is_refusal(&self) -> bool {
        matches!(self.severity, Severity::Refuse)
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; {}", self.cause, self.remedy)
    }
}

/// Why the facts could not be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FactsError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("this VM has more than {max} {what}; Longhaul moves VMs with fewer")]
    TooMany { what: &'static str, max: usize },
    #[error("QEMU's list of RAM blocks ('info ramblock') has a line that is not understood: {0}")]
    RamBlock(String),
}
