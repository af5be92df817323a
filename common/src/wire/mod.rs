//! What crosses the links, byte for byte. This header is the specification.
//!
//! Goals, in order: nothing is applied that the source did not send; a lost program or link loses no durable byte; each frame is
//! bounded before it is read. Not goals: third-party peers, and more than one version in one process.
//!
//! ```text
//! source agent        source gateway            target gateway          target agent
//!      |  <- SourceOpen ----|                          |                      |
//!      |--- Opened -------->|---- PeerHello, Open ---->|------ Open --------->|
//!      |                    |<--------------- Opened, Have..., Credit --------|
//!      |  <- Have.., Start -|                          |                      |
//!      |=== batch =========>|=== payload ============> |=== batch ==========> |   one uni stream each, any order
//!      |                    |<-- Accepted -------------|                      |   restored: the payload may be forgotten
//!      |                    |<-- Missing --------------|                      |   refers to blocks that are not there: sent again plainly
//!      |  <-- Credit -------|<--------------- Credit, Durable ----------------|   written and flushed: progress
//!      |--- DiskDone.. ---->|---- Verify ------------------------------------>|   after the last Durable
//!      |  <- Finish --------|<--------------- Verified -----------------------|
//!      |--- Finished ------>|---- Commit ------------------------------------>|
//!      |                    |<--------------- Committed ----------------------|
//! ```
//!
//! A running VM's source agent drives: it says what it needs from the target agent in words that the gateways only carry (`Say`), sends
//! rounds after the first and the RAM stream as batches of the same kind, and ends with `Moved`; the target agent with `Committed`.
//!
//! Ahead of a run the source's gateway may ask an agent to prepare a VM: `PrepareTask` and one `PrepareAnswer` on a stream of their own.
//!
//! Control messages are frames (`frame`): length as u32 LE, then postcard. They cross on one bidirectional stream for each job and
//! hop; the stream's end is the end of the attempt on that hop. Batches (`batch`) cross on unidirectional streams.
//!
//! The operator's word about a handover or a shadow (`operator`) is one frame from a gateway to an agent of its site, and one back.
//!
//! Before its first payload each connection between gateways agrees on the windows of blocks that payloads refer to (`window`): for each
//! tenant one bidirectional stream, `PeerTask::Window` and a `WindowAnswer`. One more, `PeerTask::Knock`, stays open: while the sender hears nothing
//! it writes a byte now and then, which comes back, so that both ends notice soon that a cut is over.
//!
//! Versions: the ALPN carries the major version, one line each:
//! - 1: cold disks and running VMs; (attempt, disk, round) order, RAM stream; payloads of references, differences, LZ4 and zstd.
//!
//! A peer of another version fails the handshake; both ends say so.

pub mod batch;
pub mod frame;
mod live;
pub mod operator;
pub mod prepare;
pub mod ram;
mod refusal;
pub mod sequences;
pub mod session;
pub mod window;
pub mod words;

pub use crate::link::{ALPN_AGENT, ALPN_PEER};
