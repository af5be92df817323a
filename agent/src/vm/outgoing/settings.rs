//! QEMU's migration settings: what is changed for a move, and put back.
//!
//! Owns capabilities and parameters at the source. The saved ones are small and serialisable, so that an agent that comes
//! back after a crash can put them back as well.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::OutgoingError;
use crate::vm::qmp::wire::printable;
use crate::vm::qmp::{Qmp, QmpError};

/// Capabilities that have to be on. All others have to be off: each changes the stream, needs a way back for bytes or frees
/// memory that the VM still needs if it runs on.
const ON: [&str; 2] = ["events", "pause-before-switchover"];
/// On where the config allows that the guest is slowed down. It cannot be switched while RAM flows, so that what it may do
/// is set by its parameters.
const THROTTLE: &str = "auto-converge";
/// Parameters that are changed.
const PARAMETERS: [&str; 5] = [
    "max-bandwidth",
    "downtime-limit",
    "cpu-throttle-initial",
    "cpu-throttle-increment",
    "max-cpu-throttle",
];

/// Settings as they were before the move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    capabilities: BTreeMap<String, bool>,
    parameters: BTreeMap<String, u64>,
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

impl Saved {
    /// Reads them.
    ///
    /// # Errors
    /// [`OutgoingError::Tls`] where QEMU would encrypt the stream itself; [`OutgoingError::Capability`] where it is too old.
    pub async fn read(qmp: &Qmp) -> Result<Self, OutgoingError> {
        let capabilities: Vec<Capability> = qmp.query("query-migrate-capabilities").await?;
        let told: Value = qmp.query("query-migrate-parameters").await?;
        if let Some(tls) = told["tls-creds"].as_str().filter(|creds| !creds.is_empty()) {
            return Err(OutgoingError::Tls(printable(tls)));
        }
        let parameter = |name: &str| Some((name.to_owned(), told[name].as_u64()?));
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
            parameters: PARAMETERS.into_iter().filter_map(parameter).collect(),
            was_running: qmp.query::<Status>("query-status").await?.running,
        })
    }

    /// Whether the VM ran when the move began.
    pub const fn was_running(&self) -> bool {
        self.was_running
    }

    /// Sets what a move needs.
    pub(super) async fn prepare(
        &self,
        qmp: &Qmp,
        downtime_limit: u64,
        may_throttle: bool,
    ) -> Result<(), QmpError> {
        let wanted = self.capabilities.iter().map(|(name, &was)| {
            let wanted = ON.contains(&name.as_str()) || (may_throttle && name == THROTTLE);
            (name.as_str(), was, wanted)
        });
        let changed = wanted.filter(|(_, was, wanted)| was != wanted);
        set_capabilities(qmp, changed.map(|(name, _, wanted)| (name, wanted))).await?;
        // 0 is no limit: pacing is the agent's, which reads no faster than the target takes.
        let parameters = json!({ "max-bandwidth": 0, "downtime-limit": downtime_limit });
        qmp.execute("migrate-set-parameters", parameters).await?;
        if may_throttle {
            throttle(qmp, None).await?;
        }
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
        let parameters = serde_json::to_value(&self.parameters);
        let parameters =
            parameters.map_err(|error| QmpError::answer("query-migrate-parameters", error.to_string()))?;
        qmp.execute("migrate-set-parameters", parameters).await?;
        Ok(())
    }
}

/// Lets QEMU take up to `most` percent (1 to 99) of the guest's CPU time so that its RAM converges; None: nothing worth
/// mentioning (1 %, the least that QEMU knows). Works while RAM flows, where the move was started with throttling allowed;
/// a guest that is slowed down already is let go at the next pass. The migration's end or cancel always ends it.
///
/// # Errors
/// What QEMU said.
pub async fn throttle(qmp: &Qmp, most: Option<u8>) -> Result<(), QmpError> {
    let most = most.unwrap_or(1).clamp(1, 99);
    let parameters = json!({
        "cpu-throttle-initial": most.min(20),
        "cpu-throttle-increment": most.min(10),
        "max-cpu-throttle": most,
    });
    qmp.execute("migrate-set-parameters", parameters).await?;
    Ok(())
}

/// 0 is no limit, and what is less than ten bytes a second would be rounded to that.
pub(super) async fn crawl(qmp: &Qmp, crawl: bool) -> Result<(), QmpError> {
    let limit = json!({ "max-bandwidth": if crawl { 100 } else { 0 } });
    qmp.execute("migrate-set-parameters", limit).await?;
    Ok(())
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
