//! The first act of an agent: settling what a former life of it left open.
//!
//! Owns going through the records of both roles before the first link. Leaves the decision to `vm::handover`, whose journals say who may
//! run each VM. Promises that a VM which was not handed over runs on here, without anything of ours in its QEMU, before anything else
//! is done; that a handover in doubt stays so until the other side answers; and that a VM which belongs here is run here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::ids::JobId;
use longhaul_common::wire::session::{Refusal, RefusalKind};

use super::arrive::{self, Machine};
use super::record::{Arriving, Leaving};
use super::source::LiveSource;
use super::target::LiveTarget;
use super::trial;
use crate::session::threads::on_thread;
use crate::session::{Agent, target_disks};
use crate::vm::qmp::Qmp;
use crate::vm::rounds;

/// How long the target's machine may take to see how its QEMU is, before the session counts as waiting.
const SEE: Duration = Duration::from_secs(2);

/// Settles every open session of both roles.
pub(in crate::session) async fn all(agent: &Arc<Agent>) {
    let state = agent.settings.paths.state.clone();
    let read = on_thread("records", move || (Leaving::all(&state), Arriving::all(&state))).await;
    let Ok((leaving, arriving)) = read else { return };
    // The VMs that stand because of us come first, all at once.
    let leaving = leaving
        .into_iter()
        .map(|(job, record)| leave(Arc::clone(agent), job, record));
    let leaving: Vec<_> = leaving.map(tokio::spawn).collect();
    trial::settle(agent).await;
    let arriving = arriving
        .into_iter()
        .map(|(job, record)| arrive(Arc::clone(agent), job, record));
    let arriving: Vec<_> = arriving.map(tokio::spawn).collect();
    for settled in leaving.into_iter().chain(arriving) {
        // A task that died has said why in the log.
        let _ = settled.await;
    }
}

/// A VM that was on its way out.
async fn leave(agent: Arc<Agent>, job: JobId, record: Leaving) {
    tracing::info!(%job, "settling a VM that was leaving");
    let qmp = match Qmp::connect(&record.qmp).await {
        Ok(qmp) => Some(qmp),
        Err(error) => {
            tracing::warn!(%job, "its QEMU does not answer: {error}");
            None
        }
    };
    let nbd = record.nbd.clone();
    match LiveSource::settle(&agent, job, record, qmp.clone()).await {
        // In doubt, or moved: whoever asks is answered.
        (session, true) => *agent.live_sources.slot(job).lock().await = Some(session),
        (session, false) => {
            if let Some(qmp) = qmp {
                let prefix = format!("{}{}-", crate::vm::PREFIX, job.short());
                match rounds::sweep(&qmp, &nbd, |name| !name.starts_with(&prefix)).await {
                    Ok(_) => {
                        tracing::info!(%job, "the VM runs on here, and nothing of ours is left in its QEMU")
                    }
                    Err(error) => {
                        tracing::error!(%job, "something of ours is left in the VM's QEMU: {error}")
                    }
                }
            }
            session.forget().await;
            tokio::spawn(async move {
                let refusal = Refusal::new(
                    RefusalKind::Lost,
                    "the agent was restarted; the VM runs on at the source",
                );
                session.stayed(refusal).await
            });
        }
    }
}

/// A VM that was on its way in.
async fn arrive(agent: Arc<Agent>, job: JobId, record: Arriving) {
    tracing::info!(%job, "settling a VM that was arriving");
    let machine = match Machine::open(&agent, job).await {
        Ok(machine) => machine,
        Err(refusal) => return tracing::error!(%job, "{refusal}"),
    };
    let Arriving { open, vm } = record;
    let session = match LiveTarget::reopen(&agent, open.clone(), vm, machine).await {
        Ok(session) => session,
        Err(refusal) => return tracing::error!(%job, "{refusal}"),
    };
    let limit = Instant::now() + SEE;
    while Instant::now() < limit && !arrive::is_decided(&session) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if arrive::is_given_up(&session) {
        session.over.send_replace(true);
        // The copy stays for the next attempt; its final name does not lead to it any more.
        let unlinked = on_thread("unlink", move || target_disks::unlink_all(&open, &agent.settings)).await;
        if let Ok(Err(why)) = unlinked {
            tracing::warn!(%job, "{why}");
        }
        // Whatever hooks of a former life did is undone, beside everything else.
        tokio::spawn(async move { session.hook_failure("the agent was restarted").await });
        return;
    }
    *agent.live_targets.slot(job).lock().await = Some(session);
}
