//! Why the target's QEMU cannot take the VM.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::template::TemplateError;
use crate::vm::qmp::{MigrationStatus, QmpError};

/// Why the target's QEMU cannot take the VM.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IncomingError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    #[error("the target QEMU ended ({how}); it said: {said}")]
    Died { how: String, said: String },
    #[error(
        "the target QEMU gave no monitor at {} within {} s; it said: {said}", socket.display(), limit.as_secs()
    )]
    NoMonitor {
        socket: PathBuf,
        limit: Duration,
        said: String,
    },
    #[error(
        "the target QEMU does not wait for a VM (it says '{state}'); start it anew with -S -incoming defer"
    )]
    NotWaiting { state: String },
    #[error("the target QEMU could not load the VM: {desc}; it said: {said}")]
    LoadFailed { desc: String, said: String },
    #[error("the target QEMU has not loaded the VM (its migration says '{0}'); it must not be started")]
    NotLoaded(MigrationStatus),
    #[error(
        "the export '{0}' of the target QEMU is still there and could write under the guest; remove it first"
    )]
    ExportLeft(String),
}

impl IncomingError {
    pub(super) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source: Arc::new(source),
        }
    }
}
