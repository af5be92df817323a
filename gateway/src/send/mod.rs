//! The sending side: from a source agent's batch to a stream on the WAN.
//!
//! `ingest` takes batches in and has them reduced, `outbox` decides what goes next, `transmit` writes it.

pub mod ingest;
pub mod outbox;
pub mod transmit;
