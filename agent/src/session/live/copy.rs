//! Reading a running VM's disks: round 0, and what a dirty bitmap says.
//!
//! Owns the threads that read. Leaves zeros, leaves and digests of round 0 to `disk::reader`, cutting later rounds into batches to `making`,
//! sending to the caller. Promises that a round covers every dirty byte of its bitmap, and that reading stops with whoever asked.

mod making;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use longhaul_common::digest::Digest;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{DiskIndex, Round};
use longhaul_common::wire::batch::{BatchHeader, Content, Leaves, Piece, RAW_MAX};
use longhaul_common::wire::session::{DiskCounts, Refusal, RefusalKind};
use tokio::sync::mpsc;

use self::making::{DIRTY_BATCH, Making, read_dirty};
use super::disks::{self, Reach};
use super::drive::Stop;
use super::source::LiveSource;
use super::uplink::Uplink;
use crate::disk::free_map::FreeMap;
use crate::disk::have::HaveLeaves;
use crate::disk::reader::{DiskRead, KnownLeaves, Outgoing};
use crate::session::outcome;
use crate::session::threads::ThreadFailed;

/// Batches that are read ahead.
const READ_AHEAD: usize = 4;

/// What a round has of one disk, not addressed yet.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub disk: DiskIndex,
    pieces: Vec<Piece>,
    pub data: Bytes,
}

/// To whom batches go, and as what.
#[derive(Clone)]
pub(super) struct Address {
    pub uplink: Arc<Uplink>,
    pub round: Round,
    pub urgent: bool,
}

/// A batch with its header for one attempt.
pub(super) struct Ready {
    pub batch: Batch,
    pub header: BatchHeader,
}

impl Address {
    /// Hashes the data: not for the runtime's threads.
    pub(super) fn ready(&self, batch: Batch) -> Result<Ready, Refusal> {
        let mut header = BatchHeader {
            job: self.uplink.job,
            attempt: self.uplink.attempt,
            disk: batch.disk,
            round: self.round,
            sequence: self.uplink.next_sequence(),
            pieces: batch.pieces.clone(),
            leaves: Leaves::default(),
            ram: None,
            urgent: self.urgent,
            digest: Digest([0; 32]),
        };
        let made = header.digest_of(&batch.data);
        header.digest = made.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
        Ok(Ready { batch, header })
    }
}

impl Batch {
    /// What of the disk it stands for.
    pub(super) fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.pieces.iter().map(|piece| piece.extent)
    }

    /// Bytes of the disk that it stands for.
    pub(super) fn covered(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.extent.len()).sum()
    }
}

/// Tells reading threads to stop when whoever asked is gone.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

enum Event {
    Batch(Outgoing),
    Done(Digest, DiskCounts),
    Failed(Refusal),
}

/// Reads all disks and sends what the target does not `have`. Gives what was counted.
pub(super) async fn base(
    session: &Arc<LiveSource>,
    uplink: &Arc<Uplink>,
    reach: Reach,
    have: Vec<HaveLeaves>,
) -> Result<Vec<(Digest, DiskCounts)>, Stop> {
    let (events, mut read) = mpsc::channel(READ_AHEAD);
    let stop = StopOnDrop(Arc::default());
    let (reading, with, stopping) = (Arc::clone(session), Arc::clone(uplink), Arc::clone(&stop.0));
    let body = move || read_base(&reading, &with, reach, &have, &events, &stopping);
    std::thread::Builder::new()
        .name("live-read".to_owned())
        .spawn(body)
        .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
    let mut done = Vec::new();
    while let Some(event) = read.recv().await {
        match event {
            Event::Batch(outgoing) => {
                // A hole that is told of now is not told of again with what was put off.
                let pieces = outgoing.header.pieces.iter();
                let holes = pieces.filter(|piece| piece.content == Content::Hole);
                let disk = usize::from(outgoing.header.disk.0);
                session.free.sent(disk, holes.map(|piece| piece.extent));
                uplink.send_disk(&outgoing.header, outgoing.data.into()).await?;
            }
            Event::Done(digest, counts) => done.push((digest, counts)),
            Event::Failed(refusal) => return Err(refusal.into()),
        }
        if session.heard.borrow().cancel.is_some() {
            return Err(Stop::Detached);
        }
    }
    Ok(whole(done, session.disks.len())?)
}

/// A thread that died has said nothing of what it did not read.
fn whole<T>(done: Vec<T>, disks: usize) -> Result<Vec<T>, Refusal> {
    match done.len() == disks {
        true => Ok(done),
        false => Err(Refusal::because(RefusalKind::Protocol, &ThreadFailed)),
    }
}

fn read_base(
    session: &LiveSource,
    uplink: &Uplink,
    reach: Reach,
    have: &[HaveLeaves],
    events: &mpsc::Sender<Event>,
    stop: &AtomicBool,
) {
    let threads = session.agent.settings.limits.read_threads;
    let images = match disks::connect(reach) {
        Ok(images) => images,
        Err(refusal) => return drop(events.blocking_send(Event::Failed(refusal))),
    };
    for ((disk, image), have) in (0..).map(DiskIndex).zip(&images).zip(have) {
        let free = session.free.deferred(usize::from(disk.0));
        let free = free.unwrap_or_else(|| FreeMap::new(image.size()));
        let read = DiskRead {
            job: session.job,
            attempt: uplink.attempt,
            disk,
            image,
            allocation: &|range| image.allocation(range),
            free: &free,
            have,
            // The disk changes under us: what was read once may be read again.
            known: &KnownLeaves::new(image.size()),
            sequence: uplink.sequence(),
            emit: &|outgoing| {
                !stop.load(Ordering::Relaxed) && events.blocking_send(Event::Batch(outgoing)).is_ok()
            },
        };
        let event = match read.run(threads) {
            Ok((digest, counts)) => Event::Done(digest, counts),
            Err(error) => Event::Failed(outcome::reading(&error)),
        };
        let failed = matches!(event, Event::Failed(_));
        if events.blocking_send(event).is_err() || failed {
            return;
        }
    }
}

/// Batches as they are read; reading stops with whoever drops this.
pub(super) type Reading = mpsc::Receiver<Result<Ready, Refusal>>;

/// Reads what of a disk was put off as perhaps free and is not proven so by the time that it is read.
pub(super) fn put_off(session: &LiveSource, disk: DiskIndex, address: Address) -> Result<Reading, Refusal> {
    let (free, index) = (Arc::clone(&session.free), usize::from(disk.0));
    reading("live-put-off", move |batches| {
        let Some(image) = free.image(index) else {
            return Ok(());
        };
        // There is a lot of it, and nothing waits for a single batch.
        let mut making = Making::new(disk, RAW_MAX, |batch| batches.send(&address, batch));
        let mut from = 0;
        loop {
            let some = free.unproven(index, from, PUT_OFF_STEP);
            let Some(last) = some.last() else { break };
            from = last.end();
            if !making.read(&*image, some).map_err(|error| unread(&error))? {
                break;
            }
        }
        making.send();
        Ok(())
    })
}

/// Reads these extents of a disk, which ascend.
pub(super) fn left_out(
    session: &LiveSource,
    disk: DiskIndex,
    extents: Vec<Extent>,
    address: Address,
) -> Result<Reading, Refusal> {
    let image = session.free.image(usize::from(disk.0));
    reading("live-left-out", move |batches| {
        let mut making = Making::new(disk, DIRTY_BATCH, |batch| batches.send(&address, batch));
        if let Some(image) = image {
            making.read(&*image, extents).map_err(|error| unread(&error))?;
        }
        making.send();
        Ok(())
    })
}

/// How much of what was put off is read between two looks at what is proven, in bytes.
const PUT_OFF_STEP: u64 = 4 << 20;

/// Reads what the exports' bitmaps call dirty, all disks at once.
pub(super) fn dirty(reach: Reach, address: Address) -> Result<Reading, Refusal> {
    reading("live-round", move |batches| {
        let images = disks::connect(reach)?;
        std::thread::scope(|scope| {
            let each = (0..).map(DiskIndex).zip(&images).map(|(disk, image)| {
                let address = &address;
                scope.spawn(move || {
                    let mut making = Making::new(disk, DIRTY_BATCH, |batch| batches.send(address, batch));
                    read_dirty(image, &mut making).map_err(|error| unread(&error))
                })
            });
            let each: Vec<_> = each.collect();
            let died = |_| Refusal::because(RefusalKind::Protocol, &ThreadFailed);
            each.into_iter()
                .try_for_each(|thread| thread.join().map_err(died)?)
        })
    })
}

fn unread(error: &std::io::Error) -> Refusal {
    Refusal::because(RefusalKind::Refused, error)
}

/// Where a reading thread leaves its batches.
struct Batches(mpsc::Sender<Result<Ready, Refusal>>);

impl Batches {
    /// `false`: nobody wants more.
    fn send(&self, address: &Address, batch: Batch) -> bool {
        let ready = address.ready(batch);
        let goes_on = ready.is_ok();
        self.0.blocking_send(ready).is_ok() && goes_on
    }
}

/// Runs `read` on a thread of its own; its error is the last that comes.
fn reading(
    name: &str,
    read: impl FnOnce(&Batches) -> Result<(), Refusal> + Send + 'static,
) -> Result<Reading, Refusal> {
    let (batches, ready) = mpsc::channel(READ_AHEAD);
    let body = move || {
        let batches = Batches(batches);
        // A thread that dies must not look like one that came to the end: what it did not read would be lost.
        let ended = catch_unwind(AssertUnwindSafe(|| read(&batches)));
        let died = |_| Err(Refusal::because(RefusalKind::Protocol, &ThreadFailed));
        if let Err(refusal) = ended.unwrap_or_else(died) {
            // Nobody waits for it where the attempt is over.
            drop(batches.0.blocking_send(Err(refusal)));
        }
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
    Ok(ready)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_dies_has_not_read_to_the_end() {
        let mut died = reading("test", |_| panic!("on purpose")).unwrap();
        assert!(matches!(died.blocking_recv(), Some(Err(_))));
        assert!(died.blocking_recv().is_none());
        assert!(reading("test", |_| Ok(())).unwrap().blocking_recv().is_none());
    }

    #[test]
    fn a_round_0_without_one_of_its_disks_is_an_error() {
        assert!(whole(vec![1, 2], 2).is_ok() && whole(Vec::<u8>::new(), 0).is_ok());
        let refusal = whole(vec![1], 2).unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::Protocol);
    }
}
