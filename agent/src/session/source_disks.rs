//! A job's source images: opened, locked, scanned.
//!
//! Owns opening all disks of a job and keeping them over a lost link: the next attempt finds them as they were, if no image
//! changed. Leaves reading to `disk::reader`. Promises that only paths below the configured roots are opened, and that an image
//! shorter than its file systems say is refused.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, JobId};
use longhaul_common::units::ByteSize;
use longhaul_common::wire::batch::Content;
use longhaul_common::wire::session::{
    DEFINITION_MAX, DISKS_MAX, OpenedDisk, PartReport, Refusal, RefusalKind, SourceDisk, SourceOpen,
};
use tokio::sync::{OwnedMutexGuard, watch};

use super::outcome;
use crate::disk::free_map::FreeMap;
use crate::disk::image::{self, Flatten, OpenOptions, SourceImage};
use crate::disk::reader::KnownLeaves;
use crate::disk::roots;
use crate::disk::scan::{self, Proof, Scan};
use crate::disk::spans::Spans;
use crate::settings::AgentSettings;

/// One source image, ready to be read.
pub(super) struct OpenDisk {
    pub image: SourceImage,
    pub free: FreeMap,
    report: OpenedDisk,
    /// Leaf digests that an earlier attempt has read already.
    pub known: KnownLeaves,
    /// Where the data ends that any attempt has sent or passed over. Attempts send in ascending order.
    pub sent: AtomicU64,
}

impl OpenDisk {
    /// What the gateway is told of this disk.
    pub(super) fn report(&self) -> OpenedDisk {
        OpenedDisk {
            sent_before: self.sent.load(Ordering::Relaxed),
            ..self.report.clone()
        }
    }
}

/// All images of a job, and the VM's definition.
pub(super) struct OpenSource {
    pub disks: Vec<OpenDisk>,
    pub definition: Option<Vec<u8>>,
}

/// Images that an attempt left open for the next one.
pub(super) struct Lingering {
    asked: (Vec<SourceDisk>, Option<PathBuf>, bool),
    source: Arc<OpenSource>,
    since: Instant,
}

/// A job's images on this host: one attempt at a time has them.
struct Slot {
    newest: watch::Sender<Attempt>,
    left: Arc<tokio::sync::Mutex<Option<Lingering>>>,
}

/// The sources of every job.
pub(super) struct OpenSources {
    linger: Duration,
    slots: Mutex<HashMap<JobId, Slot>>,
}

/// An attempt's turn at its job's images; a newer attempt ends it, and waits for that.
pub(super) struct Turn {
    attempt: Attempt,
    newest: watch::Receiver<Attempt>,
    left: OwnedMutexGuard<Option<Lingering>>,
}

impl Turn {
    /// What an earlier attempt left.
    pub(super) fn take(&mut self) -> Option<Lingering> {
        self.left.take()
    }

    /// Keeps the images open and locked for the next attempt, for a while.
    pub(super) fn keep(mut self, open: &SourceOpen, source: Arc<OpenSource>, now: Instant) {
        *self.left = Some(Lingering {
            asked: asked(open),
            source,
            since: now,
        });
    }

    /// Waits until a newer attempt wants its turn.
    pub(super) async fn superseded(&self) {
        let mut newest = self.newest.clone();
        if newest.wait_for(|newest| *newest > self.attempt).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl OpenSources {
    pub(super) fn new(linger: Duration) -> Self {
        Self {
            linger,
            slots: Mutex::default(),
        }
    }

    /// Gives an attempt its turn. An older attempt of the same job is told to stop first, and waited for: it holds the images.
    pub(super) async fn enter(&self, job: JobId, attempt: Attempt) -> Result<Turn, Refusal> {
        let (newest, left) = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let slot = slots.entry(job).or_insert_with(|| Slot {
                newest: watch::Sender::new(Attempt(0)),
                left: Arc::default(),
            });
            let known = *slot.newest.borrow();
            if known >= attempt {
                return Err(superseded(known));
            }
            slot.newest.send_replace(attempt);
            (slot.newest.subscribe(), Arc::clone(&slot.left))
        };
        let left = left.lock_owned().await;
        let known = *newest.borrow();
        if known > attempt {
            return Err(superseded(known));
        }
        Ok(Turn {
            attempt,
            newest,
            left,
        })
    }

    /// Closes what nobody came back for.
    pub(super) fn expire(&self, now: Instant) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // A slot that is locked is at work.
        slots.retain(|_, slot| match slot.left.try_lock() {
            Err(_) => true,
            Ok(left) => {
                let since = left.as_ref().map(|left| left.since);
                since.is_some_and(|since| now.saturating_duration_since(since) < self.linger)
            }
        });
    }
}

fn superseded(by: Attempt) -> Refusal {
    let text = format!("attempt {by} of this job has taken over");
    Refusal::new(RefusalKind::Superseded, text)
}

/// Opens what `open` asks for, or takes up what an earlier attempt left. Blocks.
pub(super) fn open_or_take_up(
    left: Option<Lingering>,
    open: &SourceOpen,
    settings: &AgentSettings,
) -> Result<Arc<OpenSource>, Refusal> {
    if let Some(left) = left.filter(|left| left.asked == asked(open)) {
        let mut disks = left.source.disks.iter();
        if disks.all(|disk| disk.image.unchanged().is_ok()) {
            return Ok(left.source);
        }
    }
    OpenSource::open(open, settings).map(Arc::new)
}

fn asked(open: &SourceOpen) -> (Vec<SourceDisk>, Option<PathBuf>, bool) {
    (open.disks.clone(), open.definition.clone(), open.filter)
}

impl OpenSource {
    fn open(open: &SourceOpen, settings: &AgentSettings) -> Result<Self, Refusal> {
        if open.disks.is_empty() || open.disks.len() > DISKS_MAX {
            let text = format!(
                "a VM with {} disks cannot be moved; 1 to {DISKS_MAX} can",
                open.disks.len()
            );
            return Err(Refusal::new(RefusalKind::Refused, text));
        }
        let definition = open
            .definition
            .as_deref()
            .map(|path| read_definition(path, settings))
            .transpose()?;
        let disks = open
            .disks
            .iter()
            .map(|disk| OpenDisk::open(disk, open.filter, settings))
            .collect::<Result<_, _>>()?;
        Ok(Self { disks, definition })
    }
}

impl OpenDisk {
    fn open(disk: &SourceDisk, filter: bool, settings: &AgentSettings) -> Result<Self, Refusal> {
        let path = outcome::refused(roots::resolve_inside(&settings.paths.read, &disk.path))?;
        let format = disk.format.as_deref().map(str::parse).transpose();
        let allowed = |path: &Path| roots::resolve_inside(&settings.paths.read, path).is_ok();
        let options = OpenOptions {
            format: outcome::refused(format)?,
            flatten: if disk.flatten {
                Flatten::Yes
            } else {
                Flatten::Refuse
            },
            connections: settings.limits.read_threads,
            run_dir: settings.paths.run.clone(),
            qemu_nbd: settings.programs.qemu_nbd.clone(),
            qemu_img: settings.programs.qemu_img.clone(),
            allowed: &allowed,
        };
        let image = image::open(&path, &options).map_err(|error| outcome::image(&error))?;
        let started = Instant::now();
        let scan = if filter {
            scan::scan(&image)
        } else {
            unfiltered(&image)
        };
        refuse_short(&path, &scan, image.size())?;
        let sums = sum_contents(&image, &scan).map_err(|error| {
            Refusal::new(
                RefusalKind::Refused,
                format!("cannot read the map of {}: {error}", path.display()),
            )
        })?;
        let report = OpenedDisk {
            size: image.size(),
            format: image.format().to_string(),
            allocated: sums.data + sums.free,
            free: sums.free,
            used: sums.data,
            parts: scan
                .parts
                .iter()
                .zip(&sums.parts)
                .map(|(part, free)| part_report(part, *free))
                .collect(),
            notes: image.notes().to_vec(),
            scan_ms: started.elapsed().as_millis() as u64,
            sent_before: 0,
            since: None,
        };
        Ok(Self {
            known: KnownLeaves::new(image.size()),
            sent: AtomicU64::new(0),
            image,
            free: scan.free,
            report,
        })
    }
}

/// The scan of a disk whose filter is switched off.
fn unfiltered(image: &SourceImage) -> Scan {
    let size = image.size();
    Scan {
        free: FreeMap::new(size),
        parts: Vec::new(),
        needs: 0,
        shortfalls: Vec::new(),
    }
}

fn refuse_short(path: &Path, scan: &Scan, size: u64) -> Result<(), Refusal> {
    if scan.needs <= size {
        return Ok(());
    }
    let text = format!(
        "{} has {}, but its content needs {} ({}); it was cut off, copy it again from where it came",
        path.display(),
        ByteSize(size),
        ByteSize(scan.needs),
        scan.shortfalls.join("; "),
    );
    Err(Refusal::new(RefusalKind::Refused, text))
}

struct Sums {
    data: u64,
    free: u64,
    /// Of `free`, what lies in each part; holes that are free as well count as holes.
    parts: Vec<u64>,
}

/// How much of the disk is read, and how much is skipped as free.
fn sum_contents(image: &SourceImage, scan: &Scan) -> std::io::Result<Sums> {
    let mut spans = Spans::new(image.size());
    let mut sums = Sums {
        data: 0,
        free: 0,
        parts: vec![0; scan.parts.len()],
    };
    let ask = |range: Extent| image.allocation(range);
    while let Some(span) = spans.next(&scan.free, &ask)? {
        for piece in span.pieces {
            match piece.content {
                Content::Data => sums.data += piece.extent.len(),
                Content::Free => {
                    sums.free += piece.extent.len();
                    if let Some(part) = part_of(&piece.extent, &scan.parts) {
                        sums.parts[part] += piece.extent.len();
                    }
                }
                Content::Hole | Content::Zero => {}
            }
        }
    }
    Ok(sums)
}

/// The smallest part that proves something and holds `free`: a logical volume lies inside its physical one.
fn part_of(free: &Extent, parts: &[scan::Part]) -> Option<usize> {
    let proving = (0..)
        .zip(parts)
        .filter(|(_, part)| part.proof.is_some() && part.extent.intersect(free).is_some());
    proving
        .min_by_key(|(_, part)| part.extent.len())
        .map(|(index, _)| index)
}

fn part_report(part: &scan::Part, free_bytes: u64) -> PartReport {
    PartReport {
        name: part.name.clone(),
        extent: part.extent,
        kind: part.kind.clone(),
        proof: part.proof.map(|proof| proof_words(proof).to_owned()),
        free_bytes,
        reason: part.reason.clone(),
    }
}

fn proof_words(proof: Proof) -> &'static str {
    proof.words()
}

pub(super) fn read_definition(path: &Path, settings: &AgentSettings) -> Result<Vec<u8>, Refusal> {
    let path = outcome::refused(roots::resolve_inside(&settings.paths.read, path))?;
    let refused = |text: String| {
        Refusal::new(
            RefusalKind::Refused,
            format!("definition {}: {text}", path.display()),
        )
    };
    let size = std::fs::metadata(&path)
        .map_err(|error| refused(error.to_string()))?
        .len();
    if size > DEFINITION_MAX as u64 {
        return Err(refused(format!("{size} bytes are more than {DEFINITION_MAX}")));
    }
    std::fs::read(&path).map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_newer_attempt_ends_the_older_ones_turn_and_waits_for_it() {
        let sources = OpenSources::new(Duration::from_secs(60));
        let job = JobId::random();
        let older = sources
            .enter(job, Attempt(1))
            .await
            .unwrap_or_else(|e| panic!("{e}"));
        assert!(
            sources.enter(job, Attempt(1)).await.is_err(),
            "the same attempt twice"
        );
        let newer = sources.enter(job, Attempt(3));
        tokio::pin!(newer);
        let short = Duration::from_millis(20);
        assert!(
            tokio::time::timeout(short, &mut newer).await.is_err(),
            "did not wait"
        );
        tokio::time::timeout(Duration::from_secs(5), older.superseded())
            .await
            .unwrap();
        assert!(
            sources.enter(job, Attempt(2)).await.is_err(),
            "an attempt from the past"
        );
        sources.expire(Instant::now());
        drop(older);
        assert!(newer.await.is_ok());
    }
}
