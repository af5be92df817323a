//! What QEMU tells of its migration.

use serde::Deserialize;

use crate::vm::qmp::{MigrationStatus, Qmp, QmpError};

/// A migration's state and figures.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrationStats {
    pub status: MigrationStatus,
    /// While RAM flows, and after.
    pub ram: Option<RamStats>,
    /// Milliseconds from the start.
    pub total_time: Option<u64>,
    /// Milliseconds that the VM stood still, once completed.
    pub downtime: Option<u64>,
    /// Milliseconds, as QEMU expects it.
    pub expected_downtime: Option<u64>,
    /// How much of their time the virtual CPUs are kept asleep, percent.
    pub throttle: u32,
    /// Why it cannot be migrated.
    pub blocked: Vec<String>,
    /// Why it failed.
    pub error: Option<String>,
}

/// RAM's figures. `remaining` and `dirty_pages_rate` change only when QEMU looks at its dirty bitmap (a sync).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamStats {
    /// Bytes written to the stream.
    pub transferred: u64,
    /// Bytes still to send.
    pub remaining: u64,
    /// Bytes of RAM.
    pub total: u64,
    /// Zero pages sent.
    pub duplicate: u64,
    /// Full pages sent.
    pub normal: u64,
    /// Pages per second that the guest dirties.
    pub dirty_pages_rate: u64,
    /// Looks at the dirty bitmap so far: passes.
    pub dirty_sync_count: u64,
    /// Bytes of a page.
    pub page_size: u64,
    pub pages_per_second: u64,
}

impl RamStats {
    /// Bytes per second that the guest dirties; 0 during the first pass, when nothing is counted yet.
    pub fn dirtied_per_second(&self) -> f64 {
        self.dirty_pages_rate as f64 * self.page_size as f64
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Told {
    status: Option<String>,
    ram: Option<RamStats>,
    total_time: Option<u64>,
    downtime: Option<u64>,
    expected_downtime: Option<u64>,
    cpu_throttle_percentage: Option<u32>,
    #[serde(default)]
    blocked_reasons: Vec<String>,
    error_desc: Option<String>,
}

/// Asks for them; works at the source and at the target.
///
/// # Errors
/// What QEMU or the connection said.
pub async fn stats(qmp: &Qmp) -> Result<MigrationStats, QmpError> {
    let told: Told = qmp.query("query-migrate").await?;
    let status = told.status.as_deref().unwrap_or("none");
    Ok(MigrationStats {
        status: MigrationStatus::named(status),
        ram: told.ram,
        total_time: told.total_time,
        downtime: told.downtime,
        expected_downtime: told.expected_downtime,
        throttle: told.cpu_throttle_percentage.unwrap_or_default(),
        blocked: told.blocked_reasons,
        error: told.error_desc,
    })
}
