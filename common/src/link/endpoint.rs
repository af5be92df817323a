//! One connection to one authenticated peer.
//!
//! Owns [`Link`]: streams, figures, and how it ends. Who may have a link is decided before (`listen`, `connect`) and again when
//! certificates change (`tls`). Every clone of a `Link` is the same connection; when the last one is dropped the
//! connection is closed.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::congestion::SharedBudget;
use super::credentials::validity;
use super::identity::Identity;
use super::refusal::{LinkError, Refusal, code, explain};

/// QUIC packets are small: a reason must leave room for the rest of one.
const REASON_LENGTH_MAX: usize = 600;
/// Words go before every batch, by turns among themselves: they are few and small.
const WORDS: i32 = i32::MAX;
/// One-way streams of a connection that can be told apart by their priority; a new connection begins anew.
const STREAMS_MAX: u64 = 1 << 29;

/// An open connection to a peer whose certificate was judged good. Cheap to clone.
#[derive(Clone)]
pub struct Link {
    inner: Arc<LinkInner>,
}

pub(crate) struct LinkInner {
    connection: Connection,
    /// The connecting side's own endpoint; kept so that it can be drained.
    endpoint: Option<quinn::Endpoint>,
    peer: Identity,
    alpn: Vec<u8>,
    chain: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
    idle: Duration,
    budget: SharedBudget,
    closed_here: OnceLock<String>,
    /// Counts against the listener's limit while the link lives.
    _permit: Option<tokio::sync::OwnedSemaphorePermit>,
}

/// What a link was made of; see [`Link::new`].
pub(crate) struct LinkParts {
    pub(crate) connection: Connection,
    pub(crate) endpoint: Option<quinn::Endpoint>,
    pub(crate) peer: Identity,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) idle: Duration,
    pub(crate) budget: SharedBudget,
    pub(crate) permit: Option<tokio::sync::OwnedSemaphorePermit>,
}

/// A link's figures at one instant. Counters are since the link was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Smallest round-trip time that was measured.
    pub rtt_min: Duration,
    /// Bytes that may be in flight now.
    pub congestion_window: u64,
    /// UDP payload per packet now.
    pub mtu: u16,
    /// Packets sent.
    pub sent_packets: u64,
    /// UDP payload bytes sent, retransmissions included.
    pub sent_bytes: u64,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Their bytes: what was sent again.
    pub lost_bytes: u64,
    /// How often the controller was told of congestion.
    pub congestion_events: u64,
    /// How often packets of the full size stopped passing.
    pub black_holes: u64,
    /// Packets received.
    pub received_packets: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// How often the peer's connection window kept us from sending.
    pub window_blocked: u64,
}

impl Link {
    /// `None` if the peer's certificate or protocol is not there, which a finished handshake excludes.
    pub(crate) fn new(parts: LinkParts) -> Option<Self> {
        let alpn = protocol_of(&parts.connection)?;
        let not_after = validity(parts.chain.first()?)?.1;
        let inner = LinkInner {
            connection: parts.connection,
            endpoint: parts.endpoint,
            peer: parts.peer,
            alpn,
            chain: parts.chain,
            not_after,
            idle: parts.idle,
            budget: parts.budget,
            closed_here: OnceLock::new(),
            _permit: parts.permit,
        };
        Some(Self {
            inner: Arc::new(inner),
        })
    }

    pub(crate) fn inner(&self) -> &Arc<LinkInner> {
        &self.inner
    }

    /// Who is at the other end, as its certificate says.
    pub fn peer(&self) -> &Identity {
        &self.inner.peer
    }

    /// The protocol that both ends agreed on.
    pub fn alpn(&self) -> &[u8] {
        &self.inner.alpn
    }

    /// The peer's UDP address.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.connection.remote_address()
    }

    /// The last instant at which the peer's certificate is valid; the link is closed then.
    pub fn peer_not_after(&self) -> SystemTime {
        self.inner.not_after
    }

    /// A new one-way stream to the peer. What is written to it goes out behind every stream of a higher `priority` (0 to 3) and behind
    /// older ones of its own, and before all others, also where these are partly written. Waits while the peer allows no more.
    ///
    /// # Errors
    /// Why the link is gone.
    pub async fn open_uni(&self, priority: u8) -> Result<SendStream, LinkError> {
        let opened = self.inner.connection.open_uni().await;
        let stream = opened.map_err(|error| self.inner.explain(&error))?;
        let index = stream.id().index();
        if index >= STREAMS_MAX {
            self.close(
                code::DONE,
                "the connection has carried as many streams as it can; a new one follows",
            );
        }
        // Fails only where the stream is over already.
        let _ = stream.set_priority(rank(priority, index));
        Ok(stream)
    }

    /// The next one-way stream of the peer.
    ///
    /// # Errors
    /// Why the link is gone.
    pub async fn accept_uni(&self) -> Result<RecvStream, LinkError> {
        self.inner
            .connection
            .accept_uni()
            .await
            .map_err(|error| self.inner.explain(&error))
    }

    /// A new two-way stream: for words, which go before whatever waits on one-way streams. The peer sees it with its first byte.
    /// Waits while the peer allows no more.
    ///
    /// # Errors
    /// Why the link is gone.
    pub async fn open_bi(&self) -> Result<(SendStream, RecvStream), LinkError> {
        let opened = self.inner.connection.open_bi().await;
        opened.map(first).map_err(|error| self.inner.explain(&error))
    }

    /// The next two-way stream of the peer; our words on it go first, too.
    ///
    /// # Errors
    /// Why the link is gone.
    pub async fn accept_bi(&self) -> Result<(SendStream, RecvStream), LinkError> {
        let accepted = self.inner.connection.accept_bi().await;
        accepted.map(first).map_err(|error| self.inner.explain(&error))
    }

    /// The link's figures now.
    pub fn stats(&self) -> LinkStats {
        let stats = self.inner.connection.stats();
        LinkStats {
            rtt: stats.path.rtt,
            rtt_min: self.inner.connection.min_rtt(),
            congestion_window: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            sent_packets: stats.path.sent_packets,
            sent_bytes: stats.udp_tx.bytes,
            lost_packets: stats.path.lost_packets,
            lost_bytes: stats.path.lost_bytes,
            congestion_events: stats.path.congestion_events,
            black_holes: stats.path.black_holes_detected,
            received_packets: stats.udp_rx.datagrams,
            received_bytes: stats.udp_rx.bytes,
            window_blocked: stats.frame_tx.data_blocked,
        }
    }

    /// Caps the rate of this connection, and of those that share its budget, from now on; in bit/s with IP headers. No effect
    /// where the controller is not our own.
    pub fn set_rate(&self, bits_per_second: u64) {
        self.inner.budget.set_cap(bits_per_second, self.stats().mtu);
    }

    /// Ends the link; the peer is told code and reason. What is still in flight is lost.
    pub fn close(&self, code: u32, reason: &str) {
        self.inner.close(code, reason);
    }

    /// Ends the link and waits until the peer knows, for at most a second. On the connecting side only; elsewhere it does not wait.
    pub async fn close_and_wait(&self, code: u32, reason: &str) {
        self.close(code, reason);
        if let Some(endpoint) = &self.inner.endpoint {
            let _ = tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
        }
    }

    /// Waits until the link is gone, and says why.
    pub async fn closed(&self) -> LinkError {
        let error = self.inner.connection.closed().await;
        self.inner.explain(&error)
    }

    /// Why the link is gone; `None` while it lives.
    pub fn close_reason(&self) -> Option<LinkError> {
        self.inner
            .connection
            .close_reason()
            .map(|error| self.inner.explain(&error))
    }

    /// Why the link is gone, after a stream of it failed; the stream's own error where the link lives.
    pub fn reason_or(&self, stream_error: &dyn std::fmt::Display) -> String {
        self.close_reason()
            .map_or_else(|| stream_error.to_string(), |reason| reason.to_string())
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "link to {} at {}", self.peer(), self.remote_address())
    }
}

impl LinkInner {
    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    pub(crate) fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Ends a link whose peer's certificate would be refused now.
    pub(crate) fn close_refused(&self, why: &Refusal) {
        if self.connection.close_reason().is_some() {
            return;
        }
        tracing::warn!(
            peer = %self.peer.uri(), address = %self.connection.remote_address(), "closed a live link: {why}"
        );
        self.close(code::CERTIFICATE, &why.to_string());
    }

    fn close(&self, code: u32, reason: &str) {
        let _ = self.closed_here.set(reason.to_owned());
        close(&self.connection, code, reason);
    }

    fn explain(&self, error: &ConnectionError) -> LinkError {
        match (error, self.closed_here.get()) {
            (ConnectionError::LocallyClosed, Some(reason)) => LinkError::ClosedHere(reason.clone()),
            _ => explain(error, self.connection.remote_address(), self.idle),
        }
    }
}

/// The priority as quinn wants it: higher goes first, equal ones by turns. No two one-way streams are equal: sent by turns, the data of streams that
/// the peer has not taken yet could fill its whole receive window, and the streams it waits for would never end.
fn rank(priority: u8, index: u64) -> i32 {
    let lane = i64::from(priority.min(3)) + 1;
    let rank = i64::from(i32::MIN) + lane * STREAMS_MAX as i64 - 1 - index.min(STREAMS_MAX - 1) as i64;
    rank.try_into().unwrap_or(i32::MIN)
}

/// Gives our half of a two-way stream its place before the one-way ones.
fn first(stream: (SendStream, RecvStream)) -> (SendStream, RecvStream) {
    // Fails only where the stream is over already.
    let _ = stream.0.set_priority(WORDS);
    stream
}

/// Closes a connection with a reason short enough to fit one packet.
pub(crate) fn close(connection: &Connection, code: u32, reason: &str) {
    let end = reason.floor_char_boundary(REASON_LENGTH_MAX);
    connection.close(VarInt::from_u32(code), &reason.as_bytes()[..end]);
}

/// The certificate chain that the peer showed.
pub(crate) fn chain_of(connection: &Connection) -> Vec<CertificateDer<'static>> {
    let shown = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    shown.map(|chain| *chain).unwrap_or_default()
}

fn protocol_of(connection: &Connection) -> Option<Vec<u8>> {
    let data = connection
        .handshake_data()?
        .downcast::<quinn::crypto::rustls::HandshakeData>()
        .ok()?;
    data.protocol
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_go_before_lanes_and_older_streams_before_younger() {
        let mut order = Vec::new();
        for priority in (0..4).rev() {
            order.extend([0, 1, STREAMS_MAX - 1].map(|index| rank(priority, index)));
        }
        assert!(WORDS > order[0]);
        assert!(order.windows(2).all(|pair| pair[0] > pair[1]), "{order:?}");
    }
}
