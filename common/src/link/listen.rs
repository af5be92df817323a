//! Being called: the port on which a program accepts links.
//!
//! Owns the listening socket and the handshakes on it. Handshakes run side by side, bounded in number (over all, and per address)
//! and in time; an unproven address must echo a token first when there are many (RFC 9000, section 8.1). A peer that is refused gets the
//! reason, and the reason is logged, counted and kept in a short list for status pages.
//!
//! Promises: memory for strangers is bounded by [`HANDSHAKES_MAX`] handshakes; a peer that never finishes its handshake
//! holds a place for at most the handshake time; an accepted [`Link`] has a judged certificate and an accepted role.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, Incoming, ServerConfig, TokioRuntime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::congestion::SharedBudget;
use super::endpoint::{Link, LinkParts, chain_of, close};
use super::identity::{Identity, Role};
use super::refusal::{LinkError, Refusal, code, explain};
use super::tls::{Seen, TlsState};
use super::tuning::LinkSettings;
use super::welcome::{self, Unwelcome};
use super::{socket, transport};

/// Handshakes at once.
pub(crate) const HANDSHAKES_MAX: usize = 64;
/// Of these, from one IP address.
const HANDSHAKES_PER_ADDRESS: usize = 24;
/// From this many on, an address must prove itself before it costs anything.
const HANDSHAKES_TRUSTED: usize = 16;
/// Accepted links that wait for [`Listener::accept`].
const ACCEPTED_MAX: usize = 16;
/// Refused peers that are remembered.
const REFUSED_MAX: usize = 64;

/// A peer that was refused, or failed to complete its handshake.
#[derive(Clone, Debug)]
pub struct RefusedPeer {
    /// When.
    pub at: SystemTime,
    /// From where.
    pub address: SocketAddr,
    /// Why, in a sentence.
    pub reason: String,
}

/// A port on which links are accepted. Dropping it closes the port and all its links.
pub struct Listener {
    endpoint: Endpoint,
    accepted: tokio::sync::Mutex<mpsc::Receiver<Link>>,
    shared: Arc<Shared>,
}

struct Shared {
    tls: Arc<TlsState>,
    alpns: Vec<Vec<u8>>,
    roles: Vec<Role>,
    settings: LinkSettings,
    handshakes: Arc<Semaphore>,
    links: Arc<Semaphore>,
    by_address: Mutex<HashMap<IpAddr, usize>>,
    refused: Mutex<VecDeque<RefusedPeer>>,
}

impl Listener {
    /// Opens the port for peers that speak one of `alpns` and have one of `roles`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// A port that cannot be opened, or settings that cannot be used.
    pub fn bind(
        address: SocketAddr,
        tls: &Arc<TlsState>,
        alpns: &[&[u8]],
        roles: &[Role],
        settings: &LinkSettings,
    ) -> Result<Self, LinkError> {
        let shared = Arc::new(Shared {
            tls: Arc::clone(tls),
            alpns: alpns.iter().map(|alpn| alpn.to_vec()).collect(),
            roles: roles.to_vec(),
            settings: settings.clone(),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            links: Arc::new(Semaphore::new(settings.links_max)),
            by_address: Mutex::default(),
            refused: Mutex::default(),
        });
        let (config, _) = shared.server_config(&Arc::default())?;
        let socket = socket::bind(address, settings.socket_buffer)?;
        let mut parameters = transport::endpoint(settings)?;
        tls.reset().apply(&mut parameters);
        let endpoint =
            Endpoint::new(parameters, Some(config), socket, Arc::new(TokioRuntime)).map_err(|source| {
                LinkError::Socket {
                    address,
                    source: Arc::new(source),
                }
            })?;
        let (ready, accepted) = mpsc::channel(ACCEPTED_MAX);
        tokio::spawn(answer(endpoint.clone(), Arc::clone(&shared), ready));
        Ok(Self {
            endpoint,
            accepted: tokio::sync::Mutex::new(accepted),
            shared,
        })
    }

    /// The address that was bound; the port is chosen by the system when 0 was asked for.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_address(&self) -> Result<SocketAddr, LinkError> {
        self.endpoint.local_addr().map_err(|source| {
            let address = SocketAddr::from(([0, 0, 0, 0], 0));
            LinkError::Socket {
                address,
                source: Arc::new(source),
            }
        })
    }

    /// The next link. `None` after [`Listener::close`]. Cancel-safe.
    pub async fn accept(&self) -> Option<Link> {
        self.accepted.lock().await.recv().await
    }

    /// The last peers that were refused, oldest first.
    pub fn refused(&self) -> Vec<RefusedPeer> {
        let refused = self.shared.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.iter().cloned().collect()
    }

    /// Handshakes that run now.
    pub fn handshakes(&self) -> usize {
        HANDSHAKES_MAX.saturating_sub(self.shared.handshakes.available_permits())
    }

    /// Closes the port and every link that came through it.
    pub fn close(&self, reason: &str) {
        self.endpoint
            .close(quinn::VarInt::from_u32(code::STOPPING), reason.as_bytes());
    }

    /// Waits until every link of the port is gone, after [`Listener::close`].
    pub async fn drained(&self) {
        self.endpoint.wait_idle().await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close("the program stops");
    }
}

/// Takes calls until the endpoint is closed.
async fn answer(endpoint: Endpoint, shared: Arc<Shared>, ready: mpsc::Sender<Link>) {
    while let Some(incoming) = endpoint.accept().await {
        let Some((incoming, place)) = shared.admit(incoming) else {
            continue;
        };
        let (shared, ready) = (Arc::clone(&shared), ready.clone());
        tokio::spawn(async move { shared.handshake(incoming, place, ready).await });
    }
}

/// A place among the running handshakes; given back when dropped.
struct Place {
    shared: Arc<Shared>,
    address: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self
            .shared
            .by_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

impl Shared {
    /// Decides what a first packet is worth: a place, a request to prove the address, or nothing.
    fn admit(self: &Arc<Self>, incoming: Incoming) -> Option<(Incoming, Place)> {
        let address = incoming.remote_address().ip();
        let running = HANDSHAKES_MAX.saturating_sub(self.handshakes.available_permits());
        if running >= HANDSHAKES_TRUSTED && !incoming.remote_address_validated() {
            if let Err(error) = incoming.retry() {
                error.into_incoming().ignore();
            }
            return None;
        }
        let Ok(permit) = Arc::clone(&self.handshakes).try_acquire_owned() else {
            incoming.refuse();
            return None;
        };
        let mut counts = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_insert(0);
        if *count >= HANDSHAKES_PER_ADDRESS {
            drop(counts);
            incoming.refuse();
            return None;
        }
        *count += 1;
        drop(counts);
        Some((
            incoming,
            Place {
                shared: Arc::clone(self),
                address,
                _permit: permit,
            },
        ))
    }

    async fn handshake(self: Arc<Self>, incoming: Incoming, place: Place, ready: mpsc::Sender<Link>) {
        let address = incoming.remote_address();
        let seen = Arc::new(Seen::default());
        let limit = self.settings.handshake;
        let outcome = match tokio::time::timeout(limit, self.greet(incoming, &seen)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(LinkError::Broken {
                address,
                detail: format!("the handshake was not finished within {} s", limit.as_secs_f32()),
            }),
        };
        match outcome {
            Ok(link) => {
                tracing::debug!(peer = %link.peer().uri(), %address, "link accepted");
                drop(place);
                if let Err(mpsc::error::SendTimeoutError::Timeout(link)) =
                    ready.send_timeout(link, limit).await
                {
                    link.close(code::BUSY, "nobody takes new links here");
                }
            }
            Err(error) => self.note_refused(address, &self.best(error, &seen)),
        }
    }

    async fn greet(self: &Arc<Self>, incoming: Incoming, seen: &Arc<Seen>) -> Result<Link, LinkError> {
        let address = incoming.remote_address();
        let (config, budget) = self.server_config(seen)?;
        let explain = |error| explain(&error, address, self.settings.handshake);
        let connection = incoming
            .accept_with(Arc::new(config))
            .map_err(explain)?
            .await
            .map_err(explain)?;
        let Ok(permit) = Arc::clone(&self.links).try_acquire_owned() else {
            close(&connection, code::BUSY, "no more links are accepted");
            return Err(LinkError::Refused {
                address,
                who: "a peer".to_owned(),
                why: Refusal::Busy,
            });
        };
        let link = self.judge(&connection, budget, permit)?;
        match welcome::exchange(&connection).await {
            Ok(()) => Ok(link),
            Err(Unwelcome::Gone(error)) => Err(explain(error)),
            Err(Unwelcome::Stranger) => {
                let detail = "it did not say welcome as Longhaul does".to_owned();
                close(&connection, code::WRONG_NAME, &detail);
                Err(LinkError::Broken { address, detail })
            }
        }
    }

    /// Trust domain and role, which TLS did not judge.
    fn judge(
        &self,
        connection: &Connection,
        budget: SharedBudget,
        permit: OwnedSemaphorePermit,
    ) -> Result<Link, LinkError> {
        let address = connection.remote_address();
        let chain = chain_of(connection);
        let refuse = |code, who: String, why: Refusal| {
            close(connection, code, &why.to_string());
            LinkError::Refused { address, who, why }
        };
        let identity = chain.first().map(Identity::of_certificate);
        let peer = match identity {
            Some(Ok(peer)) => peer,
            Some(Err(error)) => {
                return Err(refuse(
                    code::WRONG_NAME,
                    "a peer".into(),
                    Refusal::WrongName(error.to_string()),
                ));
            }
            None => return Err(refuse(code::WRONG_NAME, "a peer".into(), Refusal::NoCertificate)),
        };
        let own = self.tls.identity();
        if peer.trust_domain() != own.trust_domain() {
            let (theirs, ours) = (peer.trust_domain(), own.trust_domain());
            let why = Refusal::WrongName(format!(
                "it is of the trust domain {theirs}, this program of {ours}"
            ));
            return Err(refuse(code::WRONG_NAME, peer.to_string(), why));
        }
        if !self.roles.contains(&peer.role()) {
            let why = Refusal::role(&peer, &self.roles);
            return Err(refuse(code::WRONG_ROLE, peer.to_string(), why));
        }
        let parts = LinkParts {
            connection: connection.clone(),
            endpoint: None,
            peer,
            chain,
            idle: self.settings.idle,
            budget,
            permit: Some(permit),
        };
        let broken = || LinkError::Broken {
            address,
            detail: "no certificate".to_owned(),
        };
        let link = Link::new(parts).ok_or_else(broken)?;
        self.tls.register(link.inner());
        // The files may have changed between the handshake and the registration.
        if let Err(why) = self.tls.judge(link.inner().chain()) {
            link.inner().close_refused(&why);
            return Err(LinkError::Refused {
                address,
                who: link.peer().to_string(),
                why,
            });
        }
        Ok(link)
    }

    fn server_config(&self, seen: &Arc<Seen>) -> Result<(ServerConfig, SharedBudget), LinkError> {
        let tls = self.tls.server_config(&self.alpns, seen)?;
        let quic = QuicServerConfig::try_from(tls).map_err(|error| LinkError::Settings(error.to_string()))?;
        let mut config = ServerConfig::with_crypto(Arc::new(quic));
        let budget = SharedBudget::of_connection(&self.settings);
        config
            .transport_config(transport::transport(&self.settings, &budget)?)
            // First packets that wait to be answered, and what is kept of them.
            .max_incoming(256)
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(4 << 20);
        Ok((config, budget))
    }

    /// Says what this end saw, rather than the alert it became.
    fn best(&self, error: LinkError, seen: &Seen) -> LinkError {
        let LinkError::Refused { address, who, why } = error else {
            return error;
        };
        let shown = seen.shown();
        let who = shown.who.map_or(who, |who| who.to_string());
        let why = match (shown.refusal, why) {
            (Some(own), _) => own,
            (None, Refusal::OtherProtocol(_)) => {
                let spoken: Vec<String> = self
                    .alpns
                    .iter()
                    .map(|name| String::from_utf8_lossy(name).into_owned())
                    .collect();
                Refusal::protocols(&shown.offered, &spoken)
            }
            (None, why) => why,
        };
        LinkError::Refused { address, who, why }
    }

    fn note_refused(&self, address: SocketAddr, error: &LinkError) {
        metrics::counter!("longhaul_link_refused_total").increment(1);
        tracing::warn!(%address, "no link: {error}");
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() == REFUSED_MAX {
            refused.pop_front();
        }
        refused.push_back(RefusedPeer {
            at: SystemTime::now(),
            address,
            reason: error.to_string(),
        });
    }
}
