//! One payload's way from the WAN to the target agent.
//!
//! Owns stages 6 to 8: every length checked, the payload restored on a worker thread, the batch digest verified, the batch handed to
//! the agent. Promises that a batch is accepted at most once for each attempt, however often its payload arrives, and that it is
//! said to be accepted only after its digest held.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use longhaul_common::ids::{Attempt, JobId, Sequence};
use longhaul_common::link::{Identity, Link, RecvStream, VarInt};
use longhaul_common::wire::batch::{BatchError, BatchHeader, STREAM_MAX};
use longhaul_common::wire::sequences::Sequences;
use tokio::sync::{Notify, mpsc};

use super::Receiving;
use crate::metrics::{MISSING, RECEIVED_RAW, RECEIVED_WAN};
use crate::reduction::{self, Encoding, Payload, RestoreError, Vm};

/// Tells the peer that its payload found no job.
const NO_JOB: VarInt = VarInt::from_u32(1);

/// Batches that wait for the agent's link; those behind them wait with their memory.
const OUTLET: usize = 2;
/// A payload must be complete within this time: the slowest links take seconds for one.
const STREAM_TIME: Duration = Duration::from_secs(300);

/// What a job's payloads belong to.
pub(super) struct Owner {
    /// Whose job it is: nobody else's payloads are taken for it.
    pub peer: Identity,
    /// Whose window they refer to; empty: that of all who name no tenant.
    pub tenant: String,
    pub vm: Vm,
}

/// A job's attempt on the receiving side.
pub(super) struct Delivery {
    pub attempt: Attempt,
    pub of: Owner,
    /// Batches on their way to the agent, written one after the other: were several streams open at once, the ones that the agent has
    /// not taken yet could fill its receive window and starve the ones it reads.
    outlet: mpsc::Sender<Restored>,
    /// Every batch that was ever accepted in this attempt.
    accepted: Mutex<Sequences>,
    /// Accepted, and not said yet.
    unsaid: Mutex<Sequences>,
    /// Not restored, for want of blocks that they refer to, and not said yet.
    missing: Mutex<Sequences>,
    /// Something was accepted, or is missing.
    pub said: Notify,
    /// Takes the reason why the attempt cannot go on.
    failed: mpsc::Sender<String>,
}

impl Delivery {
    /// To `agent`; `failed` takes the first reason why it cannot go on.
    pub(super) fn new(attempt: Attempt, of: Owner, agent: Link, failed: mpsc::Sender<String>) -> Self {
        let (outlet, batches) = mpsc::channel(OUTLET);
        tokio::spawn(hand_over(agent, batches, failed.clone()));
        let (accepted, unsaid) = (Mutex::default(), Mutex::default());
        Self {
            attempt,
            of,
            outlet,
            accepted,
            unsaid,
            missing: Mutex::default(),
            said: Notify::new(),
            failed,
        }
    }

    /// What was accepted since this was last asked.
    pub(super) fn take_unsaid(&self) -> Sequences {
        std::mem::take(&mut *self.unsaid.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What was found to be missing since this was last asked.
    pub(super) fn take_missing(&self) -> Sequences {
        std::mem::take(&mut *self.missing.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// It is asked for again, unless another copy of it has been accepted.
    fn lacks(&self, sequence: Sequence) {
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        if !accepted.contains(sequence) {
            let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
            missing.insert(sequence);
            self.said.notify_one();
        }
    }

    /// False where it was accepted before.
    fn accept(&self, sequence: Sequence) -> bool {
        let first = self
            .accepted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(sequence);
        if first {
            self.unsaid
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(sequence);
            self.said.notify_one();
        }
        first
    }
}

/// Writes batches to the agent until nobody has any more, or the link fails.
async fn hand_over(agent: Link, mut batches: mpsc::Receiver<Restored>, failed: mpsc::Sender<String>) {
    while let Some(Restored { head, raw, priority }) = batches.recv().await {
        let handed = async {
            let mut stream = agent
                .open_uni(priority)
                .await
                .map_err(|error| error.to_string())?;
            stream
                .write_chunk(head)
                .await
                .map_err(|error| agent.reason_or(&error))?;
            stream
                .write_chunk(raw)
                .await
                .map_err(|error| agent.reason_or(&error))?;
            // Fails only where the agent refused the stream; its control stream says why.
            let _ = stream.finish();
            Ok::<_, String>(())
        };
        if let Err(reason) = handed.await {
            let _ = failed.try_send(format!("a batch cannot be handed to the target agent: {reason}"));
            return;
        }
    }
}

/// A batch as the agent gets it.
struct Restored {
    head: Bytes,
    raw: Bytes,
    priority: u8,
}

/// A payload as it came.
struct Arrived {
    header: BatchHeader,
    /// The header's bytes, as the agent wants them.
    head: Bytes,
    payload: Payload,
}

/// Takes one stream to its end.
pub(super) async fn take(receiving: &Receiving, peer: &Identity, mut stream: RecvStream) {
    // A stream that breaks off belongs to a connection that is gone; its payload comes again.
    let Ok(Ok(bytes)) = tokio::time::timeout(STREAM_TIME, stream.read_to_end(STREAM_MAX)).await else {
        return;
    };
    metrics::counter!(RECEIVED_WAN).increment(bytes.len() as u64);
    let arrived = match split(&bytes.into()) {
        Ok(arrived) => arrived,
        Err(error) => return tracing::debug!(%peer, "a payload was refused: {error}"),
    };
    let (job, attempt) = (arrived.header.job, arrived.header.attempt);
    let Some(delivery) = find(receiving, peer, job, attempt) else {
        let _ = stream.stop(NO_JOB);
        return tracing::debug!(%job, %attempt, "a payload found no job");
    };
    let Arrived {
        header,
        head,
        payload,
    } = arrived;
    let (sequence, urgent, priority) = (header.sequence, header.urgent, header.priority());
    let (windows, of) = (Arc::clone(&receiving.windows), Arc::clone(&delivery));
    let restored = receiving.workers.run_as(urgent, move || {
        let Owner { peer, tenant, vm } = &of.of;
        let pair = windows.with(&peer.to_string(), tenant);
        reduction::restore(&payload, &header, *vm, pair.as_deref())
    });
    match restored.await {
        Ok(Ok(raw)) => {
            metrics::counter!(RECEIVED_RAW).increment(raw.len() as u64);
            if delivery.accept(sequence) {
                // Where the link has failed, its reason is on its way.
                let _ = delivery.outlet.send(Restored { head, raw, priority }).await;
            }
        }
        Ok(Err(RestoreError::Missing)) => {
            metrics::counter!(MISSING).increment(1);
            delivery.lacks(sequence);
        }
        Ok(Err(error)) => {
            let _ = delivery
                .failed
                .try_send(format!("batch {sequence} cannot be restored: {error}"));
        }
        Err(error) => {
            let _ = delivery.failed.try_send(error.to_string());
        }
    }
}

fn split(bytes: &Bytes) -> Result<Arrived, BatchError> {
    let (header, rest) = BatchHeader::decode(bytes)?;
    let (encoding, reduced) = rest.split_first().ok_or(BatchError::Payload("it is missing"))?;
    let encoding = Encoding::from_wire(*encoding)?;
    let head = bytes.slice(..bytes.len() - rest.len());
    let payload = Payload {
        encoding,
        bytes: bytes.slice(bytes.len() - reduced.len()..),
    };
    Ok(Arrived {
        header,
        head,
        payload,
    })
}

fn find(receiving: &Receiving, peer: &Identity, job: JobId, attempt: Attempt) -> Option<Arc<Delivery>> {
    let delivery = receiving
        .deliveries
        .get(&job)
        .map(|entry| Arc::clone(entry.value()));
    delivery.filter(|delivery| delivery.attempt == attempt && delivery.of.peer == *peer)
}
