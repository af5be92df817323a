//! What is done for the proofs of free blocks before round 0: trim, the bitmaps of a prepared VM, the freeze.
//!
//! Owns their order. Leaves each to its module. Promises that whatever fails here costs a proof and a sentence in the report, never the job;
//! and that a guest whose thaw is not confirmed is not handed over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::wire::session::LiveStage;

use super::{Drive, SAY_AGAIN};
use crate::session::live::clock::RunClock;
use crate::session::live::freeze::{self, FreezeError};
use crate::session::live::record::Freezing;
use crate::session::live::{disks, prepared, trim};
use crate::session::threads::on_thread;
use crate::vm::guest_agent::places;

/// How long the thaw may take before the job goes on without the proof.
const CONFIRM: Duration = Duration::from_secs(10);

impl Drive {
    pub(super) async fn begin(&mut self) {
        match RunClock::start(&self.s.qmp).await {
            Ok(clock) => self.clock = clock,
            Err(error) => self.remark(format!("no proof by age: {error}")),
        }
        // A job that was cancelled before it began touches no guest.
        if self.check_cancel().is_err() {
            return;
        }
        let prepared = self.take_over().await;
        if self.s.vm.fstrim {
            self.trim(prepared).await;
        }
        if self.s.free.is_wanted() && self.s.guest_agent.is_some() {
            self.freeze().await;
        }
    }

    /// Something that the report says, and the log.
    fn remark(&mut self, text: String) {
        tracing::info!(job = %self.s.job, "{text}");
        self.outcome.notes.push(text);
    }

    /// The bitmaps of a VM that was prepared count from when they were switched on. `true`: they were taken over.
    async fn take_over(&mut self) -> bool {
        let socket = self.s.record().qmp.clone();
        let agent = Arc::clone(&self.s.agent);
        let Some(vm) = agent.prepared.of(&socket) else {
            return false;
        };
        let covers = self.s.disks.iter().all(|disk| vm.nodes().contains(&disk.node));
        let since = vm.since();
        let taken = match prepared::is_whole(&self.s.qmp, &vm).await {
            _ if !covers => Err("it was prepared with other disks".to_owned()),
            Ok(true) => {
                let taken = self.rounds.take_over(vm.bitmap()).await;
                taken.map_err(|error| error.to_string())
            }
            Ok(false) => Err("its dirty bitmaps are not on any more".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(refusal) = prepared::forget(&agent, &vm).await {
            self.remark(refusal.text);
        }
        match (taken, since) {
            (Ok(()), Some(since)) => {
                self.clock.known_since(since);
                self.s.free.hurry();
                let age = since.elapsed().as_secs();
                self.remark(format!("the VM was prepared {age} s before the run"));
            }
            (Ok(()), None) => self.remark(
                "the VM was prepared, but not seen to run since: its age counts from the run on".to_owned(),
            ),
            (Err(why), _) => {
                self.remark(format!("the VM was prepared in vain: {why}"));
                return false;
            }
        }
        true
    }

    async fn trim(&mut self, prepared: bool) {
        if prepared {
            return; // It was done then; what is discarded now would have to be sent as written.
        }
        let (said, discarded) = trim::trim(self.s.guest_agent.as_deref()).await;
        self.remark(said);
        if !discarded {
            return;
        }
        // What was discarded counts as written: the bitmaps and the looks begin anew, since nothing was sent yet.
        if let Err(error) = self.rounds.forget_writes().await {
            return self.remark(format!("what was trimmed is sent as written: {error}"));
        }
        let (free, policy, started) = (Arc::clone(&self.s.free), self.s.vm.policy, Instant::now());
        if on_thread("live-again", move || free.again(started, &policy))
            .await
            .is_err()
        {
            self.remark("the disks could not be looked at again after the trim".to_owned());
        }
    }

    async fn freeze(&mut self) {
        let began = Instant::now();
        match self.try_freeze().await {
            Ok(lasted) => {
                let file_systems = "the guest's file systems were frozen";
                self.note(&format!("{file_systems} for {} ms", lasted.as_millis()));
                self.step_done("freeze", began);
            }
            Err(error) => self.remark(format!("no proof by a freeze: {error}")),
        }
    }

    async fn try_freeze(&mut self) -> Result<Duration, FreezeError> {
        let (Some(guest_agent), job) = (self.s.guest_agent.clone(), self.s.job) else {
            return Err(FreezeError::Nothing);
        };
        let reach = disks::reach(&mut self.rounds, 1).await?;
        let images = on_thread("freeze-open", move || disks::connect(reach)).await??;
        let qmp = self.s.record().qmp.clone();
        let nodes: Vec<_> = self.s.disks.iter().map(|disk| disk.node.clone()).collect();
        let wish = freeze::Wish {
            job,
            record: Freezing { guest_agent, qmp },
            places: places(&self.s.qmp, &nodes).await?,
            images,
            confirm: CONFIRM,
        };
        let frozen = freeze::freeze(&self.s.agent.thaws, wish).await?;
        let lasted = frozen.lasted;
        self.s.free.froze(frozen);
        Ok(lasted)
    }

    /// Whether the guest may still be frozen: then nobody at the target would thaw it.
    pub(super) async fn waits_for_thaw(&mut self) -> bool {
        let agent = &self.s.agent;
        let waits = self
            .s
            .guest_agent
            .as_ref()
            .is_some_and(|socket| agent.thaws.is_awaited(socket));
        if waits {
            let said = "the guest's file systems may be frozen: waiting for its agent to confirm that they are thawed";
            self.state(LiveStage::Rounds, 0, 0, said.to_owned()).await;
            tokio::time::sleep(SAY_AGAIN).await;
        }
        waits
    }
}
