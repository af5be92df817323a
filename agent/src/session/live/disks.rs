//! The disks of a running VM, as its QEMU shows them.
//!
//! Owns finding the disks that a job names, their exports while a round is read, and what the gateway is told of them. Leaves bitmaps
//! and exports to `vm::rounds`, reading to `disk::reader`.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use longhaul_common::extent::Extent;
use longhaul_common::wire::session::{DISKS_MAX, OpenedDisk, Refusal, RefusalKind, SourceDisk};
use serde::{Deserialize, Serialize};

use crate::disk::free_map::FreeMap;
use crate::disk::image::{Allocation, LiveImage};
use crate::vm::qmp::{Qmp, QmpError};
use crate::vm::rounds::{RoundExport, Rounds, RoundsError};

/// One disk of the VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct VmDisk {
    /// Root node that the guest's device sees.
    pub node: String,
    /// The file or device below it, as QEMU opened it.
    pub file: PathBuf,
    pub format: String,
    pub size: u64,
    /// A medium that is copied: it belongs to nobody, and stays what and where it is.
    #[serde(default)]
    pub read_only: bool,
}

#[derive(Deserialize)]
struct Device {
    device: String,
    #[serde(default)]
    qdev: Option<String>,
    #[serde(default)]
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Inserted {
    file: String,
    #[serde(default)]
    node_name: Option<String>,
    ro: bool,
    drv: String,
    image: Image,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    virtual_size: u64,
    filename: String,
}

/// The VM's disks that the job names, in the job's order: by qdev id, device name or node name.
pub(super) async fn find(qmp: &Qmp, wanted: &[SourceDisk]) -> Result<Vec<VmDisk>, Refusal> {
    let refuse = |text: String| Refusal::new(RefusalKind::Refused, text);
    if wanted.is_empty() || wanted.len() > DISKS_MAX {
        let text = format!(
            "a VM with {} disks cannot be moved; 1 to {DISKS_MAX} can",
            wanted.len()
        );
        return Err(refuse(text));
    }
    let devices: Vec<Device> = qmp
        .query("query-block")
        .await
        .map_err(|error| Refusal::because(RefusalKind::Refused, &error))?;
    let disks = wanted.iter().map(|disk| {
        let name = disk.path.to_string_lossy();
        let found = devices.iter().find(|device| device.is(&name));
        let inserted = found.and_then(|device| device.inserted.as_ref()).ok_or_else(|| {
            let known: Vec<_> = devices.iter().flat_map(Device::names).collect();
            refuse(format!(
                "the VM has no disk '{name}'; it has: {}; correct [[disk]] source",
                known.join(", ")
            ))
        })?;
        inserted.disk(&name).map_err(refuse)
    });
    disks.collect()
}

/// Of each file the root node of the disk that is stored in it; none where no disk is.
pub(super) async fn nodes_of(qmp: &Qmp, files: &[PathBuf]) -> Result<Vec<Option<String>>, QmpError> {
    let devices: Vec<Device> = qmp.query("query-block").await?;
    let disks: Vec<_> = devices
        .iter()
        .filter_map(|device| device.inserted.as_ref()?.disk("").ok())
        .collect();
    let of = |file: &PathBuf| {
        disks
            .iter()
            .find(|disk| disk.file == *file)
            .map(|disk| disk.node.clone())
    };
    Ok(files.iter().map(of).collect())
}

impl Device {
    /// By what it may be called: "/machine/peripheral/disk0/virtio-backend" is `disk0`.
    fn names(&self) -> Vec<String> {
        let Some(inserted) = &self.inserted else {
            return Vec::new();
        };
        let qdev = self.qdev.as_deref().unwrap_or_default();
        let short = qdev.strip_prefix("/machine/peripheral/").unwrap_or(qdev);
        let short = short.split('/').next().unwrap_or_default();
        let names = [
            short,
            &self.device,
            inserted.node_name.as_deref().unwrap_or_default(),
        ];
        let mut names: Vec<_> = names
            .iter()
            .filter(|name| !name.is_empty())
            .map(|name| (*name).to_owned())
            .collect();
        names.dedup();
        names
    }

    fn is(&self, name: &str) -> bool {
        self.names().iter().any(|known| known == name)
    }
}

impl Inserted {
    fn disk(&self, name: &str) -> Result<VmDisk, String> {
        let node = self.node_name.clone().filter(|node| !node.is_empty());
        let node = node.ok_or_else(|| {
            format!(
                "disk '{name}' has no node name; start the VM with -blockdev, or give its -drive a node-name"
            )
        })?;
        let file = if self.file.is_empty() || self.file.starts_with("json:") {
            &self.image.filename
        } else {
            &self.file
        };
        Ok(VmDisk {
            node,
            file: PathBuf::from(file),
            format: self.drv.clone(),
            size: self.image.virtual_size,
            read_only: self.ro,
        })
    }
}

/// The exports of a round and, for each, connections that QEMU holds itself.
pub(super) struct Reach {
    exports: Vec<(RoundExport, Vec<OwnedFd>)>,
}

/// Has QEMU hold connections to the exports of the open round.
pub(super) async fn reach(rounds: &mut Rounds, connections: usize) -> Result<Reach, RoundsError> {
    let mut exports = Vec::new();
    for export in rounds.exports().to_vec() {
        let sockets = rounds.sockets(connections).await?;
        exports.push((export, sockets));
    }
    Ok(Reach { exports })
}

/// Connects to the exports of a round. Blocks.
pub(super) fn connect(reach: Reach) -> Result<Vec<LiveImage>, Refusal> {
    let images = reach.exports.into_iter().map(|(export, sockets)| {
        let bitmap = export.bitmap.as_ref();
        let image = LiveImage::connect(&export.socket, &export.export, bitmap, sockets);
        image.map_err(|error| Refusal::because(RefusalKind::Refused, &error))
    });
    images.collect()
}

/// What is stored of an image. Blocks.
pub(super) fn report(disk: &VmDisk, image: &LiveImage) -> Result<OpenedDisk, Refusal> {
    let started = std::time::Instant::now();
    let mut allocated = 0_u64;
    each_stored(image, |extent| allocated += extent.len())?;
    Ok(OpenedDisk {
        size: image.size(),
        format: disk.format.clone(),
        allocated,
        free: 0,
        used: allocated,
        parts: Vec::new(),
        notes: Vec::new(),
        scan_ms: started.elapsed().as_millis() as u64,
        sent_before: 0,
        since: None,
    })
}

/// Bytes that are stored in an image and free by this map. Blocks.
pub(super) fn stored_and_free(image: &LiveImage, free: &FreeMap) -> Result<u64, Refusal> {
    let mut bytes = 0_u64;
    each_stored(image, |extent| {
        let mut at = extent.offset();
        while at < extent.end() {
            let (is_free, run) = free.run(at, extent.end());
            bytes += if is_free { run.end() - at } else { 0 };
            at = run.end();
        }
    })?;
    Ok(bytes)
}

/// Gives every stored extent of an image.
fn each_stored(image: &LiveImage, mut stored: impl FnMut(&Extent)) -> Result<(), Refusal> {
    let mut at = 0;
    while at < image.size() {
        let range = Extent::between(at, image.size().min(at.saturating_add(MAP_STEP)));
        let runs = image.allocation(range);
        let runs = runs.map_err(|error| Refusal::because(RefusalKind::Refused, &error))?;
        runs.iter()
            .filter(|run| run.state == Allocation::Data)
            .for_each(|run| stored(&run.extent));
        at = range.end();
    }
    Ok(())
}

/// What is told of a disk that is not read any more.
pub(super) fn unread(disk: &VmDisk) -> OpenedDisk {
    OpenedDisk {
        size: disk.size,
        format: disk.format.clone(),
        allocated: 0,
        free: 0,
        used: 0,
        parts: Vec::new(),
        notes: Vec::new(),
        scan_ms: 0,
        sent_before: 0,
        since: None,
    }
}

/// How much of a disk's map is asked for at once, in bytes of the disk.
const MAP_STEP: u64 = 64 << 30;
