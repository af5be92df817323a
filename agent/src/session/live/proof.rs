//! Which free blocks of a running guest stay behind.
//!
//! Owns the looks at the disks during round 0: what the first one calls free is put off, what is proven by the end is left out, the rest
//! is sent; a second look shortly before the pause. Leaves proofs to `disk::live_free`. Promises that a block which is put off is either
//! proven free or sent before RAM flows.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::extent::Extent;
use longhaul_common::wire::session::{LivePolicy, PartReport, Refusal};

use super::disks;
use super::freeze::Frozen;
use crate::disk::free_map::FreeMap;
use crate::disk::image::LiveImage;
use crate::disk::live_free::{Look, Mount, Proofs, Rules, SecondLook, second_look};
use crate::disk::scan::Part;
use crate::session::threads::on_thread;

/// More than any disk has.
const ALL: u64 = 1 << 62;
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// One disk's free blocks.
struct DiskProof {
    image: Arc<LiveImage>,
    /// What the first look called free.
    deferred: FreeMap,
    proofs: Proofs,
    /// What round 0 left out and no round has sent since; nothing before its end.
    left_out: FreeMap,
}

impl DiskProof {
    fn first(image: Arc<LiveImage>, started: Instant, age: Option<Duration>, filter: bool) -> Self {
        let rules = Rules {
            started,
            age,
            frozen: Vec::new(),
        };
        let mut proofs = Proofs::new(image.size(), rules);
        let mut deferred = FreeMap::new(image.size());
        if filter {
            let look = Look::running(&*image, Instant::now());
            proofs.add(&look);
            deferred = look.free;
        }
        Self {
            left_out: FreeMap::new(image.size()),
            image,
            deferred,
            proofs,
        }
    }

    fn froze(&mut self, mounts: Vec<Mount>, look: Option<&Look>) {
        let size = self.image.size();
        self.proofs.froze(mounts, look, size);
        if let Some(look) = look {
            let deferred = &mut self.deferred;
            look.free.each_run(&Extent::between(0, size), &mut |run| {
                deferred.mark(&run);
            });
            deferred.share(&look.free);
        }
    }

    /// Looks again where something that is put off is not proven yet.
    fn look(&mut self) {
        if self.proofs.missing(&self.deferred, self.image.size()) > 0 {
            let mut look = Look::running(&*self.image, Instant::now());
            // Little changes between two looks, and the proofs keep what they saw.
            look.free.share(&self.deferred);
            self.proofs.add(&look);
        }
    }
}

/// The free blocks of all disks of a VM.
pub(super) struct FreeProof {
    /// Whether any may stay behind.
    filter: bool,
    disks: Mutex<Vec<DiskProof>>,
    /// What was sent, of which disk, while somebody had the disks.
    sent: Mutex<Vec<(usize, Extent)>>,
    next: Mutex<Instant>,
}

impl FreeProof {
    /// Takes the first look at each disk. `started`: when the first dirty bitmaps were on. Blocks.
    pub(super) fn first(images: Vec<LiveImage>, started: Instant, policy: &LivePolicy, filter: bool) -> Self {
        let age = policy.free_proof_age_ms.map(Duration::from_millis);
        let disks = images
            .into_iter()
            .map(|image| DiskProof::first(Arc::new(image), started, age, filter));
        Self {
            filter,
            disks: Mutex::new(disks.collect()),
            sent: Mutex::default(),
            next: Mutex::new(Instant::now() + LOOK_EVERY),
        }
    }

    /// The disks are read by these from now on: the exports of the ones before are closed.
    pub(super) fn renew(&self, images: Vec<LiveImage>) {
        for (disk, image) in self.disks().iter_mut().zip(images) {
            disk.image = Arc::new(image);
        }
    }

    /// Of a session that reads nothing any more.
    pub(super) fn none() -> Self {
        Self {
            filter: false,
            disks: Mutex::default(),
            sent: Mutex::default(),
            next: Mutex::new(Instant::now()),
        }
    }

    /// Whether any free block may stay behind.
    pub(super) const fn is_wanted(&self) -> bool {
        self.filter
    }

    /// Forgets what was seen: the dirty bitmaps were emptied at `started`, when nothing had been sent yet. Blocks.
    pub(super) fn again(&self, started: Instant, policy: &LivePolicy) {
        let age = policy.free_proof_age_ms.map(Duration::from_millis);
        let mut disks = self.disks();
        let old = std::mem::take(&mut *disks).into_iter();
        *disks = old
            .map(|disk| DiskProof::first(disk.image, started, age, self.filter))
            .collect();
    }

    /// Takes in a freeze, before anything was sent.
    pub(super) fn froze(&self, frozen: Frozen) {
        let all = frozen.mounts.into_iter().zip(frozen.looks);
        for (disk, (mounts, look)) in self.disks().iter_mut().zip(all) {
            if !mounts.is_empty() {
                disk.froze(mounts, look.as_ref());
            }
        }
    }

    fn disks(&self) -> MutexGuard<'_, Vec<DiskProof>> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        self.take_in(&mut disks);
        disks
    }

    /// Has the disks know what was sent.
    fn take_in(&self, disks: &mut [DiskProof]) {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        for (disk, extent) in sent.drain(..) {
            if let Some(disk) = disks.get_mut(disk) {
                disk.deferred.clear(&extent);
                disk.left_out.clear(&extent);
            }
        }
    }

    /// What of a disk is not read in round 0's first pass.
    pub(super) fn deferred(&self, disk: usize) -> Option<FreeMap> {
        self.disks().get(disk).map(|disk| disk.deferred.clone())
    }

    /// Nothing of this disk is left behind: the target holds it already, free or not.
    pub(super) fn drop_disk(&self, disk: usize) {
        if let Some(disk) = self.disks().get_mut(disk) {
            let size = disk.image.size();
            let rules = Rules {
                started: Instant::now(),
                age: None,
                frozen: Vec::new(),
            };
            disk.deferred = FreeMap::new(size);
            disk.left_out = FreeMap::new(size);
            disk.proofs = Proofs::new(size, rules);
        }
    }

    /// What of a disk was never sent, as offset and length of each run; after the last round. None where there are more than `max` runs.
    pub(super) fn left_behind(&self, disk: usize, max: usize) -> Option<Vec<(u64, u64)>> {
        let disks = self.disks();
        let left_out = &disks.get(disk)?.left_out;
        let (size, mut runs, mut at) = (disks.get(disk)?.image.size(), Vec::new(), 0);
        while at < size {
            let (free, run) = left_out.run(at, size);
            if free {
                runs.push((run.offset(), run.len()));
            }
            if runs.len() > max {
                return None;
            }
            at = run.end();
        }
        Some(runs)
    }

    /// Has the next look come at once: something may be proven by now.
    pub(super) fn hurry(&self) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether it is time to look again.
    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= *self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks again where it is time to. `runs_since`: since when the VM has run without a stop.
    pub(super) async fn look(self: &Arc<Self>, runs_since: Option<Instant>) {
        {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            if Instant::now() < *next {
                return;
            }
            *next = Instant::now() + LOOK_EVERY;
        }
        let with = Arc::clone(self);
        // A look that cannot be had proves nothing.
        let _ = on_thread("free-look", move || {
            // Whoever sends tells `sent` meanwhile; the next to take the disks hears of it.
            for disk in with.disks().iter_mut() {
                disk.proofs.age_from(runs_since);
                disk.look();
            }
        })
        .await;
    }

    /// Extents of a disk, from `from` on and at most `max` bytes, that were put off and are still not proven free.
    pub(super) fn unproven(&self, disk: usize, from: u64, max: u64) -> Vec<Extent> {
        let disks = self.disks();
        let Some(disk) = disks.get(disk) else {
            return Vec::new();
        };
        let (size, proven) = (disk.image.size(), disk.proofs.free());
        let (mut found, mut bytes, mut at) = (Vec::new(), 0, from);
        while at < size && bytes < max {
            let (deferred, run) = disk.deferred.run(at, size);
            at = run.end();
            if !deferred {
                continue;
            }
            let mut within = run.offset();
            while within < run.end() && bytes < max {
                let (free, part) = proven.run(within, run.end());
                let end = part.end().min(part.offset() + (max - bytes));
                if !free {
                    found.push(Extent::between(part.offset(), end));
                    bytes += end - part.offset();
                }
                within = if free { part.end() } else { end };
                at = within;
            }
        }
        found
    }

    /// A disk as it is looked at now. Whoever reads it keeps nobody from the proofs.
    pub(super) fn image(&self, disk: usize) -> Option<Arc<LiveImage>> {
        self.disks().get(disk).map(|disk| Arc::clone(&disk.image))
    }

    /// The end of round 0: what is left out from now on. Gives of each disk the bytes of it that its image stores. Blocks.
    pub(super) fn leave_out(&self) -> Result<Vec<u64>, Refusal> {
        let count = self.disks().len();
        let left_out = (0..count).map(|disk| {
            let mut left = self.deferred(disk).unwrap_or_else(|| FreeMap::new(0));
            for extent in self.unproven(disk, 0, ALL) {
                left.clear(&extent);
            }
            if let Some(of) = self.disks().get_mut(disk) {
                of.left_out = left.clone();
            }
            left
        });
        let left_out: Vec<_> = left_out.collect();
        let skipped = left_out.iter().enumerate().map(|(disk, left)| {
            let image = self.image(disk);
            image.map_or(Ok(0), |image| disks::stored_and_free(&image, left))
        });
        skipped.collect()
    }

    /// This of a disk was sent: it is not left behind. Never waits for a look.
    pub(super) fn sent(&self, disk: usize, extents: impl Iterator<Item = Extent>) {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.extend(extents.map(|extent| (disk, extent)));
        drop(sent);
        if let Ok(mut disks) = self.disks.try_lock() {
            self.take_in(&mut disks);
        }
    }

    /// Of each disk, what was left out, not sent since, and is allocated now. Blocks.
    pub(super) fn second_look(&self) -> Vec<SecondLook> {
        let look = |disk: &DiskProof| match disk.left_out.free_bytes() {
            0 => SecondLook::default(),
            _ => second_look(&disk.left_out, &Look::running(&*disk.image, Instant::now())),
        };
        self.disks().iter().map(look).collect()
    }

    /// Of each disk its parts, with what was left behind and by which proof, or why nothing was.
    pub(super) fn report(&self) -> Vec<Vec<PartReport>> {
        let parts = |disk: &DiskProof| disk.proofs.parts().map(part_report).collect();
        self.disks().iter().map(parts).collect()
    }
}

fn part_report(part: &Part) -> PartReport {
    PartReport {
        name: part.name.clone(),
        extent: part.extent,
        kind: part.kind.clone(),
        proof: part.proof.map(|proof| proof.words().to_owned()),
        free_bytes: part.free_bytes,
        reason: part.reason.clone(),
    }
}
