//! The operator's word, carried out at the source.
//!
//! Owns the sentences around it. Leaves when it may be said to the session's `resolve`, and the decision to `vm::handover`. Promises that the
//! word is journaled before anything follows from it.

use std::time::{Duration, Instant};

use longhaul_common::wire::session::{Refusal, RefusalKind};

use super::SourceVm;
use crate::session::live::resolve::{Resolved, Said, Told, may_resolve};
use crate::vm::handover::{By, Reason, Resolve, SourceEvent, SourceState};

/// How long the VM may take to run again, or its QEMU to end.
const OBEYS: Duration = Duration::from_secs(10);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(20);

impl SourceVm {
    /// Takes a word of the target or the operator.
    pub(in crate::session::live) async fn hear(&mut self, told: Told) {
        match told {
            Told::Word(word) => self.on(SourceEvent::Heard(word)).await,
            Told::Operator(resolve, answer) => {
                let said = self.resolve(resolve).await;
                // Who asked may have gone: the journal says what was decided.
                let _ = answer.send(said);
            }
        }
    }

    pub(in crate::session::live) async fn resolve(&mut self, resolve: Resolve) -> Resolved {
        if let Some(already) = may_resolve(*self.owner.state(), resolve)? {
            return Ok(Said::already(already));
        }
        tracing::warn!(job = %self.s.job, ?resolve, "the operator decides the handover");
        self.on(SourceEvent::Resolve(resolve)).await;
        let limit = Instant::now() + OBEYS;
        let gone = |state: &SourceState| matches!(state, SourceState::TakenBack { gone: true, .. });
        while !self.owner.is_closed() && !gone(self.owner.state()) && Instant::now() < limit {
            self.look().await;
            tokio::time::sleep(LOOK).await;
        }
        let names: Vec<_> = self
            .s
            .disks
            .iter()
            .map(|disk| disk.file.display().to_string())
            .collect();
        let names = names.join(", ");
        match (*self.owner.state(), self.owner.is_closed()) {
            (SourceState::TakenBack { .. }, true) => Ok(Said::done(vec![
                "the VM runs at the source again, as it was when it was handed over".to_owned(),
                "the job has ended: cancel it to remove the copy at the target, or resume it to move the VM again".to_owned(),
            ])),
            (SourceState::TakenBack { gone: true, .. }, false) => Ok(Said::done(vec![format!(
                "the VM belongs to the source, but its QEMU is gone: start it from its disks, which have their names again \
                 ({names}); they are as after a power failure when it was handed over"
            )])),
            (SourceState::Released { .. }, _) => Ok(Said::done(vec![
                "the VM belongs to the target; the source will not run it, and its images stay as shadows".to_owned(),
                "unless it runs there, say the same to the target's agent: longhaul resolve JOB --run-at target --agent AGENT, \
                 at a gateway of its site"
                    .to_owned(),
            ])),
            (_, _) => Err(format!(
                "the word was taken, but is not carried out yet ({}): see the agent's log, and say it again",
                self.owner.words()
            )),
        }
    }

    /// Why a handover that came back must not be tried again by itself.
    pub(in crate::session::live) fn resolved(&self) -> Option<Refusal> {
        let text = match self.owner.state() {
            SourceState::TakenBack { by: By::Operator, .. } => {
                "the operator decided that the VM stays at its source; resume the job to move it again"
            }
            SourceState::TakenBack {
                reason: Reason::HookFailed,
                ..
            } => {
                "the at_handover hook at the target failed (its agent's log says how); the handover was taken back, the VM runs \
                 on at the source"
            }
            _ => return None,
        };
        Some(Refusal::new(RefusalKind::Refused, text))
    }
}
