//! Ending a job on the operator's word.
//!
//! Owns bringing a VM back, asking where one in doubt runs, and removing what the target has. Leaves when to the parent. Promises that a job
//! counts as cancelled only once its VM is known to run at the source and the copy is gone, or the operator gave up waiting for that.

use std::time::Duration;

use longhaul_common::ids::Attempt;
use longhaul_common::wire::session::{Refusal, RefusalKind};

use super::{Driver, now};
use crate::job::attempt::{Source, Target, target_open};
use crate::job::live::{self, Cancelled};
use crate::job::progress::JobState;
use crate::job::spec::Kind;

/// How long an abort may take before the target's partial copy is left to itself.
const ABORT_TIME: Duration = Duration::from_secs(30);
/// Of it, how long the target may take to say where a VM runs.
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// As agents are told it.
pub(super) fn by_operator() -> Refusal {
    Refusal::new(RefusalKind::Cancelled, "the operator cancelled the job")
}

impl Driver {
    /// Removes what the target has. False where the target cannot be reached: then it is tried again, over restarts of this
    /// program, until the operator says `cancel` a second time.
    pub(super) async fn cancel(&mut self) -> bool {
        let asked_twice = std::mem::replace(&mut self.record.cancelling, true) && self.asked_again;
        let attempt = match self.next_attempt(JobState::Waiting).await {
            Ok(attempt) => attempt,
            Err(refusal) => {
                self.rest(JobState::Waiting, Some(refusal.text)).await;
                return false;
            }
        };
        let removed = tokio::time::timeout(ABORT_TIME, self.remove_copy(attempt)).await;
        let (why, transient) = match removed {
            Ok(Ok(true)) => {
                self.complete_instead().await;
                return true;
            }
            Ok(Ok(false)) => (None, false),
            Ok(Err(refusal)) => (Some(refusal.text), refusal.kind.is_transient()),
            Err(_) => (Some("the target did not answer".to_owned()), true),
        };
        if let Some(why) = why.as_ref().filter(|_| transient && !asked_twice) {
            let text = format!(
                "cancelled, but the partial copy cannot be removed yet: {why}; cancel once more to leave it there"
            );
            self.rest(JobState::Waiting, Some(text)).await;
            return false;
        }
        self.record.finished = Some(now());
        let message = why.map(|why| format!("the partial copy may still be there: {why}"));
        self.rest(JobState::Cancelled, message).await;
        true
    }

    /// True where the target says that everything has arrived already: too late to cancel.
    async fn remove_copy(&mut self, attempt: Attempt) -> Result<bool, Refusal> {
        if self.record.sizes.is_empty() {
            // No attempt came as far as the target.
            return Ok(false);
        }
        if self.record.spec.kind == Kind::Live {
            match self.cancel_live(attempt).await? {
                Cancelled::RunsOn => {}
                Cancelled::HandedOver => return self.hear_the_target().await,
            }
        }
        let spec = &self.record.spec;
        let mut open = target_open(spec, self.job, attempt, &self.record.sizes, None, None);
        // What is about to be removed needs no room.
        for disk in &mut open.disks {
            disk.preallocate = false;
            disk.shadow = false;
        }
        let target = Target::open(&self.context, spec, open, None).await?;
        if target.arrived.is_some() {
            return Ok(true);
        }
        target.abort(&by_operator()).await?;
        Ok(false)
    }

    async fn cancel_live(&self, attempt: Attempt) -> Result<Cancelled, Refusal> {
        let asked = self.record.spec.source_open(self.job, attempt);
        let source = Source::open(&self.context, &self.record.spec, asked).await?;
        live::cancel(source, &by_operator()).await
    }

    /// Cancelled when the VM was handed over already: where it runs is for the target to say. True: there.
    async fn hear_the_target(&mut self) -> Result<bool, Refusal> {
        let attempt = self.next_attempt(JobState::Waiting).await?;
        match tokio::time::timeout(ANSWER_TIME, self.connect_and_move(attempt)).await {
            Ok(Ok(report)) => {
                self.record.report = Some(report);
                Ok(true)
            }
            // It came back, or will be asked again.
            Ok(Err(refusal)) if !refusal.kind.is_transient() => Err(Refusal {
                kind: RefusalKind::Lost,
                ..refusal
            }),
            _ => {
                let text = "the VM was handed over and the target has not answered: it cannot be cancelled; bring the link to the target and its agent back, which know whether the VM runs there, or decide without them: longhaul resolve";
                Err(Refusal::new(RefusalKind::Lost, text))
            }
        }
    }
}
