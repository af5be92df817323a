//! Reading a running VM's disks: dirty bitmaps, rounds, read-only NBD exports.
//!
//! Owns what is added to QEMU for it, all disks of the VM together: round 0's bitmap is on before the first byte is read;
//! each further round begins with a swap of all disks' bitmaps in one transaction, which QEMU carries out with all I/O
//! drained, so that a write lies wholly in one round or the next. Leaves the reading itself to `disk::image::LiveImage`.
//!
//! Connections are made through [`Rounds::sockets`] only: a client that leaves by itself makes some versions of QEMU abort.
//!
//! Promises: the bitmap of a round is removed only when the caller says that all of it is durable at the target
//! ([`Rounds::finish`]), or is merged into the next ([`Rounds::give_back`]); everything added is removed again
//! ([`Rounds::remove`]), and found by its name after a crash ([`sweep`]). Works while the VM is stopped in pre-switchover.

mod bitmaps;
mod error;
mod exports;
mod server;
mod since;
mod sockets;
mod sweep;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::disk::image::ShownBitmap;
use crate::vm::PREFIX;
use crate::vm::qmp::Qmp;

pub use self::bitmaps::{BitmapInfo, add_bitmaps, bitmaps, remove_bitmaps};
pub use self::error::RoundsError;
pub use self::exports::{ExportInfo, exports};
pub use self::server::NbdServer;
pub use self::since::{find_since, read_since, since_name, start_since};
pub use self::sweep::{Swept, sweep};

/// The most of a disk that one bit may stand for.
pub const GRANULARITY: u32 = 64 << 10;
/// The least: the guest's own block.
const GRANULARITY_MIN: u32 = 4 << 10;
/// A bitmap takes no more of QEMU's memory than this, unless its granularity is at its most.
const BITMAP_MAX: u64 = 8 << 20;

/// What is `wanted`, in bytes; 0: the finest that is not dear. A guest that writes a block here and there dirties sixteen times as much at
/// 64 KiB as at 4 KiB, and all of it is read, compared and waited for again.
pub fn granularity(wanted: u32, disks: impl IntoIterator<Item = u64>) -> u32 {
    let largest = disks.into_iter().max().unwrap_or(0);
    let finest = |granularity: &u32| largest / u64::from(*granularity) / 8 <= BITMAP_MAX;
    let mut steps = [GRANULARITY_MIN, 8 << 10, 16 << 10, 32 << 10].into_iter();
    match wanted {
        0 => steps.find(finest).unwrap_or(GRANULARITY),
        wanted => wanted,
    }
}

/// What the rounds of one job are made of.
#[derive(Clone, Debug)]
pub struct RoundsOptions {
    /// Eight hex digits of the job: part of every name.
    pub job: String,
    /// Names of the block nodes to read, in the order of the job's disks: each the root that its device sees
    /// (`DiskFacts::node`).
    pub nodes: Vec<String>,
    /// Bytes per bit: a power of two, 4 KiB to 64 KiB.
    pub granularity: u32,
    /// Where QEMU shall listen, at most 107 bytes; QEMU's user must be able to make this file.
    pub socket: PathBuf,
    /// The unix socket of an NBD server that runs in this QEMU already, for somebody else.
    pub foreign_socket: Option<PathBuf>,
}

/// One disk of one round, ready to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundExport {
    pub node: String,
    /// Unix socket of the NBD server.
    pub socket: PathBuf,
    /// Name of the export, and its id.
    pub export: String,
    /// Bitmap that says what is dirty; none in round 0, where everything counts.
    pub bitmap: Option<ShownBitmap>,
}

/// The rounds of all disks of one job.
#[derive(Debug)]
pub struct Rounds {
    qmp: Qmp,
    options: RoundsOptions,
    server: NbdServer,
    /// The round whose bitmap records now.
    recording: u32,
    /// The round that is being read.
    open: Option<Open>,
    /// Makes ids unique.
    serial: u32,
    /// How many sockets QEMU holds for us.
    sockets: u32,
}

#[derive(Debug)]
struct Open {
    exports: Vec<RoundExport>,
    /// Its disabled bitmap; none in round 0.
    bitmap: Option<String>,
}

impl Rounds {
    /// Switches the first bitmaps on, then opens round 0: the base exports.
    ///
    /// # Errors
    /// See [`RoundsError`]; what was added until then is removed again.
    pub async fn start(qmp: &Qmp, options: RoundsOptions) -> Result<Self, RoundsError> {
        check(&options)?;
        let server = NbdServer::ensure(qmp, &options.socket, options.foreign_socket.as_deref()).await?;
        let mut rounds = Self {
            qmp: qmp.clone(),
            options,
            server,
            recording: 0,
            open: None,
            serial: 0,
            sockets: 0,
        };
        match rounds.begin().await {
            Ok(()) => Ok(rounds),
            Err(error) => {
                let _ = rounds.remove().await; // The first error is the one to tell.
                Err(error)
            }
        }
    }

    async fn begin(&mut self) -> Result<(), RoundsError> {
        let name = self.bitmap(0);
        add_bitmaps(&self.qmp, &self.options.nodes, &name, self.options.granularity).await?;
        self.open_round(None).await
    }

    /// The disks of the round that is open, in the order of [`RoundsOptions::nodes`]; empty between rounds.
    pub fn exports(&self) -> &[RoundExport] {
        self.open.as_ref().map_or(&[], |open| &open.exports)
    }

    /// Sockets for `count` connections to the open round's exports, all disks together; good until the round is finished or
    /// given back. The one way to connect that a running VM survives in every version of QEMU: see `sockets`.
    ///
    /// # Errors
    /// [`RoundsError::TooManySockets`] beyond 256 in one round.
    pub async fn sockets(&mut self, count: usize) -> Result<Vec<OwnedFd>, RoundsError> {
        let max = sockets::SOCKETS_MAX;
        let too_many = || RoundsError::TooManySockets { count, max };
        let more = u32::try_from(count).map_err(|_| too_many())?;
        let all = self
            .sockets
            .checked_add(more)
            .filter(|&all| all <= max)
            .ok_or_else(too_many)?;
        let first = std::mem::replace(&mut self.sockets, all);
        sockets::open(&self.qmp, first, more).await
    }

    /// The round that is open, or was last: 0 until the first [`Self::next`]. Round n reads what was written between the
    /// beginnings of rounds n-1 and n.
    pub const fn round(&self) -> u32 {
        self.recording
    }

    /// Begins the next round: one transaction switches all disks to new bitmaps; the old ones, now still, are exported.
    /// In pre-switchover this is the last round: nothing writes any more, and should the move be called off, the new
    /// bitmaps are there already.
    ///
    /// # Errors
    /// [`RoundsError::RoundOpen`] where the one before was neither finished nor given back.
    pub async fn next(&mut self) -> Result<u32, RoundsError> {
        if self.open.is_some() {
            return Err(RoundsError::RoundOpen(self.round()));
        }
        let old = self.bitmap(self.recording);
        let next = self.recording.checked_add(1).ok_or(RoundsError::TooManyRounds)?;
        let new = self.bitmap(next);
        bitmaps::swap(
            &self.qmp,
            &self.options.nodes,
            &old,
            &new,
            self.options.granularity,
        )
        .await?;
        self.recording = next;
        if let Err(error) = self.open_round(Some(old.clone())).await {
            // Nothing of it was read: it counts to the next round.
            self.merge(&old).await?;
            return Err(error);
        }
        Ok(self.round())
    }

    /// All of the open round is durable at the target: its exports and bitmaps go.
    pub async fn finish(&mut self) -> Result<(), RoundsError> {
        let Some(bitmap) = self.close().await? else {
            return Ok(());
        };
        remove_bitmaps(&self.qmp, &self.options.nodes, &bitmap).await
    }

    /// The open round was not carried through, or is in doubt: it counts to the next one. Round 0 cannot be given back:
    /// its exports are closed, and what it has not copied the caller has to remember.
    pub async fn give_back(&mut self) -> Result<(), RoundsError> {
        let Some(bitmap) = self.close().await? else {
            return Ok(());
        };
        self.merge(&bitmap).await
    }

    /// Exports round 0's whole disks once more, for reading on after [`Self::give_back`] in round 0 or for a second look.
    ///
    /// # Errors
    /// [`RoundsError::RoundOpen`] where a round is open.
    pub async fn open_base(&mut self) -> Result<(), RoundsError> {
        if self.open.is_some() {
            return Err(RoundsError::RoundOpen(self.round()));
        }
        self.open_round(None).await
    }

    /// Takes over a bitmap that has recorded the writes to these disks for longer: what it holds counts to the next round, and it is
    /// gone. In round 0 only.
    ///
    /// # Errors
    /// After one the bitmap is there still, in whole or in part.
    pub async fn take_over(&self, bitmap: &str) -> Result<(), RoundsError> {
        self.merge(bitmap).await
    }

    /// Forgets what was written until now: only where nothing was read yet that is relied on.
    pub async fn forget_writes(&self) -> Result<(), RoundsError> {
        bitmaps::clear(&self.qmp, &self.options.nodes, &self.bitmap(self.recording)).await
    }

    /// What the bitmap `name` of disk `disk` holds counts to the next round too. It must have recorded all along, and goes on recording.
    ///
    /// # Errors
    /// What QEMU refused, such as a bitmap that is gone.
    pub async fn inherit(&self, disk: usize, name: &str) -> Result<(), RoundsError> {
        let lost = || RoundsError::BitmapLost {
            node: self.options.nodes.get(disk).cloned().unwrap_or_default(),
            bitmap: name.to_owned(),
        };
        let node = self.options.nodes.get(disk).ok_or_else(lost)?;
        let all = bitmaps(&self.qmp).await?;
        let found = |info: &BitmapInfo| info.node == *node && info.name == name && info.recording;
        if !all.iter().any(found) {
            return Err(lost());
        }
        bitmaps::add_up(
            &self.qmp,
            std::slice::from_ref(node),
            name,
            &self.bitmap(self.recording),
        )
        .await
    }

    /// Bytes that were written since the last swap, for each disk, in steps of the granularity.
    pub async fn dirty_bytes(&self) -> Result<Vec<u64>, RoundsError> {
        self.counts(&self.bitmap(self.recording)).await
    }

    /// Dirty bytes of the bitmap `name` of each disk.
    async fn counts(&self, name: &str) -> Result<Vec<u64>, RoundsError> {
        let all = bitmaps(&self.qmp).await?;
        let count = |node: &String| {
            let found = all.iter().find(|info| info.node == *node && info.name == name);
            found
                .map(|info| info.count)
                .ok_or_else(|| RoundsError::BitmapLost {
                    node: node.clone(),
                    bitmap: name.to_owned(),
                })
        };
        self.options.nodes.iter().map(count).collect()
    }

    /// Takes everything away that was added; the NBD server too, where it is ours and nobody else uses it.
    pub async fn remove(mut self) -> Result<(), RoundsError> {
        let closed = self.close().await;
        let swept = sweep::of_job(&self.qmp, &self.prefix()).await;
        self.server.stop(&self.qmp).await?;
        closed?;
        swept.map(|_| ())
    }

    /// Closes the open round's exports; gives its bitmap.
    async fn close(&mut self) -> Result<Option<String>, RoundsError> {
        let Some(open) = &self.open else {
            return Ok(None);
        };
        let ids: Vec<_> = open.exports.iter().map(|export| export.export.as_str()).collect();
        exports::remove(&self.qmp, &ids).await?;
        sockets::close(&self.qmp).await?;
        self.sockets = 0;
        Ok(self.open.take().and_then(|open| open.bitmap))
    }

    async fn merge(&self, bitmap: &str) -> Result<(), RoundsError> {
        let into = self.bitmap(self.recording);
        bitmaps::merge(&self.qmp, &self.options.nodes, bitmap, &into).await
    }

    async fn open_round(&mut self, bitmap: Option<String>) -> Result<(), RoundsError> {
        let mut opened = Vec::with_capacity(self.options.nodes.len());
        let shown = self.shown(bitmap.as_deref()).await?;
        for (disk, (node, bitmap)) in self.options.nodes.iter().zip(shown).enumerate() {
            self.serial = self.serial.wrapping_add(1);
            let export = RoundExport {
                node: node.clone(),
                socket: self.server.socket().to_owned(),
                export: format!("{}disk{disk}-{}", self.prefix(), self.serial),
                bitmap,
            };
            if let Err(error) = exports::add(&self.qmp, &export).await {
                let ids: Vec<_> = opened
                    .iter()
                    .map(|export: &RoundExport| export.export.as_str())
                    .collect();
                exports::remove(&self.qmp, &ids).await?;
                return Err(error);
            }
            opened.push(export);
        }
        self.open = Some(Open {
            exports: opened,
            bitmap,
        });
        Ok(())
    }

    /// The bitmap of a round that is to be read, of each disk.
    async fn shown(&self, bitmap: Option<&str>) -> Result<Vec<Option<ShownBitmap>>, RoundsError> {
        let Some(name) = bitmap else {
            return Ok(vec![None; self.options.nodes.len()]);
        };
        let dirty = self.counts(name).await?;
        let shown = dirty.into_iter().map(|dirty| {
            Some(ShownBitmap {
                name: name.to_owned(),
                granularity: self.options.granularity,
                dirty,
            })
        });
        Ok(shown.collect())
    }

    fn prefix(&self) -> String {
        format!("{PREFIX}{}-", self.options.job)
    }

    fn bitmap(&self, round: u32) -> String {
        format!("{}{round}", self.prefix())
    }

    /// The socket that the exports are reached by.
    pub fn socket(&self) -> &Path {
        self.server.socket()
    }
}

fn check(options: &RoundsOptions) -> Result<(), RoundsError> {
    let granularity = options.granularity;
    if !granularity.is_power_of_two() || !(GRANULARITY_MIN..=GRANULARITY).contains(&granularity) {
        return Err(RoundsError::Granularity(granularity));
    }
    let plain = |c: char| c.is_ascii_alphanumeric();
    if options.job.is_empty() || options.job.len() > 32 || !options.job.chars().all(plain) {
        return Err(RoundsError::JobName(options.job.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_are_as_fine_as_eight_mebibytes_allow_unless_it_is_said() {
        const GIB: u64 = 1 << 30;
        let of = |gib: u64| granularity(0, [GIB, gib * GIB]) >> 10;
        assert_eq!(
            [1, 256, 257, 512, 1024, 2048, 2049, 65_536].map(of),
            [4, 4, 8, 8, 16, 32, 64, 64]
        );
        assert_eq!(
            (granularity(0, []), granularity(32 << 10, [GIB])),
            (4 << 10, 32 << 10)
        );
    }
}
