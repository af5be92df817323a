//! Why a monitor could not be used, or a command failed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// QEMU's classes of command errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    Generic,
    /// This QEMU does not have the command.
    CommandNotFound,
    /// There is no such device.
    DeviceNotFound,
    /// The device is not active.
    DeviceNotActive,
    /// What the command needs is missing (KVM).
    KvmMissingCap,
}

impl ErrorClass {
    pub(super) fn named(name: &str) -> Self {
        match name {
            "CommandNotFound" => Self::CommandNotFound,
            "DeviceNotFound" => Self::DeviceNotFound,
            "DeviceNotActive" => Self::DeviceNotActive,
            "KVMMissingCap" => Self::KvmMissingCap,
            _ => Self::Generic,
        }
    }
}

/// Why a monitor could not be used, or a command failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum QmpError {
    #[error("cannot connect to the QMP socket {}: {source}; is that VM running?", socket.display())]
    Connect {
        socket: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    #[error(
        "{} did not greet as a QMP monitor within {} s: another program may hold it; start QEMU with a QMP monitor \
         of its own for Longhaul", socket.display(), limit.as_secs_f32()
    )]
    NoGreeting { socket: PathBuf, limit: Duration },
    /// The connection works; QEMU refused.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        command: String,
        class: ErrorClass,
        desc: String,
    },
    #[error("QEMU did not answer {command} within {} s", limit.as_secs_f32())]
    Timeout { command: String, limit: Duration },
    #[error("QEMU did not reach '{what}' within {} s", limit.as_secs_f32())]
    NotReached { what: String, limit: Duration },
    #[error("the QMP connection to {} was lost: {reason}", socket.display())]
    Lost { socket: PathBuf, reason: String },
    #[error("QEMU's answer to {command} is not understood: {reason}")]
    Answer { command: String, reason: String },
}

impl QmpError {
    /// Whether QEMU itself said no, so that the connection is still good.
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether this QEMU does not know the command.
    pub const fn is_unknown_command(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                class: ErrorClass::CommandNotFound,
                ..
            }
        )
    }

    /// Whether the monitor is gone for good.
    pub const fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Connect { .. })
    }

    pub(crate) fn answer(command: &str, reason: impl Into<String>) -> Self {
        Self::Answer {
            command: command.to_owned(),
            reason: reason.into(),
        }
    }
}
