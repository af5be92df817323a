//! A job from its first attempt to its end.
//!
//! Owns trying again, pausing, and what the journal says at each step. One task for each job. Leaves one attempt to
//! `attempt` and cancelling to `cancel`. Promises that a job that is not at rest goes on by itself after any crash, that its attempts
//! count up over restarts, and that a commit which may have happened is never undone.

mod cancel;

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::ids::{Attempt, JobId};
use longhaul_common::wire::session::{Refusal, RefusalKind};
use tokio::sync::watch;

use super::attempt::{Context, Source, Target, Transfer, elapsed_ms, target_open};
use super::board::Board;
use super::finish;
use super::kept::KeepLedger;
use super::ledger::Ledger;
use super::plan::payload_of;
use super::progress::{JobState, Phase};
use super::report::Report;
use super::spec::Kind;
use crate::store::{JobRecord, Store, StoreError};

/// Waits between two attempts.
const BACKOFF: [u64; 6] = [200, 500, 1000, 2000, 3000, 5000];
/// An attempt that lasted so long starts the waits anew.
const GOOD_ATTEMPT: Duration = Duration::from_secs(20);
/// Between two saves of progress while an attempt runs.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// What the operator wants of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    #[default]
    Run,
    Pause,
    Cancel,
    /// An operator decided that the VM stays at its source.
    Resolved,
}

/// How an attempt ended.
enum Ended {
    Arrived,
    Interrupted,
    Refused(Refusal),
}

/// One job and all it needs.
pub struct Driver {
    pub record: JobRecord,
    pub job: JobId,
    pub context: Context,
    pub store: Store,
    pub board: Arc<Board>,
    pub wish: watch::Receiver<Wish>,
    ledger: Ledger,
    /// The operator said something while the job waited.
    asked_again: bool,
    /// Times of the last attempt's stages.
    stages: Vec<(&'static str, u64)>,
}

impl Driver {
    /// For a job as the journal has it.
    pub fn new(
        record: JobRecord,
        job: JobId,
        context: Context,
        store: Store,
        board: Arc<Board>,
        wish: watch::Receiver<Wish>,
    ) -> Self {
        let ledger = Ledger::restored(record.spec.disk.len(), &record.sent);
        Self {
            record,
            job,
            context,
            store,
            board,
            wish,
            ledger,
            asked_again: false,
            stages: Vec::new(),
        }
    }

    /// Runs the job until it is completed, cancelled, paused or failed. Gives back the ear for the operator's wishes: what it has
    /// not heard yet came too late for this run.
    pub async fn run(mut self) -> watch::Receiver<Wish> {
        self.drive().await;
        self.wish
    }

    async fn drive(&mut self) {
        let mut failures = 0;
        self.record.started.get_or_insert_with(now);
        loop {
            let wish = *self.wish.borrow_and_update();
            match wish {
                Wish::Cancel => {
                    if self.cancel().await {
                        return;
                    }
                    self.wait_a_while(&mut failures).await;
                    continue;
                }
                Wish::Pause => return self.rest(JobState::Paused, None).await,
                Wish::Resolved => {
                    self.record.finished = Some(now());
                    let text = "the operator decided that the VM stays at its source; resume the job to move it again, or cancel it to remove the copy";
                    return self.rest(JobState::Failed, Some(text.to_owned())).await;
                }
                Wish::Run => self.record.cancelling = false,
            }
            let began = Instant::now();
            match self.attempt().await {
                Ended::Arrived => return,
                Ended::Interrupted => continue,
                // A VM that stands is not left standing for a reason that only stops copying.
                Ended::Refused(refusal) if refusal.kind.is_transient() || self.board.is_in_doubt() => {
                    failures = if began.elapsed() > GOOD_ATTEMPT {
                        0
                    } else {
                        failures
                    };
                    let text = self.board.in_words(refusal.text);
                    self.rest(JobState::Waiting, Some(text)).await;
                    self.wait_a_while(&mut failures).await;
                }
                Ended::Refused(refusal) => {
                    self.record.finished = Some(now());
                    return self.rest(JobState::Failed, Some(refusal.text)).await;
                }
            }
        }
    }

    /// Waits longer each time, and no longer than until the operator wishes something or an agent arrives.
    async fn wait_a_while(&mut self, failures: &mut usize) {
        let wait = Duration::from_millis(BACKOFF[*failures]);
        *failures = (*failures + 1).min(BACKOFF.len() - 1);
        self.asked_again = tokio::select! {
            heard = self.wish.changed() => heard.is_ok(),
            // Perhaps the one that was missing.
            () = self.context.agents.arrival() => false,
            () = tokio::time::sleep(wait) => false,
        };
    }

    /// Says, in the journal and on the board, that nothing moves right now.
    async fn rest(&mut self, state: JobState, message: Option<String>) {
        if let Some(message) = &message {
            tracing::warn!(job = %self.job, ?state, "{message}");
        } else {
            tracing::info!(job = %self.job, ?state, "the job rests");
        }
        self.record.message = message;
        self.save(state).await;
    }

    /// Journals the record in this state, then shows it: nobody sees an end that a crash could take back.
    async fn save(&mut self, state: JobState) {
        if let Err(error) = self.try_save(state).await {
            tracing::error!(job = %self.job, "the journal cannot be written: {error}");
        }
        self.board.state(state, self.record.message.clone());
    }

    async fn try_save(&mut self, state: JobState) -> Result<(), StoreError> {
        self.record.state = state;
        self.record.progress = self.board.read().1;
        self.record.sent = self.board.sent();
        self.record.progress.message.clone_from(&self.record.message);
        self.store.save(&self.record).await
    }

    /// Begins an attempt of a number that was never used before, whatever happens to this program.
    async fn next_attempt(&mut self, state: JobState) -> Result<Attempt, Refusal> {
        let attempt = Attempt(self.record.progress.attempt.saturating_add(1));
        self.board.attempt(attempt.0);
        let saved = self.try_save(state).await;
        saved.map_err(|error| Refusal::because(RefusalKind::Lost, &error))?;
        Ok(attempt)
    }

    async fn attempt(&mut self) -> Ended {
        self.record.message = None;
        let attempt = match self.next_attempt(JobState::Running).await {
            Ok(attempt) => attempt,
            Err(refusal) => return Ended::Refused(refusal),
        };
        tracing::info!(job = %self.job, %attempt, "an attempt begins");
        let mut wish = self.wish.clone();
        let interrupted = async move {
            // A sender that is gone means that the program ends; nothing to interrupt then.
            if wish.wait_for(|wish| *wish != Wish::Run).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let store = self.store.clone();
        let (board, id) = (Arc::clone(&self.board), self.record.id.clone());
        let saving = async move {
            loop {
                tokio::time::sleep(SAVE_EVERY).await;
                // The next one may succeed; the attempt itself does not depend on it.
                let _ = store.note(&id, board.read().1, board.sent()).await;
            }
        };
        let outcome = tokio::select! {
            outcome = self.connect_and_move(attempt) => Some(outcome),
            () = interrupted => None,
            () = saving => None,
        };
        match outcome {
            None => Ended::Interrupted,
            Some(Ok(report)) => {
                self.complete(report).await;
                Ended::Arrived
            }
            Some(Err(refusal)) => Ended::Refused(refusal),
        }
    }

    async fn connect_and_move(&mut self, attempt: Attempt) -> Result<Report, Refusal> {
        let began = Instant::now();
        let board = Arc::clone(&self.board);
        if self.record.spec.kind == Kind::Move
            && let Some(report) = self.arrived_before(attempt).await?
        {
            return Ok(report);
        }
        board.phase(Phase::Scan);
        let asked = self.record.spec.source_open(self.job, attempt);
        let opened = Source::open(&self.context, &self.record.spec, asked).await;
        let mut source = opened.inspect_err(|refusal| self.refused_by_source(refusal))?;
        board.doubt(source.doubt.take());
        self.stages = vec![("open_source", elapsed_ms(began))];
        let opening = Instant::now();
        // A VM that runs at the target already has no disks here any more.
        if source.moved.is_none() {
            board.opened(&source.disks);
            self.record.sizes = source.sizes();
        }
        let open = source.target_open(&self.record.spec, self.job, attempt, &self.record.sizes);
        let target = self.open_target(open, &mut source).await?;
        if target.arrived.is_some() {
            let text = "the target says that this job has arrived, the journal does not know of it; was it restored from a copy?";
            return Err(Refusal::new(RefusalKind::Refused, text));
        }
        self.stages.push(("open_target", elapsed_ms(opening)));
        let lost_before = self.context.peer.stats().lost_packets;
        let mut ledger = std::mem::take(&mut self.ledger);
        for (index, (opened, durable)) in source.disks.iter().zip(&target.durable_below).enumerate() {
            ledger.sent_before(index, opened.sent_before.max(*durable));
        }
        let context = Context {
            agents: Arc::clone(&self.context.agents),
            ingest: Arc::clone(&self.context.ingest),
            peer: Arc::clone(&self.context.peer),
        };
        let transfer = Transfer::new(&context, &board, source, target, (self.job, attempt), ledger);
        let spec = &self.record.spec;
        transfer.outflow.of_vm(&spec.name, &spec.tenant);
        if let Some(rate) = spec.rate {
            self.context
                .peer
                .set_cap(transfer.outflow.flow, payload_of(rate.0));
        }
        // Kept by the driver, however the transfer ends: interrupted ones count, too.
        let mut transfer = KeepLedger {
            ledger: &mut self.ledger,
            transfer,
        };
        let sending = Instant::now();
        let mut report = if self.record.spec.kind == Kind::Live {
            let cancelled = self.record.cancelling.then(cancel::by_operator);
            let moved = transfer.transfer.move_live(cancelled).await?;
            self.stages.push(("transfer", elapsed_ms(sending)));
            finish::moved_live(&self.record, &transfer.transfer, moved)
        } else {
            transfer.transfer.send_all().await?;
            self.stages.push(("transfer", elapsed_ms(sending)));
            let desk = Desk {
                record: &mut self.record,
                store: &self.store,
                stages: &mut self.stages,
                board: &board,
            };
            desk.prove_and_commit(&mut transfer.transfer).await?
        };
        drop(transfer);
        report.wan_lost_packets = self.context.peer.stats().lost_packets.saturating_sub(lost_before);
        Ok(report)
    }

    /// What the source agent refuses for good, it has decided: nothing of it is in doubt any more.
    fn refused_by_source(&self, refusal: &Refusal) {
        if !refusal.kind.is_transient() {
            self.board.doubt(None);
        }
    }

    /// Opens the target; says what is missing while there is no way to it.
    async fn open_target(
        &self,
        open: longhaul_common::wire::session::TargetOpen,
        source: &mut Source,
    ) -> Result<Target, Refusal> {
        let opening = Target::open(&self.context, &self.record.spec, open, Some(source));
        tokio::pin!(opening);
        loop {
            match tokio::time::timeout(Duration::from_secs(1), &mut opening).await {
                Ok(target) => {
                    self.board.waiting(None);
                    return target;
                }
                Err(_) => {
                    if let Some(problem) = self.context.peer.problem() {
                        let site = &self.record.spec.target.site;
                        let text = self
                            .board
                            .in_words(format!("no link to site '{site}': {problem}"));
                        self.board.waiting(Some(text));
                    }
                }
            }
        }
    }

    /// Where an earlier attempt asked for the commit: whether the target has done it.
    async fn arrived_before(&mut self, attempt: Attempt) -> Result<Option<Report>, Refusal> {
        if self.record.committing.is_none() {
            return Ok(None);
        }
        let open = target_open(
            &self.record.spec,
            self.job,
            attempt,
            &self.record.sizes,
            None,
            None,
        );
        let target = Target::open(&self.context, &self.record.spec, open, None).await?;
        let Some(hook) = target.arrived else {
            self.record.committing = None;
            let text =
                "the target has not committed what an earlier attempt proved; the next one takes it up";
            return Err(Refusal::new(RefusalKind::Lost, text));
        };
        let mut report = self.record.report.take().unwrap_or_default();
        report.hook = hook;
        Ok(Some(report))
    }

    async fn complete(&mut self, mut report: Report) {
        self.record.finished = Some(now());
        report.attempts = self.record.progress.attempt.max(self.board.read().1.attempt);
        let seconds = self
            .record
            .finished
            .zip(self.record.started)
            .map_or(0, |(end, start)| (end - start).max(0));
        let stages: u64 = self.stages.iter().map(|(_, ms)| ms).sum();
        report.seconds = if report.attempts > 1 {
            (seconds as f64).max(stages as f64 / 1e3)
        } else {
            stages as f64 / 1e3
        };
        report.stages_ms = self
            .stages
            .iter()
            .map(|(name, ms)| ((*name).to_owned(), *ms))
            .collect();
        let transfer = report.stages_ms.get("transfer").copied().unwrap_or(0).max(1);
        report.goodput_bit_per_s = report
            .disks
            .iter()
            .map(|disk| disk.sent_raw_bytes)
            .sum::<u64>()
            .saturating_mul(8000)
            / transfer;
        report.ok = report.equal;
        self.board.phase(Phase::Done);
        self.record.report = Some(report);
        self.record.message = None;
        self.save(JobState::Completed).await;
        tracing::info!(job = %self.job, "the job is completed");
    }

    async fn complete_instead(&mut self) {
        let report = self.record.report.take().unwrap_or_default();
        self.complete(report).await;
    }
}

/// What of the driver is needed while a transfer holds its ledger.
struct Desk<'a> {
    record: &'a mut JobRecord,
    store: &'a Store,
    stages: &'a mut Vec<(&'static str, u64)>,
    board: &'a Board,
}

impl Desk<'_> {
    /// The end of a cold move. What is about to be committed is journaled first.
    async fn prove_and_commit(self, transfer: &mut Transfer<'_>) -> Result<Report, Refusal> {
        let proving = Instant::now();
        let proofs = transfer.prove().await?;
        self.stages.push(("verify", elapsed_ms(proving)));
        let committing = Instant::now();
        self.record.committing = Some(proofs.iter().map(|proof| proof.target.to_string()).collect());
        self.record.report = Some(finish::moved_cold(self.record, transfer, &proofs));
        self.record.progress = self.board.read().1;
        self.record.sent = transfer.outflow.sent();
        let journaled = self.store.save(self.record).await;
        journaled.map_err(|error| Refusal::because(RefusalKind::Refused, &error))?;
        let hook = transfer.commit(&proofs).await?;
        self.stages.push(("commit", elapsed_ms(committing)));
        let mut report = self.record.report.take().unwrap_or_default();
        report.hook = hook;
        Ok(report)
    }
}

/// Seconds since 1970.
pub fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}
