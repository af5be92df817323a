//! The sockets of our NBD connections, held by QEMU too.
//!
//! Some versions of QEMU abort, and the VM with them, when an NBD client leaves while the disk runs in an I/O thread: the
//! server tidies up in that thread and asserts that it is the main one. A client that QEMU itself ends, by removing the
//! export, is tidied up in the main thread. So each socket is handed to QEMU before it is connected: as long as QEMU holds
//! it, neither our goodbye nor our death can be noticed, and after the export's removal QEMU closes it.

use std::os::fd::OwnedFd;

use serde_json::json;

use super::error::RoundsError;
use crate::disk::image::nbd::unconnected;
use crate::vm::PREFIX;
use crate::vm::qmp::Qmp;

/// Most sockets at a time; QEMU's limit of open files is 1,024 where nobody raised it.
pub(super) const SOCKETS_MAX: u32 = 256;

/// Makes `count` sockets that QEMU knows by the numbers from `first` on.
pub(super) async fn open(qmp: &Qmp, first: u32, count: u32) -> Result<Vec<OwnedFd>, RoundsError> {
    let mut sockets = Vec::new();
    for number in first..first.saturating_add(count) {
        let socket = unconnected().map_err(RoundsError::socket)?;
        let theirs = socket.try_clone().map_err(RoundsError::socket)?;
        qmp.send_fd(&name(number), theirs).await?;
        sockets.push(socket);
    }
    Ok(sockets)
}

/// Lets QEMU close those it has, from number 0 on. Only after their exports are gone.
pub(super) async fn close(qmp: &Qmp) -> Result<(), RoundsError> {
    for number in 0..SOCKETS_MAX {
        match qmp.execute("closefd", json!({ "fdname": name(number) })).await {
            Err(error) if error.is_refusal() => return Ok(()), // There are no more.
            other => drop(other?),
        }
    }
    Ok(())
}

fn name(number: u32) -> String {
    format!("{PREFIX}nbd-{number}")
}
