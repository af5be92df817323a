//! Batches from this site's agents: read, reduced, put into the outbox.
//!
//! Owns stages 2 and 3 of the data path. Memory for a batch is taken before its stream is read and given back when the peer has
//! accepted it, so agents are held up instead of the gateway growing. Leaves order to `outbox`. Promises that a batch enters only
//! the flow of its own job and attempt, and that a flow's counts include every batch that entered.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use dashmap::DashMap;
use longhaul_common::ids::JobId;
use longhaul_common::link::{Link, RecvStream, VarInt};
use longhaul_common::wire::batch::{BatchHeader, STREAM_MAX};
use longhaul_common::wire::sequences::Sequences;
use longhaul_common::wire::session::Carried;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::outbox::{Flow, Lane, Ready};
use super::shares::Shares;
use super::transmit::{Peer, Pending};
use crate::job::ledger::{DiskSums, Ledger, Sent};
use crate::metrics::{REDUCED, REWRITTEN, REWRITTEN_PAYLOAD, SENT_RAW, SENT_WAN, XOR_PAYLOAD};
use crate::reduction::workers::Workers;
use crate::reduction::{self, Encoding, Level, Method, Pair, Reduced, ReductionCounts, Vm, Way, Work};

/// Tells the agent that its batch found no job.
const NO_JOB: VarInt = VarInt::from_u32(1);
/// Memory is counted in these units, so that a semaphore's 32-bit requests reach far enough.
const UNIT: usize = 1024;

/// A stream must be complete within this time: it comes from this site.
const STREAM_TIME: Duration = Duration::from_secs(60);

/// One attempt's way out: which peer, and what was counted.
pub struct Outflow {
    pub flow: Flow,
    pub peer: Arc<Peer>,
    /// Each disk's size in bytes.
    sizes: Vec<u64>,
    ledger: Mutex<Ledger>,
    /// What became of the data, by kind.
    reduced: Mutex<ReductionCounts>,
    /// The VM that the batches belong to, where it was said.
    vm: OnceLock<Vm>,
    /// The windows that its payloads refer to.
    pair: OnceLock<Option<Arc<Pair>>>,
    /// Bytes of payloads that the peer has restored.
    restored: AtomicU64,
    /// Why a batch was refused; the first reason stays.
    refused: watch::Sender<Option<String>>,
}

impl Outflow {
    pub fn new(flow: Flow, peer: Arc<Peer>, sizes: Vec<u64>, ledger: Ledger) -> Self {
        Self {
            flow,
            peer,
            sizes,
            ledger: Mutex::new(ledger),
            reduced: Mutex::default(),
            vm: OnceLock::new(),
            pair: OnceLock::new(),
            restored: AtomicU64::new(0),
            refused: watch::channel(None).0,
        }
    }

    /// Says which VM the batches belong to, so that its blocks are known again in its next job, and whose windows they may refer to. Once,
    /// before the first batch.
    pub fn of_vm(&self, name: &str, tenant: &str) {
        let _ = self.vm.set(Vm::named(name));
        let _ = self.pair.set(self.peer.pair(tenant));
    }

    /// Of nobody, where it was not said: content of one tenant must not meet another's.
    fn pair(&self) -> Option<Arc<Pair>> {
        self.pair.get().cloned().flatten()
    }

    fn vm(&self) -> Vm {
        *self.vm.get_or_init(|| Vm::named(&self.flow.0.to_string()))
    }

    /// What became of this attempt's data, by kind.
    pub fn reduced(&self) -> ReductionCounts {
        *self.reduced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, counts: ReductionCounts) {
        let mut sum = self.reduced.lock().unwrap_or_else(PoisonError::into_inner);
        *sum = sum.plus(counts);
        let kinds = [
            ("zero", counts.zero),
            ("reference", counts.reference),
            ("xor", counts.xor),
            ("compressed", counts.compressed),
            ("raw", counts.raw),
        ];
        for (kind, bytes) in kinds {
            metrics::counter!(REDUCED, "kind" => kind).increment(bytes);
        }
        metrics::counter!(XOR_PAYLOAD).increment(counts.xor_payload);
        metrics::counter!(REWRITTEN).increment(counts.rewritten);
        metrics::counter!(REWRITTEN_PAYLOAD).increment(counts.rewritten_payload);
    }

    /// Waits until a batch is refused: the attempt cannot come to its end any more. Cancel-safe.
    pub async fn refused(&self) -> String {
        let mut refused = self.refused.subscribe();
        let reason = refused.wait_for(Option::is_some).await;
        // The sender lives as long as this.
        reason
            .map(|reason| reason.clone().unwrap_or_default())
            .unwrap_or_default()
    }

    /// Whether a batch fits its disk; the attempt learns of one that does not.
    fn admits(&self, header: &BatchHeader) -> bool {
        let checked = match self.sizes.get(usize::from(header.disk.0)) {
            // A part of the RAM stream: its limits were checked when it was decoded.
            _ if header.ram.is_some() => return true,
            Some(size) => header.check(*size).map_err(|error| error.to_string()),
            None => Err(format!("it speaks of disk {}, which there is not", header.disk)),
        };
        let Err(reason) = checked else { return true };
        let reason = format!("a batch of the source agent was refused: {reason}");
        tracing::warn!(job = %header.job, "{reason}");
        self.refused
            .send_if_modified(|known| known.is_none() && known.replace(reason).is_none());
        false
    }

    /// What a running VM's source is told of this.
    pub fn carried(&self) -> Carried {
        Carried {
            dirty: self.ledger().dirty(),
            restored: self.restored.load(Ordering::Relaxed),
            limited: self.peer.is_limited(self.flow),
        }
    }

    /// The counts, with what this attempt's connections sent twice.
    pub fn sums(&self) -> DiskSums {
        let again = self.peer.sent_again(self.flow);
        let mut sums = self.ledger().total();
        let ram = self.ledger().ram();
        sums.wan += again.wan + ram.wan;
        sums.sent += ram.sent;
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
    way: Way,
    /// Batches that are being reduced or wait for it.
    reducing: AtomicUsize,
    shares: Mutex<Shares>,
    memory: Arc<Semaphore>,
    /// What `memory` has when nothing is held.
    units: usize,
    /// Of `memory`, what one agent may hold with streams that it has not finished.
    share: usize,
}

impl Ingest {
    /// With room for `memory` bytes of batches and payloads, over all jobs.
    pub fn new(workers: Workers, way: Way, memory: u64) -> Self {
        // Below the size of one stream nothing could ever be read.
        let units = (memory as usize / UNIT).max(2 * STREAM_MAX.div_ceil(UNIT));
        Self {
            flows: DashMap::new(),
            workers,
            way,
            reducing: AtomicUsize::new(0),
            // A batch may be held twice, reduced and plain; most are much smaller reduced.
            shares: Mutex::new(Shares::new((units * UNIT) as u64 / 4 * 3)),
            memory: Arc::new(Semaphore::new(units)),
            units,
            share: (units / 4 * 3).max(STREAM_MAX.div_ceil(UNIT)),
        }
    }

    /// Memory that is held right now, in bytes.
    pub fn held(&self) -> usize {
        self.units.saturating_sub(self.memory.available_permits()) * UNIT
    }

    /// Takes batches for this flow from now on; an older attempt's flow of the same job ends.
    pub fn open(&self, outflow: Arc<Outflow>) {
        let flow = outflow.flow;
        if let Some(older) = self.flows.insert(flow.0, outflow) {
            self.shares().close(older.flow);
            settle(&older);
        }
        self.shares().open(flow);
    }

    /// Takes no more batches for this flow, and forgets what waits.
    pub fn close(&self, outflow: &Outflow) {
        self.flows
            .remove_if(&outflow.flow.0, |_, known| known.flow == outflow.flow);
        self.shares().close(outflow.flow);
        settle(outflow);
    }

    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The target gave `credit`: how much its source is to have now.
    pub fn credit(&self, outflow: &Outflow, credit: u64) -> u64 {
        self.shares().credit(outflow.flow, credit)
    }

    /// The peer has these: they are forgotten. Gives the credit that the source is to have now.
    pub fn accepted(&self, outflow: &Outflow, sequences: &Sequences) -> u64 {
        let (taken, bytes) = outflow.peer.accepted(outflow.flow, sequences);
        outflow.restored.fetch_add(bytes, Ordering::Relaxed);
        self.shares().taken(outflow.flow, taken)
    }

    /// Takes batches off an agent's link until it ends; gives the reason.
    pub async fn serve(self: &Arc<Self>, link: &Link) -> String {
        let share = Arc::new(Semaphore::new(self.share));
        let room = STREAM_MAX.div_ceil(UNIT) as u32;
        loop {
            // Memory only for a stream that is there: an agent that is silent holds none.
            let stream = match link.accept_uni().await {
                Ok(stream) => stream,
                Err(error) => return error.to_string(),
            };
            let own = Arc::clone(&share).acquire_many_owned(room).await;
            let permit = Arc::clone(&self.memory).acquire_many_owned(room).await;
            let (Ok(own), Ok(permit)) = (own, permit) else {
                return "the gateway stops".to_owned();
            };
            tokio::spawn(Arc::clone(self).take(stream, own, permit));
        }
    }

    async fn take(
        self: Arc<Self>,
        mut stream: RecvStream,
        own: OwnedSemaphorePermit,
        mut permit: OwnedSemaphorePermit,
    ) {
        // A stream that breaks off belongs to an attempt that is ending.
        let Ok(Ok(bytes)) = tokio::time::timeout(STREAM_TIME, stream.read_to_end(STREAM_MAX)).await else {
            return;
        };
        drop(own);
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
        if !outflow.admits(&header) {
            return;
        }
        let head = bytes.slice(..bytes.len() - raw.len());
        let Some(reduced) = self.reduce(&outflow, &header, &raw).await else {
            return;
        };
        let plain = reduced.kept.needs_window.then(|| [head.clone(), raw.clone()]);
        let head = with_encoding(&head, reduced.payload.encoding);
        // What the payload does not need is given back at once.
        let kept = plain.as_ref().map_or(0, |_| bytes.len());
        let keep = (head.len() + reduced.payload.bytes.len() + kept).div_ceil(UNIT);
        drop(permit.split(permit.num_permits().saturating_sub(keep)));
        let hold = Some(Arc::new(permit));
        let ready = Ready {
            flow: outflow.flow,
            sequence: header.sequence,
            lane: Lane::of(&header),
            raw: header.data_len(),
            parts: [head, reduced.payload.bytes],
            hold: hold.clone(),
            again: false,
        };
        let kept = reduced.kept;
        let len = ready.len();
        let pending = Pending {
            kept,
            pair: outflow.pair(),
            plain,
            len,
            credit: if header.ram.is_some() { 0 } else { header.credit() },
            hold,
        };
        // While this entry is held nobody closes the flow: what is pushed behind its end would stay for ever.
        let entry = self.flows.get(&header.job);
        if entry.as_ref().is_some_and(|entry| entry.flow == outflow.flow) {
            metrics::counter!(SENT_RAW).increment(ready.raw);
            metrics::counter!(SENT_WAN).increment(ready.len());
            outflow.ledger().entered(&header, ready.len());
            outflow.count(reduced.counts);
            outflow.peer.push(ready, pending);
        } else if let Some(pair) = &pending.pair {
            pair.given_up(&pending.kept);
        }
    }

    /// How much work a batch of this lane is worth. What a stopped VM waits for is worth no long search: time counts.
    fn level(&self, outflow: &Outflow, lane: Lane) -> Level {
        if let Some(level) = self.way.level {
            return level;
        }
        let of = if lane == Lane::Handover { Lane::Ram } else { lane };
        let waiting = self
            .reducing
            .load(Ordering::Relaxed)
            .saturating_sub(self.workers.threads());
        let level = outflow
            .peer
            .level(of, waiting, self.workers.threads(), Instant::now());
        if lane == Lane::Handover {
            level.min(Level::Zstd3)
        } else {
            level
        }
    }

    async fn reduce(
        self: &Arc<Self>,
        outflow: &Arc<Outflow>,
        header: &BatchHeader,
        raw: &Bytes,
    ) -> Option<Reduced> {
        let lane = Lane::of(header);
        self.reducing.fetch_add(1, Ordering::Relaxed);
        let (ingest, flow) = (Arc::clone(self), Arc::clone(outflow));
        let (data, of) = (raw.clone(), header.clone());
        let reduced = self.workers.run_as(header.urgent, move || {
            // Chosen now: many may have waited for this thread, and the link's state is another one since they came.
            let method = Method {
                dedup: ingest.way.dedup,
                xor: ingest.way.xor,
                level: ingest.level(&flow, lane),
            };
            let (pair, vm) = (flow.pair(), flow.vm());
            let began = Instant::now();
            let reduced = reduction::reduce(&data, &of, vm, pair.as_deref(), method);
            (reduced, method.level, began.elapsed())
        });
        let reduced = reduced.await;
        self.reducing.fetch_sub(1, Ordering::Relaxed);
        let (reduced, level, busy) = reduced.ok()?;
        let work = Work {
            raw: raw.len() as u64,
            content: reduced.counts.content(level),
            payload: reduced.payload.bytes.len() as u64,
            busy,
        };
        outflow.peer.measured(lane, level, work);
        Some(reduced)
    }

    /// Sends these again without the window: the peer does not hold what they refer to.
    pub async fn send_plainly(&self, outflow: &Outflow, sequences: &Sequences) {
        for (ready, [head, raw]) in outflow.peer.missing(outflow.flow, sequences) {
            let level = self.level(outflow, ready.lane);
            let reduce = move || reduction::reduce_plainly(&raw, level);
            let Ok(reduced) = self.workers.run_as(ready.lane == Lane::Handover, reduce).await else {
                return;
            };
            let parts = [
                with_encoding(&head, reduced.payload.encoding),
                reduced.payload.bytes,
            ];
            let entry = self.flows.get(&outflow.flow.0);
            if entry.as_ref().is_some_and(|entry| entry.flow == outflow.flow) {
                outflow.peer.push_again(Ready {
                    parts,
                    again: true,
                    ..ready
                });
            }
        }
    }
}

/// A header as it stands before a payload.
fn with_encoding(head: &[u8], encoding: Encoding) -> Bytes {
    let mut bytes = BytesMut::with_capacity(head.len() + 1);
    bytes.put_slice(head);
    bytes.put_u8(encoding as u8);
    bytes.freeze()
}

/// Ends a flow at the peer, and its counts: what never left is not counted as sent.
fn settle(outflow: &Outflow) {
    let again = outflow.peer.sent_again(outflow.flow);
    let unsent = outflow.peer.close(outflow.flow);
    let mut ledger = outflow.ledger();
    ledger.again(again.raw, again.wan);
    ledger.withdraw(&unsent);
}
