//! What a session at the target begins with: the handover as a former life left it, and a template that can start the VM.
//!
//! Owns both checks before anything is opened. Leaves the session to the parent.

use std::sync::Arc;

use longhaul_common::ids::JobId;
use longhaul_common::wire::session::{Refusal, RefusalKind, TargetOpen, TargetVm};

use crate::disk::roots;
use crate::session::Agent;
use crate::session::threads::on_thread;
use crate::vm::handover::{Effect, TargetOwner};
use crate::vm::incoming::Template;
use crate::vm::journal::{Journal, Role};

/// The target's machine and its journal.
pub(in crate::session::live) struct Machine {
    pub(super) owner: TargetOwner,
    pub(super) journal: Option<Journal>,
    pub(super) effects: Vec<Effect>,
}

impl Machine {
    /// As a former life of this agent left it.
    pub(in crate::session::live) async fn open(agent: &Arc<Agent>, job: JobId) -> Result<Self, Refusal> {
        let refused = |error: &dyn std::error::Error| Refusal::because(RefusalKind::Refused, error);
        let state = agent.settings.paths.state.clone();
        let opened = on_thread("journal", move || Journal::open(&state, job, Role::Target)).await;
        let journal = opened
            .map_err(|error| refused(&error))?
            .map_err(|error| refused(&error))?;
        let (owner, effects) = TargetOwner::restore(journal.records()).map_err(|error| refused(&error))?;
        Ok(Self {
            owner,
            journal: Some(journal),
            effects,
        })
    }

    /// Whether the VM belongs to this host.
    pub(in crate::session::live) fn owns(&self) -> bool {
        self.owner.owns()
    }
}

/// Refuses a job whose VM this agent could not start.
pub(in crate::session::live) fn check_template(
    agent: &Agent,
    open: &TargetOpen,
    vm: &TargetVm,
) -> Result<(), Refusal> {
    let refuse = |text: String| Err(Refusal::new(RefusalKind::Refused, text));
    if open.disks.iter().any(|disk| disk.overwrite) {
        return refuse(
            "a running VM's disks do not replace images: remove target.overwrite and free the names"
                .to_owned(),
        );
    }
    if let Some(socket) = &vm.qmp {
        roots::resolve_inside(&agent.settings.paths.qmp, socket).map_err(|error| {
            let text = format!("target.qmp: {error} (the target agent's setting is paths.qmp)");
            Refusal::new(RefusalKind::Refused, text)
        })?;
    }
    let template = Template(agent.settings.vm.command.clone());
    if vm.qmp.is_none() && template.0.is_empty() {
        return refuse(
            "the target agent has no vm.command to start the VM's QEMU with; add it to its config, or name a QEMU that \
             waits in target.qmp"
                .to_owned(),
        );
    }
    Ok(())
}
