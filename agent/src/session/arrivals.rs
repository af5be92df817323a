//! Batches that arrive, and the sessions they are for.
//!
//! Owns the table of target sessions and the reading of one stream. Leaves checking and writing to the session's threads. Promises
//! that a batch reaches only the session of its own job and attempt, that a job has at most one session, and that a stream is never
//! read beyond the limit of a batch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use longhaul_common::ids::{Attempt, JobId};
use longhaul_common::link::{RecvStream, VarInt};
use longhaul_common::wire::batch::{BatchHeader, CREDIT_MIN, STREAM_MAX};
use longhaul_common::wire::session::{Refusal, RefusalKind};
use tokio::sync::{mpsc, watch};

/// Tells the gateway that a stream found no session.
const NO_SESSION: VarInt = VarInt::from_u32(1);
/// Tells the gateway that nobody allowed it to send so much.
const NO_CREDIT: VarInt = VarInt::from_u32(2);
/// Headers and data of a job's waiting batches may take so many times its credit: a batch without data counts less than it takes.
const BYTES_PER_CREDIT: u64 = 3;

/// One batch as it came. Holds its part of the session's room until it is dropped.
pub(in crate::session) struct Arrived {
    pub header: BatchHeader,
    pub data: Bytes,
    pub _part: RoomPart,
}

/// What a session may hold: the credit that was given, so that a job that is held up holds up no other.
pub(super) struct Room {
    /// (credit, bytes of streams) that are left.
    left: Mutex<(u64, u64)>,
}

/// A batch's part of the room.
pub(in crate::session) struct RoomPart {
    room: Arc<Room>,
    credit: u64,
    bytes: u64,
}

impl Room {
    pub(super) fn new(credit: u64) -> Arc<Self> {
        let left = Mutex::new((credit, credit.saturating_mul(BYTES_PER_CREDIT)));
        Arc::new(Self { left })
    }

    fn left(&self) -> MutexGuard<'_, (u64, u64)> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` where the sender was not allowed so much.
    pub(super) fn take(self: &Arc<Self>, credit: u64, bytes: u64) -> Option<RoomPart> {
        let mut left = self.left();
        *left = (left.0.checked_sub(credit)?, left.1.checked_sub(bytes)?);
        let room = Arc::clone(self);
        Some(RoomPart { room, credit, bytes })
    }
}

impl Drop for RoomPart {
    fn drop(&mut self) {
        let mut left = self.room.left();
        *left = (left.0 + self.credit, left.1 + self.bytes);
    }
}

/// Where a session takes one kind of batches, and how much of it.
#[derive(Clone)]
struct Inlet {
    inbox: mpsc::Sender<Arrived>,
    room: Arc<Room>,
}

struct Entry {
    attempt: Attempt,
    disks: Inlet,
    /// Only where a running VM arrives.
    ram: Option<Inlet>,
    stop: watch::Sender<bool>,
    /// Closed when the session has let go of its images.
    gone: watch::Receiver<()>,
}

/// Every target session of this agent, by job.
#[derive(Default)]
pub(super) struct Arrivals {
    sessions: Mutex<HashMap<JobId, Entry>>,
}

/// A session's place in the table; leaves it when dropped.
pub(super) struct Seat<'a> {
    table: &'a Arrivals,
    job: JobId,
    attempt: Attempt,
    pub inbox: mpsc::Receiver<Arrived>,
    /// Closed at once where no RAM is expected.
    pub ram: mpsc::Receiver<Arrived>,
    pub stop: watch::Receiver<bool>,
    _gone: watch::Sender<()>,
}

impl Inlet {
    fn new(credit: u64) -> (Self, mpsc::Receiver<Arrived>) {
        // As many batches as the credit allows: handing one over never waits.
        let (inbox, arrived) = mpsc::channel((credit / CREDIT_MIN + 1) as usize);
        let room = Room::new(credit);
        (Self { inbox, room }, arrived)
    }
}

impl Arrivals {
    fn table(&self) -> MutexGuard<'_, HashMap<JobId, Entry>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a session. An older attempt of the same job is stopped first, and waited for: it holds the images.
    pub(super) async fn enter(&self, job: JobId, attempt: Attempt, credit: u64) -> Result<Seat<'_>, Refusal> {
        self.enter_with_ram(job, attempt, credit, None).await
    }

    /// As [`Self::enter`], with room for so many bytes of a RAM stream.
    pub(super) async fn enter_with_ram(
        &self,
        job: JobId,
        attempt: Attempt,
        credit: u64,
        ram: Option<u64>,
    ) -> Result<Seat<'_>, Refusal> {
        loop {
            let mut gone = {
                let mut table = self.table();
                match table.get(&job) {
                    Some(other) if other.attempt >= attempt => {
                        let text = format!("attempt {} of this job is already under way here", other.attempt);
                        return Err(Refusal::new(RefusalKind::Superseded, text));
                    }
                    Some(older) => {
                        older.stop.send_replace(true);
                        older.gone.clone()
                    }
                    None => return Ok(self.seat(&mut table, job, attempt, credit, ram)),
                }
            };
            while gone.changed().await.is_ok() {}
            self.table()
                .retain(|known, entry| *known != job || entry.gone.has_changed().is_ok());
        }
    }

    fn seat(
        &self,
        table: &mut HashMap<JobId, Entry>,
        job: JobId,
        attempt: Attempt,
        credit: u64,
        ram: Option<u64>,
    ) -> Seat<'_> {
        let (disks, arrived) = Inlet::new(credit);
        let (ram_inlet, ram_arrived) = Inlet::new(ram.unwrap_or(CREDIT_MIN));
        let (stop, stopped) = watch::channel(false);
        let (held, gone) = watch::channel(());
        table.insert(
            job,
            Entry {
                attempt,
                disks,
                ram: ram.map(|_| ram_inlet),
                stop,
                gone,
            },
        );
        Seat {
            table: self,
            job,
            attempt,
            inbox: arrived,
            ram: ram_arrived,
            stop: stopped,
            _gone: held,
        }
    }

    /// Reads one stream and hands its batch over.
    pub(super) async fn receive(&self, mut stream: RecvStream) {
        // A stream that breaks off belongs to a link or an attempt that is ending; the batch is sent again.
        let Ok(bytes) = stream.read_to_end(STREAM_MAX).await else {
            return;
        };
        let bytes = Bytes::from(bytes);
        let (header, data) = match BatchHeader::decode(&bytes) {
            Ok((header, rest)) => (header, bytes.slice(bytes.len() - rest.len()..)),
            Err(error) => return tracing::warn!("a batch was refused: {error}"),
        };
        let inbox = self
            .table()
            .get(&header.job)
            .filter(|e| e.attempt == header.attempt)
            .and_then(|e| {
                let inlet = if header.ram.is_some() {
                    e.ram.clone()
                } else {
                    Some(e.disks.clone())
                };
                Some((inlet?, e.stop.clone()))
            });
        match inbox {
            Some((Inlet { inbox, room }, stop)) => {
                let Some(part) = room.take(header.credit(), bytes.len() as u64) else {
                    let _ = stream.stop(NO_CREDIT);
                    stop.send_replace(true);
                    return tracing::error!(job = %header.job, "a batch came without credit; this attempt ends");
                };
                // Full or closed: the session has ended meanwhile, nobody waits for this batch.
                let _ = inbox.try_send(Arrived {
                    header,
                    data,
                    _part: part,
                });
            }
            None => {
                let _ = stream.stop(NO_SESSION);
                tracing::debug!(job = %header.job, attempt = %header.attempt, "a batch found no session");
            }
        }
    }
}

impl Seat<'_> {
    /// No more batches are taken from now on.
    pub(super) fn close(&mut self) {
        let mut table = self.table.table();
        if table
            .get(&self.job)
            .is_some_and(|entry| entry.attempt == self.attempt)
        {
            // Replaced by a dead end: the seat stays taken until the images are let go.
            let (dead, _) = mpsc::channel(1);
            if let Some(entry) = table.get_mut(&self.job) {
                entry.disks.inbox = dead.clone();
                if let Some(ram) = &mut entry.ram {
                    ram.inbox = dead;
                }
            }
        }
        drop(table);
        self.inbox.close();
        self.ram.close();
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut table = self.table.table();
        if table
            .get(&self.job)
            .is_some_and(|entry| entry.attempt == self.attempt)
        {
            table.remove(&self.job);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_newer_attempt_waits_for_the_older_one_to_let_go() {
        let arrivals = Arrivals::default();
        let job = JobId::random();
        let older = arrivals
            .enter(job, Attempt(1), 1)
            .await
            .unwrap_or_else(|e| panic!("{e}"));
        assert!(
            arrivals.enter(job, Attempt(1), 1).await.is_err(),
            "the same attempt twice"
        );
        let mut stop = older.stop.clone();
        let newer = arrivals.enter(job, Attempt(2), 1);
        tokio::pin!(newer);
        assert!(
            tokio::time::timeout(Duration::from_millis(20), &mut newer)
                .await
                .is_err(),
            "did not wait"
        );
        assert!(*stop.borrow_and_update());
        drop(older);
        let newer = tokio::time::timeout(Duration::from_secs(5), newer).await.unwrap();
        assert!(newer.is_ok());
    }

    #[test]
    fn no_more_than_the_credit_is_taken_and_what_is_written_makes_room() {
        let room = Room::new(10_000);
        let first = room.take(6_000, 6_100).unwrap();
        assert!(room.take(4_001, 4_100).is_none(), "more than the credit");
        assert!(room.take(4_000, 30_000).is_none(), "headers without end");
        let second = room.take(4_000, 4_100).unwrap();
        drop(first);
        assert!(room.take(6_000, 6_100).is_some());
        drop(second);
        assert_eq!(*room.left(), (10_000, 30_000));
    }
}
