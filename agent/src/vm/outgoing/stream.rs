//! The socket that RAM flows through.
//!
//! A socket pair, one end of which QEMU gets over its monitor: nobody else can connect, and its buffer is ours to choose. Never
//! a pipe: QEMU breaks a stuck write off by shutting the socket down. Fallback: a unix socket that QEMU connects to.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::net::UnixListener;

use super::error::OutgoingError;
use super::stats::stats;
use crate::vm::qmp::Qmp;

/// The name under which QEMU knows its end of the pair.
const FD_NAME: &str = "longhaul-ram";
/// How long QEMU may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

pub(super) async fn pair(qmp: &Qmp, send_buffer: usize) -> Result<UnixStream, OutgoingError> {
    let (ours, theirs) = UnixStream::pair().map_err(OutgoingError::socket)?;
    let set = rustix::net::sockopt::set_socket_send_buffer_size(&theirs, send_buffer);
    set.map_err(|error| OutgoingError::socket(error.into()))?;
    qmp.send_fd(FD_NAME, OwnedFd::from(theirs)).await?;
    if let Err(error) = migrate(qmp, &format!("fd:{FD_NAME}")).await {
        // Where QEMU has not taken it, our name would stay.
        let _ = qmp.execute("closefd", json!({ "fdname": FD_NAME })).await;
        return Err(error);
    }
    Ok(ours)
}

pub(super) async fn listen(qmp: &Qmp, path: &Path) -> Result<UnixStream, OutgoingError> {
    let _ = std::fs::remove_file(path); // Left by a crash, or not there.
    let listener = UnixListener::bind(path).map_err(OutgoingError::socket)?;
    let accepted = async {
        migrate(qmp, &format!("unix:{}", path.display())).await?;
        match tokio::time::timeout(CONNECT_LIMIT, listener.accept()).await {
            Ok(accepted) => accepted.map_err(OutgoingError::socket),
            Err(_) => Err(OutgoingError::Failed {
                // QEMU accepts the command before it connects, so that the reason is told here.
                desc: stats(qmp).await?.error.unwrap_or_default(),
                status: stats(qmp).await?.status,
            }),
        }
    };
    let accepted = accepted.await;
    let _ = std::fs::remove_file(path);
    let stream = accepted?.0.into_std().map_err(OutgoingError::socket)?;
    stream.set_nonblocking(false).map_err(OutgoingError::socket)?;
    Ok(stream)
}

async fn migrate(qmp: &Qmp, uri: &str) -> Result<(), OutgoingError> {
    qmp.execute("migrate", json!({ "uri": uri })).await?;
    Ok(())
}

impl OutgoingError {
    fn socket(source: io::Error) -> Self {
        let source = std::sync::Arc::new(source);
        Self::Socket { source }
    }
}
