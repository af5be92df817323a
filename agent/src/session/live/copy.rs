//! Reading a running VM's disks: round 0, and what a dirty bitmap says.
//!
//! Owns the threads that read. Leaves zeros, leaves and digests of round 0 to `disk::reader`, cutting later rounds into batches to `making`,
//! sending to the caller. Promises that a round covers every dirty byte of its bitmap, and that reading stops with whoever asked.

mod making;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use longhaul_common::digest::Digest;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{DiskIndex, Round};
use longhaul_common::wire::batch::{BatchHeader, Leaves, Piece};
use longhaul_common::wire::session::{DiskCounts, Refusal, RefusalKind};
use tokio::sync::mpsc;

use self::making::{Making, read_dirty};
use super::disks::{self, Reach};
use super::drive::Stop;
use super::proof::FreeProof;
use super::source::LiveSource;
use super::uplink::Uplink;
use crate::disk::free_map::FreeMap;
use crate::disk::have::HaveLeaves;
use crate::disk::reader::{DiskRead, KnownLeaves, Outgoing};
use crate::session::outcome;
use crate::session::threads::on_thread;

/// Batches that are read ahead.
const READ_AHEAD: usize = 4;

/// What a round has of one disk, not addressed yet.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub disk: DiskIndex,
    pieces: Vec<Piece>,
    pub data: Vec<u8>,
}

impl Batch {
    /// The header for one attempt, and the data.
    pub(super) fn addressed(
        &self,
        uplink: &Uplink,
        round: Round,
        urgent: bool,
    ) -> Result<(BatchHeader, Vec<u8>), Stop> {
        let mut header = BatchHeader {
            job: uplink.job,
            attempt: uplink.attempt,
            disk: self.disk,
            round,
            sequence: uplink.next_sequence(),
            pieces: self.pieces.clone(),
            leaves: Leaves::default(),
            ram: None,
            urgent,
            digest: Digest([0; 32]),
        };
        let made = header.digest_of(&self.data);
        header.digest = made.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
        Ok((header, self.data.clone()))
    }

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
            Event::Batch(outgoing) => uplink.send_disk(&outgoing.header, outgoing.data).await?,
            Event::Done(digest, counts) => done.push((digest, counts)),
            Event::Failed(refusal) => return Err(refusal.into()),
        }
        if session.heard.borrow().cancel.is_some() {
            return Err(Stop::Detached);
        }
    }
    Ok(done)
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

/// Reads some of what was put off as perhaps free and is not proven so: the batches, and where to go on. `None` at the disk's end.
pub(super) async fn put_off(
    session: &Arc<LiveSource>,
    disk: DiskIndex,
    from: u64,
) -> Result<Option<(Vec<Batch>, u64)>, Stop> {
    let index = usize::from(disk.0);
    some(session, disk, move |free| {
        free.unproven(index, from, PUT_OFF_STEP)
    })
    .await
}

/// Reads the first of these extents of a disk, in disk order: the batches, and where to go on.
pub(super) async fn left_out(
    session: &Arc<LiveSource>,
    disk: DiskIndex,
    extents: &[Extent],
    from: u64,
) -> Result<Option<(Vec<Batch>, u64)>, Stop> {
    let (mut some_of, mut room) = (Vec::new(), PUT_OFF_STEP);
    for extent in extents.iter().filter(|extent| extent.end() > from) {
        let start = extent.offset().max(from);
        let part = Extent::between(start, extent.end().min(start + room));
        room -= part.len();
        some_of.push(part);
        if room == 0 {
            break;
        }
    }
    some(session, disk, move |_| some_of).await
}

async fn some(
    session: &Arc<LiveSource>,
    disk: DiskIndex,
    which: impl FnOnce(&FreeProof) -> Vec<Extent> + Send + 'static,
) -> Result<Option<(Vec<Batch>, u64)>, Stop> {
    let free = Arc::clone(&session.free);
    let index = usize::from(disk.0);
    let read = on_thread("live-put-off", move || {
        let extents = which(&free);
        let end = extents.last().map(|extent| extent.end())?;
        let (batches, mut made) = mpsc::channel(PUT_OFF_BATCHES);
        let read = free.with_image(index, |image| {
            let mut making = Making::new(disk);
            making.read(image, extents, &batches)?;
            making.send(&batches);
            Ok::<_, std::io::Error>(())
        })?;
        drop(batches);
        let mut list = Vec::new();
        while let Some(batch) = made.blocking_recv() {
            list.push(batch);
        }
        Some(read.map(|()| (list, end)))
    });
    let read = read
        .await
        .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
    let refused = |error: std::io::Error| Refusal::because(RefusalKind::Refused, &error);
    let Some((list, end)) = read.transpose().map_err(refused)? else {
        return Ok(None);
    };
    Ok(Some((list.into_iter().collect::<Result<_, _>>()?, end)))
}

/// How much of what was put off is read at once, in bytes.
const PUT_OFF_STEP: u64 = 4 << 20;
/// More batches than that much can make.
const PUT_OFF_BATCHES: usize = 4096;

/// Reads what the exports' bitmaps call dirty, all disks at once. The receiver's end stops the reading.
pub(super) async fn dirty(reach: Reach) -> Result<mpsc::Receiver<Result<Batch, Refusal>>, Stop> {
    let (batches, read) = mpsc::channel(READ_AHEAD);
    let body = move || {
        let images = match disks::connect(reach) {
            Ok(images) => images,
            Err(refusal) => return drop(batches.blocking_send(Err(refusal))),
        };
        std::thread::scope(|scope| {
            for (disk, image) in (0..).map(DiskIndex).zip(&images) {
                let batches = &batches;
                scope.spawn(move || {
                    if let Err(error) = read_dirty(disk, image, batches) {
                        let refusal = Refusal::because(RefusalKind::Refused, &error);
                        drop(batches.blocking_send(Err(refusal)));
                    }
                });
            }
        });
    };
    std::thread::Builder::new()
        .name("live-round".to_owned())
        .spawn(body)
        .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
    Ok(read)
}
