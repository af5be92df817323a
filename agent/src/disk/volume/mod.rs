//! What lies between a disk image and its file systems: partition tables, logical volumes, and what else may claim a volume.
//!
//! Owns the decoding of GPT, MBR and LVM2, the signatures by which anything else is recognised, and the views through which a
//! file system reads its volume. Leaves alone the free map and the report ([`crate::disk::scan`]) and the file systems
//! themselves ([`crate::disk::fs`]). Promises: nothing here calls a byte free because a table says so; tables only say where a
//! volume lies, and where two of them disagree, or one does not hold together, its volumes are copied whole. Every list read
//! from a disk has a limit.

pub(crate) mod doubt;
pub(crate) mod gpt;
pub(crate) mod judge;
pub(crate) mod lvm;
pub(crate) mod mbr;
pub(crate) mod signature;
pub(crate) mod table;
pub(crate) mod view;

pub use judge::Probe;

use std::error::Error;
use std::io;

use crate::disk::ReadAt;

/// Bytes `[offset, offset + len)`; the caller bounds `len`.
pub(crate) fn read(volume: &dyn ReadAt, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; len];
    volume.read_exact_at(&mut buf, offset)?;
    Ok(buf)
}

/// The `N` bytes at `at`, as an array to decode a number from; zeros where `bytes` ends before.
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

/// An error and its causes as one sentence.
pub(crate) fn sentence(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A name found on a disk, fit for a report: short, one line, no control characters.
pub(crate) fn printable(name: &str) -> String {
    let clean = name.trim_matches(['\0', ' ']).chars();
    clean
        .map(|c| if c.is_control() || c == '\'' { '?' } else { c })
        .take(64)
        .collect()
}
