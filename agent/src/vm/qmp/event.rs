//! Events: what QEMU says without being asked.
//!
//! Owns the few kinds that Longhaul acts on, and a bounded queue of them for each listener. Promises: a listener that is
//! too slow is told that it missed some, so that it asks for the state instead of believing that nothing happened.

use std::fmt;

use serde_json::Value;
use tokio::sync::broadcast;

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The virtual CPUs stopped.
    Stop,
    /// The virtual CPUs run again.
    Resume,
    /// The guest was shut down, or QEMU is ending.
    Shutdown,
    /// The migration changed its state (needs the capability `events`).
    Migration(MigrationStatus),
    /// A pass over the RAM began; counted from 1.
    MigrationPass(u64),
    /// An export is gone, and what it kept busy is free.
    BlockExportDeleted(String),
    /// Any other event.
    Other { name: String, data: Value },
}

impl Event {
    pub(super) fn named(name: &str, data: Value) -> Self {
        let text = |key: &str| data.get(key).and_then(Value::as_str).map(str::to_owned);
        match name {
            "STOP" => Self::Stop,
            "RESUME" => Self::Resume,
            "SHUTDOWN" => Self::Shutdown,
            "MIGRATION" => match text("status") {
                Some(status) => Self::Migration(MigrationStatus::named(&status)),
                None => Self::other(name, data),
            },
            "MIGRATION_PASS" => match data.get("pass").and_then(Value::as_u64) {
                Some(pass) => Self::MigrationPass(pass),
                None => Self::other(name, data),
            },
            "BLOCK_EXPORT_DELETED" => match text("id") {
                Some(id) => Self::BlockExportDeleted(id),
                None => Self::other(name, data),
            },
            _ => Self::other(name, data),
        }
    }

    fn other(name: &str, data: Value) -> Self {
        let name = name.to_owned();
        Self::Other { name, data }
    }
}

/// Where a migration stands, at the source or at the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationStatus {
    /// There was none in this process.
    None,
    Setup,
    Active,
    /// The VM is stopped and its disks are still active.
    PreSwitchover,
    /// The device state is being sent.
    Device,
    Completed,
    Cancelling,
    Cancelled,
    Failed,
    /// Postcopy, `wait-unplug`, `colo` and what later versions add.
    Other(String),
}

impl MigrationStatus {
    pub(crate) fn named(name: &str) -> Self {
        match name {
            "none" => Self::None,
            "setup" => Self::Setup,
            "active" => Self::Active,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "completed" => Self::Completed,
            "cancelling" => Self::Cancelling,
            "cancelled" => Self::Cancelled,
            "failed" => Self::Failed,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether nothing goes on (any more).
    pub const fn is_settled(&self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Cancelled | Self::Failed
        )
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Other(name) => name,
        })
    }
}

/// The events from the moment of [`super::Qmp::events`] on.
#[derive(Debug)]
pub struct Events(pub(super) broadcast::Receiver<Event>);

/// What a listener gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    Event(Event),
    /// Some were missed: ask for the state.
    Missed,
    /// The connection is lost; nothing more will come.
    Lost,
}

impl Events {
    /// The next event, if it is here already.
    pub fn try_next(&mut self) -> Option<Heard> {
        match self.0.try_recv() {
            Ok(event) => Some(Heard::Event(event)),
            Err(broadcast::error::TryRecvError::Empty) => None,
            Err(broadcast::error::TryRecvError::Lagged(_)) => Some(Heard::Missed),
            Err(broadcast::error::TryRecvError::Closed) => Some(Heard::Lost),
        }
    }

    /// Waits for the next event. May be dropped at any time without losing one.
    pub async fn next(&mut self) -> Heard {
        match self.0.recv().await {
            Ok(event) => Heard::Event(event),
            Err(broadcast::error::RecvError::Lagged(_)) => Heard::Missed,
            Err(broadcast::error::RecvError::Closed) => Heard::Lost,
        }
    }
}
