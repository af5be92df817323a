//! The agent program: reads its config, checks everything that can be checked before the first connection, then serves.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use longhaul_agent::disk::image::end_stale_servers;
use longhaul_agent::metrics;
use longhaul_agent::session::Agent;
use longhaul_agent::settings::AgentSettings;
use longhaul_common::link::{Reloader, Role, TlsState};
use longhaul_common::wire::session::chain;
use longhaul_common::{settings, telemetry};

/// Longhaul's agent: one per hypervisor host.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Config file.
    #[arg(long, default_value = "/etc/longhaul/agent.toml")]
    config: PathBuf,
    /// Check the config and leave.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("longhaul-agent: {sentence}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let settings: AgentSettings = settings::load(&arguments.config).map_err(|error| chain(&error))?;
    settings
        .check()
        .map_err(|text| format!("{}: {text}", arguments.config.display()))?;
    let tls =
        TlsState::load(settings.identity.credentials(), Some(Role::Agent)).map_err(|error| chain(&error))?;
    if arguments.check {
        println!("{} is good", arguments.config.display());
        return Ok(());
    }
    telemetry::start_logs(&settings.log).map_err(|error| chain(&error))?;
    let text = telemetry::start_metrics().map_err(|error| chain(&error))?;
    metrics::describe();
    for folder in [&settings.paths.run, &settings.paths.state] {
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    }
    let stale = end_stale_servers(&settings.paths.run);
    if stale > 0 {
        tracing::warn!("ended {stale} image servers that an earlier agent left behind");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime
        .map_err(|error| format!("cannot start: {error}"))?
        .block_on(serve(settings, tls, text))
}

async fn serve(
    settings: AgentSettings,
    tls: Arc<TlsState>,
    text: telemetry::MetricsText,
) -> Result<(), String> {
    for warning in tls.warnings() {
        tracing::warn!("{warning}");
    }
    tracing::info!(identity = %tls.identity(), "the agent starts");
    let _watch = Reloader::watch(&tls);
    if let Some(address) = settings.metrics {
        telemetry::serve_metrics(address, text)
            .await
            .map_err(|error| format!("metrics = \"{address}\": {error}"))?;
    }
    let agent = Agent::new(settings, tls);
    tokio::select! {
        () = Arc::clone(&agent).run() => Ok(()),
        signal = telemetry::stop_signal() => {
            tracing::info!("the agent stops: {signal}");
            Ok(())
        }
    }
}
