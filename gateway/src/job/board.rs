//! What everybody may know of a running job: written by its attempt, read by the API.
//!
//! Owns the current [`Progress`] and wakes those who watch it. Leaves sums to `ledger` and rates to `progress`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use longhaul_common::wire::session::{DiskCounts, LiveStage, LiveState, OpenedDisk};

use super::ledger::Sent;
use super::progress::{JobState, Pace, Phase, Progress};
use crate::send::ingest::Outflow;

#[derive(Default)]
struct Inner {
    state: JobState,
    progress: Progress,
    pace: Pace,
    /// Of each disk, what this attempt kept and found to be zeros, once it was read.
    kept: Vec<u64>,
    /// Of each disk, what the journal is to keep.
    sent: Vec<Sent>,
    /// A running VM's handover is in doubt, in these words.
    doubt: Option<String>,
}

/// A job's notice board.
#[derive(Default)]
pub struct Board {
    inner: Mutex<Inner>,
}

impl Board {
    /// As the journal left it.
    pub fn new(state: JobState, progress: Progress, sent: Vec<Sent>) -> Self {
        let inner = Inner {
            state,
            progress,
            sent,
            ..Inner::default()
        };
        Self {
            inner: Mutex::new(inner),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the job is doing.
    pub fn read(&self) -> (JobState, Progress) {
        let inner = self.inner();
        (inner.state, inner.progress.clone())
    }

    /// What was sent of each disk.
    pub fn sent(&self) -> Vec<Sent> {
        self.inner().sent.clone()
    }

    /// The job does something else now, for this reason.
    pub fn state(&self, state: JobState, message: Option<String>) {
        let mut inner = self.inner();
        inner.state = state;
        inner.progress.message = message;
        if state != JobState::Running {
            (inner.progress.wan_bit_per_s, inner.progress.done_bit_per_s) = (0, 0);
            inner.progress.eta_seconds = None;
            inner.pace = Pace::default();
        }
    }

    /// A new attempt begins.
    pub fn attempt(&self, attempt: u32) {
        let mut inner = self.inner();
        inner.state = JobState::Running;
        inner.progress.attempt = attempt;
        if inner.doubt.is_none() {
            inner.progress.phase = Phase::Connect;
        }
        inner.progress.message = inner.doubt.clone();
        inner.pace = Pace::default();
    }

    /// The attempt enters a phase.
    pub fn phase(&self, phase: Phase) {
        let mut inner = self.inner();
        // Nothing that an attempt does makes a doubt smaller; only the source ends it.
        if inner.doubt.is_none() || phase == Phase::Done {
            inner.progress.phase = phase;
        }
    }

    /// The source says that its handover is in doubt, or that it is not any more.
    pub fn doubt(&self, words: Option<String>) {
        let mut inner = self.inner();
        if words.is_none() && inner.doubt.is_none() {
            return;
        }
        inner.doubt = words.map(|words| format!("in doubt: {words}"));
        if inner.doubt.is_some() {
            inner.progress.phase = Phase::InDoubt;
        }
        inner.progress.message = inner.doubt.clone();
    }

    /// Whether a VM stands until its target has answered.
    pub fn is_in_doubt(&self) -> bool {
        self.inner().doubt.is_some()
    }

    /// `text`, behind the doubt where there is one.
    pub fn in_words(&self, text: String) -> String {
        match &self.inner().doubt {
            Some(doubt) => format!("{doubt}; {text}"),
            None => text,
        }
    }

    /// The disks are scanned.
    pub fn opened(&self, disks: &[OpenedDisk]) {
        let mut inner = self.inner();
        inner.kept = vec![0; disks.len()];
        let progress = &mut inner.progress;
        progress.raw_bytes = disks.iter().map(|disk| disk.size).sum();
        progress.used_bytes = disks.iter().map(|disk| disk.used).sum();
        progress.skipped_free_bytes = disks.iter().map(|disk| disk.free).sum();
        progress.hole_bytes = disks
            .iter()
            .map(|disk| disk.size.saturating_sub(disk.allocated))
            .sum();
        progress.done_bytes = 0;
        progress.verified_bytes = 0;
    }

    /// A disk was read to its end.
    pub fn disk_read(&self, disk: usize, counts: &DiskCounts) {
        let mut inner = self.inner();
        if let Some(kept) = inner.kept.get_mut(disk) {
            *kept = counts.kept;
        }
    }

    /// A running VM's move is here now.
    pub fn live(&self, state: &LiveState) {
        let mut inner = self.inner();
        let progress = &mut inner.progress;
        progress.phase = match state.stage {
            LiveStage::Copy => Phase::Transfer,
            LiveStage::Rounds => Phase::Rounds,
            LiveStage::Ram => Phase::Ram,
            LiveStage::Handover => Phase::Handover,
            LiveStage::InDoubt => Phase::InDoubt,
            LiveStage::Done => Phase::Commit,
        };
        let live = progress.live.get_or_insert_default();
        (live.round, live.disk_left_bytes, live.ram_left_bytes) =
            (state.round, state.disk_left, state.ram_left);
        live.decision.clone_from(&state.decision);
        drop(inner);
        let doubt = state.stage == LiveStage::InDoubt;
        self.doubt(doubt.then(|| state.decision.clone()));
    }

    /// The sums have changed.
    pub fn count(&self, outflow: &Outflow) {
        let sums = outflow.sums();
        let sent = outflow.sent();
        let mut inner = self.inner();
        inner.sent = sent;
        let Inner {
            progress, pace, kept, ..
        } = &mut *inner;
        progress.done_bytes = sums
            .durable
            .saturating_add(kept.iter().sum::<u64>())
            .min(progress.used_bytes);
        progress.zero_bytes = sums.zero;
        if let Some(live) = &mut progress.live {
            let ram = outflow.ledger().ram();
            (live.ram_stream_bytes, live.ram_wan_bytes) = (ram.stream, ram.wan);
        }
        progress.sent_raw_bytes = sums.sent;
        progress.wan_bytes = sums.wan;
        progress.resent_bytes = sums.resent;
        pace.update(Instant::now(), progress);
    }

    /// So much was read back at the target.
    pub fn verified(&self, bytes: u64) {
        self.inner().progress.verified_bytes = bytes;
    }

    /// The target waits for something, or goes on.
    pub fn waiting(&self, reason: Option<String>) {
        let state = if reason.is_some() {
            JobState::Waiting
        } else {
            JobState::Running
        };
        self.state(state, reason);
    }
}
