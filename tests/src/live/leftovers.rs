//! What a job should have cleared up.
//!
//! Owns the list of places to look at: the source's QEMU (bitmaps, exports, nodes, migration settings), folders of
//! both agents, the target's QEMU. Leaves alone when it is looked. Promises to name whatever it finds; a partial copy
//! of a job that only failed is none: the job may be resumed.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::monitor::Monitor;
use super::settings;
use super::stage::Stage;
use super::verdict::LiveReport;
use crate::lab::End;

/// Everything that Longhaul adds to a QEMU is called so.
const PREFIX: &str = "longhaul-";
/// What a QEMU notes for the way back stays in it.
const SINCE: &str = "longhaul-since-";

/// QEMU's migration capabilities and parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QemuSettings {
    capabilities: Value,
    parameters: Value,
}

impl QemuSettings {
    /// As they are now; nothing where QEMU does not answer.
    pub fn of(monitor: &Monitor) -> Self {
        let ask = |command| monitor.execute(command, Value::Null).unwrap_or_default();
        Self {
            capabilities: ask("query-migrate-capabilities"),
            parameters: ask("query-migrate-parameters"),
        }
    }

    fn differences(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if let (Value::Array(before), Value::Array(now)) = (&self.capabilities, &now.capabilities) {
            let changed = now.iter().filter(|capability| !before.contains(capability));
            found.extend(changed.map(|capability| format!("migration capability {capability}")));
        }
        if let (Value::Object(before), Value::Object(now)) = (&self.parameters, &now.parameters) {
            let changed = now
                .iter()
                .filter(|(name, value)| before.get(*name) != Some(*value));
            found.extend(changed.map(|(name, value)| format!("migration parameter {name} = {value}")));
        }
        found
    }
}

/// Looks everywhere.
pub fn find(stage: &Stage, report: &LiveReport, before: &QemuSettings) -> Vec<String> {
    let mut found = Vec::new();
    let cause = report.report.job["cause"].as_str().unwrap_or_default();
    let cancelled = cause.starts_with("the job is cancelled");
    let directory = stage.lab.directory();
    // A job that failed can be resumed: what it needs for that stays.
    let over = cancelled || report.report.job["ok"] == Value::Bool(true);
    if report.owner == "source" && over {
        found.extend(in_qemu(stage.monitor(End::Source)));
        let now = QemuSettings::of(stage.monitor(End::Source));
        found.extend(before.differences(&now));
    }
    if report.owner == "source" && cancelled {
        found.extend(entries(&disks(directory), |_| true));
        if stage.monitor(End::Target).is_connected() {
            found.push("the target's QEMU runs".to_owned());
        }
    }
    if report.owner == "target" {
        found.extend(in_qemu(stage.monitor(End::Target)));
        // The second is the store of firmware variables, where the guest has one.
        let own = [0, 1].map(|disk| settings::disk(directory, End::Target, disk));
        let is_own = |path: &Path| own.iter().any(|own| path == own) && !path.is_symlink();
        found.extend(entries(&disks(directory), |path| !is_own(path)));
        if stage.monitor(End::Source).is_connected() {
            found.push("the source's QEMU runs".to_owned());
        }
    }
    if over {
        let socket = |path: &Path| name(path).starts_with("nbd-");
        found.extend(entries(&settings::qmp_folder(directory, End::Source), socket));
    }
    found
}

fn disks(directory: &Path) -> std::path::PathBuf {
    let disk = settings::disk(directory, End::Target, 0);
    disk.parent().map(Path::to_path_buf).unwrap_or_default()
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Files of a folder.
fn entries(folder: &Path, counts: impl Fn(&Path) -> bool) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path()).filter(|path| counts(path));
    paths.map(|path| format!("file {}", path.display())).collect()
}

/// Bitmaps, exports and nodes of ours.
fn in_qemu(monitor: &Monitor) -> Vec<String> {
    let ask = |command| match monitor.execute(command, Value::Null) {
        Ok(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    let ours = |value: &Value| {
        let name = value.as_str().filter(|name| name.starts_with(PREFIX));
        name.map(str::to_owned)
    };
    let mut found = Vec::new();
    for node in ask("query-named-block-nodes") {
        found.extend(ours(&node["node-name"]).map(|name| format!("node {name}")));
        let bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
        found.extend(
            bitmaps
                .filter_map(|bitmap| ours(&bitmap["name"]))
                .filter(|name| !name.starts_with(SINCE))
                .map(|name| format!("bitmap {name}")),
        );
    }
    for export in ask("query-block-exports") {
        found.extend(ours(&export["id"]).map(|name| format!("export {name}")));
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_changed_setting_is_named_and_a_silent_qemu_is_none() {
        let before = QemuSettings {
            capabilities: json!([{"capability": "events", "state": false}]),
            parameters: json!({"max-bandwidth": 1, "downtime-limit": 300}),
        };
        let mut now = before.clone();
        assert!(before.differences(&now).is_empty());
        now.parameters["max-bandwidth"] = json!(2);
        now.capabilities[0]["state"] = json!(true);
        assert_eq!(before.differences(&now).len(), 2);
        assert!(before.differences(&QemuSettings::default()).is_empty());
    }
}
