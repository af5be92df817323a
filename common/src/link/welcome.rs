//! The first words on a link, in both directions.
//!
//! Each end judges the other's certificate, then sends [`WELCOME`] on its first one-way stream and waits for the other's. In TLS 1.3
//! the connecting side is done before its certificate was judged; with the welcome, a link that was handed out was accepted by
//! both ends, and a refusal surfaces where the link is made, on both of them.

use quinn::{Connection, ConnectionError};

/// What is said. The number is the version of this exchange, not of the protocol above.
const WELCOME: &[u8] = b"longhaul welcome 1\n";

/// Why there was no welcome.
pub(crate) enum Unwelcome {
    /// The connection ended first.
    Gone(ConnectionError),
    /// Something else was said.
    Stranger,
}

/// Says welcome and waits for the other's.
pub(crate) async fn exchange(connection: &Connection) -> Result<(), Unwelcome> {
    let gone = |connection: &Connection| {
        connection
            .close_reason()
            .map_or(Unwelcome::Stranger, Unwelcome::Gone)
    };
    let mut own = connection.open_uni().await.map_err(Unwelcome::Gone)?;
    if own.write_all(WELCOME).await.is_err() || own.finish().is_err() {
        return Err(gone(connection));
    }
    let mut theirs = connection.accept_uni().await.map_err(Unwelcome::Gone)?;
    match theirs.read_to_end(WELCOME.len()).await {
        Ok(said) if said == WELCOME => Ok(()),
        _ => Err(gone(connection)),
    }
}
