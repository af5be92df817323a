//! Finding and removing what a crashed agent left in a QEMU.
//!
//! Everything of ours is known by its name. Order matters: an export keeps its bitmap busy.

use std::path::Path;

use super::bitmaps::{bitmaps, remove_bitmaps};
use super::error::RoundsError;
use super::exports::{self, exports};
use super::server;
use crate::vm::PREFIX;
use crate::vm::qmp::Qmp;

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub exports: Vec<String>,
    /// Node and bitmap.
    pub bitmaps: Vec<(String, String)>,
    /// Whether our NBD server was stopped.
    pub server: bool,
}

impl Swept {
    /// Whether there was nothing.
    pub const fn is_empty(&self) -> bool {
        self.exports.is_empty() && self.bitmaps.is_empty() && !self.server
    }
}

/// Removes all of Longhaul's exports and bitmaps from this QEMU but those bitmaps whose names `keep` knows; also the NBD
/// server, where it listens at `socket` and serves nobody else.
///
/// # Errors
/// What QEMU refused, after as much as possible was removed.
pub async fn sweep(qmp: &Qmp, socket: &Path, keep: impl Fn(&str) -> bool) -> Result<Swept, RoundsError> {
    let mut swept = remove(qmp, PREFIX, keep).await?;
    if server::is_server_of(qmp, socket).await? {
        swept.server = server::stop_unless_used(qmp).await?;
    }
    Ok(swept)
}

/// The same for one job's names, without the server.
pub(super) async fn of_job(qmp: &Qmp, prefix: &str) -> Result<Swept, RoundsError> {
    remove(qmp, prefix, |_| false).await
}

async fn remove(qmp: &Qmp, prefix: &str, keep: impl Fn(&str) -> bool) -> Result<Swept, RoundsError> {
    let mut swept = Swept::default();
    let ours = exports(qmp).await?.into_iter().map(|export| export.id);
    swept.exports = ours.filter(|id| id.starts_with(prefix)).collect();
    let ids: Vec<_> = swept.exports.iter().map(String::as_str).collect();
    exports::remove(qmp, &ids).await?;
    super::sockets::close(qmp).await?;
    let mut failed = None;
    for bitmap in bitmaps(qmp).await? {
        if !bitmap.name.starts_with(prefix) || keep(&bitmap.name) {
            continue;
        }
        let node = std::slice::from_ref(&bitmap.node);
        match remove_bitmaps(qmp, node, &bitmap.name).await {
            Ok(()) => swept.bitmaps.push((bitmap.node, bitmap.name)),
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(swept), Err)
}
