//! Dirty bitmaps of several disks at once: added, swapped, merged, removed, counted.
//!
//! Every change is one transaction over all disks: all or none.

use serde::Deserialize;
use serde_json::{Value, json};

use super::error::RoundsError;
use crate::vm::qmp::{Qmp, QmpError};

/// A bitmap of any owner, as QEMU tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    pub node: String,
    pub name: String,
    /// Dirty bytes.
    pub count: u64,
    /// Bytes per bit.
    pub granularity: u32,
    /// Whether writes are recorded now.
    pub recording: bool,
    /// Whether an export or a job uses it.
    pub busy: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Node {
    node_name: Option<String>,
    #[serde(default)]
    dirty_bitmaps: Vec<Bitmap>,
}

#[derive(Deserialize)]
struct Bitmap {
    name: Option<String>,
    count: u64,
    granularity: u32,
    #[serde(default)]
    recording: bool,
    #[serde(default)]
    busy: bool,
}

/// All named bitmaps of all block nodes.
pub async fn bitmaps(qmp: &Qmp) -> Result<Vec<BitmapInfo>, QmpError> {
    let nodes: Vec<Node> = qmp
        .query_with("query-named-block-nodes", json!({ "flat": true }))
        .await?;
    let mut all = Vec::new();
    for node in nodes {
        let Some(node_name) = node.node_name else {
            continue;
        };
        all.extend(node.dirty_bitmaps.into_iter().filter_map(|bitmap| {
            Some(BitmapInfo {
                node: node_name.clone(),
                name: bitmap.name?,
                count: bitmap.count,
                granularity: bitmap.granularity,
                recording: bitmap.recording,
                busy: bitmap.busy,
            })
        }));
    }
    Ok(all)
}

/// Switches a bitmap `name` on for each node, all at the same moment. Granularity in bytes.
pub async fn add_bitmaps(
    qmp: &Qmp,
    nodes: &[String],
    name: &str,
    granularity: u32,
) -> Result<(), RoundsError> {
    let adds = nodes.iter().map(|node| add(node, name, granularity));
    transact(qmp, adds.collect()).await
}

/// Removes the bitmap `name` of each node.
pub async fn remove_bitmaps(qmp: &Qmp, nodes: &[String], name: &str) -> Result<(), RoundsError> {
    let removes = nodes
        .iter()
        .map(|node| action("remove", &json!({ "node": node, "name": name })));
    transact(qmp, removes.collect()).await
}

/// From one moment on, `new` records instead of `old`.
pub(super) async fn swap(
    qmp: &Qmp,
    nodes: &[String],
    old: &str,
    new: &str,
    granularity: u32,
) -> Result<(), RoundsError> {
    let adds = nodes.iter().map(|node| add(node, new, granularity));
    let disables = nodes
        .iter()
        .map(|node| action("disable", &json!({ "node": node, "name": old })));
    transact(qmp, adds.chain(disables).collect()).await
}

/// What `from` holds is held by `into` too, and `from` is gone.
pub(super) async fn merge(qmp: &Qmp, nodes: &[String], from: &str, into: &str) -> Result<(), RoundsError> {
    // Not in one transaction with the removal: a removal that could not be undone would lose what a failed merge needs.
    add_up(qmp, nodes, from, into).await?;
    remove_bitmaps(qmp, nodes, from).await
}

/// What `from` holds is held by `into` too.
pub(super) async fn add_up(qmp: &Qmp, nodes: &[String], from: &str, into: &str) -> Result<(), RoundsError> {
    let merges = nodes.iter().map(|node| {
        let data = json!({ "node": node, "target": into, "bitmaps": [from] });
        action("merge", &data)
    });
    transact(qmp, merges.collect()).await
}

/// Empties the bitmap `name` of each node, all at the same moment.
pub(super) async fn clear(qmp: &Qmp, nodes: &[String], name: &str) -> Result<(), RoundsError> {
    let clears = nodes
        .iter()
        .map(|node| action("clear", &json!({ "node": node, "name": name })));
    transact(qmp, clears.collect()).await
}

fn add(node: &str, name: &str, granularity: u32) -> Value {
    let data = json!({ "node": node, "name": name, "granularity": granularity, "persistent": false });
    action("add", &data)
}

fn action(verb: &str, data: &Value) -> Value {
    json!({ "type": format!("block-dirty-bitmap-{verb}"), "data": data })
}

async fn transact(qmp: &Qmp, actions: Vec<Value>) -> Result<(), RoundsError> {
    if actions.is_empty() {
        return Ok(());
    }
    // It drains all I/O of the disks first, which takes as long as the slowest request under way.
    let limit = std::time::Duration::from_secs(30);
    qmp.execute_within("transaction", json!({ "actions": actions }), limit)
        .await?;
    Ok(())
}
