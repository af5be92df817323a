//! The connections to one peer, and the writing of payloads on them.
//!
//! Owns stage 5: several connections, each on its own socket, each pulling from the shared outbox as its congestion window allows.
//! Leaves what goes next to `outbox`. Promises that a dead connection costs nothing but the second sending of its own unaccepted
//! payloads, and that it is dialled again for as long as the program runs.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use longhaul_common::ids::Sequence;
use longhaul_common::link::{self, Identity, Link, LinkSettings, RecvStream, Role, SendStream, TlsState};
use longhaul_common::wire::ALPN_PEER;
use longhaul_common::wire::sequences::Sequences;
use longhaul_common::wire::session::{Refusal, RefusalKind, chain};
use tokio::sync::Notify;

use super::outbox::{ConnectionId, Flow, Outbox, Ready, SentAgain, window};
use crate::metrics::SENT_AGAIN;
use crate::settings::PeerSection;

/// So long a dead connection's payloads rest at least: what the peer sent before it died, if it did, has arrived by then.
const REST: Duration = Duration::from_millis(250);
/// And no longer than this.
const REST_MAX: Duration = Duration::from_secs(5);
/// The congestion window may have grown meanwhile: look again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// A call that is not answered by then (plus some round trips) is made anew: after a cut, QUIC's own repetitions come ever later.
const CALL_TIME: Duration = Duration::from_secs(4);
/// Waits between two tries to reach the peer.
const BACKOFF: [u64; 5] = [100, 250, 500, 1000, 2000];

/// What is known of the connections to a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerStats {
    pub connections: usize,
    pub rtt_ms: u64,
    pub sent_bytes: u64,
    pub lost_packets: u64,
    pub in_flight_bytes: u64,
    /// Payloads that wait for a connection.
    pub waiting_bytes: u64,
    /// Why the last try to connect failed, while there is no connection.
    pub problem: Option<String>,
}

#[derive(Default)]
struct Links {
    live: BTreeMap<ConnectionId, Link>,
    /// Sums of connections that are gone.
    sent_bytes: u64,
    lost_packets: u64,
    problem: Option<String>,
}

/// A peer gateway that this one sends to.
pub struct Peer {
    pub settings: PeerSection,
    tls: Arc<TlsState>,
    outbox: Mutex<Outbox>,
    /// Something was pushed, accepted or closed.
    changed: Notify,
    links: Mutex<Links>,
    linked: Notify,
    next: AtomicU64,
}

impl Peer {
    /// Begins to dial, and goes on for as long as the program runs.
    pub fn start(settings: PeerSection, tls: Arc<TlsState>) -> Arc<Self> {
        let peer = Arc::new(Self {
            settings,
            tls,
            outbox: Mutex::default(),
            changed: Notify::new(),
            links: Mutex::default(),
            linked: Notify::new(),
            next: AtomicU64::new(0),
        });
        for _ in 0..peer.settings.link.settings().connections {
            tokio::spawn(Arc::clone(&peer).keep_connected());
        }
        peer
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a payload into the outbox.
    pub fn push(&self, ready: Ready) {
        self.outbox().push(ready);
        self.changed.notify_waiters();
    }

    /// The peer accepted these.
    pub fn accepted(&self, flow: Flow, sequences: &Sequences) {
        self.outbox().accepted_all(flow, sequences);
        self.changed.notify_waiters();
    }

    /// What of a flow was sent a second time, because a connection died.
    pub fn sent_again(&self, flow: Flow) -> SentAgain {
        self.outbox().sent_again(flow)
    }

    /// Forgets a flow; gives what of it was never sent.
    pub fn close(&self, flow: Flow) -> Vec<Sequence> {
        let unsent = self.outbox().close(flow);
        self.changed.notify_waiters();
        unsent
    }

    /// A stream for a job's control messages, on the first connection there is; waits for one.
    pub async fn control(&self) -> Result<(Link, SendStream, RecvStream), Refusal> {
        loop {
            let linked = self.linked.notified();
            let link = self.links().live.values().next().cloned();
            let Some(link) = link else {
                linked.await;
                continue;
            };
            let lost = |error| Refusal::because(RefusalKind::Lost, &error);
            let (send, recv) = link.open_bi().await.map_err(lost)?;
            return Ok((link, send, recv));
        }
    }

    /// Why there is no connection, while there is none.
    pub fn problem(&self) -> Option<String> {
        let links = self.links();
        if links.live.is_empty() {
            links.problem.clone()
        } else {
            None
        }
    }

    /// Sums over all connections since the program started.
    pub fn stats(&self) -> PeerStats {
        let (in_flight_bytes, waiting_bytes) = {
            let outbox = self.outbox();
            (outbox.in_flight(), outbox.waiting())
        };
        let links = self.links();
        let live: Vec<_> = links.live.values().map(Link::stats).collect();
        PeerStats {
            connections: live.len(),
            rtt_ms: live
                .iter()
                .map(|stats| stats.rtt.as_millis() as u64)
                .min()
                .unwrap_or(0),
            sent_bytes: links.sent_bytes + live.iter().map(|stats| stats.sent_bytes).sum::<u64>(),
            lost_packets: links.lost_packets + live.iter().map(|stats| stats.lost_packets).sum::<u64>(),
            in_flight_bytes,
            waiting_bytes,
            problem: if links.live.is_empty() {
                links.problem.clone()
            } else {
                None
            },
        }
    }

    async fn keep_connected(self: Arc<Self>) {
        let mut settings = self.settings.link.settings();
        let round_trips = settings.rtt.unwrap_or_default() * 10;
        settings.handshake = settings.handshake.min(CALL_TIME + round_trips);
        let mut failures = 0;
        loop {
            match self.dial(&settings).await {
                Ok(link) => {
                    failures = 0;
                    self.use_link(link).await;
                }
                Err(problem) => {
                    let mut links = self.links();
                    if links.live.is_empty() && links.problem.as_ref() != Some(&problem) {
                        tracing::warn!(peer = %self.settings.site, "cannot reach the peer, trying on: {problem}");
                    }
                    links.problem = Some(problem);
                }
            }
            tokio::time::sleep(Duration::from_millis(BACKOFF[failures])).await;
            failures = (failures + 1).min(BACKOFF.len() - 1);
        }
    }

    async fn dial(&self, settings: &LinkSettings) -> Result<Link, String> {
        let PeerSection {
            site, name, address, ..
        } = &self.settings;
        let us = self.tls.identity();
        let expected =
            Identity::new(us.trust_domain(), site, Role::Gateway, name).map_err(|error| error.to_string())?;
        let found = tokio::net::lookup_host(address.as_str()).await;
        let mut found = found.map_err(|error| format!("'{address}' cannot be resolved: {error}"))?;
        let address: SocketAddr = found
            .next()
            .ok_or_else(|| format!("'{address}' has no address"))?;
        link::connect(address, &expected, ALPN_PEER, &self.tls, settings)
            .await
            .map_err(|error| chain(&error))
    }

    async fn use_link(&self, link: Link) {
        let id = ConnectionId(self.next.fetch_add(1, Ordering::Relaxed));
        tracing::info!(peer = %self.settings.site, connection = id.0, address = %link.remote_address(), "linked to the peer");
        self.links().live.insert(id, link.clone());
        self.linked.notify_waiters();
        let reason = tokio::select! {
            reason = self.transmit(id, &link) => reason,
            error = link.closed() => error.to_string(),
        };
        let stats = link.stats();
        {
            let mut links = self.links();
            links.live.remove(&id);
            links.sent_bytes += stats.sent_bytes;
            links.lost_packets += stats.lost_packets;
            links.problem = Some(reason.clone());
        }
        self.rest().await;
        let again = self.outbox().connection_lost(id);
        metrics::counter!(SENT_AGAIN).increment(again);
        self.changed.notify_waiters();
        tracing::warn!(peer = %self.settings.site, connection = id.0, again, "a connection to the peer ended: {reason}");
        link.close(link::code::DONE, "the connection failed");
    }

    /// Waits until another connection has heard from the peer: where the peer itself died, the others are dead as well and only do not
    /// know it yet. What they would carry again would be sent in vain; the job's attempt ends meanwhile instead.
    async fn rest(&self) {
        tokio::time::sleep(REST).await;
        let heard = |links: &Links| -> BTreeMap<ConnectionId, u64> {
            let received = |link: &Link| link.stats().received_packets;
            links
                .live
                .iter()
                .map(|(id, link)| (*id, received(link)))
                .collect()
        };
        let before = heard(&self.links());
        let alive = async {
            loop {
                tokio::time::sleep(LOOK_AGAIN).await;
                // One that is new was answered by the peer just now.
                let now = heard(&self.links());
                if now
                    .iter()
                    .any(|(id, received)| before.get(id).is_none_or(|known| known < received))
                {
                    return;
                }
            }
        };
        // Where nothing is heard for so long, the payloads wait in the outbox for whoever comes.
        let _ = tokio::time::timeout(REST_MAX, alive).await;
    }

    /// Writes payloads on one connection until it fails; gives the reason.
    async fn transmit(&self, id: ConnectionId, link: &Link) -> String {
        loop {
            let changed = self.changed.notified();
            let next = self.outbox().take(id, window(link.stats().congestion_window));
            let Some(ready) = next else {
                // Woken by a change, or soon in any case: the window grows by itself.
                let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
                continue;
            };
            if let Err(reason) = write(link, ready).await {
                return reason;
            }
        }
    }
}

async fn write(link: &Link, ready: Ready) -> Result<(), String> {
    let mut stream = link.open_uni().await.map_err(|error| error.to_string())?;
    // Fails only where the peer refused the stream already.
    let _ = stream.set_priority(ready.lane.priority());
    for part in ready.parts {
        stream
            .write_chunk(part)
            .await
            .map_err(|error| link.reason_or(&error))?;
    }
    // Fails only where the peer refused the stream: its attempt is over, and the control stream says so.
    let _ = stream.finish();
    Ok(())
}
