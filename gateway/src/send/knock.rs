//! Knocking at a peer that is not heard, so that the end of a cut is noticed soon.
//!
//! Owns one stream of each connection, on which single bytes go out and come back; when is decided in `common/link`. Leaves alone what
//! the connection carries otherwise.

use longhaul_common::link::{KNOCK_EVERY, Link, Silence};
use longhaul_common::wire::frame;
use longhaul_common::wire::session::PeerTask;

/// Knocks at a peer that is not heard, for as long as the link lives; gives why it does not.
pub(super) async fn knock(link: &Link) -> String {
    let knocks = async {
        let (mut send, mut recv) = link.open_bi().await.map_err(|error| error.to_string())?;
        let broken = |error: &dyn std::fmt::Display| link.reason_or(error);
        frame::write(&mut send, &PeerTask::Knock)
            .await
            .map_err(|error| broken(&error))?;
        let (mut silence, mut answers) = (Silence::default(), [0; 64]);
        loop {
            tokio::select! {
                answered = recv.read(&mut answers) => match answered {
                    Ok(Some(_)) => {}
                    Ok(None) => return Ok(()),
                    Err(error) => return Err(broken(&error)),
                },
                () = tokio::time::sleep(KNOCK_EVERY) => {
                    let stats = link.stats();
                    if silence.look(stats.sent_packets, stats.received_packets) {
                        send.write_all(&[0]).await.map_err(|error| broken(&error))?;
                    }
                }
            }
        }
    };
    match knocks.await {
        Ok(()) => std::future::pending().await,
        Err(reason) => reason,
    }
}
