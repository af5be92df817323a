//! The receiving side: from a peer's stream to this site's target agent.
//!
//! Owns the port for peers, and the table that leads a payload to its job's agent (`delivery`). Control messages of a job are passed
//! on both ways by `relay`; payloads are restored, checked and handed over by `delivery`. Keeps no state of its own but the
//! windows of blocks (`reduction`): a lost gateway costs a new attempt and bytes, and nothing else.

mod delivery;
mod relay;

use std::sync::Arc;

use dashmap::DashMap;
use longhaul_common::ids::JobId;
use longhaul_common::link::probe::serve_probe;
use longhaul_common::link::{ALPN_PROBE, Identity, Link, LinkError, Listener, Role, TlsState};
use longhaul_common::wire::ALPN_PEER;
use longhaul_common::wire::batch::STREAM_MAX;
use tokio::sync::Semaphore;

use crate::agents::Agents;
use crate::reduction::Windows;
use crate::reduction::workers::Workers;
use crate::settings::PeersSection;
use delivery::Delivery;

/// Memory is counted in these units, so that a semaphore's 32-bit requests reach far enough.
const UNIT: usize = 1024;
/// Memory for one payload and what it becomes.
const ROOM: usize = 2 * STREAM_MAX.div_ceil(UNIT);
/// Jobs of one peer that arrive at once.
const JOBS_PER_PEER: usize = 64;

/// Everything that arriving jobs share.
pub struct Receiving {
    agents: Arc<Agents>,
    deliveries: DashMap<JobId, Arc<Delivery>>,
    workers: Workers,
    /// What the peers' payloads refer to.
    windows: Arc<Windows>,
    memory: Arc<Semaphore>,
    /// What `memory` has when nothing is held.
    units: usize,
    /// Of `memory`, what one peer may hold: the others must get on beside one that finishes nothing.
    share: usize,
    /// What each peer that ever linked may take, by its name; as many as there are certificates.
    shares: DashMap<Identity, Share>,
}

/// What one peer may take, over all its links.
#[derive(Clone)]
struct Share {
    memory: Arc<Semaphore>,
    jobs: Arc<Semaphore>,
}

impl Receiving {
    /// With room for `memory` bytes of payloads and restored batches, over all jobs.
    pub fn new(agents: Arc<Agents>, workers: Workers, windows: Arc<Windows>, memory: u64) -> Arc<Self> {
        let units = (memory as usize / UNIT).max(2 * ROOM);
        Arc::new(Self {
            agents,
            deliveries: DashMap::new(),
            workers,
            windows,
            memory: Arc::new(Semaphore::new(units)),
            units,
            share: (units / 4 * 3).max(ROOM),
            shares: DashMap::new(),
        })
    }

    /// Memory that is held right now, in bytes.
    pub fn held(&self) -> usize {
        self.units.saturating_sub(self.memory.available_permits()) * UNIT
    }

    fn share(&self, peer: &Identity) -> Share {
        let new = || Share {
            memory: Arc::new(Semaphore::new(self.share)),
            jobs: Arc::new(Semaphore::new(JOBS_PER_PEER)),
        };
        self.shares.entry(peer.clone()).or_insert_with(new).clone()
    }

    /// Opens the port, if there is to be one, and serves peers for as long as the program runs.
    pub fn listen(self: Arc<Self>, settings: &PeersSection, tls: &Arc<TlsState>) -> Result<(), LinkError> {
        let Some(address) = settings.listen else {
            return Ok(());
        };
        let link = settings.link.far_settings();
        let listener = Listener::bind(address, tls, &[ALPN_PEER, ALPN_PROBE], &[Role::Gateway], &link)?;
        tracing::info!(%address, "listening for peers");
        tokio::spawn(async move {
            while let Some(link) = listener.accept().await {
                if link.alpn() == ALPN_PROBE {
                    tokio::spawn(serve_probe(link));
                    continue;
                }
                tracing::info!(peer = %link.peer(), address = %link.remote_address(), "peer linked");
                tokio::spawn(Arc::clone(&self).serve(link));
            }
        });
        Ok(())
    }

    async fn serve(self: Arc<Self>, link: Link) {
        let share = self.share(link.peer());
        let payloads = tokio::spawn(Arc::clone(&self).take_payloads(link.clone(), Arc::clone(&share.memory)));
        let reason = loop {
            match link.accept_bi().await {
                Ok((send, recv)) => {
                    let jobs = Arc::clone(&share.jobs);
                    tokio::spawn(relay::run(Arc::clone(&self), link.clone(), jobs, send, recv));
                }
                Err(error) => break error,
            }
        };
        payloads.abort();
        tracing::info!(peer = %link.peer(), "the link of a peer ended: {reason}");
    }

    async fn take_payloads(self: Arc<Self>, link: Link, share: Arc<Semaphore>) {
        // Memory only for a stream that is there: a link that is silent holds none.
        while let Ok(stream) = link.accept_uni().await {
            let own = Arc::clone(&share).acquire_many_owned(ROOM as u32).await;
            let permit = Arc::clone(&self.memory).acquire_many_owned(ROOM as u32).await;
            let (receiving, peer) = (Arc::clone(&self), link.peer().clone());
            tokio::spawn(async move {
                delivery::take(&receiving, &peer, stream).await;
                drop((own, permit));
            });
        }
    }
}
