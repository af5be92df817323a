//! What is looked at before a running VM's QEMU is changed.
//!
//! Owns refusing a VM that cannot be moved, and the first look at its disks. Leaves the comparison with the target's QEMU to `target_vm`.

use std::sync::Arc;
use std::time::Instant;

use longhaul_common::wire::session::{LivePolicy, OpenedDisk, Refusal, RefusalKind, ShadowId, SourceVm};

use super::IOTHREADS_FROM;
use crate::disk::roots;
use crate::session::Agent;
use crate::session::live::disks::{self, Reach, VmDisk};
use crate::session::live::proof::FreeProof;
use crate::session::threads::on_thread;
use crate::vm::facts::{self, VmFacts};
use crate::vm::qmp::Qmp;
use crate::vm::rounds;

/// The monitor's socket, where this agent may use it.
pub(in crate::session::live) fn allowed_socket(
    agent: &Agent,
    vm: &SourceVm,
) -> Result<std::path::PathBuf, Refusal> {
    roots::resolve_inside(&agent.settings.paths.qmp, &vm.qmp).map_err(|error| {
        let text = format!("source.qmp: {error} (the agent's setting is paths.qmp)");
        Refusal::new(RefusalKind::Refused, text)
    })
}

/// The guest agent's socket, where the job names one and this agent may use it.
pub(in crate::session::live) fn allowed_guest_agent(
    agent: &Agent,
    vm: &SourceVm,
) -> Result<Option<std::path::PathBuf>, Refusal> {
    let allowed = |path: &std::path::PathBuf| {
        roots::resolve_inside(&agent.settings.paths.qmp, path).map_err(|error| {
            let text = format!("source.guest_agent: {error} (the agent's setting is paths.qmp)");
            Refusal::new(RefusalKind::Refused, text)
        })
    };
    vm.guest_agent.as_ref().map(allowed).transpose()
}

/// Of each disk the shadow since which its QEMU has noted every write.
pub(in crate::session::live) async fn known_since(
    qmp: &Qmp,
    nodes: &[String],
) -> Result<Vec<Option<ShadowId>>, Refusal> {
    let found = rounds::find_since(qmp, nodes).await;
    found.map_err(|error| Refusal::because(RefusalKind::Refused, &error))
}

/// Looks at the disks for the first time: what is stored, and what of it may be free.
pub(in crate::session::live) async fn survey(
    reach: Result<Reach, Refusal>,
    shown: Vec<VmDisk>,
    policy: LivePolicy,
    filter: bool,
) -> Result<(Vec<OpenedDisk>, Arc<FreeProof>), Refusal> {
    let started = Instant::now();
    let surveyed = on_thread("live-open", move || {
        let images = disks::connect(reach?)?;
        let reports = shown
            .iter()
            .zip(&images)
            .map(|(disk, image)| disks::report(disk, image));
        let mut reports: Vec<_> = reports.collect::<Result<_, _>>()?;
        let free = FreeProof::first(images, started, &policy, filter);
        for (index, report) in reports.iter_mut().enumerate() {
            let Some(deferred) = free.deferred(index) else {
                continue;
            };
            let image = free.image(index);
            let counted = image.map(|image| disks::stored_and_free(&image, &deferred));
            // Holes are left behind as what they are.
            report.free = counted.transpose()?.unwrap_or(0).min(report.allocated);
            report.used = report.allocated - report.free;
        }
        Ok((reports, Arc::new(free)))
    });
    let failed = |error| Refusal::because(RefusalKind::Protocol, &error);
    surveyed.await.map_err(failed)?
}

/// Everything that would make QEMU or the guest fail later, before anything is touched. Gives what the VM is, and what people should know.
pub(in crate::session::live) async fn refuse_unmovable(qmp: &Qmp) -> Result<(VmFacts, Vec<String>), Refusal> {
    let facts = facts::gather(qmp, facts::HostCpu::read()).await;
    let facts = facts.map_err(|error| Refusal::because(RefusalKind::Refused, &error))?;
    refuse_iothreads(qmp).await?;
    let findings = facts::refusals(&facts);
    let (refused, noted): (Vec<_>, Vec<_>) = findings.into_iter().partition(facts::Finding::is_refusal);
    let words =
        |findings: Vec<facts::Finding>| -> Vec<String> { findings.iter().map(ToString::to_string).collect() };
    match refused.is_empty() {
        true => Ok((facts, words(noted))),
        false => Err(Refusal::new(RefusalKind::Refused, words(refused).join("; "))),
    }
}

/// QEMU 7.2 was seen to abort, and the VM with it, when it closes a reader's connection to a disk that runs in an iothread
/// (`blk_aio_attached: Assertion client->recv_coroutine == NULL`).
pub(in crate::session::live) async fn refuse_iothreads(qmp: &Qmp) -> Result<(), Refusal> {
    let threads: Vec<serde_json::Value> = qmp
        .query("query-iothreads")
        .await
        .map_err(|error| Refusal::because(RefusalKind::Refused, &error))?;
    if threads.is_empty() || qmp.version().at_least(IOTHREADS_FROM.0, IOTHREADS_FROM.1) {
        return Ok(());
    }
    let text = format!(
        "the VM has {} iothreads, and reading a disk in one of them can end this version of QEMU, with the VM in it: start the \
         VM without iothreads, or with QEMU {}.{} or newer",
        threads.len(),
        IOTHREADS_FROM.0,
        IOTHREADS_FROM.1
    );
    Err(Refusal::new(RefusalKind::Refused, text))
}
