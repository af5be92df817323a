//! A handover in doubt at its source, and the operator's word on it.
//!
//! Owns what may be said in which state, and passing it on. Leaves carrying it out to `source_vm`, and asking the agent to `operator`.
//! Promises that it changes nothing where nothing is in doubt.

use std::sync::Arc;
use std::time::Duration;

use longhaul_common::wire::session::{FromSource, LiveStage, LiveState};
use tokio::sync::{mpsc, oneshot};

use super::source::LiveSource;
use super::source_vm::SourceVm;
use crate::vm::handover::{By, Note, Resolve, SourceState, Word};

/// How long the session may take to act and answer.
const ANSWER: Duration = Duration::from_secs(60);

/// What people should know of it.
#[derive(Debug)]
pub(super) struct Said {
    pub lines: Vec<String>,
    /// Not so where it was done before.
    pub changed: bool,
}

impl Said {
    pub(super) fn already(line: &str) -> Self {
        let lines = vec![line.to_owned()];
        Self {
            lines,
            changed: false,
        }
    }

    pub(super) fn done(lines: Vec<String>) -> Self {
        Self { lines, changed: true }
    }
}

/// Or why it was not done.
pub(super) type Resolved = Result<Said, String>;

/// What the handover's machine is told from outside.
pub(super) enum Told {
    Word(Word),
    Operator(Resolve, oneshot::Sender<Resolved>),
}

/// Why nothing is to be decided in this state; `Ok(Some)`: it is decided already, in just this way.
pub(super) fn may_resolve(state: SourceState, resolve: Resolve) -> Result<Option<&'static str>, String> {
    use SourceState as S;
    match (state, resolve) {
        (S::HandedOver { .. }, _) | (S::Released { by: By::Operator }, Resolve::Source) => Ok(None),
        (S::TakenBack { .. } | S::Kept { .. }, Resolve::Source) => {
            Ok(Some("the VM belongs to the source already"))
        }
        (S::Released { .. }, Resolve::Target) => Ok(Some("the VM belongs to the target already")),
        (S::Released { by: By::Protocol }, Resolve::Source) => {
            Err("nothing is in doubt: the target has said that it runs the VM; move it back instead".to_owned())
        }
        (S::TakenBack { .. } | S::Kept { .. }, Resolve::Target) => Err(
            "nothing is in doubt: the VM stays at the source, and the target will not run it; resume the job to move it"
                .to_owned(),
        ),
        (S::Fresh | S::Iterating | S::PreSwitchover, _)
        | (S::Continuing { .. } | S::Barring { .. } | S::Settling { .. }, _) => Err(
            "nothing is in doubt: the VM was not handed over, it is the source's; pause or cancel the job instead".to_owned(),
        ),
    }
}

impl LiveSource {
    /// Has the handover's machine take the operator's word. It must be in a state for it.
    pub(super) async fn resolve(self: &Arc<Self>, resolve: Resolve) -> Resolved {
        let (answer, answered) = oneshot::channel();
        let late = || {
            Err("the agent is busy with this VM and did not take the word in time: say it again".to_owned())
        };
        let told = Told::Operator(resolve, answer);
        match tokio::time::timeout(ANSWER, self.words.send(told)).await {
            Ok(Ok(())) => {}
            // Nobody listens any more: it is over, but for what an operator said before.
            Ok(Err(_)) => return self.resolve_again(resolve).await,
            Err(_) => return late(),
        }
        match tokio::time::timeout(ANSWER, answered).await {
            Ok(Ok(said)) => said,
            Ok(Err(_)) => self.resolve_again(resolve).await,
            Err(_) => late(),
        }
    }

    /// The session has ended: from its journal, with a machine of its own.
    pub(super) async fn resolve_again(self: &Arc<Self>, resolve: Resolve) -> Resolved {
        let (_words, heard) = mpsc::channel(1);
        let mut vm = SourceVm::open(self, heard)
            .await
            .map_err(|refusal| refusal.text)?;
        let said = vm.resolve(resolve).await?;
        if let Some(refusal) = vm.resolved() {
            let refusal = self.stayed(refusal).await;
            self.end(Err(refusal));
            self.forget().await;
        }
        Ok(said)
    }

    /// Says that the handover is in doubt, before anything else is said to a gateway that attaches.
    pub(super) async fn say_doubt(&self, say: &mpsc::Sender<FromSource>) {
        let state = *self.owner.borrow();
        if let Some(SourceState::HandedOver { .. }) = state {
            let doubt = LiveState {
                stage: LiveStage::InDoubt,
                decision: Note::InDoubt.to_string(),
                ..LiveState::default()
            };
            // Where the gateway is gone, the next message notices.
            let _ = say.send(FromSource::Live(doubt)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use longhaul_common::digest::Digest;

    use super::*;
    use crate::vm::handover::{Facts, Stream};

    #[test]
    fn only_a_doubt_can_be_decided() {
        let stream = Stream {
            len: 1,
            hash: Digest([0; 32]),
        };
        let facts = Facts {
            disk_batches: 1,
            stream,
        };
        let doubt = SourceState::HandedOver {
            facts,
            recalled: None,
            fresh: false,
        };
        for resolve in [Resolve::Source, Resolve::Target] {
            assert_eq!(may_resolve(doubt, resolve), Ok(None));
            for state in [
                SourceState::Fresh,
                SourceState::Iterating,
                SourceState::Barring { facts },
            ] {
                let why = may_resolve(state, resolve).unwrap_err();
                assert!(why.contains("nothing is in doubt"), "{why}");
            }
        }
        let released = SourceState::Released { by: By::Protocol };
        assert!(may_resolve(released, Resolve::Source).is_err());
        assert!(may_resolve(released, Resolve::Target).unwrap().is_some());
        let given = SourceState::Released { by: By::Operator };
        assert_eq!(may_resolve(given, Resolve::Source), Ok(None));
    }
}
