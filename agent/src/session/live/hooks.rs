//! The hooks of a running VM's move, as each side's session runs them.
//!
//! Owns what they are told of the VM, and noting that they began. Leaves the moments to the sessions and programs to `session::hook`.

use std::path::PathBuf;

use longhaul_common::wire::session::{Refusal, RefusalKind, TargetOpen, TargetVm};

use super::source::LiveSource;
use super::target::LiveTarget;
use crate::session::Agent;
use crate::session::hook::{self, End, Hooks, Moment};

/// A hook of this moment that runs beside the handover.
pub(super) type Running = tokio::task::JoinHandle<Result<(), String>>;

/// Waits for one; a task that died is a failure, too.
pub(super) async fn ended(hook: Running) -> Result<(), String> {
    hook.await
        .unwrap_or_else(|error| Err(format!("the at_handover hook was lost: {error}")))
}

impl LiveSource {
    fn hooks(&self) -> Hooks {
        Hooks {
            job: self.job,
            name: self.vm.name.clone(),
            end: End::Source,
            site: self.agent.site(),
            other: self.vm.target.clone(),
            disks: self.disks.iter().map(|disk| disk.file.clone()).collect(),
            definition: self.record().definition.clone(),
        }
    }

    /// Nothing was moved so far. That hooks began is noted first, so that a restarted agent undoes what they did.
    pub(super) async fn hook_before(&self) -> Result<(), Refusal> {
        self.remember(|record| record.hooked = true).await?;
        let ran = self
            .hooks()
            .run(&self.agent.settings.hooks, Moment::Before, None)
            .await;
        ran.map_err(|why| {
            let text = format!("{why}; nothing was moved, the VM runs on");
            Refusal::new(RefusalKind::Refused, text)
        })
    }

    /// The VM stands: runs beside what is sent meanwhile.
    pub(super) fn hook_at_handover(&self) -> Option<Running> {
        let section = self.agent.settings.hooks.clone();
        hook::is_set(&section, Moment::AtHandover).then(|| {
            let hooks = self.hooks();
            tokio::spawn(async move { hooks.run(&section, Moment::AtHandover, None).await })
        })
    }

    /// The target runs the VM. Gives a sentence for the report where the hook failed.
    pub(super) async fn hook_after(&self) -> Option<String> {
        let hooks = self.hooks();
        hooks
            .run_anyway(&self.agent.settings.hooks, Moment::After, None)
            .await
    }

    /// The VM stays here, or came back. Gives a sentence for the report where the hook failed.
    pub(super) async fn hook_failure(&self, cause: &str) -> Option<String> {
        let hooks = self.hooks();
        let section = &self.agent.settings.hooks;
        hooks.run_anyway(section, Moment::OnFailure, Some(cause)).await
    }

    /// Whether any hook of this job may have run.
    pub(super) fn is_hooked(&self) -> bool {
        self.record().hooked
    }
}

fn at_target(agent: &Agent, open: &TargetOpen, vm: &TargetVm) -> Hooks {
    let folder = agent.settings.paths.state.join("definitions");
    let definition = folder.join(open.job.to_string());
    Hooks {
        job: open.job,
        name: open.name.clone(),
        end: End::Target,
        site: agent.site(),
        other: vm.source.clone(),
        disks: open.disks.iter().map(|disk| disk.path.clone()).collect(),
        definition: definition.exists().then_some(definition),
    }
}

/// Before a copy is made or a QEMU started.
pub(super) async fn before_at_target(agent: &Agent, open: &TargetOpen, vm: &TargetVm) -> Result<(), Refusal> {
    let hooks = at_target(agent, open, vm);
    let ran = hooks.run(&agent.settings.hooks, Moment::Before, None).await;
    ran.map_err(|why| {
        let text = format!("{why}; nothing was moved, the VM runs on at its source");
        Refusal::new(RefusalKind::Refused, text)
    })
}

impl LiveTarget {
    fn hooks(&self) -> Hooks {
        at_target(&self.agent, &self.open, &self.vm)
    }

    /// The source has stopped its VM: runs beside what still arrives, after what undoes an earlier one.
    pub(super) fn hook_at_handover(&self, undoing: Option<tokio::task::JoinHandle<()>>) -> Option<Running> {
        let section = self.agent.settings.hooks.clone();
        hook::is_set(&section, Moment::AtHandover).then(|| {
            let hooks = self.hooks();
            tokio::spawn(async move {
                if let Some(undoing) = undoing
                    && tokio::time::timeout(section.handover_timeout.0, undoing)
                        .await
                        .is_err()
                {
                    return Err("the on_failure hook of an earlier handover still runs".to_owned());
                }
                hooks.run(&section, Moment::AtHandover, None).await
            })
        })
    }

    /// The VM runs here. Gives a sentence for the report where the hook failed.
    pub(super) async fn hook_after(&self, disks: &[PathBuf]) -> Option<String> {
        let hooks = Hooks {
            disks: disks.to_vec(),
            ..self.hooks()
        };
        hooks
            .run_anyway(&self.agent.settings.hooks, Moment::After, None)
            .await
    }

    /// The VM does not come, or not now.
    pub(super) async fn hook_failure(&self, cause: &str) {
        let hooks = self.hooks();
        // The log has its failure; there is no report at this end.
        let _ = hooks
            .run_anyway(&self.agent.settings.hooks, Moment::OnFailure, Some(cause))
            .await;
    }
}
