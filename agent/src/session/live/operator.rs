//! The operator's word on one VM of this host, as its gateway passes it on.
//!
//! Owns finding the VM by the start of its job's number, and asking for certainty before a word that could make two copies of it.
//! Leaves source and target to decide (`resolve`, `arrive`), and shadows to `shadow`. Promises one answer, in words.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use longhaul_common::ids::JobId;
use longhaul_common::link::SendStream;
use longhaul_common::wire::frame;
use longhaul_common::wire::operator::{OperatorAnswer, OperatorTask, OperatorWord, RunAt};
use longhaul_common::wire::session::{Refusal, RefusalKind};
use longhaul_common::wire::words::cleaned;

use super::record::Leaving;
use super::resolve::{Resolved, Said, may_resolve};
use super::source::LiveSource;
use crate::session::Agent;
use crate::session::threads::on_thread;
use crate::vm::handover::{Resolve, TargetOwner, TargetState};
use crate::vm::journal::{self, Journal, Role};

/// How long the gateway may take to hear the answer.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Serves one question.
pub(in crate::session) async fn run(agent: &Arc<Agent>, mut send: SendStream, task: OperatorTask) {
    let said = match find(agent, &task.job) {
        Ok(Some(job)) => obey(agent, job, &task).await,
        Ok(None) => nothing(agent, &task).await,
        Err(why) => Err(why),
    };
    let answer = match said {
        Ok(Said { lines, changed }) => OperatorAnswer::Done { lines, changed },
        Err(why) => OperatorAnswer::Refused(Refusal::new(RefusalKind::Refused, why)),
    };
    let _ = tokio::time::timeout(LAST_WORD, frame::write(&mut send, &answer)).await;
    let _ = send.finish();
    let _ = tokio::time::timeout(LAST_WORD, send.stopped()).await;
}

/// The one job whose number begins so.
fn find(agent: &Agent, start: &str) -> Result<Option<JobId>, String> {
    let start = start.to_ascii_lowercase();
    if start.is_empty() || !start.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!("'{}' is no job's number", cleaned(&start)));
    }
    let mut jobs = agent.live_sources.beginning_with(&start);
    jobs.extend(agent.live_targets.beginning_with(&start));
    jobs.sort_unstable();
    jobs.dedup();
    match jobs[..] {
        [job] => Ok(Some(job)),
        [] => Ok(None),
        _ => Err(format!("{start} names several jobs; write more of its digits")),
    }
}

/// There is no session of such a job; what is known of it lies in the state folder.
async fn nothing(agent: &Agent, task: &OperatorTask) -> Resolved {
    let (state, task) = (agent.settings.paths.state.clone(), task.clone());
    let said = on_thread("records", move || {
        let start = task.job.to_ascii_lowercase();
        let begins = |job: &JobId| job.to_string().starts_with(&start);
        match task.word {
            OperatorWord::Forget => match Leaving::all(&state).into_iter().find(|(job, _)| begins(job)) {
                Some((job, _)) => Err(format!(
                    "job {job} is recorded here, but no move of it was completed; see the agent's log"
                )),
                None => Ok(Said::already("nothing of this job is left on this host")),
            },
            OperatorWord::Resolve { run_at, .. } => by_journal(&state, begins, run_at),
        }
    });
    said.await.map_err(|error| error.to_string())?
}

/// Blocks. What a host has given up stays so, and is said as often as anyone asks.
fn by_journal(state: &Path, begins: impl Fn(&JobId) -> bool, run_at: RunAt) -> Resolved {
    let words = |error: &dyn std::error::Error| error.to_string();
    let found = journal::list(state).map_err(|error| words(&error))?;
    let Some((job, role)) = found.into_iter().find(|(job, _)| begins(job)) else {
        return Err(
            "nothing is in doubt: this agent holds nothing of a running VM's job of that number".to_owned(),
        );
    };
    if role == Role::Source {
        return Err(format!(
            "nothing is in doubt: no VM of job {job} is being moved from here, or its journal cannot be used; see the agent's log"
        ));
    }
    let journal = Journal::open(state, job, role).map_err(|error| words(&error))?;
    let (owner, _) = TargetOwner::restore(journal.records()).map_err(|error| words(&error))?;
    match (owner.state(), run_at) {
        (TargetState::Aborted { .. }, RunAt::Source) => Ok(Said::already(
            "aborted: this host has given the VM up for good, and will never run it",
        )),
        (TargetState::Aborted { .. }, RunAt::Target) => Err(
            "this host has given the VM up for good: it can only be run at the source (--run-at source)"
                .to_owned(),
        ),
        _ => Err(format!("nothing is in doubt: {}", owner.words())),
    }
}

async fn obey(agent: &Arc<Agent>, job: JobId, task: &OperatorTask) -> Resolved {
    let source = agent.live_sources.slot(job);
    match task.word {
        OperatorWord::Forget => {
            let mut slot = source.lock().await;
            let Some(session) = slot.as_ref() else {
                return Err(
                    "this host is not the source of the job's VM: what it left lies at the source".to_owned(),
                );
            };
            let lines = session.remove_shadows().await?;
            *slot = None;
            tracing::info!(%job, "the job is forgotten");
            Ok(Said::done(lines))
        }
        OperatorWord::Resolve { run_at, other_is_off } => {
            let resolve = match run_at {
                RunAt::Source => Resolve::Source,
                RunAt::Target => Resolve::Target,
            };
            let leaving = source.lock().await.as_ref().map(Arc::clone);
            if let Some(session) = leaving {
                return at_source(&session, resolve, other_is_off).await;
            }
            let target = agent.live_targets.slot(job);
            let arriving = target.lock().await.as_ref().map(Arc::clone);
            match arriving.filter(|session| !*session.over.borrow()) {
                Some(session) => session.resolve(resolve, other_is_off).await,
                None => nothing(agent, task).await,
            }
        }
    }
}

async fn at_source(session: &Arc<LiveSource>, resolve: Resolve, sure: bool) -> Resolved {
    let state = *session.owner.borrow();
    match state {
        Some(state) => match may_resolve(state, resolve)? {
            Some(already) => Ok(Said::already(already)),
            None => {
                certain(state_words(session), resolve, sure)?;
                session.resolve(resolve).await
            }
        },
        None if session.has_moved() => {
            certain("the VM was moved", resolve, sure)?;
            session.resolve_again(resolve).await
        }
        None => Err(session.failure().unwrap_or_else(|| {
            "nothing is in doubt: no handover has begun, the VM is the source's; pause or cancel the job instead".to_owned()
        })),
    }
}

fn state_words(session: &LiveSource) -> &'static str {
    if session.uplink.borrow().is_some() {
        "handed over, no answer from the target; its gateway is being asked"
    } else {
        "handed over, no answer from the target, which nothing leads to right now"
    }
}

/// Asks for certainty before a word that can make two copies of a VM.
pub(super) fn certain(state: &str, resolve: Resolve, sure: bool) -> Result<(), String> {
    if sure {
        return Ok(());
    }
    Err(format!(
        "in doubt ({state}), and nothing was done. {} If you are sure, say it again with --the-other-side-is-off",
        resolve.risk()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_can_make_two_copies_is_asked_for_twice() {
        for resolve in [Resolve::Source, Resolve::Target] {
            let why = certain("loaded", resolve, false).unwrap_err();
            assert!(
                why.contains("two copies") && why.contains("--the-other-side-is-off"),
                "{why}"
            );
            assert_eq!(certain("loaded", resolve, true), Ok(()));
        }
    }
}
