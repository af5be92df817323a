//! The gateway program: reads its config, checks everything that can be checked before the first connection, then serves.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use longhaul_common::link::{Reloader, Role, TlsState};
use longhaul_common::wire::session::chain;
use longhaul_common::{settings, telemetry};
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
    /// Check the config and leave.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("longhaul-gateway: {sentence}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let settings: GatewaySettings = settings::load(&arguments.config).map_err(|error| chain(&error))?;
    settings
        .check()
        .map_err(|text| format!("{}: {text}", arguments.config.display()))?;
    let tls = TlsState::load(settings.identity.credentials(), Some(Role::Gateway))
        .map_err(|error| chain(&error))?;
    if arguments.check {
        println!("{} is good", arguments.config.display());
        return Ok(());
    }
    telemetry::start_logs(&settings.log).map_err(|error| chain(&error))?;
    let text = telemetry::start_metrics().map_err(|error| chain(&error))?;
    metrics::describe();
    std::fs::create_dir_all(&settings.state)
        .map_err(|error| format!("cannot make {}: {error}", settings.state.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime
        .map_err(|error| format!("cannot start: {error}"))?
        .block_on(serve(settings, tls, text))
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
    if section.window_file.0 <= section.window.0 {
        return Ok((Windows::new(Some(size)), way));
    }
    let folder = settings.state.join("windows");
    let windows = Windows::in_folder(size, &folder)
        .map_err(|error| format!("cannot keep windows in {}: {error}", folder.display()))?;
    Ok((windows, way))
}

async fn serve(
    settings: GatewaySettings,
    tls: Arc<TlsState>,
    text: telemetry::MetricsText,
) -> Result<(), String> {
    for warning in tls.warnings() {
        tracing::warn!("{warning}");
    }
    tracing::info!(identity = %tls.identity(), "the gateway starts");
    let _watch = Reloader::watch(&tls);
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
