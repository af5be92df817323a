//! What agent and gateway do at their start, in the same order and with the same words.
//!
//! Owns the checklist before the first connection: config, certificates, logs, metrics, runtime; and `--check`, which ends after the
//! second. Leaves alone what a program serves. Promises that whatever keeps a program from starting is one sentence and a documented
//! exit code.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use crate::link::{Reloader, Role, TlsState};
use crate::settings::{self, sections::IdentitySection};
use crate::telemetry::{self, LogSettings, MetricsText};
use crate::wire::session::chain;

/// Something is wrong with the command, the config or the host.
const WRONG: u8 = 2;
/// `--check` found a good config whose certificates are not on this host.
pub const ABSENT: u8 = 3;
/// Stands before what is not there.
pub const ABSENT_HERE: &str = " is good, but this host lacks its certificates: ";

/// A program's settings, as far as every program has them.
pub trait ProgramSettings: DeserializeOwned {
    /// What no single value can show: a sentence that names the key.
    fn check(&self) -> Result<(), String>;
    fn identity(&self) -> &IdentitySection;
    fn log(&self) -> &LogSettings;
}

/// A program that may begin to serve.
pub struct Ready<S> {
    pub settings: S,
    pub tls: Arc<TlsState>,
    /// What the program counts.
    pub metrics: MetricsText,
}

/// Starts the program `name` from its config file, or only looks whether it could start; gives its exit code. `serve` runs within the
/// runtime until the program stops.
pub fn run<S: ProgramSettings>(
    name: &str,
    config: &Path,
    check: bool,
    role: Role,
    serve: impl AsyncFnOnce(Ready<S>) -> Result<(), String>,
) -> ExitCode {
    let ended = match check {
        true => look::<S>(config, role),
        false => start(config, role, serve).map(|()| ExitCode::SUCCESS),
    };
    ended.unwrap_or_else(|sentence| {
        eprintln!("{name}: {sentence}");
        ExitCode::from(WRONG)
    })
}

fn load<S: ProgramSettings>(config: &Path) -> Result<S, String> {
    let settings: S = settings::load(config).map_err(|error| chain(&error))?;
    let checked = settings.check();
    checked.map_err(|text| format!("{}: {text}", config.display()))?;
    Ok(settings)
}

/// Whether a config file is good, and its certificates are: what `--check` says. One that was made for another host is good without
/// them.
///
/// # Errors
/// What is wrong, in a sentence.
pub fn judge<S: ProgramSettings>(config: &Path, role: Role) -> Result<(S, Option<String>), String> {
    let settings: S = load(config)?;
    match TlsState::load(settings.identity().credentials(), Some(role)) {
        Ok(_) => Ok((settings, None)),
        Err(error) if error.is_absent() => Ok((settings, Some(chain(&error)))),
        Err(error) => Err(chain(&error)),
    }
}

fn look<S: ProgramSettings>(config: &Path, role: Role) -> Result<ExitCode, String> {
    let (_, absent) = judge::<S>(config, role)?;
    Ok(match absent {
        None => {
            println!("{} is good", config.display());
            ExitCode::SUCCESS
        }
        Some(absent) => {
            println!("{}{ABSENT_HERE}{absent}", config.display());
            ExitCode::from(ABSENT)
        }
    })
}

fn start<S: ProgramSettings>(
    config: &Path,
    role: Role,
    serve: impl AsyncFnOnce(Ready<S>) -> Result<(), String>,
) -> Result<(), String> {
    let settings: S = load(config)?;
    let tls = TlsState::load(settings.identity().credentials(), Some(role)).map_err(|error| chain(&error))?;
    telemetry::start_logs(settings.log()).map_err(|error| chain(&error))?;
    let metrics = telemetry::start_metrics().map_err(|error| chain(&error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    runtime.block_on(async {
        for warning in tls.warnings() {
            tracing::warn!("{warning}");
        }
        tracing::info!(identity = %tls.identity(), "the program starts");
        let _watch = Reloader::watch(&tls);
        serve(Ready {
            settings,
            tls,
            metrics,
        })
        .await
    })
}
