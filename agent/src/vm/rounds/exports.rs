//! Read-only NBD exports: added, listed, removed for good.
//!
//! Promises: a removal returns only when QEMU has let go of the export, so that its bitmap is free.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;

use super::RoundExport;
use super::error::RoundsError;
use crate::vm::qmp::{Qmp, QmpError, Watch};

/// How long QEMU may take to let go: requests under way have to end.
const REMOVE_LIMIT: Duration = Duration::from_secs(30);
/// After this time nobody reads what QEMU still wants to write.
const STUCK: Duration = Duration::from_secs(1);

/// An export of any owner, as QEMU tells it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExportInfo {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub node_name: String,
    #[serde(default)]
    pub shutting_down: bool,
}

/// All block exports of this QEMU.
pub async fn exports(qmp: &Qmp) -> Result<Vec<ExportInfo>, QmpError> {
    qmp.query("query-block-exports").await
}

pub(super) async fn add(qmp: &Qmp, export: &RoundExport) -> Result<(), RoundsError> {
    let mut arguments = json!({
        "type": "nbd",
        "id": export.export,
        "name": export.export,
        "node-name": export.node,
        "writable": false,
    });
    if let Some(bitmap) = &export.bitmap {
        arguments["bitmaps"] = json!([bitmap.name]);
    }
    qmp.execute("block-export-add", arguments).await?;
    Ok(())
}

/// Removes the exports `ids`, and waits until they are gone. Those that are gone already are fine.
pub(super) async fn remove(qmp: &Qmp, ids: &[&str]) -> Result<(), RoundsError> {
    if ids.is_empty() {
        return Ok(());
    }
    let mut watch = Watch::start(qmp, REMOVE_LIMIT);
    for id in ids {
        match qmp
            .execute("block-export-del", json!({ "id": id, "mode": "hard" }))
            .await
        {
            // Gone, or going: the list below says which.
            Err(error) if error.is_refusal() => {}
            other => drop(other?),
        }
    }
    let told = Instant::now();
    let mut closed = false;
    loop {
        let left = exports(qmp).await?;
        if !left.iter().any(|export| ids.contains(&export.id.as_str())) {
            return Ok(());
        }
        // An answer to an agent that died fills a socket whose other end only QEMU holds: its writer wakes when that is closed.
        if !closed && told.elapsed() > STUCK {
            closed = true;
            super::sockets::close(qmp).await?;
        }
        watch.again("the exports are gone").await?;
    }
}
