//! The same migration by QEMU alone over the emulated link: the measure that Longhaul is held against.
//!
//! Owns the commands: the disks mirrored to the incoming QEMU's NBD server, then RAM over TCP with a pause
//! before the switchover in which the mirrors end. Leaves alone measuring, which is the same for all. It
//! speaks the operator program's lines, so that nobody else needs to know who migrates. Promises to run the target only after the mirrors
//! have ended and the NBD server is gone, and that nothing moves any more once its last line is said.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use serde_json::{Value, json};

use super::monitor::Monitor;
use super::plain::{capabilities, reached, wait_status};
use crate::usage::wait_until;

const RAM_PORT: u16 = 7601;
const DISK_PORT: u16 = 7602;
/// How long QEMU may take to end a migration that was cancelled.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// How QEMU sends RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum RamMode {
    #[default]
    Plain,
    /// With a cache of the guest's size
    Xbzrle,
    /// Four channels, zstd
    MultifdZstd,
}

/// What is to be moved.
#[derive(Clone, Debug)]
pub struct Rival {
    pub source: Monitor,
    pub target: Monitor,
    /// The target's address on the link.
    pub address: Ipv4Addr,
    pub disks: usize,
    pub ram_mib: u64,
    pub mode: RamMode,
    pub downtime_ms: u64,
    pub limit: Duration,
    /// Set where nobody waits for it any longer. Past its switchover it goes through all the same: then the guest belongs to the target.
    pub given_up: Arc<AtomicBool>,
}

/// Makes an empty image of the source's size for the target.
///
/// # Errors
/// When qemu-img cannot be run or refuses.
pub fn make_image(source: &Path, target: &Path, format: &str) -> io::Result<()> {
    let size = std::fs::metadata(source)?.len();
    if format == "raw" {
        return std::fs::File::create(target)?.set_len(size);
    }
    let info = std::process::Command::new("qemu-img")
        .args(["info", "--output=json"])
        .arg(source)
        .output()?;
    let info: Value = serde_json::from_slice(&info.stdout)?;
    let size = info["virtual-size"].as_u64().unwrap_or(size);
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .arg(target)
        .arg(size.to_string())
        .status()?;
    made.success()
        .then_some(())
        .ok_or_else(|| io::Error::other("qemu-img cannot make the target's image"))
}

impl Rival {
    /// Migrates, and says on the way and at the end what the operator program would say.
    pub fn run(&self, say: &SyncSender<String>) {
        let report = match self.migrate(say) {
            Ok(job) => json!({"state": "completed", "report": job}),
            Err(error) => {
                self.cancel();
                json!({"state": "failed", "message": error.to_string()})
            }
        };
        let _ = say.send(json!({"event": "report", "job": report}).to_string());
    }

    /// Ends a migration that is under way, and waits for its end: the guest must not leave after somebody has looked where it runs.
    fn cancel(&self) {
        let _ = self.source.execute("migrate_cancel", Value::Null);
        wait_until(CANCEL_LIMIT, || {
            let info = self.source.execute("query-migrate", Value::Null).ok()?;
            let over = ["cancelled", "failed", "completed"];
            info["status"]
                .as_str()
                .is_none_or(|status| over.contains(&status))
                .then_some(())
        });
    }

    /// Waits as long as the contestant is waited for.
    fn wait<T>(&self, missed: &str, mut look: impl FnMut() -> Option<T>) -> io::Result<T> {
        let given_up = || self.given_up.load(Ordering::Relaxed);
        let seen = wait_until(self.limit, || match look() {
            Some(seen) => Some(Some(seen)),
            None => given_up().then_some(None),
        });
        seen.flatten().ok_or_else(|| io::Error::other(missed.to_owned()))
    }

    fn migrate(&self, say: &SyncSender<String>) -> io::Result<Value> {
        let phase = |name: &str| {
            let _ = say.send(json!({"event": "progress", "progress": {"phase": name}}).to_string());
        };
        phase("disk");
        let all = ["events", "late-block-activate"];
        capabilities(&self.target, &[&all[..], self.extra()].concat())?;
        self.parameters(&self.target)?;
        let server = json!({"type": "inet", "data": {"host": "0.0.0.0", "port": DISK_PORT.to_string()}});
        self.target.execute("nbd-server-start", json!({"addr": server}))?;
        for number in 0..self.disks {
            self.mirror(number)?;
        }
        for number in 0..self.disks {
            self.wait_ready(number)?;
        }
        phase("ram");
        let host = self.address;
        let listen = format!("tcp:0.0.0.0:{RAM_PORT}");
        self.target.execute("migrate-incoming", json!({"uri": listen}))?;
        let all = ["events", "pause-before-switchover"];
        capabilities(&self.source, &[&all[..], self.extra()].concat())?;
        self.parameters(&self.source)?;
        let limits = json!({"max-bandwidth": 0, "downtime-limit": self.downtime_ms});
        self.source.execute("migrate-set-parameters", limits)?;
        self.source
            .execute("migrate", json!({"uri": format!("tcp:{host}:{RAM_PORT}")}))?;
        self.wait("the guest's memory never was small enough", || {
            reached(&self.source, "pre-switchover")
        })??;
        for number in 0..self.disks {
            self.end_mirror(number)?;
        }
        self.source
            .execute("migrate-continue", json!({"state": "pre-switchover"}))?;
        wait_status(&self.source, "completed", self.limit)?;
        wait_status(&self.target, "completed", self.limit)?;
        self.target.execute("nbd-server-stop", Value::Null)?;
        self.target.execute("cont", Value::Null)?;
        let ram = self.source.execute("query-migrate", Value::Null)?;
        Ok(
            json!({"ok": true, "rounds": ram["ram"]["dirty-sync-count"], "downtime_ms": ram["downtime"], "qemu": ram}),
        )
    }

    fn extra(&self) -> &'static [&'static str] {
        match self.mode {
            RamMode::Plain => &[],
            RamMode::Xbzrle => &["xbzrle"],
            RamMode::MultifdZstd => &["multifd"],
        }
    }

    fn parameters(&self, monitor: &Monitor) -> io::Result<()> {
        let parameters = match self.mode {
            RamMode::Plain => return Ok(()),
            RamMode::Xbzrle => json!({"xbzrle-cache-size": self.ram_mib << 20}),
            RamMode::MultifdZstd => json!({"multifd-channels": 4, "multifd-compression": "zstd"}),
        };
        monitor.execute("migrate-set-parameters", parameters).map(|_| ())
    }

    fn mirror(&self, number: usize) -> io::Result<()> {
        let (node, name) = (format!("node{number}"), format!("copy{number}"));
        let export = json!({"type": "nbd", "id": name, "node-name": node, "name": name, "writable": true});
        self.target.execute("block-export-add", export)?;
        let server = json!({"type": "inet", "host": self.address.to_string(), "port": DISK_PORT.to_string()});
        let remote = json!({"driver": "raw", "node-name": name, "discard": "unmap", "detect-zeroes": "unmap",
            "file": {"driver": "nbd", "server": server, "export": name}});
        self.source.execute("blockdev-add", remote)?;
        let job =
            json!({"job-id": format!("mirror{number}"), "device": node, "target": name, "sync": "full"});
        self.source.execute("blockdev-mirror", job).map(|_| ())
    }

    fn wait_ready(&self, number: usize) -> io::Result<()> {
        let name = format!("mirror{number}");
        let missed = format!("{name} did not become ready");
        let ready = self.wait(&missed, || {
            let jobs = self.source.execute("query-block-jobs", Value::Null).ok()?;
            let jobs = jobs.as_array()?;
            let job = jobs.iter().find(|job| job["device"] == name.as_str());
            // One that is gone has failed.
            job.map_or(Some(false), |job| (job["ready"] == true).then_some(true))
        })?;
        ready.then_some(()).ok_or_else(|| io::Error::other(missed))
    }

    fn end_mirror(&self, number: usize) -> io::Result<()> {
        let name = format!("mirror{number}");
        self.source.execute("block-job-cancel", json!({"device": name}))?;
        let ended = wait_until(self.limit, || {
            let jobs = self.source.execute("query-block-jobs", Value::Null).ok()?;
            let gone = jobs.as_array()?.iter().all(|job| job["device"] != name.as_str());
            gone.then_some(())
        });
        ended.ok_or_else(|| io::Error::other(format!("{name} did not end")))?;
        let node = json!({"node-name": format!("copy{number}")});
        self.source.execute("blockdev-del", node).map(|_| ())
    }
}
