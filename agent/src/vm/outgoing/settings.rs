//! QEMU's migration settings: what is changed for a move, and put back.
//!
//! Owns capabilities and parameters at the source. The saved ones are small and serialisable, so that an agent that comes
//! back after a crash can put them back as well.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::OutgoingError;
use crate::vm::qmp::{Qmp, QmpError};

/// Capabilities that have to be on. All others have to be off: each changes the stream, needs a way back for bytes or frees
/// memory that the VM still needs if it runs on.
const ON: [&str; 2] = ["events", "pause-before-switchover"];
/// May be on or off, as the config says.
const THROTTLE: &str = "auto-converge";

/// Settings as they were before the move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    capabilities: BTreeMap<String, bool>,
    /// Bytes per second.
    max_bandwidth: Option<u64>,
    /// Milliseconds.
    downtime_limit: Option<u64>,
    /// Whether the VM ran when the move began.
    was_running: bool,
}

#[derive(Deserialize)]
struct Status {
    running: bool,
}

#[derive(Deserialize)]
pub(crate) struct Capability {
    pub(crate) capability: String,
    pub(crate) state: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Parameters {
    max_bandwidth: Option<u64>,
    downtime_limit: Option<u64>,
    #[serde(default)]
    tls_creds: Option<String>,
}

impl Saved {
    /// Reads them.
    ///
    /// # Errors
    /// [`OutgoingError::Tls`] where QEMU would encrypt the stream itself; [`OutgoingError::Capability`] where it is too old.
    pub async fn read(qmp: &Qmp) -> Result<Self, OutgoingError> {
        let capabilities: Vec<Capability> = qmp.query("query-migrate-capabilities").await?;
        let parameters: Parameters = qmp.query("query-migrate-parameters").await?;
        if let Some(tls) = parameters.tls_creds.filter(|creds| !creds.is_empty()) {
            return Err(OutgoingError::Tls(tls));
        }
        let capabilities: BTreeMap<_, _> = capabilities
            .into_iter()
            .take(256)
            .map(|capability| (capability.capability, capability.state))
            .collect();
        if let Some(missing) = ON.into_iter().find(|name| !capabilities.contains_key(*name)) {
            return Err(OutgoingError::Capability(missing));
        }
        Ok(Self {
            capabilities,
            max_bandwidth: parameters.max_bandwidth,
            downtime_limit: parameters.downtime_limit,
            was_running: qmp.query::<Status>("query-status").await?.running,
        })
    }

    /// Whether the VM ran when the move began.
    pub const fn was_running(&self) -> bool {
        self.was_running
    }

    /// Sets what a move needs.
    pub(super) async fn prepare(&self, qmp: &Qmp, downtime_limit: u64) -> Result<(), QmpError> {
        let wanted = self.capabilities.iter().map(|(name, &was)| {
            let wanted = ON.contains(&name.as_str());
            (name.as_str(), was, wanted)
        });
        let changed = wanted.filter(|(_, was, wanted)| was != wanted);
        set_capabilities(qmp, changed.map(|(name, _, wanted)| (name, wanted))).await?;
        // 0 is no limit: pacing is the agent's, which reads no faster than the target takes.
        let parameters = json!({ "max-bandwidth": 0, "downtime-limit": downtime_limit });
        qmp.execute("migrate-set-parameters", parameters).await?;
        Ok(())
    }

    /// Puts everything back as it was.
    pub async fn put_back(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let now: Vec<Capability> = qmp.query("query-migrate-capabilities").await?;
        let changed = now.iter().filter_map(|now| {
            let was = *self.capabilities.get(&now.capability)?;
            (was != now.state).then_some((now.capability.as_str(), was))
        });
        set_capabilities(qmp, changed).await?;
        let mut parameters = serde_json::Map::new();
        let mut put = |name: &str, value: Option<u64>| {
            value.map(|value| parameters.insert(name.to_owned(), Value::from(value)))
        };
        put("max-bandwidth", self.max_bandwidth);
        put("downtime-limit", self.downtime_limit);
        qmp.execute("migrate-set-parameters", Value::Object(parameters))
            .await?;
        Ok(())
    }
}

/// Lets QEMU slow the guest down so that its RAM converges, or stops that: also while a migration runs.
///
/// # Errors
/// What QEMU said.
pub async fn throttle(qmp: &Qmp, on: bool) -> Result<(), QmpError> {
    set_capabilities(qmp, [(THROTTLE, on)].into_iter()).await
}

pub(super) async fn downtime_limit(qmp: &Qmp, milliseconds: u64) -> Result<(), QmpError> {
    let limit = json!({ "downtime-limit": milliseconds });
    qmp.execute("migrate-set-parameters", limit).await?;
    Ok(())
}

pub(crate) async fn set_capabilities(
    qmp: &Qmp,
    changes: impl Iterator<Item = (&str, bool)>,
) -> Result<(), QmpError> {
    let changes: Vec<_> = changes
        .map(|(capability, state)| json!({ "capability": capability, "state": state }))
        .collect();
    if changes.is_empty() {
        return Ok(());
    }
    let all = json!({ "capabilities": changes });
    qmp.execute("migrate-set-capabilities", all).await?;
    Ok(())
}
