//! The sending side: from a source agent's batch to a stream on the WAN.
//!
//! `ingest` takes batches in and has them reduced, `shares` divides its memory among jobs, `outbox` decides what goes next, `transmit` writes it,
//! `greeting` begins a connection, `rest` says when a dead one's share goes again, `knock` notices the end of a cut.

mod greeting;
pub mod ingest;
mod knock;
pub mod outbox;
mod rest;
mod shares;
pub mod transmit;
