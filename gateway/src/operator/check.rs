//! `longhaul check FILE`: any of the project's files.
//!
//! Owns finding out which kind of file it is. An agent's config is checked by the agent's own program: nobody else knows its keys.

use std::path::{Path, PathBuf};
use std::process::Command;

use longhaul_common::link::Role;
use longhaul_common::settings::{self, SettingsError};
use longhaul_common::startup;

use crate::job::spec::{JobSpec, SpecError};
use crate::settings::GatewaySettings;

/// Why a file is not good.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("{path}")]
    Spec { path: PathBuf, source: SpecError },
    #[error("{0}")]
    Gateway(String),
    #[error("{path} has no 'kind' (a job), no [agents] (a gateway) and no [gateway] (an agent): what is it?")]
    Unknown { path: PathBuf },
    #[error("{0}")]
    Agent(String),
    #[error("cannot start longhaul-agent to check its config; is it installed?")]
    NoAgent(#[source] std::io::Error),
}

/// A sentence about a good file.
pub(super) fn check(path: &Path) -> Result<String, CheckError> {
    let keys: toml::Table = settings::load_file(path)?;
    if keys.contains_key("kind") {
        let spec: JobSpec = settings::load_file(path)?;
        spec.check().map_err(|source| CheckError::Spec {
            path: path.to_owned(),
            source,
        })?;
        return Ok(format!(
            "{} is a good job: {} of {}",
            path.display(),
            counted(spec.disk.len(), "disk"),
            spec.name
        ));
    }
    if keys.contains_key("agents") {
        let judged = startup::judge::<GatewaySettings>(path, Role::Gateway);
        let (gateway, absent) = judged.map_err(CheckError::Gateway)?;
        let peers = counted(gateway.peer.len(), "peer");
        let good = format!("{} is a good gateway config with {peers}", path.display());
        return Ok(with_absent(good, absent.as_deref()));
    }
    if keys.contains_key("gateway") {
        return check_agent(path);
    }
    Err(CheckError::Unknown {
        path: path.to_owned(),
    })
}

fn check_agent(path: &Path) -> Result<String, CheckError> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("longhaul-agent")));
    let program = beside
        .filter(|path| path.exists())
        .unwrap_or_else(|| "longhaul-agent".into());
    let output = Command::new(program)
        .arg("--check")
        .arg("--config")
        .arg(path)
        .output();
    let output = output.map_err(CheckError::NoAgent)?;
    let good = format!("{} is a good agent config", path.display());
    if output.status.success() {
        return Ok(good);
    }
    if output.status.code() == Some(i32::from(startup::ABSENT)) {
        let said = String::from_utf8_lossy(&output.stdout);
        let absent = said
            .trim()
            .split_once(startup::ABSENT_HERE)
            .map(|(_, absent)| absent);
        return Ok(with_absent(
            good,
            Some(absent.unwrap_or("its certificates are missing")),
        ));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(CheckError::Agent(
        said.trim().trim_start_matches("longhaul-agent: ").to_owned(),
    ))
}

/// A file that was made for another host is no worse for it.
fn with_absent(good: String, absent: Option<&str>) -> String {
    match absent {
        Some(absent) => format!("{good}; this host lacks its certificates: {absent}"),
        None => good,
    }
}

fn counted(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    }
}
