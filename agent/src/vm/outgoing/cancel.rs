//! The way back: from every state of an outgoing migration to a VM that runs as before.
//!
//! Serves a living job and an agent that comes back after a crash alike. Whether the VM may run on is decided before
//! (`handover`): after `completed` the target must be known not to run.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;

use super::error::OutgoingError;
use super::settings::Saved;
use super::stats::stats;
use crate::vm::qmp::{MigrationStatus, Qmp, QmpError, Watch};

/// From where the VM was called back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cancelled {
    /// What QEMU said first.
    pub found: MigrationStatus,
    /// What it said when everything had settled; `completed` where the end overtook the cancel.
    pub settled: MigrationStatus,
    /// Whether `cont` was needed: the VM stood still after `completed`.
    pub continued: bool,
    /// Whether the VM runs now; a VM that was paused before the move still stands.
    pub running: bool,
}

#[derive(Deserialize)]
struct Status {
    status: String,
    running: bool,
}

/// Calls an outgoing migration off, and lets the VM run on as before.
///
/// Close our end of the stream first where the migration may be past [`super::Outgoing::go_on`]: a QEMU that waits for a
/// reader does not hear the monitor. Never after the target may run.
///
/// # Errors
/// [`OutgoingError::NotRunning`] where the VM does not run on; what QEMU said else. May be repeated.
pub async fn cancel(qmp: &Qmp, saved: Option<&Saved>, limit: Duration) -> Result<Cancelled, OutgoingError> {
    let mut watch = Watch::start(qmp, limit);
    let found = stats(qmp).await?.status;
    let mut settled = found.clone();
    // QEMU 7.2 that hears `migrate_cancel` while it writes its last part forgets to take its images back: the VM runs on without
    // them, and its next write aborts QEMU. A stream that is closed ends the migration there without this: failed, or completed.
    let patience = Instant::now() + limit / 2;
    while settled == MigrationStatus::Device && Instant::now() < patience {
        watch.again("the migration ends with its stream").await?;
        settled = stats(qmp).await?.status;
    }
    if !settled.is_settled() {
        qmp.execute_within("migrate_cancel", json!({}), limit).await?;
        while !settled.is_settled() {
            watch.again("the migration is called off").await?;
            settled = stats(qmp).await?.status;
        }
    }
    let may_run = saved.is_none_or(Saved::was_running);
    let continued = resume(qmp, &mut watch, may_run).await?;
    let running = status(qmp).await?.running;
    if let Some(saved) = saved {
        saved.put_back(qmp).await?;
    }
    Ok(Cancelled {
        found,
        settled,
        continued,
        running,
    })
}

/// Sees to it that the VM does not stay in a state that only the migration brought about.
async fn resume(qmp: &Qmp, watch: &mut Watch, may_run: bool) -> Result<bool, OutgoingError> {
    let mut continued = false;
    loop {
        let now = status(qmp).await?;
        match now.status.as_str() {
            // QEMU is about to resume it by itself.
            "finish-migrate" => {}
            // It was paused before: `cont` is its operator's word.
            "postmigrate" if !may_run => return Ok(false),
            "postmigrate" if !continued => {
                qmp.execute("cont", json!({})).await?;
                continued = true;
            }
            "postmigrate" => {}
            _ => return Ok(continued),
        }
        match watch.again("the VM runs on").await {
            Err(QmpError::NotReached { .. }) => return Err(OutgoingError::NotRunning { status: now.status }),
            other => other?,
        }
    }
}

async fn status(qmp: &Qmp) -> Result<Status, QmpError> {
    qmp.query("query-status").await
}
