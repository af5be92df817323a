//! The agent program: what it serves with, once its config is read and checked.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use longhaul_agent::disk::image::end_stale_servers;
use longhaul_agent::metrics;
use longhaul_agent::session::Agent;
use longhaul_agent::settings::AgentSettings;
use longhaul_common::link::Role;
use longhaul_common::startup::{self, Ready};
use longhaul_common::telemetry;

/// Longhaul's agent: one per hypervisor host.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Config file.
    #[arg(long, default_value = "/etc/longhaul/agent.toml")]
    config: PathBuf,
    /// Check the config and the certificates it names, and leave.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let Arguments { config, check } = Arguments::parse();
    startup::run("longhaul-agent", &config, check, Role::Agent, serve)
}

async fn serve(ready: Ready<AgentSettings>) -> Result<(), String> {
    let Ready {
        settings,
        tls,
        metrics: text,
    } = ready;
    metrics::describe();
    for folder in [&settings.paths.run, &settings.paths.state] {
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    }
    let stale = end_stale_servers(&settings.paths.run);
    if stale > 0 {
        tracing::warn!("ended {stale} image servers that an earlier agent left behind");
    }
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
