//! Preparing a running VM ahead of a run: asked of the source's agent, which does it and keeps it.
//!
//! Owns the question and the wait for its answer. Leaves everything else to the agent: this gateway keeps nothing of it.

use std::sync::Arc;
use std::time::Duration;

use longhaul_common::wire::prepare::{PrepareAnswer, PrepareTask, PreparedVm};
use longhaul_common::wire::session::{AgentTask, Refusal, RefusalKind};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::spec::JobSpec;
use super::table::JobError;
use crate::agents::Agents;

/// Trimming a guest's file systems takes most of it.
const ANSWER_TIME: Duration = Duration::from_secs(330);
/// How long an agent may take to list its VMs.
const LIST_TIME: Duration = Duration::from_secs(3);

/// A VM whose dirty bitmaps are on ahead of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PreparedReport {
    /// The agent of its host.
    pub agent: String,
    pub name: String,
    /// Its monitor's socket.
    pub qmp: String,
    pub disks: u32,
    /// For so long it has run without a stop and with its bitmaps on; none where its agent does not know.
    pub age_seconds: Option<u64>,
    /// Written since.
    pub dirty_bytes: Option<u64>,
    pub notes: Vec<String>,
}

/// What is wished of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Begin,
    End,
}

/// Has the source's agent prepare a VM, or end that.
pub async fn prepare(agents: &Agents, spec: &JobSpec, wish: Wish) -> Result<PreparedReport, JobError> {
    spec.check()?;
    let open = spec.prepare_open()?;
    let task = match wish {
        Wish::Begin => PrepareTask::Begin(open),
        Wish::End => PrepareTask::End(open),
    };
    let agent = &spec.source.agent;
    let asked = tokio::time::timeout(ANSWER_TIME, ask(agents, agent, task)).await;
    let late = || {
        Refusal::new(
            RefusalKind::Lost,
            format!("agent '{agent}' did not answer in time; see its log, and `longhaul status`"),
        )
    };
    let vms = asked.map_err(|_| late())??;
    let missing = || Refusal::new(RefusalKind::Protocol, format!("agent '{agent}' named no VM"));
    vms.into_iter()
        .next()
        .map(|vm| report(agent, vm))
        .ok_or_else(|| missing().into())
}

/// The VMs that are prepared at this site. An agent that does not answer in time has none to show.
pub async fn list(agents: &Arc<Agents>) -> Vec<PreparedReport> {
    let mut asked = JoinSet::new();
    for agent in agents.names() {
        let agents = Arc::clone(agents);
        // All at once, so that one that is slow does not add to another.
        asked.spawn(async move {
            let listed = tokio::time::timeout(LIST_TIME, ask(&agents, &agent, PrepareTask::List)).await;
            let vms = listed.ok().and_then(Result::ok).unwrap_or_default();
            vms.into_iter().map(|vm| report(&agent, vm)).collect::<Vec<_>>()
        });
    }
    let mut all = asked.join_all().await.concat();
    all.sort_by(|one, other| (&one.agent, &one.name).cmp(&(&other.agent, &other.name)));
    all
}

async fn ask(agents: &Agents, agent: &str, task: PrepareTask) -> Result<Vec<PreparedVm>, Refusal> {
    match agents.ask(agent, &AgentTask::Prepare(task)).await? {
        PrepareAnswer::Prepared(vms) => Ok(vms),
        PrepareAnswer::Failed(refusal) => Err(refusal),
    }
}

fn report(agent: &str, vm: PreparedVm) -> PreparedReport {
    PreparedReport {
        agent: agent.to_owned(),
        name: vm.name,
        qmp: vm.qmp,
        disks: vm.disks,
        age_seconds: vm.age_ms.map(|ms| ms / 1000),
        dirty_bytes: vm.dirty_bytes,
        notes: vm.notes,
    }
}
