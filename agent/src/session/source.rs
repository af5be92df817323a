//! The source side of one attempt: open, read, send within credit, finish.
//!
//! Owns the order of these steps and the stream to the gateway. Leaves reading to `disk::reader` and the images' life to
//! `source_disks`. Promises that no more is sent than the target gave credit for, and that an attempt whose stream ends stops
//! reading at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use longhaul_common::digest::Digest;
use longhaul_common::ids::DiskIndex;
use longhaul_common::link::{Link, RecvStream, SendStream};
use longhaul_common::wire::batch::Content;
use longhaul_common::wire::frame::{self, FrameError};
use longhaul_common::wire::session::{DiskCounts, FromSource, Refusal, RefusalKind, SourceOpen, ToSource};
use tokio::sync::{Semaphore, mpsc};

use super::source_disks::{OpenDisk, OpenSource, open_or_take_up};
use super::threads::{ThreadFailed, on_thread};
use super::{Agent, outcome};
use crate::disk::have::HaveLeaves;
use crate::disk::reader::{DiskRead, Outgoing};
use crate::metrics::{SOURCE_BATCHES, SOURCE_RAW};

/// Batches that are read ahead of the link.
const READ_AHEAD: usize = 4;

/// From the reading thread to the sending task.
enum Event {
    Batch(Outgoing),
    DiskDone(DiskIndex, Digest, DiskCounts),
    Failed(Refusal),
}

/// Runs the attempt to its end.
pub(super) async fn run(
    agent: &Arc<Agent>,
    link: Link,
    mut send: SendStream,
    recv: RecvStream,
    open: SourceOpen,
) {
    tracing::info!(job = %open.job, attempt = %open.attempt, disks = open.disks.len(), "source opens");
    let mut turn = match agent.sources.enter(open.job, open.attempt).await {
        Ok(turn) => turn,
        Err(refusal) => return fail(&mut send, &open, refusal).await,
    };
    let (with, asked, left) = (Arc::clone(agent), open.clone(), turn.take());
    let opened = on_thread("source-open", move || {
        open_or_take_up(left, &asked, &with.settings)
    })
    .await;
    let opened = opened.unwrap_or_else(|error| Err(Refusal::because(RefusalKind::Protocol, &error)));
    let source = match opened {
        Ok(source) => source,
        Err(refusal) => {
            drop(turn);
            return fail(&mut send, &open, refusal).await;
        }
    };
    let attempt = Attempt {
        agent: Arc::clone(agent),
        link,
        open: open.clone(),
        source: Arc::clone(&source),
    };
    let ended = tokio::select! {
        ended = attempt.converse(&mut send, recv) => ended,
        () = turn.superseded() => Ok(Ended::Left),
    };
    match ended {
        Ok(Ended::Finished) => tracing::info!(job = %open.job, "source is done"),
        Ok(Ended::Left) => {
            tracing::info!(job = %open.job, attempt = %open.attempt, "the gateway ended this attempt");
            turn.keep(&open, source, Instant::now());
        }
        Err(refusal) => {
            turn.keep(&open, source, Instant::now());
            fail(&mut send, &open, refusal).await;
        }
    }
}

async fn fail(send: &mut SendStream, open: &SourceOpen, refusal: Refusal) {
    tracing::warn!(job = %open.job, attempt = %open.attempt, "source: {refusal}");
    // A gateway that is gone cannot be told; it starts anew by itself.
    let _ = frame::write(send, &FromSource::Failed(refusal)).await;
    let _ = send.finish();
    let _ = send.stopped().await;
}

enum Ended {
    Finished,
    /// The gateway closed the stream.
    Left,
}

struct Attempt {
    agent: Arc<Agent>,
    link: Link,
    open: SourceOpen,
    source: Arc<OpenSource>,
}

/// Tells the reading thread to stop when the attempt ends, however it ends.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Attempt {
    async fn converse(&self, send: &mut SendStream, mut recv: RecvStream) -> Result<Ended, Refusal> {
        let disks = self.source.disks.iter().map(OpenDisk::report).collect();
        say(
            send,
            &FromSource::Opened {
                disks,
                definition: self.source.definition.clone(),
                live: None,
            },
        )
        .await?;
        let Some(have) = self.hear_have(&mut recv).await? else {
            return Ok(Ended::Left);
        };
        let credit = Arc::new(Semaphore::new(0));
        let (finish, mut finish_asked) = mpsc::channel(1);
        let mut control = tokio::spawn(hear(recv, Arc::clone(&credit), finish));
        let stop = StopOnDrop(Arc::new(AtomicBool::new(false)));
        let events = self.start_reading(have, &stop)?;
        let outcome = tokio::select! {
            sent = self.send_all(send, events, &credit, &mut finish_asked) => sent.map(|()| Ended::Finished),
            ended = &mut control => match ended {
                Ok(Ok(())) => Ok(Ended::Left),
                Ok(Err(error)) => Err(Refusal::because(RefusalKind::Lost, &error)),
                Err(_) => Err(Refusal::new(RefusalKind::Protocol, "the source agent's control task failed")),
            },
        };
        control.abort();
        outcome
    }

    /// What the target holds already; `None` where the gateway only wanted to look (a plan).
    async fn hear_have(&self, recv: &mut RecvStream) -> Result<Option<Vec<HaveLeaves>>, Refusal> {
        let mut have: Vec<_> = self.source.disks.iter().map(|_| HaveLeaves::default()).collect();
        loop {
            let heard = frame::read(recv)
                .await
                .map_err(|error| Refusal::because(RefusalKind::Lost, &error))?;
            match heard {
                None => return Ok(None),
                Some(ToSource::Start) => return Ok(Some(have)),
                Some(ToSource::Have(leaves)) => {
                    let disk = usize::from(leaves.disk.0);
                    let size = self.source.disks.get(disk).map(|disk| disk.image.size());
                    let (Some(have), Some(size)) = (have.get_mut(disk), size) else {
                        return Err(Refusal::new(
                            RefusalKind::Protocol,
                            "the target speaks of a disk there is not",
                        ));
                    };
                    outcome::refused(have.add(&leaves, size))?;
                }
                Some(_) => {
                    return Err(Refusal::new(
                        RefusalKind::Protocol,
                        "the gateway spoke out of turn",
                    ));
                }
            }
        }
    }

    /// Reads all disks on a thread of their own; batches come out in the order they are read.
    fn start_reading(
        &self,
        have: Vec<HaveLeaves>,
        stop: &StopOnDrop,
    ) -> Result<mpsc::Receiver<Event>, Refusal> {
        let (events, received) = mpsc::channel(READ_AHEAD);
        let stop = Arc::clone(&stop.0);
        let (open, source) = (self.open.clone(), Arc::clone(&self.source));
        let threads = self.agent.settings.limits.read_threads;
        let body = move || {
            let sequence = AtomicU64::new(0);
            for (index, have) in (0..).map(DiskIndex).zip(&have) {
                let event = match read_disk(&open, &source, index, have, &sequence, threads, &events, &stop) {
                    Ok((digest, counts)) => Event::DiskDone(index, digest, counts),
                    Err(refusal) => Event::Failed(refusal),
                };
                let failed = matches!(event, Event::Failed(_));
                if events.blocking_send(event).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("source-read".to_owned())
            .spawn(body);
        thread.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
        Ok(received)
    }

    /// Sends every batch, then answers `Finish`. Ends with the attempt's success.
    async fn send_all(
        &self,
        send: &mut SendStream,
        mut events: mpsc::Receiver<Event>,
        credit: &Semaphore,
        finish_asked: &mut mpsc::Receiver<()>,
    ) -> Result<(), Refusal> {
        let mut left = self.source.disks.len();
        while let Some(event) = events.recv().await {
            match event {
                Event::Batch(outgoing) => self.send_batch(outgoing, credit).await?,
                Event::DiskDone(disk, digest, counts) => {
                    left = left.saturating_sub(1);
                    say(send, &FromSource::DiskDone { disk, digest, counts }).await?;
                }
                Event::Failed(refusal) => return Err(refusal),
            }
        }
        // A thread that died has said nothing of what it did not read, and nobody would ask to finish.
        if left > 0 {
            return Err(Refusal::because(RefusalKind::Protocol, &ThreadFailed));
        }
        if finish_asked.recv().await.is_none() {
            // The control task says why; it ends this attempt.
            return std::future::pending().await;
        }
        let source = Arc::clone(&self.source);
        let unchanged = on_thread("source-check", move || {
            source
                .disks
                .iter()
                .try_for_each(|disk| disk.image.unchanged())
                .map_err(|error| outcome::image(&error))
        });
        unchanged
            .await
            .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))??;
        say(send, &FromSource::Finished).await?;
        let _ = send.finish();
        let _ = send.stopped().await;
        Ok(())
    }

    async fn send_batch(&self, outgoing: Outgoing, credit: &Semaphore) -> Result<(), Refusal> {
        let needed = u32::try_from(outgoing.header.credit()).unwrap_or(u32::MAX);
        let permit = credit.acquire_many(needed).await;
        permit
            .map_err(|error| Refusal::because(RefusalKind::Lost, &error))?
            .forget();
        let (header, raw) = (
            outcome::refused(outgoing.header.encode())?,
            outgoing.header.data_len(),
        );
        let data = outgoing.header.pieces.iter().rev();
        let last = data.into_iter().find(|piece| piece.content == Content::Data);
        let disk = self.source.disks.get(usize::from(outgoing.header.disk.0));
        if let (Some(disk), Some(last)) = (disk, last) {
            disk.sent.fetch_max(last.extent.end(), Ordering::Relaxed);
        }
        let lost =
            |error: &dyn std::fmt::Display| Refusal::new(RefusalKind::Lost, self.link.reason_or(error));
        let stream = self.link.open_uni(outgoing.header.priority()).await;
        let mut stream = stream.map_err(|error| lost(&error))?;
        stream
            .write_chunk(header.into())
            .await
            .map_err(|error| lost(&error))?;
        stream
            .write_chunk(outgoing.data.into())
            .await
            .map_err(|error| lost(&error))?;
        // Fails only where the gateway refused the stream, and then it ends the attempt.
        let _ = stream.finish();
        metrics::counter!(SOURCE_BATCHES).increment(1);
        metrics::counter!(SOURCE_RAW).increment(raw);
        Ok(())
    }
}

/// Listens to the gateway until it closes the stream.
async fn hear(
    mut recv: RecvStream,
    credit: Arc<Semaphore>,
    finish: mpsc::Sender<()>,
) -> Result<(), FrameError> {
    while let Some(message) = frame::read(&mut recv).await? {
        match message {
            ToSource::Credit(bytes) => {
                let room = Semaphore::MAX_PERMITS - credit.available_permits();
                credit.add_permits(usize::try_from(bytes).unwrap_or(usize::MAX).min(room));
            }
            ToSource::Finish => drop(finish.try_send(())),
            ToSource::Durable(_)
            | ToSource::Have(_)
            | ToSource::Start
            | ToSource::Say(_)
            | ToSource::Cancel(_)
            | ToSource::Carried(_) => {}
        }
    }
    Ok(())
}

async fn say(send: &mut SendStream, message: &FromSource) -> Result<(), Refusal> {
    frame::write(send, message)
        .await
        .map_err(|error| Refusal::because(RefusalKind::Lost, &error))
}

#[expect(
    clippy::too_many_arguments,
    reason = "what one disk's reading needs, all of it distinct"
)]
fn read_disk(
    open: &SourceOpen,
    source: &OpenSource,
    index: DiskIndex,
    have: &HaveLeaves,
    sequence: &AtomicU64,
    threads: usize,
    events: &mpsc::Sender<Event>,
    stop: &AtomicBool,
) -> Result<(Digest, DiskCounts), Refusal> {
    let disk = &source.disks[usize::from(index.0)];
    let read = DiskRead {
        job: open.job,
        attempt: open.attempt,
        disk: index,
        image: &disk.image,
        allocation: &|range| disk.image.allocation(range),
        free: &disk.free,
        have,
        known: &disk.known,
        sequence,
        emit: &|outgoing| {
            !stop.load(Ordering::Relaxed) && events.blocking_send(Event::Batch(outgoing)).is_ok()
        },
    };
    read.run(threads).map_err(|error| outcome::reading(&error))
}
