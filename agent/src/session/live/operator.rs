//! The operator's word on one VM of this host, as its gateway passes it on.
//!
//! Owns finding the VM by the start of its job's number, and asking for certainty before a word that could make two copies of it.
//! Leaves source and target to decide (`resolve`, `arrive`), and shadows to `shadow`. Promises one answer, in words.

use std::sync::Arc;
use std::time::Duration;

use longhaul_common::ids::JobId;
use longhaul_common::link::SendStream;
use longhaul_common::wire::frame;
use longhaul_common::wire::operator::{OperatorAnswer, OperatorTask, OperatorWord, RunAt};
use longhaul_common::wire::session::{Refusal, RefusalKind};
use longhaul_common::wire::words::cleaned;

use super::Slot;
use super::resolve::{Resolved, Said, may_resolve};
use super::source::LiveSource;
use crate::session::Agent;
use crate::vm::handover::Resolve;

/// How long the gateway may take to hear the answer.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Serves one question.
pub(in crate::session) async fn run(agent: &Arc<Agent>, mut send: SendStream, task: OperatorTask) {
    let said = match find(agent, &task.job) {
        Ok(job) => obey(agent, job, task.word).await,
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
fn find(agent: &Agent, start: &str) -> Result<JobId, String> {
    let start = start.to_ascii_lowercase();
    if start.is_empty() || !start.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!("'{}' is no job's number", cleaned(&start)));
    }
    let mut jobs = agent.live_sources.beginning_with(&start);
    jobs.extend(agent.live_targets.beginning_with(&start));
    jobs.sort_unstable();
    jobs.dedup();
    match jobs[..] {
        [job] => Ok(job),
        [] => Err(format!(
            "this agent holds nothing of a running VM's job {start}: it never came here, is over, or was forgotten before"
        )),
        _ => Err(format!("{start} names several jobs; write more of its digits")),
    }
}

async fn obey(agent: &Arc<Agent>, job: JobId, word: OperatorWord) -> Resolved {
    let source = agent.live_sources.slot(job);
    match word {
        OperatorWord::Forget => {
            let mut slot = source.lock().await;
            let session = slot
                .as_ref()
                .ok_or("this host is not the source of the job's VM: what it left lies at the source")?;
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
            let mut said = at_source(&source, resolve, other_is_off).await?;
            let target = agent.live_targets.slot(job);
            let session = target.lock().await.as_ref().map(Arc::clone);
            if let Some(session) = session.filter(|session| !*session.over.borrow()) {
                let more = session.resolve(resolve, other_is_off).await?;
                said.lines.extend(more.lines);
                said.changed |= more.changed;
            }
            Ok(said)
        }
    }
}

async fn at_source(slot: &Slot<LiveSource>, resolve: Resolve, sure: bool) -> Resolved {
    let session = slot.lock().await.as_ref().map(Arc::clone);
    let Some(session) = session else {
        return Ok(Said::default());
    };
    let state = *session.owner.borrow();
    match state {
        Some(state) => match may_resolve(state, resolve)? {
            Some(already) => Ok(Said::already(already)),
            None => {
                certain(state_words(&session), resolve, sure)?;
                session.resolve(resolve).await
            }
        },
        None if session.has_moved() => {
            certain("the VM was moved", resolve, sure)?;
            session.resolve_again(resolve).await
        }
        None => Err(
            "nothing is in doubt: no handover has begun, the VM is the source's; pause or cancel the job instead".to_owned(),
        ),
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
