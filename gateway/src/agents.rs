//! The agents of this site, as far as they are linked right now.
//!
//! Owns the port for agents and the table of their links. Leaves what is said to them to `job` and `receive`. Promises that an
//! agent's name comes from its certificate and its site is ours, and that a newer link of an agent replaces the older one.

use std::sync::Arc;

use dashmap::DashMap;
use longhaul_common::link::{Link, LinkError, Listener, Role, TlsState, code};
use longhaul_common::wire::ALPN_AGENT;
use longhaul_common::wire::frame;
use longhaul_common::wire::session::{AgentTask, Refusal, RefusalKind};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::send::ingest::Ingest;
use crate::settings::AgentsSection;

/// Linked agents by name.
#[derive(Default)]
pub struct Agents {
    links: DashMap<String, Link>,
    /// Counts arrivals.
    arrivals: watch::Sender<u64>,
}

impl Agents {
    /// The link to an agent, or a refusal that says it is not there.
    pub fn link(&self, name: &str) -> Result<Link, Refusal> {
        let link = self.links.get(name).map(|entry| entry.value().clone());
        link.ok_or_else(|| {
            let text = format!(
                "agent '{name}' is not linked to this gateway; see that longhaul-agent runs there and what its log says"
            );
            Refusal::new(RefusalKind::Lost, text)
        })
    }

    /// Asks an agent on a stream of its own: one frame there, one back.
    pub async fn ask<A: DeserializeOwned>(&self, name: &str, task: &AgentTask) -> Result<A, Refusal> {
        let link = self.link(name)?;
        let lost = |error: &dyn std::fmt::Display| {
            let text = format!("agent '{name}' was lost: {}", link.reason_or(error));
            Refusal::new(RefusalKind::Lost, text)
        };
        let (mut send, mut recv) = link.open_bi().await.map_err(|error| lost(&error))?;
        frame::write(&mut send, task)
            .await
            .map_err(|error| lost(&error))?;
        let answer = frame::read(&mut recv).await.map_err(|error| lost(&error))?;
        answer.ok_or_else(|| lost(&"it ended the stream without an answer"))
    }

    /// Names of all linked agents, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.links.iter().map(|entry| entry.key().clone()).collect();
        names.sort();
        names
    }

    /// Waits until any agent has linked from now on.
    pub async fn arrival(&self) {
        // The sender lives as long as this table.
        let _ = self.arrivals.subscribe().changed().await;
    }

    fn enter(&self, link: &Link) {
        let name = link.peer().name().to_owned();
        tracing::info!(agent = %name, address = %link.remote_address(), "agent linked");
        if let Some(older) = self.links.insert(name, link.clone()) {
            older.close(code::DONE, "a newer link of this agent took its place");
        }
        self.arrivals.send_modify(|count| *count += 1);
    }

    fn leave(&self, link: &Link) {
        self.links
            .remove_if(link.peer().name(), |_, known| known.close_reason().is_some());
    }
}

/// Opens the port and serves agents for as long as the program runs.
pub fn listen(
    settings: &AgentsSection,
    tls: &Arc<TlsState>,
    agents: Arc<Agents>,
    ingest: Arc<Ingest>,
) -> Result<(), LinkError> {
    let link = settings.link.settings();
    let listener = Listener::bind(settings.listen, tls, &[ALPN_AGENT], &[Role::Agent], &link)?;
    tracing::info!(address = %settings.listen, "listening for agents");
    let site = tls.identity().site().to_owned();
    tokio::spawn(async move {
        while let Some(link) = listener.accept().await {
            if link.peer().site() != site {
                let reason = format!(
                    "this gateway serves site '{site}', the agent is of site '{}'",
                    link.peer().site()
                );
                tracing::warn!(agent = %link.peer(), "{reason}");
                link.close(code::WRONG_NAME, &reason);
                continue;
            }
            agents.enter(&link);
            let (agents, ingest) = (Arc::clone(&agents), Arc::clone(&ingest));
            tokio::spawn(async move {
                let reason = ingest.serve(&link).await;
                tracing::warn!(agent = %link.peer().name(), "the link to an agent ended: {reason}");
                agents.leave(&link);
            });
        }
    });
    Ok(())
}
