//! The source agent's way to the target during one wire attempt.
//!
//! Owns sending batches within the target's credit, and which of them are not durable yet. Leaves what is sent to `source` and
//! `ram_out`. Promises that a batch counts as outstanding before its first byte leaves, and that everything that waits here ends when
//! the attempt does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use longhaul_common::ids::{Attempt, JobId, Sequence};
use longhaul_common::link::Link;
use longhaul_common::wire::batch::BatchHeader;
use longhaul_common::wire::sequences::Sequences;
use longhaul_common::wire::session::{Carried, FromSource};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::metrics::{SOURCE_BATCHES, SOURCE_RAW};

/// The attempt is over; the next one takes up what it left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the link to the target was lost")]
pub(super) struct Detached;

/// One attempt, as long as it lasts.
pub(super) struct Uplink {
    pub job: JobId,
    pub attempt: Attempt,
    link: Link,
    say: mpsc::Sender<FromSource>,
    credit: Semaphore,
    sequence: AtomicU64,
    /// With how many bytes each covers.
    outstanding: Mutex<BTreeMap<Sequence, u64>>,
    /// Counts changes of `outstanding`.
    settled: watch::Sender<u64>,
    gone: watch::Sender<bool>,
    /// What the gateway said last.
    carried: Mutex<Carried>,
    /// Bytes of data that became durable or were taken by QEMU: the goodput.
    pub delivered: AtomicU64,
}

impl Uplink {
    pub(super) fn new(job: JobId, attempt: Attempt, link: Link, say: mpsc::Sender<FromSource>) -> Self {
        Self {
            job,
            attempt,
            link,
            say,
            credit: Semaphore::new(0),
            sequence: AtomicU64::new(0),
            outstanding: Mutex::default(),
            settled: watch::Sender::new(0),
            gone: watch::Sender::new(false),
            carried: Mutex::default(),
            delivered: AtomicU64::new(0),
        }
    }

    fn outstanding(&self) -> MutexGuard<'_, BTreeMap<Sequence, u64>> {
        self.outstanding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the next batch.
    pub(super) fn next_sequence(&self) -> Sequence {
        Sequence(self.sequence.fetch_add(1, Ordering::Relaxed))
    }

    /// The counter itself, for a reader that numbers its own batches.
    pub(super) fn sequence(&self) -> &AtomicU64 {
        &self.sequence
    }

    /// The attempt is over.
    pub(super) fn end(&self) {
        self.gone.send_replace(true);
        self.credit.close();
        self.settled.send_modify(|count| *count += 1);
    }

    pub(super) fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Waits until the attempt is over.
    pub(super) async fn ended(&self) {
        let mut gone = self.gone.subscribe();
        // The sender lives as long as this.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    pub(super) fn set_carried(&self, carried: Carried) {
        *self.carried.lock().unwrap_or_else(PoisonError::into_inner) = carried;
    }

    /// What became of the data so far, as the gateway said last.
    pub(super) fn carried(&self) -> Carried {
        *self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn give_credit(&self, bytes: u64) {
        let room = Semaphore::MAX_PERMITS - self.credit.available_permits();
        self.credit
            .add_permits(usize::try_from(bytes).unwrap_or(usize::MAX).min(room));
    }

    /// These are written and flushed at the target.
    pub(super) fn durable(&self, sequences: &Sequences) {
        let mut outstanding = self.outstanding();
        let known = sequences.among(outstanding.keys().copied());
        for sequence in known {
            outstanding.remove(&sequence);
        }
        drop(outstanding);
        self.settled.send_modify(|count| *count += 1);
    }

    /// Bytes of batches of the disks that were sent and are not durable.
    pub(super) fn unsettled(&self) -> u64 {
        self.outstanding().values().sum()
    }

    /// Waits until every batch of the disks that was sent is durable.
    pub(super) async fn settle(&self) -> Result<(), Detached> {
        let mut settled = self.settled.subscribe();
        loop {
            settled.borrow_and_update();
            if self.is_gone() {
                return Err(Detached);
            }
            if self.outstanding().is_empty() {
                return Ok(());
            }
            settled.changed().await.map_err(|_| Detached)?;
        }
    }

    /// Sends a batch of a disk once there is credit for it.
    pub(super) async fn send_disk(&self, header: &BatchHeader, data: Bytes) -> Result<(), Detached> {
        let needed = u32::try_from(header.credit()).unwrap_or(u32::MAX);
        let permit = self.credit.acquire_many(needed).await.map_err(|_| Detached)?;
        permit.forget();
        let raw = data.len() as u64;
        self.outstanding().insert(header.sequence, raw);
        let sent = self.send(header, data).await;
        self.delivered.fetch_add(raw, Ordering::Relaxed);
        sent
    }

    /// Sends a batch; a link that breaks is noticed by everybody who waits here.
    pub(super) async fn send(&self, header: &BatchHeader, data: Bytes) -> Result<(), Detached> {
        let Ok(head) = header.encode() else {
            // Headers are made within the limits; one that is not ends the attempt instead of the agent.
            tracing::error!(job = %self.job, "a batch header is larger than its limit");
            self.end();
            return Err(Detached);
        };
        let raw = data.len() as u64;
        let written = async {
            let mut stream = self
                .link
                .open_uni(header.priority())
                .await
                .map_err(|_| Detached)?;
            stream.write_chunk(head.into()).await.map_err(|_| Detached)?;
            stream.write_chunk(data).await.map_err(|_| Detached)?;
            let _ = stream.finish();
            Ok(())
        };
        let written = tokio::select! {
            written = written => written,
            () = self.ended() => Err(Detached),
        };
        metrics::counter!(SOURCE_BATCHES).increment(1);
        metrics::counter!(SOURCE_RAW).increment(raw);
        written
    }

    /// Says something to the gateway; lost where the attempt ends.
    pub(super) async fn say(&self, message: FromSource) {
        tokio::select! {
            _ = self.say.send(message) => {}
            () = self.ended() => {}
        }
    }
}
