//! The agent's side of the wire: one link to the site's gateway, and the tasks that arrive on it.
//!
//! Owns connecting (again and again), and handing each stream to the task it is for. Leaves disks to `disk`, and what a task does
//! to `source` and `target`. Promises that a lost link ends its tasks and nothing else: partial copies stay, and the agent is
//! back within seconds.

mod arrivals;
mod hook;
mod live;
mod outcome;
mod source;
mod source_disks;
mod stream;
mod target;
mod target_disks;
mod threads;
mod writers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use longhaul_common::link::{self, Identity, Link, RecvStream, Role, SendStream, TlsState};
use longhaul_common::wire::session::AgentTask;
use longhaul_common::wire::{ALPN_AGENT, frame};
use tokio::sync::Semaphore;

use crate::metrics::LINKED;
use crate::settings::AgentSettings;

/// Streams of batches that are read at once; the job's credit bounds their bytes.
const STREAMS_MAX: usize = 16;
/// The first frame of a task must be there by then.
const FIRST_FRAME: Duration = Duration::from_secs(20);
/// Between two looks for images that nobody came back for.
const FORGOTTEN_CHECK: Duration = Duration::from_secs(10);
/// Waits between two tries to reach the gateway.
const BACKOFF: [u64; 6] = [100, 200, 400, 800, 1500, 2500];

/// What all tasks of this agent share.
pub struct Agent {
    pub(crate) settings: AgentSettings,
    tls: Arc<TlsState>,
    arrivals: arrivals::Arrivals,
    sources: source_disks::OpenSources,
    live_sources: live::LiveSources,
    live_targets: live::LiveTargets,
    thaws: Arc<live::thaw::Thaws>,
    prepared: live::prepared::PreparedVms,
}

impl Agent {
    /// For a checked config.
    pub fn new(settings: AgentSettings, tls: Arc<TlsState>) -> Arc<Self> {
        let linger = settings.limits.source_linger.0;
        let sources = source_disks::OpenSources::new(linger);
        let thaws = Arc::new(live::thaw::Thaws::new(settings.paths.state.clone()));
        Arc::new(Self {
            thaws,
            settings,
            tls,
            arrivals: arrivals::Arrivals::default(),
            sources,
            live_sources: live::LiveSources::default(),
            live_targets: live::LiveTargets::default(),
            prepared: live::prepared::PreparedVms::default(),
        })
    }

    /// The site in this agent's certificate.
    fn site(&self) -> String {
        self.tls.identity().site().to_owned()
    }

    /// Serves until the process ends.
    pub async fn run(self: Arc<Self>) {
        live::settle::all(&self).await;
        tokio::spawn(Arc::clone(&self).close_forgotten_sources());
        let mut failures = 0;
        let mut last_error = String::new();
        loop {
            match self.connect().await {
                Ok(link) => {
                    tracing::info!(gateway = %link.peer(), address = %link.remote_address(), "linked to the gateway");
                    (failures, last_error) = (0, String::new());
                    metrics::gauge!(LINKED).set(1.0);
                    let reason = self.serve(&link).await;
                    metrics::gauge!(LINKED).set(0.0);
                    tracing::warn!("the link to the gateway ended: {reason}");
                }
                Err(error) => {
                    // Once per cause: a gateway that is away for an hour is one line, not thousands.
                    if error != last_error {
                        tracing::warn!("cannot reach the gateway, trying on: {error}");
                        last_error = error;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(BACKOFF[failures])).await;
            failures = (failures + 1).min(BACKOFF.len() - 1);
        }
    }

    /// Unlocks images of attempts that nobody took up again.
    async fn close_forgotten_sources(self: Arc<Self>) {
        loop {
            tokio::time::sleep(FORGOTTEN_CHECK).await;
            let agent = Arc::clone(&self);
            // Closing may wait for a helper program to end: not on the runtime.
            let _ =
                threads::on_thread("close", move || agent.sources.expire(std::time::Instant::now())).await;
        }
    }

    async fn connect(&self) -> Result<Link, String> {
        let gateway = &self.settings.gateway;
        let us = self.tls.identity();
        let expected = Identity::new(us.trust_domain(), us.site(), Role::Gateway, &gateway.name)
            .map_err(|error| error.to_string())?;
        let address = resolve(&gateway.address).await?;
        let settings = self.settings.link.settings();
        let link = link::connect(address, &expected, ALPN_AGENT, &self.tls, &settings).await;
        link.map_err(|error| longhaul_common::wire::session::chain(&error))
    }

    /// Takes streams until the link ends; gives the reason.
    async fn serve(self: &Arc<Self>, link: &Link) -> String {
        let streams = Arc::new(Semaphore::new(STREAMS_MAX));
        loop {
            tokio::select! {
                stream = link.accept_bi() => match stream {
                    Ok((send, recv)) => drop(tokio::spawn(Arc::clone(self).task(link.clone(), send, recv))),
                    Err(error) => return error.to_string(),
                },
                stream = accept_permitted(link, &streams) => match stream {
                    Ok((stream, permit)) => {
                        let agent = Arc::clone(self);
                        tokio::spawn(async move {
                            agent.arrivals.receive(stream).await;
                            drop(permit);
                        });
                    }
                    Err(error) => return error.to_string(),
                },
            }
        }
    }

    async fn task(self: Arc<Self>, link: Link, send: SendStream, mut recv: RecvStream) {
        let first = tokio::time::timeout(FIRST_FRAME, frame::read::<AgentTask>(&mut recv)).await;
        match first {
            Ok(Ok(Some(AgentTask::Source(mut open)))) if open.live.is_some() => {
                if let Some(vm) = open.live.take() {
                    live::source::run(&self, link, send, recv, open, vm).await;
                }
            }
            Ok(Ok(Some(AgentTask::Target(mut open)))) if open.live.is_some() => {
                if let Some(vm) = open.live.take() {
                    live::target::run(&self, send, recv, open, vm).await;
                }
            }
            Ok(Ok(Some(AgentTask::Operator(task)))) => live::operator::run(&self, send, task).await,
            Ok(Ok(Some(AgentTask::Source(open)))) => source::run(&self, link, send, recv, open).await,
            Ok(Ok(Some(AgentTask::Target(open)))) => target::run(&self, send, recv, open).await,
            Ok(Ok(Some(AgentTask::Prepare(task)))) => live::prepared::serve(&self, send, task).await,
            Ok(Ok(None)) => {}
            Ok(Err(error)) => tracing::warn!("a task from the gateway was refused: {error}"),
            Err(_) => tracing::warn!("a task from the gateway never said what it is for"),
        }
    }
}

async fn accept_permitted(
    link: &Link,
    streams: &Arc<Semaphore>,
) -> Result<(RecvStream, Option<tokio::sync::OwnedSemaphorePermit>), link::LinkError> {
    let permit = Arc::clone(streams).acquire_owned().await.ok();
    Ok((link.accept_uni().await?, permit))
}

/// The first address of "host:port".
async fn resolve(address: &str) -> Result<SocketAddr, String> {
    let found = tokio::net::lookup_host(address).await;
    let mut found =
        found.map_err(|error| format!("gateway.address '{address}' cannot be resolved: {error}"))?;
    found
        .next()
        .ok_or_else(|| format!("gateway.address '{address}' has no address"))
}
