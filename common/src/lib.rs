//! What two Longhaul programs must agree on, and nothing else.
//!
//! A type belongs here only when at least two of the programs (agent, gateway, operator) have to give it the same meaning:
//! byte ranges and digests, the wire, the link that carries it, how settings are read, how a program starts and reports on itself.
//! This crate never opens a disk image and never decides anything about a job.

pub mod digest;
pub mod extent;
pub mod ids;
pub mod link;
pub mod settings;
pub mod startup;
pub mod telemetry;
pub mod units;
pub mod wire;
