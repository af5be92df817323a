//! The receiving side: from a peer's stream to this site's target agent.
//!
//! Owns the port for peers, and the table that leads a payload to its job's agent (`delivery`). Control messages of a job are passed
//! on both ways by `relay`; payloads are restored, checked and handed over by `delivery`. Keeps no state of its own: a lost gateway
//! costs a new attempt and nothing else.

mod delivery;
mod relay;

use std::sync::Arc;

use dashmap::DashMap;
use longhaul_common::ids::JobId;
use longhaul_common::link::probe::serve_probe;
use longhaul_common::link::{ALPN_PROBE, Link, LinkError, Listener, Role, TlsState};
use longhaul_common::wire::ALPN_PEER;
use longhaul_common::wire::batch::STREAM_MAX;
use tokio::sync::Semaphore;

use crate::agents::Agents;
use crate::reduction::workers::Workers;
use crate::settings::PeersSection;
use delivery::Delivery;

/// Memory is counted in these units, so that a semaphore's 32-bit requests reach far enough.
const UNIT: usize = 1024;

/// Everything that arriving jobs share.
pub struct Receiving {
    agents: Arc<Agents>,
    deliveries: DashMap<JobId, Arc<Delivery>>,
    workers: Workers,
    memory: Arc<Semaphore>,
}

impl Receiving {
    /// With room for `memory` bytes of payloads and restored batches, over all jobs.
    pub fn new(agents: Arc<Agents>, workers: Workers, memory: u64) -> Arc<Self> {
        let units = (memory as usize / UNIT).max(4 * STREAM_MAX.div_ceil(UNIT));
        Arc::new(Self {
            agents,
            deliveries: DashMap::new(),
            workers,
            memory: Arc::new(Semaphore::new(units)),
        })
    }

    /// Opens the port, if there is to be one, and serves peers for as long as the program runs.
    pub fn listen(self: Arc<Self>, settings: &PeersSection, tls: &Arc<TlsState>) -> Result<(), LinkError> {
        let Some(address) = settings.listen else {
            return Ok(());
        };
        let link = settings.link.settings();
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
        let reason = loop {
            // Room for one payload and what it becomes, before a stream is taken.
            let room = 2 * STREAM_MAX.div_ceil(UNIT) as u32;
            tokio::select! {
                stream = link.accept_bi() => match stream {
                    Ok((send, recv)) => {
                        let link = link.clone();
                        tokio::spawn(relay::run(Arc::clone(&self), link, send, recv));
                    }
                    Err(error) => break error,
                },
                stream = async {
                    let permit = Arc::clone(&self.memory).acquire_many_owned(room).await;
                    link.accept_uni().await.map(|stream| (stream, permit))
                } => match stream {
                    Ok((stream, permit)) => {
                        let receiving = Arc::clone(&self);
                        tokio::spawn(async move {
                            delivery::take(&receiving, stream).await;
                            drop(permit);
                        });
                    }
                    Err(error) => break error,
                },
            }
        };
        tracing::info!(peer = %link.peer(), "the link of a peer ended: {reason}");
    }
}
