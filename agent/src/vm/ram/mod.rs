//! QEMU's migration stream between two agents: taken apart at the source, made again byte for byte at the target.
//!
//! Owns the tap (`Tokenizer`), its inverse (`Rebuilder`), what the source keeps until the target's QEMU has it (`Retained`) and how
//! far it may read ahead (`ReadWindow`). Leaves sockets, clocks, batches and QMP alone: everything here is pure.
//!
//! ```text
//! QEMU -> ReadWindow -> Tokenizer -> Part -> Retained -> ... any order, any way ... -> Rebuilder -> QEMU
//! ```
//!
//! Promises that whatever goes into a `Tokenizer` comes out of a `Rebuilder` unchanged, however the stream was fed and in whatever
//! order its parts arrive. A stream that is not understood costs compression, never a byte.

mod dirty;
mod fields;
mod grammar;
mod header;
mod part;
mod rebuild;
mod records;
mod retained;
mod sent;
mod tokenizer;
mod window;

pub use grammar::{Block, OpaqueReason, Phase};
pub use part::{Counts, PART_LEN_MAX, Part, TARGET_MIN};
pub use rebuild::{Accepted, RebuildError, Rebuilder};
pub use retained::{RetainError, Retained};
pub use tokenizer::{Tokenizer, TokenizerOptions};
pub use window::{ReadWindow, WindowError};
