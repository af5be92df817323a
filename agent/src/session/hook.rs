//! The program that the operator wants run when a VM has arrived.
//!
//! Owns its environment, its time limit and the sentence about its failure. Its output goes where the agent's log goes.

use std::path::{Path, PathBuf};

use longhaul_common::ids::JobId;

use crate::settings::HooksSection;

/// What the hook is told.
pub(super) struct Arrival<'a> {
    pub job: JobId,
    pub name: &'a str,
    pub disks: &'a [PathBuf],
    pub definition: Option<&'a Path>,
}

/// Runs the hook, if there is one. Gives a sentence where it failed: the VM has arrived all the same.
pub(super) async fn run(hooks: &HooksSection, arrival: &Arrival<'_>) -> Option<String> {
    let program = hooks.arrived.as_ref()?;
    let disks: Vec<_> = arrival.disks.iter().map(|path| path.to_string_lossy()).collect();
    let mut command = tokio::process::Command::new(program);
    command.env("LONGHAUL_JOB", arrival.job.to_string());
    command.env("LONGHAUL_NAME", arrival.name);
    command.env("LONGHAUL_DISKS", disks.join("\n"));
    command.env(
        "LONGHAUL_DEFINITION",
        arrival.definition.unwrap_or_else(|| Path::new("")),
    );
    command.stdin(std::process::Stdio::null()).kill_on_drop(true);
    let program = program.display();
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Some(format!("the hook {program} cannot be started: {error}")),
    };
    match tokio::time::timeout(hooks.timeout.0, child.wait_with_output()).await {
        Ok(Ok(output)) if output.status.success() => None,
        Ok(Ok(output)) => Some(format!("the hook {program} ended with {}", output.status)),
        Ok(Err(error)) => Some(format!("the hook {program} cannot be waited for: {error}")),
        Err(_) => Some(format!(
            "the hook {program} took longer than {} and was ended",
            hooks.timeout
        )),
    }
}
