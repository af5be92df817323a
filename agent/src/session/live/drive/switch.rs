//! From the disks being nearly clean to the target's word: RAM is begun, the VM stopped, the last round sent.
//!
//! Owns these steps of a migration. Leaves deciding when to the parent, and who may run the VM to `source_vm`. Promises that the VM runs on
//! here wherever a step ends early.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use longhaul_common::wire::session::{LiveStage, Refusal, RefusalKind};

use super::{Drive, PREPARE, SAY_AGAIN, Stop};
use crate::session::live::copy::{self, Batch, Ready};
use crate::session::live::hooks;
use crate::session::live::source::Unready;
use crate::session::live::source_vm::Over;
use crate::session::live::uplink::Uplink;
use crate::session::live::word::ToTarget;
use crate::vm::handover::{Generation, Reason};

/// So often in a row the target may give up what RAM flows to: a QEMU that dies once is nobody's fault.
const GIVEN_UP_MAX: u32 = 3;
/// What lies further apart is not in a row.
const IN_A_ROW: Duration = Duration::from_secs(600);
/// So long before the end of round 0 the target is asked to make a QEMU ready.
const AHEAD: Duration = Duration::from_secs(5);

impl Drive {
    /// Has the target start a QEMU while the last of round 0 is on its way. Without an answer, it is asked again when RAM is to flow.
    pub(in crate::session::live) async fn prepare_ahead(&mut self, uplink: &Uplink) {
        let left = self
            .s
            .used()
            .iter()
            .sum::<u64>()
            .saturating_sub(uplink.delivered.load(Ordering::Relaxed));
        if self.ahead.is_some() || self.pace.takes(left).is_none_or(|left| left > AHEAD) {
            return;
        }
        let generation = self.vm.next_generation();
        // What the VM cannot tell now is asked again.
        if let Ok(vm) = self.vm.words().await {
            let vm = Box::new(vm);
            let ask = self.ahead.insert(ToTarget::Prepare { generation, vm });
            self.s.tell(ask).await;
        }
    }

    /// Has the target make a QEMU ready for this generation, or for a higher one where that was given up already; gives which.
    async fn prepare(
        &mut self,
        uplink: &Arc<Uplink>,
        mut generation: Generation,
    ) -> Result<Generation, Stop> {
        while let Some((upto, reason)) = self.ask_to_prepare(uplink, generation).await? {
            self.begin_anew(&Over::ByTarget(reason.to_string()))?;
            generation = Generation(upto.max(generation).0.saturating_add(1));
        }
        Ok(generation)
    }

    /// Gives up to which generation the target has given up, and why, where it has.
    async fn ask_to_prepare(
        &mut self,
        uplink: &Arc<Uplink>,
        generation: Generation,
    ) -> Result<Option<(Generation, Reason)>, Stop> {
        let ahead = self.ahead.take();
        let ahead =
            ahead.filter(|ask| matches!(ask, ToTarget::Prepare { generation: of, .. } if *of == generation));
        let ask = match ahead {
            Some(ask) => ask,
            None => ToTarget::Prepare {
                generation,
                vm: Box::new(self.vm.words().await?),
            },
        };
        let mut heard = self.s.heard.subscribe();
        let limit = Instant::now() + PREPARE;
        loop {
            self.s.tell(&ask).await;
            let answered = heard.wait_for(|heard| {
                heard.cancel.is_some() || heard.prepared.as_ref().is_some_and(|(of, _)| *of == generation)
            });
            let answer = tokio::select! {
                answered = tokio::time::timeout(SAY_AGAIN, answered) => {
                    answered.ok().and_then(Result::ok).and_then(|heard| heard.prepared.clone())
                }
                () = uplink.ended() => return Err(Stop::Detached),
            };
            self.check_cancel()?;
            match answer.filter(|(of, _)| *of == generation) {
                Some((_, Ok(notes))) => {
                    self.outcome.notes.extend(notes);
                    return Ok(None);
                }
                Some((_, Err(Unready::GivenUp(upto, reason)))) => return Ok(Some((upto, reason))),
                Some((_, Err(Unready::Unfit(why)))) => {
                    return Err(Refusal::new(RefusalKind::Refused, why).into());
                }
                None if Instant::now() > limit => {
                    let text = format!(
                        "the target had no QEMU ready within {} s; see its agent's log",
                        PREPARE.as_secs()
                    );
                    return Err(Refusal::new(RefusalKind::Refused, text).into());
                }
                None => {}
            }
        }
    }

    /// Has the target make a QEMU ready, then lets RAM flow.
    pub(in crate::session::live) async fn start_ram(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        self.vm.eject_media().await?;
        let generation = self.vm.next_generation();
        let generation = self.prepare(uplink, generation).await?;
        self.outcome.generation = generation.0;
        self.vm.begin(generation).await?;
        self.note(&format!("RAM begins to flow, stream {generation}"));
        Ok(())
    }

    /// A RAM stream is over before the VM stood; the next one follows unless the target has said often enough that it cannot.
    pub(in crate::session::live) fn begin_anew(&mut self, over: &Over) -> Result<(), Stop> {
        if let Over::ByTarget(reason) = over {
            let (times, last) = self.given_up;
            let times = if last.elapsed() > IN_A_ROW { 1 } else { times + 1 };
            self.given_up = (times, Instant::now());
            if times >= GIVEN_UP_MAX {
                let text = format!(
                    "the VM was not moved: {reason}, {times} times in a row while its RAM flowed; the target agent's log says more"
                );
                return Err(Refusal::new(RefusalKind::Refused, text).into());
            }
        }
        self.note(&format!("{over}; the RAM stream is begun anew"));
        Ok(())
    }

    /// The VM stands (pre-switchover): the last round, the rest of RAM, and the target's word. `Detached` and `CalledOff` only while the VM runs on.
    pub(in crate::session::live) async fn hand_over(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        let stopped = self.stands.take().unwrap_or_else(Instant::now);
        let hook = self.s.hook_at_handover();
        self.at_handover = hook.is_some();
        self.state(LiveStage::Handover, 0, 0, "the VM stands".to_owned())
            .await;
        let last = match self.last_round(uplink).await {
            Ok(last) => last,
            Err(stop) => {
                self.rounds.give_back().await?;
                self.vm.give_up(Reason::LinkLost).await?;
                // What it did is undone by the one on failure, which must come after it.
                if let Some(hook) = hook {
                    let _ = hooks::ended(hook).await;
                }
                return Err(stop);
            }
        };
        self.step_done("last round read", stopped);
        // Its bitmap counts on: should the VM stay here, what the target was sent just now is sent again.
        self.rounds.give_back().await?;
        self.step_done("exports closed", stopped);
        self.vm
            .finish(uplink, last, self.round, stopped, hook, &mut self.outcome)
            .await?;
        self.outcome.blackout_ms = stopped.elapsed().as_millis() as u64;
        Ok(())
    }

    /// Reads and sends the last round, urgently. Gives its batches: they are kept until the target has answered.
    pub(in crate::session::live) async fn last_round(
        &mut self,
        uplink: &Arc<Uplink>,
    ) -> Result<Vec<Batch>, Stop> {
        self.round += 1;
        self.outcome.rounds += 1;
        self.rounds.next().await?;
        let reach = self.reach().await?;
        let mut batches = copy::dirty(reach, self.address(uplink, true))?;
        let mut last = Vec::new();
        while let Some(ready) = batches.recv().await {
            let Ready { batch, header } = ready?;
            self.count(&batch);
            uplink.send_disk(&header, batch.data.clone()).await?;
            last.push(batch);
        }
        Ok(last)
    }
}
