//! A VM that waits at its target, and the operator's word on it.
//!
//! Owns what may be said in which state, and the sentences around it. Leaves the decision to `vm::handover`. Promises that a VM whose
//! memory never was here whole is not run, for then its disks are not whole either.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::{Arrive, Event};
use crate::session::live::operator::certain;
use crate::session::live::resolve::{Resolved, Said};
use crate::session::live::target::LiveTarget;
use crate::session::target_disks;
use crate::session::threads::on_thread;
use crate::vm::handover::{Resolve, TargetEvent, TargetState};

/// How long the VM may take to run.
const OBEYS: Duration = Duration::from_secs(10);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(20);
/// How long the session may take to act and answer.
const ANSWER: Duration = Duration::from_secs(60);

impl LiveTarget {
    /// Has the handover's machine take the operator's word.
    pub(in crate::session::live) async fn resolve(&self, resolve: Resolve, sure: bool) -> Resolved {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.event(Event::Operator(resolve, sure, answer)).await;
            answered.await
        };
        match tokio::time::timeout(ANSWER, asked).await {
            Ok(Ok(said)) => said,
            Ok(Err(_)) => Err("the session has just ended: say it again".to_owned()),
            Err(_) => Err(
                "the agent is busy with this VM and did not take the word in time: say it again".to_owned(),
            ),
        }
    }
}

impl Arrive {
    pub(super) async fn resolve(&mut self, resolve: Resolve, sure: bool) -> Resolved {
        // What is known of QEMU may be half a second old.
        self.look().await;
        if let Some(already) = self.may_resolve(resolve, sure)? {
            return Ok(Said::already(already));
        }
        if resolve == Resolve::Target {
            certain(self.owner.words(), resolve, sure)?;
        }
        tracing::warn!(job = %self.s.job, ?resolve, "the operator decides the handover");
        self.on(TargetEvent::Resolve(resolve)).await;
        let limit = Instant::now() + OBEYS;
        let boots = |state: TargetState| matches!(state, TargetState::Running { boot: true, .. });
        while self.owner.owns() && !self.is_started() && !boots(*self.owner.state()) && Instant::now() < limit
        {
            self.look().await;
            tokio::time::sleep(LOOK).await;
        }
        match *self.owner.state() {
            TargetState::Running { started: true, .. } => Ok(Said::done(vec![
                "the VM runs here now".to_owned(),
                "keep the source host's QEMU for it ended: when that agent is back it hears of this and keeps to it".to_owned(),
            ])),
            TargetState::Running { boot: true, .. } => Ok(Said::done(vec![format!(
                "the VM belongs to this host, but its memory is lost: start it from its disks ({:?}); they are as after a power \
                 failure",
                self.qemu.paths()
            )])),
            TargetState::Aborted { .. } => Ok(Said::done(vec![
                "this host has given the VM up for good, and says so to the source as soon as it is reached; the source's agent \
                 then lets it run"
                    .to_owned(),
            ])),
            _ => Err(format!(
                "the word was taken, but is not carried out yet ({}): see the agent's log, and say it again",
                self.owner.words()
            )),
        }
    }

    /// Why nothing is to be decided; `Ok(Some)`: it is decided already, in just this way.
    fn may_resolve(&self, resolve: Resolve, sure: bool) -> Result<Option<&'static str>, String> {
        let refused = |text: &str| Err(text.to_owned());
        match (*self.owner.state(), resolve) {
            (TargetState::Fresh, _) => refused("nothing is in doubt: no VM was prepared for on this host"),
            (TargetState::Waiting, Resolve::Target) if !self.owner.may_be_run() => refused(
                "its memory never was here whole, so its disks are not either: this copy cannot be run. Start the VM at its \
                 source, from its own disks",
            ),
            (TargetState::Waiting, Resolve::Source) if !sure && !self.owner.may_be_run() => refused(
                "nothing is in doubt: the VM is the source's, and its memory may be arriving; pause or cancel the job instead. If the                  source is gone for good, say it again with --the-other-side-is-off: this host then gives up what it holds",
            ),
            (TargetState::Waiting, _) => Ok(None),
            (TargetState::Running { .. }, Resolve::Target) => Ok(Some("the VM belongs to this host already")),
            (TargetState::Running { .. }, Resolve::Source) => {
                refused("nothing is in doubt: the VM belongs to this host; move it back instead")
            }
            (TargetState::Aborted { .. }, Resolve::Source) => Ok(Some(
                "aborted: this host has given the VM up for good, and will never run it",
            )),
            (TargetState::Aborted { .. }, Resolve::Target) => refused(
                "this host has given the VM up for good: it can only be run at the source (--run-at source)",
            ),
        }
    }

    /// A session that has no copies open cannot receive another generation: the next attempt opens one that can.
    pub(super) async fn end_closed(&mut self) {
        self.s.over.send_replace(true);
        let (agent, open) = (std::sync::Arc::clone(&self.s.agent), self.s.open.clone());
        let unlinked = on_thread("unlink", move || target_disks::unlink_all(&open, &agent.settings));
        if let Ok(Err(why)) = unlinked.await {
            tracing::warn!(job = %self.s.job, "{why}");
        }
        // Hooks of a former life may have run.
        if self.undoing.is_none() {
            self.s.hook_failure("the handover was given up").await;
        }
    }
}
