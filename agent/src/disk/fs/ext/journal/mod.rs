//! The journal (JBD2) of an ext file system that may be mounted: what was committed, laid over the volume.
//!
//! Owns finding the journal's blocks, reading its superblock, the scan from its tail to the newest commit, and the overlay of the
//! allocation metadata to that commit. Leaves alone what the metadata means (the rest of `ext`) and whether a state is new enough
//! to prove anything (`disk::live_free`). Promises: only transactions with an intact commit block count; content with a wrong
//! checksum is never used where checksums exist; a journal that moved under the read is read again a few times, then given up.
//! Every loop is bounded by the journal's length and every table by a constant. Source: the kernel's
//! Documentation/filesystems/ext4 (journal), and what recovery does with it.
//!
//! ```text
//! superblock -> place -> header (tail) -> log (tail .. newest commit) -> overlay -> running: bitmaps of one commit
//! ```
//!
//! Why the order of reads is safe: what was committed before the tail had been written home before the tail moved there. So
//! the tail is read first, then the log, and blocks at home last; a block at home is at least as new as the tail, and all that
//! is newer up to the newest commit is in the log. Log blocks from the tail on are not written again until the tail moves, which
//! a second look at it tells.

mod header;
mod log;
mod overlay;
mod place;
pub(super) mod running;
mod tags;

use super::Unproven;

/// Why one reading of the journal came to nothing.
#[derive(Debug)]
enum Fault {
    /// It was written to meanwhile, or read torn: another reading may succeed.
    Moved(&'static str),
    /// No reading will succeed.
    Unproven(Unproven),
}

impl From<Unproven> for Fault {
    fn from(why: Unproven) -> Self {
        Self::Unproven(why)
    }
}

/// Whether sequence number `a` comes after `b`; numbers wrap around.
pub(in crate::disk) fn is_after(a: u32, b: u32) -> bool {
    // Differences beyond half the range mean the other direction, as JBD2 has it.
    a != b && a.wrapping_sub(b) < 1 << 31
}

/// The big-endian 32-bit number at `at`, which the caller keeps inside `bytes`.
fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
