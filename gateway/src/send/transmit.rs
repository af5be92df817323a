//! The connections to one peer, and the writing of payloads on them.
//!
//! Owns stage 5: several connections, each on its own socket, each pulling from the shared outbox as its congestion window allows.
//! Leaves what goes next to `outbox`. Promises that a dead connection costs nothing but the second sending of its own unaccepted
//! payloads, and that it is dialled again for as long as the program runs.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use longhaul_common::ids::Sequence;
use longhaul_common::link::{self, Identity, Link, LinkSettings, RecvStream, Role, SendStream, TlsState};
use longhaul_common::wire::ALPN_PEER;
use longhaul_common::wire::sequences::Sequences;
use longhaul_common::wire::session::{Refusal, RefusalKind, chain};
use tokio::sync::{Notify, OwnedSemaphorePermit};

use super::outbox::{ConnectionId, Flow, Lane, Outbox, Ready, Room, SentAgain, window};
use super::rest::{Heard, Rest};
use super::{greeting, knock};
use crate::metrics::SENT_AGAIN;
use crate::reduction::{CHOOSE_EVERY, Kept, Ladder, Level, Pair, Seen, Windows, Work};
use crate::settings::PeerSection;

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

/// What is remembered of a payload until the peer has accepted it.
pub struct Pending {
    pub kept: Kept,
    /// The windows that it refers to, and adds to.
    pub pair: Option<Arc<Pair>>,
    /// Header and raw data, where the peer may lack what the payload refers to.
    pub plain: Option<[Bytes; 2]>,
    /// Bytes on the stream.
    pub len: u64,
    /// Of the target's credit for disks, what it takes.
    pub credit: u64,
    /// Memory of all.
    pub hold: Option<Arc<OwnedSemaphorePermit>>,
}

/// By lane.
#[derive(Default)]
struct Ladders {
    levels: [Ladder; 4],
    /// When each chose last.
    chosen: [Option<Instant>; 4],
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
    pending: Mutex<HashMap<Flow, BTreeMap<Sequence, Pending>>>,
    /// How much work each lane's data is worth.
    ladders: Mutex<Ladders>,
    /// Bytes of payloads that the peer has accepted.
    delivered: AtomicU64,
    /// The windows shared with this peer, by tenant; the empty name is that of all others.
    pairs: BTreeMap<String, Arc<Pair>>,
    /// Known ones, also where there are no windows.
    tenants: Vec<String>,
    /// Something was pushed, accepted or closed.
    changed: Notify,
    links: Mutex<Links>,
    linked: Notify,
    next: AtomicU64,
}

impl Peer {
    /// Begins to dial, and goes on for as long as the program runs.
    pub fn start(settings: PeerSection, tls: Arc<TlsState>, windows: &Windows) -> Arc<Self> {
        let name = identity(&settings, &tls)
            .ok()
            .map(|identity| identity.to_string());
        let pair = |tenant: &str| Some((tenant.to_owned(), windows.with(name.as_ref()?, tenant)?));
        let pairs = windows.tenants().filter_map(pair).collect();
        let named = windows.tenants().filter(|tenant| !tenant.is_empty());
        let tenants = named.map(str::to_owned).collect();
        let peer = Arc::new(Self {
            settings,
            tls,
            outbox: Mutex::default(),
            pending: Mutex::default(),
            ladders: Mutex::default(),
            delivered: AtomicU64::new(0),
            pairs,
            tenants,
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

    /// The windows for a tenant's payloads; `None` where there is no such tenant, or there are no windows.
    pub fn pair(&self, tenant: &str) -> Option<Arc<Pair>> {
        self.pairs.get(tenant).cloned()
    }

    /// The names of tenants, each with windows of its own where there are any.
    pub fn tenants(&self) -> impl Iterator<Item = &str> {
        self.tenants.iter().map(String::as_str)
    }

    /// Has a flow send no more than so many bytes per second of payload.
    pub fn set_cap(&self, flow: Flow, bytes_per_second: u64) {
        self.outbox().set_cap(flow, bytes_per_second, Instant::now());
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<Flow, BTreeMap<Sequence, Pending>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a payload into the outbox, and remembers what belongs to it.
    pub fn push(&self, ready: Ready, pending: Pending) {
        let mut flows = self.pending();
        flows
            .entry(ready.flow)
            .or_default()
            .insert(ready.sequence, pending);
        drop(flows);
        self.push_again(ready);
    }

    /// Puts a payload into the outbox in place of one that the peer could not restore.
    pub fn push_again(&self, ready: Ready) {
        self.outbox().push(ready);
        self.changed.notify_waiters();
    }

    /// The peer accepted these; gives the credit that they took, and their bytes.
    pub fn accepted(&self, flow: Flow, sequences: &Sequences) -> (u64, u64) {
        self.outbox().accepted_all(flow, sequences);
        self.changed.notify_waiters();
        let accepted: Vec<_> = {
            let mut flows = self.pending();
            let Some(known) = flows.get_mut(&flow) else {
                return (0, 0);
            };
            let named = sequences.among(known.keys().copied());
            named
                .iter()
                .filter_map(|sequence| known.remove(sequence))
                .collect()
        };
        let bytes = accepted.iter().map(|pending| pending.len).sum();
        self.delivered.fetch_add(bytes, Ordering::Relaxed);
        for pending in &accepted {
            if let Some(pair) = &pending.pair {
                pair.accepted(&pending.kept);
            }
        }
        (accepted.iter().map(|pending| pending.credit).sum(), bytes)
    }

    fn ladders(&self) -> MutexGuard<'_, Ladders> {
        self.ladders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much work a lane's next batch is worth, while `waiting` batches wait for `workers` threads.
    pub fn level(&self, lane: Lane, waiting: usize, workers: usize, now: Instant) -> Level {
        let due = {
            let ladders = self.ladders();
            let chosen = ladders.chosen[lane as usize];
            chosen.is_none_or(|chosen| now.saturating_duration_since(chosen) >= CHOOSE_EVERY)
        };
        if !due {
            return self.ladders().levels[lane as usize].level();
        }
        let queued = self.queued(lane);
        let mut ladders = self.ladders();
        ladders.chosen[lane as usize] = Some(now);
        ladders.levels[lane as usize].choose(Seen {
            now,
            queued,
            delivered: self.delivered.load(Ordering::Relaxed),
            waiting,
            workers,
        })
    }

    /// Bytes of this lane and those before it that the link has no room for.
    fn queued(&self, lane: Lane) -> u64 {
        let windows: u64 = {
            let links = self.links();
            links
                .live
                .values()
                .map(|link| link.stats().congestion_window)
                .sum()
        };
        let outbox = self.outbox();
        outbox.waiting_up_to(lane) + outbox.in_flight().saturating_sub(windows)
    }

    /// Whether a flow has more to send than the link has room for, or its own cap.
    pub fn is_limited(&self, flow: Flow) -> bool {
        let is_held = self.outbox().is_held(flow, Instant::now());
        is_held == Some(true) || self.queued(Lane::Bulk) > 0
    }

    /// What a lane's batch took at `level`.
    pub fn measured(&self, lane: Lane, level: Level, work: Work) {
        self.ladders().levels[lane as usize].measured(level, work);
    }

    /// How much work each lane's data is worth right now, by the lane's name.
    pub fn levels(&self) -> [(&'static str, Level); 4] {
        let ladders = self.ladders();
        Lane::ALL.map(|lane| (lane.name(), ladders.levels[lane as usize].level()))
    }

    /// The peer cannot restore these: what it takes to send them plainly. One that is on its way again already stays: the peer will say
    /// so once more.
    pub fn missing(&self, flow: Flow, sequences: &Sequences) -> Vec<(Ready, [Bytes; 2])> {
        let named = {
            let flows = self.pending();
            flows
                .get(&flow)
                .map(|known| sequences.among(known.keys().copied()))
        };
        let mut again = Vec::new();
        for sequence in named.unwrap_or_default() {
            let Some(ready) = self.outbox().accepted(flow, sequence) else {
                continue;
            };
            let mut flows = self.pending();
            let pending = flows.get_mut(&flow).and_then(|known| known.get_mut(&sequence));
            let Some(pending) = pending else { continue };
            let kept = std::mem::take(&mut pending.kept);
            if let Some(pair) = &pending.pair {
                pair.missing(&kept);
            }
            if let Some(plain) = pending.plain.clone() {
                again.push((ready, plain));
            }
        }
        again
    }

    /// What of a flow was sent a second time, because a connection died.
    pub fn sent_again(&self, flow: Flow) -> SentAgain {
        self.outbox().sent_again(flow)
    }

    /// Forgets a flow; gives what of it was never sent.
    pub fn close(&self, flow: Flow) -> Vec<Sequence> {
        let unsent = self.outbox().close(flow);
        self.changed.notify_waiters();
        let pending = self.pending().remove(&flow).unwrap_or_default();
        for pending in pending.values() {
            if let Some(pair) = &pending.pair {
                pair.given_up(&pending.kept);
            }
        }
        unsent
    }

    /// A stream for a job's control messages, on the newest connection there is; waits for one. Where the peer was restarted, older
    /// ones may not know yet that they are dead.
    pub async fn control(&self) -> Result<(Link, SendStream, RecvStream), Refusal> {
        loop {
            let linked = self.linked.notified();
            let link = self.links().live.values().next_back().cloned();
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
        let mut settings = self.settings.link.far_settings();
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
        let address = &self.settings.address;
        let expected = identity(&self.settings, &self.tls)?;
        let found = tokio::net::lookup_host(address.as_str()).await;
        let mut found = found.map_err(|error| format!("'{address}' cannot be resolved: {error}"))?;
        let address: SocketAddr = found
            .next()
            .ok_or_else(|| format!("'{address}' has no address"))?;
        link::connect(address, &expected, ALPN_PEER, &self.tls, settings)
            .await
            .map_err(|error| chain(&error))
    }

    async fn use_link(self: &Arc<Self>, link: Link) {
        let id = ConnectionId(self.next.fetch_add(1, Ordering::Relaxed));
        tracing::info!(peer = %self.settings.site, connection = id.0, address = %link.remote_address(), "linked to the peer");
        greeting::agree(&link, &self.settings.site, &self.pairs).await;
        self.links().live.insert(id, link.clone());
        self.linked.notify_waiters();
        let reason = tokio::select! {
            reason = self.transmit(id, &link) => reason,
            error = link.closed() => error.to_string(),
            reason = knock::knock(&link) => reason,
        };
        let stats = link.stats();
        {
            let mut links = self.links();
            links.live.remove(&id);
            links.sent_bytes += stats.sent_bytes;
            links.lost_packets += stats.lost_packets;
            links.problem = Some(reason.clone());
        }
        tracing::warn!(peer = %self.settings.site, connection = id.0, "a connection to the peer ended: {reason}");
        // The next one is dialled at once: a VM may stand until there is one.
        let peer = Arc::clone(self);
        tokio::spawn(async move {
            peer.rest().await;
            let again = peer.outbox().connection_lost(id);
            metrics::counter!(SENT_AGAIN).increment(again);
            peer.changed.notify_waiters();
            tracing::debug!(peer = %peer.settings.site, connection = id.0, again, "what a dead connection carried goes on another");
            link.close(link::code::DONE, "the connection failed");
        });
    }

    /// Packets received, by connection.
    fn heard(&self) -> Heard {
        let links = self.links();
        let received = |(id, link): (&ConnectionId, &Link)| (*id, link.stats().received_packets);
        links.live.iter().map(received).collect()
    }

    /// Waits before what a connection carried that died just now is sent again.
    async fn rest(&self) {
        let began = Instant::now();
        let mut rest = Rest::begin(self.heard());
        while !rest.is_over(began.elapsed(), &self.heard()) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Writes payloads on one connection until it fails; gives the reason.
    async fn transmit(&self, id: ConnectionId, link: &Link) -> String {
        let tuning = link::tune(&self.settings.link.far_settings());
        let ahead = Lane::ALL.map(|lane| tuning.ahead(lane.priority()));
        loop {
            let changed = self.changed.notified();
            let room = Room {
                window: window(link.stats().congestion_window),
                ahead,
            };
            let next = self.outbox().take(id, &room, Instant::now());
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

/// Who is expected at the other end.
fn identity(settings: &PeerSection, tls: &TlsState) -> Result<Identity, String> {
    let trust_domain = tls.identity().trust_domain().to_owned();
    Identity::new(&trust_domain, &settings.site, Role::Gateway, &settings.name)
        .map_err(|error| error.to_string())
}

async fn write(link: &Link, ready: Ready) -> Result<(), String> {
    let mut stream = link
        .open_uni(ready.lane.priority())
        .await
        .map_err(|error| error.to_string())?;
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
