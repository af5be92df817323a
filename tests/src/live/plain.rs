//! A live migration by QEMU alone, from one QEMU to another on this machine.
//!
//! Owns the order of commands: capabilities, the stream over a unix socket, the disk copied while the guest
//! stands still before the switchover, `cont`. It is what the lab's own guests and measures are tried on, and
//! what rivals are built from. Promises that the target runs only after the source's QEMU has completed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::SeekFrom;
use serde_json::{Value, json};

use super::monitor::Monitor;
use crate::usage::wait_until;

/// How long each state may take.
const LIMIT: Duration = Duration::from_secs(120);
const CHUNK: usize = 64 << 10;

/// Moves a guest from one QEMU to another, its RAM at this rate (0 is unlimited); `copy_disks` is called while it stands still.
///
/// # Errors
/// QEMU's own words, or the state that was not reached in time.
pub fn migrate(
    source: &Monitor,
    target: &Monitor,
    stream: &Path,
    bytes_per_s: u64,
    copy_disks: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let uri = format!("unix:{}", stream.display());
    capabilities(target, &["events", "late-block-activate"])?;
    target.execute("migrate-incoming", json!({"uri": uri}))?;
    capabilities(source, &["events", "pause-before-switchover"])?;
    source.execute("migrate-set-parameters", json!({"max-bandwidth": bytes_per_s}))?;
    source.execute("migrate", json!({"uri": uri}))?;
    wait_status(source, "pre-switchover", LIMIT)?;
    copy_disks()?;
    source.execute("migrate-continue", json!({"state": "pre-switchover"}))?;
    wait_status(source, "completed", LIMIT)?;
    wait_status(target, "completed", LIMIT)?;
    target.execute("cont", Value::Null)?;
    Ok(())
}

pub(super) fn capabilities(monitor: &Monitor, names: &[&str]) -> io::Result<()> {
    let list: Vec<_> = names
        .iter()
        .map(|name| json!({"capability": name, "state": true}))
        .collect();
    monitor
        .execute("migrate-set-capabilities", json!({"capabilities": list}))
        .map(|_| ())
}

/// Whether the migration has reached this state, or never will.
pub(super) fn reached(monitor: &Monitor, wanted: &str) -> Option<io::Result<()>> {
    let info = match monitor.execute("query-migrate", Value::Null) {
        Ok(info) => info,
        Err(error) => return Some(Err(error)),
    };
    match info["status"].as_str().unwrap_or_default() {
        status if status == wanted => Some(Ok(())),
        status @ ("failed" | "cancelled") => {
            let reason = info["error-desc"].as_str().unwrap_or("QEMU gives no reason");
            Some(Err(io::Error::other(format!("the migration {status}: {reason}"))))
        }
        _ => None,
    }
}

pub(super) fn wait_status(monitor: &Monitor, wanted: &str, limit: Duration) -> io::Result<()> {
    wait_until(limit, || reached(monitor, wanted)).unwrap_or_else(|| {
        Err(io::Error::other(format!(
            "the migration did not reach '{wanted}'"
        )))
    })
}

/// Makes `to` (of the same size) equal to `from`: writes what differs, and gives how many bytes that was.
/// Where `from` has a hole, `to` must have zeros already.
///
/// # Errors
/// When a file cannot be read or written.
pub fn copy_changes(from: &Path, to: &Path) -> io::Result<u64> {
    let (from, to) = (
        File::open(from)?,
        File::options().read(true).write(true).open(to)?,
    );
    let end = from.metadata()?.len();
    let (mut at, mut written) = (0, 0);
    let (mut one, mut two) = (vec![0; CHUNK], vec![0; CHUNK]);
    while at < end {
        at = match rustix::fs::seek(&from, SeekFrom::Data(at)) {
            Ok(data) => data / CHUNK as u64 * CHUNK as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let length = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
        from.read_exact_at(&mut one[..length], at)?;
        to.read_exact_at(&mut two[..length], at)?;
        if one[..length] != two[..length] {
            to.write_all_at(&one[..length], at)?;
            written += length as u64;
        }
        at += length as u64;
    }
    to.sync_data()?;
    Ok(written)
}
