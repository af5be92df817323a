//! The gateway program: what it serves with, once its config is read and checked.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use longhaul_common::link::Role;
use longhaul_common::startup::{self, Ready};
use longhaul_common::telemetry;
use longhaul_common::wire::session::chain;
use longhaul_gateway::agents::{self, Agents};
use longhaul_gateway::api::{self, Api};
use longhaul_gateway::job::table::Jobs;
use longhaul_gateway::metrics::{self, Gauges};
use longhaul_gateway::receive::Receiving;
use longhaul_gateway::reduction::workers::Workers;
use longhaul_gateway::reduction::{Level, Size, Way, Windows};
use longhaul_gateway::send::ingest::Ingest;
use longhaul_gateway::send::transmit::Peer;
use longhaul_gateway::settings::{GatewaySettings, LevelSetting};
use longhaul_gateway::store::Store;

/// Longhaul's gateway: one or more per site.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Config file.
    #[arg(long, default_value = "/etc/longhaul/gateway.toml")]
    config: PathBuf,
    /// Check the config and the certificates it names, and leave.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let Arguments { config, check } = Arguments::parse();
    startup::run("longhaul-gateway", &config, check, Role::Gateway, serve)
}

/// The windows, and how data is reduced: at a level of its own choice where there is none.
fn reduction(settings: &GatewaySettings) -> Result<(Arc<Windows>, Way), String> {
    let section = &settings.reduction;
    let level = match section.level {
        LevelSetting::Adaptive => None,
        LevelSetting::Raw => Some(Level::Raw),
        LevelSetting::Lz4 => Some(Level::Lz4),
        LevelSetting::Zstd1 => Some(Level::Zstd1),
        LevelSetting::Zstd3 => Some(Level::Zstd3),
        LevelSetting::Zstd9 => Some(Level::Zstd9),
    };
    let way = Way {
        dedup: section.dedup,
        xor: section.xor,
        level,
    };
    let size = Size::of(section.window.0, section.window_file.0);
    let tenants = section.tenants.iter().cloned().collect();
    if section.window_file.0 <= section.window.0 {
        return Ok((Windows::new(Some(size), tenants), way));
    }
    let folder = settings.state.join("windows");
    let windows = Windows::in_folder(size, tenants, &folder)
        .map_err(|error| format!("cannot keep windows in {}: {error}", folder.display()))?;
    Ok((windows, way))
}

async fn serve(ready: Ready<GatewaySettings>) -> Result<(), String> {
    let Ready {
        settings,
        tls,
        metrics: text,
    } = ready;
    metrics::describe();
    std::fs::create_dir_all(&settings.state)
        .map_err(|error| format!("cannot make {}: {error}", settings.state.display()))?;
    let store = Store::open(&settings.state.join("journal.sqlite")).map_err(|error| chain(&error))?;
    let threads = match settings.limits.workers {
        0 => std::thread::available_parallelism().map_or(2, usize::from),
        threads => threads,
    };
    let workers = Workers::start(threads).map_err(|error| format!("cannot start threads: {error}"))?;
    let agents = Arc::new(Agents::default());
    let (windows, method) = reduction(&settings)?;
    let ingest = Arc::new(Ingest::new(
        workers.clone(),
        method,
        settings.limits.send_memory.0,
    ));
    agents::listen(&settings.agents, &tls, Arc::clone(&agents), Arc::clone(&ingest))
        .map_err(|error| format!("agents.listen: {}", chain(&error)))?;
    let receiving = Receiving::new(
        Arc::clone(&agents),
        workers,
        Arc::clone(&windows),
        settings.limits.receive_memory.0,
    );
    Arc::clone(&receiving)
        .listen(&settings.peers, &tls)
        .map_err(|error| format!("peers.listen: {}", chain(&error)))?;
    let peers = settings
        .peer
        .iter()
        .map(|peer| Peer::start(peer.clone(), Arc::clone(&tls), &windows))
        .collect();
    let jobs = Jobs::new(agents, Arc::clone(&ingest), peers, store, settings.limits.jobs);
    let gauges = Gauges { ingest, receiving };
    let api = Api::new(Arc::clone(&jobs), text, gauges, tls.identity().to_string());
    api::serve(&settings.api, &tls, api)
        .await
        .map_err(|error| chain(&error))?;
    let resumed = jobs.resume_unfinished().await.map_err(|error| chain(&error))?;
    if resumed > 0 {
        tracing::info!(resumed, "unfinished jobs go on");
    }
    let signal = telemetry::stop_signal().await;
    tracing::info!("the gateway stops: {signal}");
    if let Err(error) = windows.keep() {
        tracing::warn!("the windows are not kept, and begin anew: {error}");
    }
    Ok(())
}
