//! The VM stands: the rest of its RAM, the handover, the wait for the target's word, and what stays behind.
//!
//! Owns these last steps and how the source's QEMU is asked. Leaves the decision to `vm::handover`. Promises that nothing but the target's
//! answer ends the wait once the VM is handed over.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::ids::Round;
use longhaul_common::wire::session::{LiveOutcome, Refusal, RefusalKind};
use tokio::sync::watch;

use super::{CANCEL_LIMIT, LOOK, REMIND, SourceVm};
use crate::session::live::copy::{Address, Batch, Ready};
use crate::session::live::drive::{self, Stop};
use crate::session::live::hooks;
use crate::session::live::ram_out::RamOut;
use crate::session::live::source::{End, Heard};
use crate::session::live::uplink::Uplink;
use crate::session::live::word::ToTarget;
use crate::session::threads::on_thread;
use crate::vm::handover::{DiskRound, Facts, Reason, SourceEvent, SourceQemu, SourceState, Stream};
use crate::vm::outgoing;
use crate::vm::qmp::{MigrationStatus, Qmp};

/// What is being sent once more, while there is something.
type Again<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

impl SourceVm {
    /// The last disk round is on its way: takes the rest of RAM, hands over, waits for the target's word. `Ok`: the VM is its.
    pub(in crate::session::live) async fn finish(
        &mut self,
        uplink: &Arc<Uplink>,
        last: Vec<Batch>,
        round: u32,
        stopped: Instant,
        hook: Option<hooks::Running>,
        outcome: &mut LiveOutcome,
    ) -> Result<(), Stop> {
        let mut step = |name: &str| {
            outcome
                .steps_ms
                .push((name.to_owned(), stopped.elapsed().as_millis() as u64));
        };
        self.on(SourceEvent::LastRoundRead).await;
        step("told to go on");
        let Some(ram) = self.ram.clone() else {
            return Err(self.called_off());
        };
        let stream = self.take_tail(&ram, uplink).await;
        step("stream ended");
        let generation = ram.generation;
        if let Some(stream) = stream {
            // Only what it is: the target may load it while a hook of ours still runs.
            self.s.tell(&ToTarget::StreamEnd { generation, stream }).await;
        }
        let hooked = hook.is_some();
        let stream = self.allowed(stream, hook).await?;
        if hooked {
            step("hook ended");
        }
        if let Some(stream) = stream {
            (outcome.stream_bytes, outcome.stream_digest) = (stream.len, stream.hash);
            let counts = ram.view().counts;
            outcome.notes.push(format!(
                "RAM: {} pages with content ({} of them sent again), {} zero pages",
                counts.pages, counts.resent_pages, counts.zeros
            ));
            let batches = last.len() as u32;
            let disks = DiskRound { round, batches };
            self.on(SourceEvent::StreamEnded(Facts { disks, stream })).await;
            self.wait_completed().await;
            step("handed over");
            let end = ToTarget::StreamEnd { generation, stream };
            self.wait_answer(uplink, &last, round, end).await;
            step("target's answer");
        }
        match self.owner.state() {
            SourceState::Released { .. } => {
                self.close_released().await;
                step("source QEMU ended");
                let arrival = self.s.heard.borrow().arrival.clone();
                let named = |(name, ms): (String, u64)| (format!("at the target: {name}"), ms);
                outcome.steps_ms.extend(arrival.into_iter().map(named));
                Ok(())
            }
            SourceState::Settling { .. } => {
                self.give_up(Reason::MigrationFailed).await?;
                Err(self.called_off())
            }
            _ => {
                self.let_go().await;
                Err(self.resolved().map_or_else(|| self.called_off(), Stop::from))
            }
        }
    }

    /// Why the VM stayed here.
    fn called_off(&self) -> Stop {
        Stop::CalledOff(self.in_words(match *self.owner.state() {
            SourceState::Settling { reason }
            | SourceState::Kept { reason, .. }
            | SourceState::TakenBack { reason, .. } => reason,
            _ => Reason::MigrationFailed,
        }))
    }

    /// What a hook of a handover that was called off did is undone by the one on failure, which must come after it.
    pub(in crate::session::live) async fn hook_ended(&mut self) {
        if let Some(hook) = self.hook.take() {
            let _ = hooks::ended(hook).await;
        }
    }

    /// The stream, where the operator's hook succeeded. Nothing is handed over yet: where it fails, the VM is taken back and the job ends.
    async fn allowed(
        &mut self,
        stream: Option<Stream>,
        hook: Option<hooks::Running>,
    ) -> Result<Option<Stream>, Stop> {
        let Some(hook) = hook else { return Ok(stream) };
        let Some(stream) = stream else {
            self.hook = Some(hook);
            return Ok(None);
        };
        let Err(why) = hooks::ended(hook).await else {
            let waits = matches!(self.owner.state(), SourceState::Continuing { .. });
            return Ok(waits.then_some(stream));
        };
        self.give_up(Reason::HookFailed).await?;
        let text = format!("{why}; the handover was taken back, the VM runs on at the source");
        Err(Refusal::new(RefusalKind::Refused, text).into())
    }

    /// Waits for the stream's end, or for a reason to call the VM back.
    pub(in crate::session::live) async fn take_tail(
        &mut self,
        ram: &Arc<RamOut>,
        uplink: &Arc<Uplink>,
    ) -> Option<Stream> {
        let since = Instant::now();
        let ended = tokio::select! {
            ended = ram.ended() => ended,
            () = uplink.ended() => Err("the link to the target was lost while the VM stood".to_owned()),
            () = tokio::time::sleep(self.limits.device) => Err("the rest of RAM took too long".to_owned()),
        };
        match ended {
            Ok(stream) if matches!(self.owner.state(), SourceState::Continuing { .. }) => Some(stream),
            Ok(_) => None,
            Err(why) => {
                tracing::warn!(job = %self.s.job, after_ms = since.elapsed().as_millis() as u64, "{why}; the VM is called back");
                self.on(SourceEvent::Stop(Reason::TooSlow)).await;
                None
            }
        }
    }

    pub(in crate::session::live) async fn wait_completed(&mut self) {
        let limit = Instant::now() + self.limits.device;
        while matches!(
            self.owner.state(),
            SourceState::Continuing { .. } | SourceState::Barring { .. }
        ) {
            if Instant::now() > limit {
                return self.on(SourceEvent::Stop(Reason::TooSlow)).await;
            }
            tokio::time::sleep(LOOK).await;
            self.look().await;
        }
    }

    /// Handed over: until the target says that it runs the VM, or never will.
    pub(in crate::session::live) async fn wait_answer(
        &mut self,
        uplink: &Arc<Uplink>,
        last: &[Batch],
        round: u32,
        end: ToTarget,
    ) {
        let mut uplinks = self.s.uplink.subscribe();
        let life = self.s.heard.borrow().session.map(|(_, life)| life);
        let mut on = uplink.attempt;
        let mut since = Instant::now();
        let mut recalled = false;
        // Beside the words: a target that has it all already gives no credit any more, but says so.
        let mut again: Again<'_> = Box::pin(std::future::pending());
        while let SourceState::HandedOver { .. } = self.owner.state() {
            let waited = since.elapsed();
            if !recalled && let Some(overdue) = self.owner.overdue(waited, waited, &self.limits) {
                tracing::warn!(job = %self.s.job, "{overdue}; the target is asked to give the VM up");
                (recalled, since) = (true, Instant::now());
                self.on(overdue.event).await;
                continue;
            }
            tokio::select! {
                word = self.words.recv() => match word {
                    Some(told) => self.hear(told).await,
                    None => return,
                },
                _ = uplinks.changed() => {}
                () = &mut again => {
                    again = Box::pin(std::future::pending());
                    self.s.tell(&end).await;
                    self.on(SourceEvent::Remind).await;
                }
                () = tokio::time::sleep(REMIND) => {
                    self.s.tell(&end).await;
                    self.on(SourceEvent::Remind).await;
                }
            }
            let found = uplinks
                .borrow_and_update()
                .clone()
                .filter(|uplink| uplink.attempt > on);
            if let Some(uplink) = found {
                on = uplink.attempt;
                let heard = self.s.heard.subscribe();
                again = Box::pin(async move {
                    if is_same_life(heard, &uplink, life).await {
                        send_again(uplink, last, round).await;
                    }
                });
            }
        }
    }

    /// Waits for the target's word after a crash of this agent, which took with it what the target may not have yet.
    pub(in crate::session::live) async fn await_answer(&mut self) -> End {
        let mut uplinks = self.s.uplink.subscribe();
        let mut reached = None;
        while self.is_in_doubt() {
            if uplinks.borrow_and_update().is_some() {
                reached.get_or_insert_with(Instant::now);
            }
            let waited = reached.map_or(Duration::ZERO, |since| since.elapsed());
            if let Some(overdue) = self.owner.overdue_again(waited, &self.limits) {
                tracing::warn!(job = %self.s.job, "{overdue}; the target is asked to give the VM up");
                self.on(overdue.event).await;
                continue;
            }
            tokio::select! {
                _ = uplinks.changed() => {}
                word = self.words.recv() => match word {
                    Some(told) => self.hear(told).await,
                    None => break,
                },
                () = tokio::time::sleep(REMIND) => self.on(SourceEvent::Remind).await,
            }
        }
        match self.owner.state() {
            SourceState::Released { .. } => {
                self.close_released().await;
                let mut outcome = drive::blank(self.s.disks.len());
                outcome.generation = self.owner.generation().0;
                outcome.notes.push(
                    "the source agent was restarted during the handover: its figures are lost".to_owned(),
                );
                Ok(Box::new(outcome))
            }
            _ => {
                self.settle().await;
                if let Some(refusal) = self.resolved() {
                    return Err(refusal);
                }
                let text = format!(
                    "the VM was not moved: {}; the job can be run again",
                    self.owner.words()
                );
                Err(Refusal::new(RefusalKind::Lost, text))
            }
        }
    }

    pub(in crate::session::live) async fn close_released(&mut self) {
        let limit = Instant::now() + CANCEL_LIMIT;
        while !self.owner.is_closed() && Instant::now() < limit {
            self.look().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if let Some(ram) = self.ram.take() {
            ram.close();
        }
        self.outgoing = None;
    }
}

/// Waits for what the target says of its session. One of another life has opened its copies anew, if at all: the last round is no
/// use to it, for it may not even hold what that changes, and its answer is a word.
async fn is_same_life(mut heard: watch::Receiver<Heard>, uplink: &Uplink, life: Option<u64>) -> bool {
    let of_attempt = |heard: &Heard| heard.session.filter(|(attempt, _)| *attempt == uplink.attempt);
    let told = async {
        let told = heard.wait_for(|heard| of_attempt(heard).is_some()).await;
        told.ok().and_then(|heard| of_attempt(&heard))
    };
    tokio::select! {
        told = told => told.map(|(_, life)| life) == life,
        () = uplink.ended() => false,
    }
}

/// A new attempt bars what the old one had on its way: the last round goes once more.
async fn send_again(uplink: Arc<Uplink>, last: &[Batch], round: u32) {
    let address = Address {
        uplink: Arc::clone(&uplink),
        round: Round(round),
        urgent: true,
    };
    for batch in last.iter().cloned() {
        let address = address.clone();
        let Ok(Ok(Ready { batch, header })) = on_thread("last-round", move || address.ready(batch)).await
        else {
            continue;
        };
        if uplink.send_disk(&header, batch.data).await.is_err() {
            return;
        }
    }
}

/// How the source's QEMU is, asked now.
pub(in crate::session::live) async fn qemu_state(qmp: &Qmp) -> SourceQemu {
    match outgoing::stats(qmp).await {
        Ok(stats) => match stats.status {
            MigrationStatus::None | MigrationStatus::Cancelled | MigrationStatus::Failed => SourceQemu::Idle,
            MigrationStatus::PreSwitchover => SourceQemu::PreSwitchover,
            MigrationStatus::Device => SourceQemu::Device,
            MigrationStatus::Completed => completed(qmp).await,
            _ => SourceQemu::Iterating,
        },
        Err(error) if error.is_lost() => SourceQemu::Gone,
        // Busy with its lock held: it iterates or writes its tail; the next look says more.
        Err(_) => SourceQemu::Iterating,
    }
}

/// Completed, and the guest stands; where it runs (again), nothing of the migration is left.
pub(in crate::session::live) async fn completed(qmp: &Qmp) -> SourceQemu {
    #[derive(serde::Deserialize)]
    struct Status {
        running: bool,
    }
    match qmp.query::<Status>("query-status").await {
        Ok(Status { running: true }) => SourceQemu::Idle,
        Ok(_) => SourceQemu::Completed,
        Err(error) if error.is_lost() => SourceQemu::Gone,
        Err(_) => SourceQemu::Completed,
    }
}
