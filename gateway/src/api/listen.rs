//! Where the API listens: a unix socket, and TCP with mutual TLS where it is wanted.
//!
//! Owns both sockets. Promises that a socket file left by a dead gateway is replaced and one of a living gateway is not, and that a TLS
//! handshake that does not end holds nobody else up.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use longhaul_common::link::{LinkError, Role, TlsState, https_server_config};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::connections::Connections;
use super::{Api, router};
use crate::settings::ApiSection;

/// Handshakes at once.
const HANDSHAKES_MAX: usize = 32;
/// A handshake must be complete within this time.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// Why the API cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("another gateway answers on {path}; stop it, or give this one another api.socket")]
    InUse { path: PathBuf },
    #[error("cannot listen on {path}; see that its folder exists and may be written")]
    Socket { path: PathBuf, source: io::Error },
    #[error("cannot listen on api.listen = \"{address}\"")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("TLS for the API cannot be set up")]
    Tls(#[from] LinkError),
}

/// Serves the API for as long as the program runs.
pub async fn serve(settings: &ApiSection, tls: &Arc<TlsState>, api: Api) -> Result<(), ApiError> {
    let socket = unix_listener(&settings.socket).await?;
    tracing::info!(socket = %settings.socket.display(), "the API listens");
    let connections = Connections::new(router(api));
    tokio::spawn(serve_unix(socket, connections.clone()));
    let Some(address) = settings.listen else {
        return Ok(());
    };
    let failed = |source| ApiError::Tcp { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    let config = https_server_config(tls, &[Role::Operator])?;
    tokio::spawn(shake_hands(listener, TlsAcceptor::from(config), connections));
    tracing::info!(%local, "the API listens with mutual TLS");
    Ok(())
}

async fn serve_unix(socket: UnixListener, connections: Connections) {
    while let Some(place) = connections.place().await {
        match socket.accept().await {
            Ok((client, _)) => connections.serve(client, place),
            // Too many open files, for one: later there may be fewer.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn unix_listener(path: &Path) -> Result<UnixListener, ApiError> {
    let failed = |source| ApiError::Socket {
        path: path.to_owned(),
        source,
    };
    if UnixStream::connect(path).await.is_ok() {
        return Err(ApiError::InUse {
            path: path.to_owned(),
        });
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(listener)
}

async fn shake_hands(listener: TcpListener, acceptor: TlsAcceptor, connections: Connections) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else {
            return;
        };
        let Ok((stream, address)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        tokio::spawn(async move {
            let stream = match tokio::time::timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::warn!(%address, "refused an operator: {error}"),
                Err(_) => return tracing::debug!(%address, "an operator's handshake took too long"),
            };
            if let Some(place) = connections.place().await {
                drop(permit);
                connections.serve(stream, place);
            }
        });
    }
}
