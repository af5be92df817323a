//! Image formats, and how one is recognised.
//!
//! Owns the names and the magic numbers. Leaves alone what the headers go on to say (`header`).
//!
//! Security: **a probed format is a guess that a guest can steer.** A guest owns every byte of its raw disk
//! and may write a qcow2 header there whose backing file is `/etc/shadow`; whoever probes that disk later
//! hands the host's file to the guest. Therefore a format that the operator states is never questioned, `raw`
//! least of all, and a probed image may never make us open another file (see `chain`).

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::disk::ReadAt;

/// The format of an image. As text: QEMU's name of it, in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vhdx,
    Vpc,
    Vdi,
    Qed,
    /// Another format that QEMU reads: qcow, parallels, dmg, bochs, cloop.
    Other(String),
}

/// QEMU's remaining formats. A closed list: QEMU's drivers also reach networks and host devices.
const OTHERS: [&str; 5] = ["qcow", "parallels", "dmg", "bochs", "cloop"];

/// A format that QEMU does not read, or that is not a format of images.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no image format known here; known are raw, qcow2, vmdk, vhdx, vpc, vdi, qed, qcow, parallels, \
     dmg, bochs and cloop"
)]
pub struct UnknownFormat(String);

impl Format {
    /// QEMU's name of the format.
    pub fn name(&self) -> &str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vpc => "vpc",
            Self::Vdi => "vdi",
            Self::Qed => "qed",
            Self::Other(name) => name,
        }
    }

    /// The format that the content's magic numbers suggest; `Raw` where none is known.
    pub(super) fn probe(content: &dyn ReadAt) -> io::Result<Self> {
        let size = content.size();
        let mut head = vec![0; size.min(512) as usize];
        content.read_exact_at(&mut head, 0)?;
        if let Some(format) = by_head(&head) {
            return Ok(format);
        }
        // A fixed VHD is raw but for its last sector.
        if let Some(tail_at) = size.checked_sub(512).filter(|at| *at > 0) {
            let mut tail = [0; 8];
            content.read_exact_at(&mut tail, tail_at)?;
            if &tail == b"conectix" {
                return Ok(Self::Vpc);
            }
        }
        Ok(Self::Raw)
    }
}

fn by_head(head: &[u8]) -> Option<Format> {
    let qcow_version = head.get(4..8);
    Some(match head {
        [b'Q', b'F', b'I', 0xfb, ..] if qcow_version == Some(&[0, 0, 0, 1]) => Format::Other("qcow".into()),
        [b'Q', b'F', b'I', 0xfb, ..] => Format::Qcow2,
        [b'Q', b'E', b'D', 0, ..] => Format::Qed,
        _ if head.starts_with(b"KDMV") || head.starts_with(b"COWD") => Format::Vmdk,
        _ if head.starts_with(b"# Disk DescriptorFile") => Format::Vmdk,
        _ if head.starts_with(b"vhdxfile") => Format::Vhdx,
        _ if head.starts_with(b"conectix") => Format::Vpc,
        _ if head.starts_with(b"WithoutFreeSpace") || head.starts_with(b"WithouFreSpacExt") => {
            Format::Other("parallels".into())
        }
        _ if head.get(64..68) == Some(&0xbeda_107f_u32.to_le_bytes()) => Format::Vdi,
        _ => return None,
    })
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Ok(match name {
            "raw" => Self::Raw,
            "qcow2" => Self::Qcow2,
            "vmdk" => Self::Vmdk,
            "vhdx" => Self::Vhdx,
            "vpc" | "vhd" => Self::Vpc,
            "vdi" => Self::Vdi,
            "qed" => Self::Qed,
            other if OTHERS.contains(&other) => Self::Other(other.to_owned()),
            other => return Err(UnknownFormat(other.to_owned())),
        })
    }
}

impl TryFrom<String> for Format {
    type Error = UnknownFormat;

    fn try_from(name: String) -> Result<Self, UnknownFormat> {
        name.parse()
    }
}

impl From<Format> for String {
    fn from(format: Format) -> Self {
        format.name().to_owned()
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_round_trip() {
        for name in ["raw", "qcow2", "vmdk", "vhdx", "vpc", "vdi", "qed", "qcow", "dmg"] {
            assert_eq!(name.parse::<Format>().unwrap().to_string(), name);
        }
        assert_eq!("vhd".parse::<Format>(), Ok(Format::Vpc));
    }

    #[test]
    fn drivers_that_are_no_formats_are_refused() {
        for name in [
            "nbd",
            "file",
            "host_device",
            "blkdebug",
            "vvfat",
            "luks",
            "null-co",
            "",
            "QCOW2",
        ] {
            assert!(name.parse::<Format>().is_err(), "{name}");
        }
    }

    #[test]
    fn short_content_is_raw() {
        for len in [0, 1, 4, 7, 67, 511, 513] {
            assert_eq!(Format::probe(&vec![0u8; len]).unwrap(), Format::Raw);
        }
        assert_eq!(Format::probe(&b"QFI\xfb".to_vec()).unwrap(), Format::Qcow2);
    }
}
