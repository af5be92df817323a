//! Batches from this site's agents: read, reduced, put into the outbox.
//!
//! Owns stages 2 and 3 of the data path. Memory for a batch is taken before its stream is read and given back when the peer has
//! accepted it, so agents are held up instead of the gateway growing. Leaves order to `outbox`. Promises that a batch enters only
//! the flow of its own job and attempt, and that a flow's counts include every batch that entered.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use dashmap::DashMap;
use longhaul_common::ids::JobId;
use longhaul_common::link::{Link, RecvStream, VarInt};
use longhaul_common::wire::batch::{BatchHeader, STREAM_MAX};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::outbox::{Flow, Lane, Ready};
use super::transmit::Peer;
use crate::job::ledger::{DiskSums, Ledger, Sent};
use crate::reduction::{self, workers::Workers};

/// Tells the agent that its batch found no job.
const NO_JOB: VarInt = VarInt::from_u32(1);
/// Memory is counted in these units, so that a semaphore's 32-bit requests reach far enough.
const UNIT: usize = 1024;

/// One attempt's way out: which peer, and what was counted.
pub struct Outflow {
    pub flow: Flow,
    pub peer: Arc<Peer>,
    ledger: Mutex<Ledger>,
}

impl Outflow {
    pub fn new(flow: Flow, peer: Arc<Peer>, ledger: Ledger) -> Self {
        Self {
            flow,
            peer,
            ledger: Mutex::new(ledger),
        }
    }

    /// The counts, with what this attempt's connections sent twice.
    pub fn sums(&self) -> DiskSums {
        let again = self.peer.sent_again(self.flow);
        let mut sums = self.ledger().total();
        sums.wan += again.wan;
        sums.resent += again.raw;
        sums
    }

    /// What the journal is to keep, with what this attempt's connections sent twice.
    pub fn sent(&self) -> Vec<Sent> {
        let again = self.peer.sent_again(self.flow);
        let mut sent = self.ledger().sent();
        if let Some(first) = sent.first_mut() {
            first.wan_bytes += again.wan;
            first.resent_bytes += again.raw;
        }
        sent
    }

    /// The ledger with which the next attempt starts, once this flow is closed.
    pub fn to_next(&self) -> Ledger {
        self.ledger().clone().next_attempt()
    }

    /// The counts; sound at any moment.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every flow that takes batches right now.
pub struct Ingest {
    flows: DashMap<JobId, Arc<Outflow>>,
    workers: Workers,
    memory: Arc<Semaphore>,
}

impl Ingest {
    /// With room for `memory` bytes of batches and payloads, over all jobs.
    pub fn new(workers: Workers, memory: u64) -> Self {
        // Below the size of one stream nothing could ever be read.
        let units = (memory as usize / UNIT).max(2 * STREAM_MAX.div_ceil(UNIT));
        Self {
            flows: DashMap::new(),
            workers,
            memory: Arc::new(Semaphore::new(units)),
        }
    }

    /// Takes batches for this flow from now on; an older attempt's flow of the same job ends.
    pub fn open(&self, outflow: Arc<Outflow>) {
        if let Some(older) = self.flows.insert(outflow.flow.0, outflow) {
            settle(&older);
        }
    }

    /// Takes no more batches for this flow, and forgets what waits.
    pub fn close(&self, outflow: &Outflow) {
        self.flows
            .remove_if(&outflow.flow.0, |_, known| known.flow == outflow.flow);
        settle(outflow);
    }

    /// Takes batches off an agent's link until it ends; gives the reason.
    pub async fn serve(self: &Arc<Self>, link: &Link) -> String {
        loop {
            let permit = Arc::clone(&self.memory)
                .acquire_many_owned(STREAM_MAX.div_ceil(UNIT) as u32)
                .await;
            let Ok(permit) = permit else {
                return "the gateway stops".to_owned();
            };
            match link.accept_uni().await {
                Ok(stream) => drop(tokio::spawn(Arc::clone(self).take(stream, permit))),
                Err(error) => return error.to_string(),
            }
        }
    }

    async fn take(self: Arc<Self>, mut stream: RecvStream, mut permit: OwnedSemaphorePermit) {
        // A stream that breaks off belongs to an attempt that is ending.
        let Ok(bytes) = stream.read_to_end(STREAM_MAX).await else {
            return;
        };
        let bytes = Bytes::from(bytes);
        let (header, raw) = match BatchHeader::decode(&bytes) {
            Ok((header, rest)) if header.data_len() == rest.len() as u64 => {
                let raw = bytes.slice(bytes.len() - rest.len()..);
                (header, raw)
            }
            Ok(_) => return tracing::warn!("an agent's batch is not as long as its header says"),
            Err(error) => return tracing::warn!("an agent's batch was refused: {error}"),
        };
        let outflow = self.flows.get(&header.job).map(|entry| Arc::clone(entry.value()));
        let Some(outflow) = outflow.filter(|outflow| outflow.flow == (header.job, header.attempt)) else {
            let _ = stream.stop(NO_JOB);
            return tracing::debug!(job = %header.job, "a batch found no job");
        };
        let Ok(payload) = self.workers.run(move || reduction::reduce(raw)).await else {
            return;
        };
        let mut head = BytesMut::from(&bytes[..bytes.len() - header.data_len() as usize]);
        head.put_u8(payload.encoding as u8);
        // What the payload does not need is given back at once.
        let keep = (head.len() + payload.bytes.len()).div_ceil(UNIT);
        drop(permit.split(permit.num_permits().saturating_sub(keep)));
        let ready = Ready {
            flow: outflow.flow,
            sequence: header.sequence,
            lane: Lane::Bulk,
            raw: header.data_len(),
            parts: [head.freeze(), payload.bytes],
            hold: Some(Arc::new(permit)),
            again: false,
        };
        // While this entry is held nobody closes the flow: what is pushed behind its end would stay for ever.
        let entry = self.flows.get(&header.job);
        if entry.as_ref().is_some_and(|entry| entry.flow == outflow.flow) {
            outflow.ledger().entered(&header, ready.len());
            outflow.peer.push(ready);
        }
    }
}

/// Ends a flow at the peer, and its counts: what never left is not counted as sent.
fn settle(outflow: &Outflow) {
    let again = outflow.peer.sent_again(outflow.flow);
    let unsent = outflow.peer.close(outflow.flow);
    let mut ledger = outflow.ledger();
    ledger.again(again.raw, again.wan);
    ledger.withdraw(&unsent);
}
