//! What an operator orders at one agent, past every attempt: a handover in doubt decided, a shadow removed.
//!
//! Owns the question to the agent and which one is asked. Leaves the decision to the agent, whose journal knows. Promises that it needs
//! neither the peer nor the other agent, for those are what is missing when it is needed.

use std::time::{Duration, Instant};

use longhaul_common::wire::operator::{OperatorAnswer, OperatorTask, OperatorWord, RunAt};
use longhaul_common::wire::session::{AgentTask, Refusal, RefusalKind};
use serde::{Deserialize, Serialize};

use super::spec::Kind;
use super::table::JobError;
use crate::agents::Agents;
use crate::store::JobRecord;

/// An agent may have to wait for its QEMU.
const ANSWER: Duration = Duration::from_secs(90);
/// For so long an agent that is not there is waited for: its supervisor starts it again.
const RETURN: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(500);

/// Which side is to run a VM whose handover is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Source,
    Target,
}

/// Decides a handover in doubt.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveOrder {
    pub run_at: Side,
    /// The other host is off, or its QEMU of this VM is. Without it the answer says what is risked, and nothing is done.
    #[serde(default)]
    pub the_other_side_is_off: bool,
    /// An agent of this gateway's site, for a job that its journal does not have; without it the job's source.
    #[serde(default)]
    pub agent: Option<String>,
}

/// Removes what a completed move left at its source.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ForgetOrder {
    /// As in a `ResolveOrder`.
    pub agent: Option<String>,
}

/// What an agent did.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OrderDone {
    /// What people should know, a sentence each.
    pub lines: Vec<String>,
    /// Not so where it was done before.
    pub changed: bool,
}

impl ResolveOrder {
    pub(super) fn word(&self) -> OperatorWord {
        let run_at = match self.run_at {
            Side::Source => RunAt::Source,
            Side::Target => RunAt::Target,
        };
        OperatorWord::Resolve {
            run_at,
            other_is_off: self.the_other_side_is_off,
        }
    }
}

/// The agent to be asked about a job, which this gateway may not know.
pub(super) fn agent_for(record: Option<&JobRecord>, named: Option<String>) -> Result<String, JobError> {
    match (named, record) {
        (Some(agent), _) => Ok(agent),
        (None, Some(record)) if record.spec.kind == Kind::Live => Ok(record.spec.source.agent.clone()),
        (None, _) => Err(JobError::NotLive),
    }
}

/// Asks it, again where its link is lost meanwhile: what was done before is not done twice.
pub(super) async fn ask(
    agents: &Agents,
    agent: &str,
    job: &str,
    word: OperatorWord,
) -> Result<OrderDone, Refusal> {
    let begun = Instant::now();
    let job = job.to_owned();
    let task = AgentTask::Operator(OperatorTask { job, word });
    loop {
        let left = ANSWER.saturating_sub(begun.elapsed());
        match tokio::time::timeout(left, agents.ask(agent, &task)).await {
            Ok(Ok(OperatorAnswer::Done { lines, changed })) => return Ok(OrderDone { lines, changed }),
            Ok(Ok(OperatorAnswer::Refused(refusal))) => return Err(refusal),
            Ok(Err(refusal)) if begun.elapsed() >= RETURN => return Err(refusal),
            Ok(Err(_)) => tokio::time::sleep(PAUSE).await,
            Err(_) => {
                let text = format!(
                    "agent '{agent}' did not answer within {} s; say it again",
                    ANSWER.as_secs()
                );
                return Err(Refusal::new(RefusalKind::Lost, text));
            }
        }
    }
}
