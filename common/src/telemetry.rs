//! How a program reports on itself: logs and metrics.
//!
//! Owns the set-up of both, once per process. Leaves alone what is logged and measured: each module names its own. Promises that
//! without a set-up (tests) both cost nearly nothing.
//!
//! Levels: `error`, the operator asked and did not get it; `warn`, it went on but somebody should look; `info`, what happened to a
//! job or a peer; `debug`, why; `trace`, each batch.

use std::time::Duration;

use std::net::SocketAddr;
use std::sync::Arc;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people and journald.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// The `[log]` section of every program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSettings {
    /// `tracing` filter, e.g. "info" or "info,longhaul_gateway::send=debug".
    pub level: String,
    pub format: LogFormat,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// Why reporting cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("log.level '{level}' is not a filter; write \"info\" or \"info,longhaul_agent=debug\"")]
    Level {
        level: String,
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("metrics cannot be set up")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
}

/// Sends logs to standard error from now on.
pub fn start_logs(settings: &LogSettings) -> Result<(), TelemetryError> {
    let level = |source| TelemetryError::Level {
        level: settings.level.clone(),
        source,
    };
    let filter = EnvFilter::builder().parse(&settings.level).map_err(level)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second set-up in one process (tests) keeps the first.
    let _ = match settings.format {
        LogFormat::Text => builder.with_ansi(false).with_target(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    Ok(())
}

/// Renders what was measured so far.
#[derive(Clone)]
pub struct MetricsText(PrometheusHandle);

impl MetricsText {
    /// Prometheus text format 0.0.4.
    pub fn render(&self) -> String {
        self.0.run_upkeep();
        self.0.render()
    }
}

/// Collects metrics from now on.
pub fn start_metrics() -> Result<MetricsText, TelemetryError> {
    let seconds = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &seconds)?
        .upkeep_timeout(Duration::from_secs(5));
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    // As with logs: the first set-up of a process wins.
    let _ = metrics::set_global_recorder(recorder);
    Ok(MetricsText(handle))
}

/// Connections to the metrics port that are answered at once.
const SCRAPES_MAX: usize = 8;
/// A scraper that has not asked by then is dropped.
const SCRAPE_TIME: Duration = Duration::from_secs(5);

/// Answers `GET /metrics` on `address`, for programs that have no HTTP API. Every other request gets 404.
pub async fn serve_metrics(address: SocketAddr, metrics: MetricsText) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let scrapes = Arc::new(Semaphore::new(SCRAPES_MAX));
    tokio::spawn(async move {
        loop {
            let Ok(permit) = Arc::clone(&scrapes).acquire_owned().await else {
                return;
            };
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let metrics = metrics.clone();
            tokio::spawn(async move {
                // A scraper that goes away is its own affair.
                let _ = tokio::time::timeout(SCRAPE_TIME, answer(stream, &metrics)).await;
                drop(permit);
            });
        }
    });
    Ok(())
}

async fn answer(mut stream: TcpStream, metrics: &MetricsText) -> std::io::Result<()> {
    let mut request = [0; 2048];
    let mut len = 0;
    while len < request.len() && !request[..len].windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut request[len..]).await? {
            0 => return Ok(()),
            n => len += n,
        }
    }
    let (status, body) = match request.starts_with(b"GET /metrics ") {
        true => ("200 OK", metrics.render()),
        false => ("404 Not Found", "only GET /metrics is answered here\n".to_owned()),
    };
    let kind = "Content-Type: text/plain; version=0.0.4";
    let head = format!(
        "HTTP/1.1 {status}\r\n{kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// Waits for the signal that asks a program to end.
pub async fn stop_signal() -> &'static str {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
