//! The VM stands: the rest of its RAM, the handover, the wait for the target's word, and what stays behind.
//!
//! Owns these last steps and how the source's QEMU is asked. Leaves the decision to `vm::handover`. Promises that nothing but the target's
//! answer ends the wait once the VM is handed over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::ids::Round;
use longhaul_common::wire::session::LiveOutcome;

use super::{CANCEL_LIMIT, LOOK, REMIND, SourceVm};
use crate::disk::apply::Left;
use crate::session::live::copy::Batch;
use crate::session::live::drive::Stop;
use crate::session::live::ram_out::RamOut;
use crate::session::live::shadow::{ShadowDisk, Shadows};
use crate::session::live::uplink::Uplink;
use crate::session::live::word::ToTarget;
use crate::session::threads::on_thread;
use crate::vm::handover::{Facts, Reason, SourceEvent, SourceQemu, SourceState, Stream};
use crate::vm::outgoing;
use crate::vm::qmp::{MigrationStatus, Qmp};

impl SourceVm {
    /// The last disk round is on its way: takes the rest of RAM, hands over, waits for the target's word. `true`: the VM is its.
    pub(in crate::session::live) async fn finish(
        &mut self,
        uplink: &Arc<Uplink>,
        last: Vec<Batch>,
        round: u32,
        stopped: Instant,
        outcome: &mut LiveOutcome,
    ) -> Result<bool, Stop> {
        let mut step = |name: &str| {
            outcome
                .steps_ms
                .push((name.to_owned(), stopped.elapsed().as_millis() as u64));
        };
        self.on(SourceEvent::LastRoundRead).await;
        step("told to go on");
        let Some(ram) = self.ram.clone() else {
            return Ok(false);
        };
        let stream = self.take_tail(&ram, uplink).await;
        step("stream ended");
        if let Some(stream) = stream {
            (outcome.stream_bytes, outcome.stream_digest) = (stream.len, stream.hash);
            let counts = ram.view().counts;
            outcome.notes.push(format!(
                "RAM: {} pages with content ({} of them sent again), {} zero pages",
                counts.pages, counts.resent_pages, counts.zeros
            ));
            let end = ToTarget::StreamEnd {
                generation: ram.generation,
                stream,
            };
            self.s.tell(&end).await;
            let disk_batches = last.len() as u64;
            self.on(SourceEvent::StreamEnded(Facts { disk_batches, stream }))
                .await;
            self.wait_completed().await;
            step("handed over");
            self.wait_answer(uplink, &last, round, end).await;
            step("target's answer");
        }
        match self.owner.state() {
            SourceState::Released { .. } => {
                self.close_released().await;
                step("source QEMU ended");
                Ok(true)
            }
            SourceState::Settling { .. } => {
                self.give_up(Reason::MigrationFailed).await?;
                Ok(false)
            }
            _ => {
                self.let_go().await;
                Ok(false)
            }
        }
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
        let mut on = uplink.attempt;
        let mut since = Instant::now();
        let mut recalled = false;
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
                    Some(word) => self.on(SourceEvent::Heard(word)).await,
                    None => return,
                },
                _ = uplinks.changed() => {}
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
                // The new attempt bars what the old one had on its way: the last round goes once more.
                for batch in last {
                    let Ok((header, data)) = batch.addressed(&uplink, Round(round), true) else {
                        continue;
                    };
                    if uplink.send_disk(&header, data).await.is_err() {
                        break;
                    }
                }
                self.s.tell(&end).await;
                self.on(SourceEvent::Remind).await;
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

    /// Remembers the images as shadows. `free`: of each disk the runs that were left behind; nothing where that is not known.
    pub(in crate::session::live) async fn keep_shadows(
        &self,
        generation: u32,
        free: &[Option<Vec<(u64, u64)>>],
    ) {
        let seals = self.old_copy.seals();
        let disks = self.s.disks.iter().enumerate().map(|(index, disk)| {
            let seal = seals.get(index).cloned().flatten();
            let free = free.get(index).cloned().flatten();
            ShadowDisk {
                file: disk.file.clone(),
                format: disk.format.clone(),
                size: disk.size,
                left: seal.zip(free).map(|(seal, free)| Left { seal, free }),
                lent: None,
            }
        });
        let shadows = Shadows {
            generation,
            disks: disks.collect(),
        };
        let (state, job) = (self.s.agent.settings.paths.state.clone(), self.s.job);
        let saved = on_thread("shadows", move || shadows.save(&state, job)).await;
        if let Ok(Err(why)) = saved {
            tracing::warn!(job = %self.s.job, "a way back would copy the disks whole: {why}");
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
