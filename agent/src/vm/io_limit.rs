//! Holding a guest's disk writes down, and letting them go exactly as they were.
//!
//! Owns QEMU's I/O limits of a drive (`block_set_io_throttle`): read, lowered, put back. Leaves when and how far to `converge`, and
//! writing the old limits down before they are changed to the session. Promises that a limit is only ever lowered for writes, that
//! those of others (reads, operations) stay as they are, and that putting back can be repeated.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::vm::qmp::wire::printable;
use crate::vm::qmp::{Qmp, QmpError};

/// What QEMU always wants to be told.
const RATES: [&str; 6] = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
/// What it may be told besides: bursts, and what counts as one operation.
const BURSTS: [&str; 13] = [
    "bps_max",
    "bps_rd_max",
    "bps_wr_max",
    "iops_max",
    "iops_rd_max",
    "iops_wr_max",
    "bps_max_length",
    "bps_rd_max_length",
    "bps_wr_max_length",
    "iops_max_length",
    "iops_rd_max_length",
    "iops_wr_max_length",
    "iops_size",
];

/// A drive's limits as they were. Small and serialisable, so that an agent that comes back after a crash can put them back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedLimits {
    /// "id" for a device by its id or QOM path, "device" for a drive by its own name.
    by: String,
    name: String,
    /// Drives of one group share its limits.
    group: Option<String>,
    values: BTreeMap<String, u64>,
}

/// Reads the limits of the drives whose root nodes these are; in their order.
///
/// # Errors
/// What QEMU or the connection said; a node that no drive has.
pub async fn read(qmp: &Qmp, nodes: &[String]) -> Result<Vec<SavedLimits>, QmpError> {
    let blocks: Vec<Value> = qmp.query("query-block").await?;
    let saved = nodes.iter().map(|node| {
        let mut with = blocks
            .iter()
            .filter(|block| block["inserted"]["node-name"] == **node);
        with.find_map(SavedLimits::of)
            .ok_or_else(|| QmpError::answer("query-block", format!("no drive has the node {node}")))
    });
    saved.collect()
}

/// Holds each drive's writes to so many bytes per second; one that is slower already stays so.
///
/// # Errors
/// What QEMU said; some drives may be held by then.
pub async fn hold(qmp: &Qmp, saved: &[SavedLimits], bytes_per_s: u64) -> Result<(), QmpError> {
    for drive in saved {
        let members = saved
            .iter()
            .filter(|other| drive.group.is_some() && other.group == drive.group);
        let share = bytes_per_s.saturating_mul(members.count().max(1) as u64);
        qmp.execute(
            "block_set_io_throttle",
            drive.arguments(&lowered(&drive.values, share)),
        )
        .await?;
    }
    Ok(())
}

/// Puts every limit back as it was.
///
/// # Errors
/// The first that QEMU refused, after all were tried.
pub async fn put_back(qmp: &Qmp, saved: &[SavedLimits]) -> Result<(), QmpError> {
    let mut failed = None;
    for drive in saved {
        let put = qmp
            .execute("block_set_io_throttle", drive.arguments(&drive.values))
            .await;
        failed = failed.or(put.err());
    }
    failed.map_or(Ok(()), Err)
}

impl SavedLimits {
    fn of(block: &Value) -> Option<Self> {
        let inserted = &block["inserted"];
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        // The short id of a virtio disk does not lead to its backend; what QEMU tells here does.
        let named = text(&block["qdev"]).map(|id| ("id", id));
        let (by, name) = named.or_else(|| Some(("device", text(&block["device"])?)))?;
        let known = RATES.iter().chain(&BURSTS);
        let values = known.filter_map(|key| Some(((*key).to_owned(), inserted[*key].as_u64()?)));
        Some(Self {
            by: by.to_owned(),
            name,
            group: text(&inserted["group"]).map(|group| printable(&group)),
            values: values.collect(),
        })
    }

    fn arguments(&self, values: &BTreeMap<String, u64>) -> Value {
        let mut arguments = Map::new();
        arguments.insert(self.by.clone(), json!(self.name));
        for rate in RATES {
            arguments.insert(rate.to_owned(), json!(values.get(rate).copied().unwrap_or(0)));
        }
        for burst in BURSTS {
            if let Some(value) = values.get(burst) {
                arguments.insert(burst.to_owned(), json!(value));
            }
        }
        if let Some(group) = &self.group {
            arguments.insert("group".to_owned(), json!(group));
        }
        Value::Object(arguments)
    }
}

/// The same limits with writes held to `limit`. QEMU knows either one limit for both directions or one for each: where there is one
/// for both, it is that which is lowered. Bursts of what is lowered would undo it.
fn lowered(values: &BTreeMap<String, u64>, limit: u64) -> BTreeMap<String, u64> {
    let mut lowered = values.clone();
    let both = values.get("bps").copied().unwrap_or(0) > 0;
    let key = if both { "bps" } else { "bps_wr" };
    let was = values.get(key).copied().unwrap_or(0);
    // 0 is no limit, to QEMU.
    let limit = limit.max(1);
    if was == 0 || limit < was {
        lowered.insert(key.to_owned(), limit);
        lowered.remove(&format!("{key}_max"));
        lowered.remove(&format!("{key}_max_length"));
    }
    lowered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), *value))
            .collect()
    }

    #[test]
    fn only_writes_are_lowered_and_never_raised() {
        assert_eq!(lowered(&values(&[]), 1000), values(&[("bps_wr", 1000)]));
        assert_eq!(
            lowered(&values(&[("bps_rd", 5), ("iops", 7), ("bps_wr", 0)]), 1000),
            values(&[("bps_rd", 5), ("iops", 7), ("bps_wr", 1000)])
        );
        let slow = values(&[("bps_wr", 10), ("bps_wr_max", 20), ("bps_wr_max_length", 2)]);
        assert_eq!(lowered(&slow, 1000), slow);
        assert_eq!(lowered(&slow, 0), values(&[("bps_wr", 1)]));
        let both = values(&[("bps", 4000), ("bps_max", 8000), ("bps_wr", 0)]);
        assert_eq!(lowered(&both, 1000), values(&[("bps", 1000), ("bps_wr", 0)]));
    }

    #[test]
    fn a_drive_is_told_by_what_qemu_calls_it() {
        let saved = |block: Value| SavedLimits::of(&block);
        let virtio = json!({ "device": "", "qdev": "/machine/peripheral/d/virtio-backend", "inserted": { "bps": 0, "group": "g" } });
        let saved_virtio = saved(virtio).unwrap();
        assert_eq!(
            (saved_virtio.by.as_str(), saved_virtio.group.as_deref()),
            ("id", Some("g"))
        );
        let arguments = saved_virtio.arguments(&saved_virtio.values);
        assert_eq!(arguments["iops_wr"], 0);
        assert_eq!(arguments["group"], "g");
        assert!(arguments.get("bps_max").is_none());
        assert_eq!(
            saved(json!({ "device": "pflash1", "inserted": {} })).unwrap().by,
            "device"
        );
        assert_eq!(saved(json!({ "inserted": {} })), None);
    }
}
