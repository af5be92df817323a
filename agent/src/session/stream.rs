//! A session's control stream to its gateway, one task for each direction.
//!
//! Owns passing messages on, as long as the stream lasts. Leaves what they mean to the sessions.

use longhaul_common::link::{RecvStream, SendStream};
use longhaul_common::wire::frame;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

/// Says what comes until there is no more, or the stream ends.
pub(super) async fn speak<T: Serialize>(mut send: SendStream, mut outgoing: mpsc::Receiver<T>) {
    while let Some(message) = outgoing.recv().await {
        if frame::write(&mut send, &message).await.is_err() {
            return;
        }
    }
    let _ = send.finish();
    let _ = send.stopped().await;
}

/// Hears until the stream ends, or nobody listens any more.
pub(super) async fn listen<T: DeserializeOwned>(mut recv: RecvStream, hear: mpsc::Sender<T>) {
    loop {
        match frame::read(&mut recv).await {
            Ok(Some(message)) => {
                if hear.send(message).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => return tracing::debug!("a session's control stream ended: {error}"),
        }
    }
}
