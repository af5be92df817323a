//! The target's hook at the handover: between the source's VM standing and the word that it is handed over.
//!
//! Owns when it begins and who waits for it. Leaves the program to `session::hook`. Promises that a COMMIT counts only once the hook has
//! succeeded for its generation, and that where the generation is given up the hook on failure follows it.

use std::sync::Arc;

use super::Arrive;
use crate::session::live::hooks::{self, Running};
use crate::vm::handover::{Generation, Reason, TargetEvent, TargetState, Word};

/// One generation's.
pub(super) struct HandoverHook {
    generation: Generation,
    /// Until it was waited for.
    running: Option<Running>,
}

impl Arrive {
    /// The source's VM stands: begun once for each generation.
    pub(super) fn start_handover_hook(&mut self, generation: Generation) {
        let known = self.at_handover.as_ref().map(|hook| hook.generation);
        let waits = *self.owner.state() == TargetState::Waiting && generation == self.owner.generation();
        if known == Some(generation) || !waits {
            return;
        }
        let running = self.s.hook_at_handover(self.undoing.take());
        self.at_handover = running.map(|running| HandoverHook {
            generation,
            running: Some(running),
        });
    }

    /// A word of the source. What it says may be late anyway, so a COMMIT may wait for the hook.
    pub(super) async fn hear(&mut self, word: Word) {
        if let Word::Commit { generation, .. } = word {
            self.start_handover_hook(generation);
            let hook = self
                .at_handover
                .as_mut()
                .filter(|hook| hook.generation == generation);
            let running = hook.and_then(|hook| hook.running.take());
            if let Some(running) = running
                && let Err(why) = hooks::ended(running).await
            {
                tracing::error!(job = %self.s.job, "{why}");
                self.on(TargetEvent::Stop(Reason::HookFailed)).await;
            }
        }
        self.on(TargetEvent::Heard(word)).await;
    }

    /// Where the generation was given up, what its hook did is undone, beside everything else.
    pub(super) fn undo_handover_hook(&mut self) {
        let TargetState::Aborted { reason } = *self.owner.state() else {
            return;
        };
        let Some(hook) = self.at_handover.take() else {
            return;
        };
        let session = Arc::clone(&self.s);
        self.undoing = Some(tokio::spawn(async move {
            if let Some(running) = hook.running {
                let _ = hooks::ended(running).await;
            }
            session.hook_failure(&reason.to_string()).await;
        }));
    }
}
