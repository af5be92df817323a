//! Read-only media in a VM's drives: taken out for a move, and put back where the VM stays.
//!
//! Owns QEMU's commands for it. Leaves the rule (copy, eject, map) to the session, and writing down what was taken out. Promises
//! that a medium which the guest holds is never torn out, and that putting back does nothing where something is in the drive.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::facts::DiskFacts;
use crate::vm::qmp::{Qmp, QmpError};

/// A medium and its drive. Serialisable: an agent that comes back after a crash puts it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Medium {
    /// The drive, as people call it.
    pub drive: String,
    /// The device's QOM path.
    device: String,
    node: String,
    file: String,
    format: String,
}

impl Medium {
    /// As it is found in a drive.
    pub fn of(disk: &DiskFacts) -> Self {
        Self {
            drive: disk.name.clone(),
            device: disk.device.clone(),
            node: disk.node.clone(),
            file: disk.file.clone(),
            format: disk.format.clone(),
        }
    }

    /// Takes it out. QEMU asks a guest that holds it, and refuses until the guest lets go.
    ///
    /// # Errors
    /// What QEMU said.
    pub async fn eject(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let asked = json!({ "id": self.device, "force": false });
        qmp.execute("eject", asked).await.map(drop)
    }

    /// Puts it back, unless something is in the drive.
    ///
    /// # Errors
    /// What QEMU said.
    pub async fn insert(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let blocks: Vec<Value> = qmp.query("query-block").await?;
        let is_ours = |block: &&Value| {
            let told = block["qdev"].as_str().unwrap_or_default();
            told == self.device || self.device.strip_prefix("/machine/peripheral/") == Some(told)
        };
        if blocks
            .iter()
            .find(is_ours)
            .is_none_or(|block| block.get("inserted").is_some())
        {
            return Ok(());
        }
        let nodes: Vec<Value> = qmp
            .query_with("query-named-block-nodes", json!({ "flat": true }))
            .await?;
        // What came by -blockdev is still there; what came by -drive went with the medium.
        if nodes.iter().any(|node| node["node-name"] == *self.node) {
            let asked = json!({ "id": self.device, "node-name": self.node });
            qmp.execute("blockdev-insert-medium", asked).await?;
            return qmp
                .execute("blockdev-close-tray", json!({ "id": self.device }))
                .await
                .map(drop);
        }
        let asked = json!({
            "id": self.device, "filename": self.file, "format": self.format, "read-only-mode": "read-only",
        });
        qmp.execute("blockdev-change-medium", asked).await.map(drop)
    }
}
