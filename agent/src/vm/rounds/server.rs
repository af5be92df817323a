//! QEMU's NBD server: there is one per QEMU, and it may be somebody else's.
//!
//! Owns the decision which one is used, and whether it is ours to stop.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::error::RoundsError;
use super::exports;
use crate::vm::attach::process_of;
use crate::vm::qmp::{Qmp, QmpError};

/// What an NBD server says first.
const GREETING: &[u8; 8] = b"NBDMAGIC";
const GREETING_LIMIT: Duration = Duration::from_secs(2);

/// The NBD server of one QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdServer {
    socket: PathBuf,
    ours: bool,
}

impl NbdServer {
    /// Starts it at `socket`; where one runs already, takes it if it is at `socket` (a crash left it) or at `foreign`.
    ///
    /// # Errors
    /// [`RoundsError::ServerTaken`] where one runs at an unknown place; [`RoundsError::NotItsServer`] where `foreign` is
    /// something else.
    pub async fn ensure(qmp: &Qmp, socket: &Path, foreign: Option<&Path>) -> Result<Self, RoundsError> {
        let refusal = match start(qmp, socket).await {
            Ok(()) => return Ok(Self::at(socket, true)),
            Err(error) if error.is_refusal() => error,
            Err(error) => return Err(error.into()),
        };
        if is_server_of(qmp, socket).await? {
            return Ok(Self::at(socket, true));
        }
        let taken = matches!(&refusal, QmpError::Refused { desc, .. } if desc.contains("already running"));
        match foreign {
            _ if !taken => Err(refusal.into()),
            None => Err(RoundsError::ServerTaken),
            Some(foreign) if is_server_of(qmp, foreign).await? => Ok(Self::at(foreign, false)),
            Some(foreign) => Err(RoundsError::NotItsServer(foreign.to_owned())),
        }
    }

    fn at(socket: &Path, ours: bool) -> Self {
        let socket = socket.to_owned();
        Self { socket, ours }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether we started it.
    pub const fn is_ours(&self) -> bool {
        self.ours
    }

    /// Stops it where it is ours and serves nobody else.
    pub(super) async fn stop(&self, qmp: &Qmp) -> Result<(), RoundsError> {
        if !self.ours {
            return Ok(());
        }
        stop_unless_used(qmp).await?;
        Ok(())
    }
}

async fn start(qmp: &Qmp, socket: &Path) -> Result<(), QmpError> {
    let path = socket.to_string_lossy();
    let addr = json!({ "type": "unix", "data": { "path": path } });
    // Some versions allow only 100 connections unless told otherwise; access is guarded by the socket's directory.
    let arguments = json!({ "addr": addr, "max-connections": 0 });
    qmp.execute("nbd-server-start", arguments).await?;
    Ok(())
}

/// Stops the server unless it has exports left; says whether it was stopped.
pub(super) async fn stop_unless_used(qmp: &Qmp) -> Result<bool, RoundsError> {
    if exports(qmp).await?.iter().any(|export| export.kind == "nbd") {
        return Ok(false);
    }
    match qmp.execute("nbd-server-stop", json!({})).await {
        Err(error) if error.is_refusal() => Ok(false), // It does not run.
        other => other.map(|_| true).map_err(RoundsError::from),
    }
}

/// Whether the NBD server that listens at `socket` is that of the QEMU behind `qmp`.
pub(super) async fn is_server_of(qmp: &Qmp, socket: &Path) -> Result<bool, RoundsError> {
    let greeted = tokio::time::timeout(GREETING_LIMIT, greeting(socket)).await;
    let Ok(Some(peer)) = greeted else {
        return Ok(false);
    };
    Ok(process_of(qmp).await? == Some(peer))
}

/// The process that listens at `socket` and greets as an NBD server.
async fn greeting(socket: &Path) -> Option<u32> {
    let mut stream = UnixStream::connect(socket).await.ok()?;
    let peer = stream.peer_cred().ok()?.pid()?;
    let mut hello = [0; 8];
    stream.read_exact(&mut hello).await.ok()?;
    (hello == *GREETING).then(|| u32::try_from(peer).ok()).flatten()
}
