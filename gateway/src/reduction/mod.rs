//! Fewer bytes for the same batch, and back.
//!
//! Owns the encodings of a payload, the choice between them, and the windows of blocks that this gateway shares with its peers. Leaves
//! alone where payloads go. A payload says of each block of 4 KiB what becomes of it (`plan`): zeros, a reference into the window, a
//! difference to what its place held before, or content, compressed together with that of the other blocks (`codec`).
//!
//! Promises that a payload is at most [`OVERHEAD`] bytes larger than the raw data, that restoring allocates no more than the checked
//! header's length for each part, that a payload is restored to exactly the data that was reduced or not at all, and that a window that
//! was lost, at either end, costs bytes and never correctness.

mod alike;
mod block;
mod codec;
mod decode;
mod encode;
mod index;
mod ladder;
mod layout;
mod pair;
mod persist;
mod plan;
mod slot_file;
mod window;
pub mod workers;

#[cfg(test)]
mod tests;

use bytes::Bytes;
use longhaul_common::wire::batch::{BatchError, PAYLOAD_OVERHEAD};

pub use alike::Features;
pub use block::{BlockDigest, DigestKey, differing, is_noise, is_zero, xor};
pub use codec::Level;
pub use decode::{RestoreError, restore};
pub use encode::{reduce, reduce_plainly};
pub use index::Index;
pub use ladder::{CHOOSE_EVERY, Ladder, Seen, Work};
pub use layout::Vm;
pub use pair::{Pair, Windows};
pub use window::{SLOTS_MAX, Size};

/// What a payload may need beyond the raw data: flags, epochs, the kinds of its blocks.
pub const OVERHEAD: usize = PAYLOAD_OVERHEAD - 1;

/// How a payload's bytes stand for the raw data. One byte on the wire; zero is never sent, so a zeroed buffer means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// The data itself.
    Raw = 1,
    /// One LZ4 block.
    Lz4 = 2,
    /// One zstd frame.
    Zstd = 3,
    /// Block by block, with the window.
    Blocks = 4,
}

impl Encoding {
    /// From its byte on the wire.
    pub fn from_wire(byte: u8) -> Result<Self, BatchError> {
        match byte {
            1 => Ok(Self::Raw),
            2 => Ok(Self::Lz4),
            3 => Ok(Self::Zstd),
            4 => Ok(Self::Blocks),
            _ => Err(BatchError::Payload(
                "its encoding is unknown; the peer may run another version",
            )),
        }
    }
}

/// The data of one batch, reduced.
#[derive(Clone, Debug)]
pub struct Payload {
    pub encoding: Encoding,
    pub bytes: Bytes,
}

/// Which ideas are used, and how much work is done for the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    pub dedup: bool,
    pub xor: bool,
    pub level: Level,
}

/// The same as settings say it: without a level, each lane finds its own ([`Ladder`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    pub dedup: bool,
    pub xor: bool,
    pub level: Option<Level>,
}

/// What became of raw data, in bytes of it; `payload` is what it came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReductionCounts {
    pub zero: u64,
    pub reference: u64,
    pub xor: u64,
    pub compressed: u64,
    pub raw: u64,
    pub payload: u64,
    /// The part of `payload` that carries what counts as `xor`.
    pub xor_payload: u64,
    /// The part of `xor` that is in payloads in which all of it is differences from what stood at the same place before: what was
    /// written a little, and sent again.
    pub rewritten: u64,
    /// The part of `payload` that carries what counts as `rewritten`.
    pub rewritten_payload: u64,
}

impl ReductionCounts {
    /// What `level` was applied to: content, and differences from where on they are made by zstd.
    pub fn content(&self, level: Level) -> u64 {
        let differences = if level >= Level::Zstd3 { self.xor } else { 0 };
        let content = self.compressed.saturating_add(self.raw);
        content.saturating_add(differences)
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            zero: self.zero.saturating_add(other.zero),
            reference: self.reference.saturating_add(other.reference),
            xor: self.xor.saturating_add(other.xor),
            compressed: self.compressed.saturating_add(other.compressed),
            raw: self.raw.saturating_add(other.raw),
            payload: self.payload.saturating_add(other.payload),
            xor_payload: self.xor_payload.saturating_add(other.xor_payload),
            rewritten: self.rewritten.saturating_add(other.rewritten),
            rewritten_payload: self.rewritten_payload.saturating_add(other.rewritten_payload),
        }
    }
}

/// A batch as it is to be sent.
pub struct Reduced {
    pub payload: Payload,
    pub counts: ReductionCounts,
    pub kept: Kept,
}

/// What is to be remembered of a payload until the peer has accepted it.
#[derive(Debug, Default)]
pub struct Kept {
    receipt: Option<window::Receipt>,
    /// The peer may lack what it refers to: its raw data is needed until it is accepted.
    pub needs_window: bool,
}
