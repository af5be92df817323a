//! The source's end of QEMU's own migration: RAM and device state flow out of a socket pair.
//!
//! Owns the order of commands, what of QEMU's settings is changed for it and put back afterwards, and the way back from
//! every state. Leaves alone the bytes (`ram`), the decision when to switch over (`converge`) and who owns the VM
//! (`handover`). Facts and their evidence: QEMU's documentation of `migrate`, `migrate-continue`, `migrate_cancel`.
//!
//! Promises: QEMU never switches over by itself to a state from which the VM cannot be called back; without a return path
//! the source runs on unless it says `completed`, and then only on [`cancel`].

mod cancel;
mod error;
mod settings;
mod stats;
mod stream;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use crate::vm::qmp::{MigrationStatus, Qmp, QmpError, Watch};

pub use self::cancel::{Cancelled, cancel};
pub use self::error::OutgoingError;
pub(crate) use self::settings::{Capability, set_capabilities};
pub use self::settings::{Saved, throttle};
pub use self::stats::{MigrationStats, RamStats, stats};

/// A downtime limit that no VM meets by chance unless nothing is left to send, in milliseconds.
const HOLD_BACK: u64 = 1;
/// QEMU's largest downtime limit, in milliseconds: switch over as soon as you can.
const SWITCH_OVER: u64 = 2_000_000;

/// How a migration is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutgoingOptions {
    /// What is asked for on QEMU's side of the socket pair, in bytes (SO_SNDBUF; the kernel doubles it): it bounds what QEMU
    /// believes to be sent and is not.
    pub send_buffer: usize,
    /// Whether [`throttle`] may be used in this move.
    pub may_throttle: bool,
    /// Instead of a socket pair: a unix socket that QEMU connects to, for a monitor that cannot pass descriptors. Its buffer
    /// is the system's default.
    pub listen: Option<PathBuf>,
}

impl Default for OutgoingOptions {
    fn default() -> Self {
        Self {
            send_buffer: 64 << 10,
            may_throttle: false,
            listen: None,
        }
    }
}

/// A migration that flows out of this QEMU.
#[derive(Debug)]
pub struct Outgoing {
    saved: Saved,
}

impl Outgoing {
    /// Starts the migration, and gives our end of its socket: blocking, to be read by a thread or made asynchronous by its
    /// user.
    ///
    /// `journal` gets what has to be put back after a crash, before anything is changed.
    ///
    /// # Errors
    /// See [`OutgoingError`]; settings are back as they were.
    pub async fn start(
        qmp: &Qmp,
        options: &OutgoingOptions,
        journal: impl FnOnce(&Saved),
    ) -> Result<(Self, UnixStream), OutgoingError> {
        let saved = Saved::read(qmp).await?;
        if !stats(qmp).await?.status.is_settled() {
            return Err(OutgoingError::AlreadyMigrating);
        }
        journal(&saved);
        let started = async {
            saved.prepare(qmp, HOLD_BACK, options.may_throttle).await?;
            match &options.listen {
                None => stream::pair(qmp, options.send_buffer).await,
                Some(path) => stream::listen(qmp, path).await,
            }
        };
        match started.await {
            Ok(stream) => Ok((Self { saved }, stream)),
            Err(error) => {
                let _ = saved.put_back(qmp).await; // The first error is the one to tell.
                Err(error)
            }
        }
    }

    /// What has to be put back afterwards.
    pub const fn saved(&self) -> &Saved {
        &self.saved
    }

    /// Waits until RAM flows.
    ///
    /// # Errors
    /// [`OutgoingError::Failed`] where QEMU gave up.
    pub async fn wait_active(&self, qmp: &Qmp, limit: Duration) -> Result<(), OutgoingError> {
        wait_for(qmp, limit, "active", |status| {
            matches!(
                status,
                MigrationStatus::Active | MigrationStatus::PreSwitchover | MigrationStatus::Device
            )
        })
        .await
    }

    /// Lets QEMU stop the VM as soon as it can; it then waits in pre-switchover.
    pub async fn switch_over(&self, qmp: &Qmp) -> Result<(), OutgoingError> {
        settings::downtime_limit(qmp, SWITCH_OVER).await?;
        Ok(())
    }

    /// Takes [`Self::switch_over`] back, where QEMU has not stopped the VM yet.
    pub async fn hold_back(&self, qmp: &Qmp) -> Result<(), OutgoingError> {
        settings::downtime_limit(qmp, HOLD_BACK).await?;
        Ok(())
    }

    /// Holds RAM back nearly whole, or lets it flow: while it crawls QEMU sends a page in 100 ms (its unit of pacing), and does not come to the
    /// end of what changes meanwhile. A guest that changes nothing is stopped all the same.
    pub async fn crawl(&self, qmp: &Qmp, crawl: bool) -> Result<(), OutgoingError> {
        settings::crawl(qmp, crawl).await?;
        Ok(())
    }

    /// Waits until the VM is stopped, its disks still active.
    ///
    /// # Errors
    /// [`OutgoingError::Failed`], or [`QmpError::NotReached`] after `limit`.
    pub async fn wait_pre_switchover(&self, qmp: &Qmp, limit: Duration) -> Result<(), OutgoingError> {
        wait_for(qmp, limit, "pre-switchover", |status| {
            *status == MigrationStatus::PreSwitchover
        })
        .await
    }

    /// Lets QEMU send the rest. From here on a blocked socket makes QEMU deaf: take everything at full speed, or close the
    /// socket before calling [`cancel`].
    pub async fn go_on(&self, qmp: &Qmp) -> Result<(), OutgoingError> {
        let state = json!({ "state": "pre-switchover" });
        qmp.execute("migrate-continue", state).await?;
        Ok(())
    }

    /// Waits until QEMU has written everything. This, and nothing seen on the stream, is the moment from which the VM does
    /// not run on by itself.
    ///
    /// # Errors
    /// [`OutgoingError::Failed`] where QEMU gave up and the VM runs on; [`QmpError::NotReached`] after `limit`.
    pub async fn wait_completed(&self, qmp: &Qmp, limit: Duration) -> Result<(), OutgoingError> {
        wait_for(qmp, limit, "completed", |status| {
            *status == MigrationStatus::Completed
        })
        .await
    }

    /// Calls the migration off and puts the settings back; see [`cancel`].
    pub async fn cancel(self, qmp: &Qmp, limit: Duration) -> Result<Cancelled, OutgoingError> {
        cancel(qmp, Some(&self.saved), limit).await
    }
}

/// Waits for a status; an end that is another one is an error.
async fn wait_for(
    qmp: &Qmp,
    limit: Duration,
    what: &str,
    reached: impl Fn(&MigrationStatus) -> bool,
) -> Result<(), OutgoingError> {
    let mut watch = Watch::start(qmp, limit);
    loop {
        let stats = stats(qmp).await?;
        if reached(&stats.status) {
            return Ok(());
        }
        if stats.status.is_settled() {
            let status = stats.status;
            let desc = stats.error.unwrap_or_default();
            return Err(OutgoingError::Failed { status, desc });
        }
        watch.again(what).await?;
    }
}

impl From<QmpError> for OutgoingError {
    fn from(error: QmpError) -> Self {
        Self::Qmp(error)
    }
}
