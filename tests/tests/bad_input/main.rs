//! What people, strangers and broken peers do to the programs: each mistake gets one clear sentence, and nothing else suffers.
//!
//! Owns the promises about bad input, with the real programs on loopback: config files (`config`), job files and images (`jobs`),
//! certificates and versions (`certificates`), garbage on the ports (`garbage`), peers that lie (`liars`), and the HTTP API
//! (`api`), the lab itself (`lab`). Leaves decoders alone: they have fuzz targets.

#![allow(clippy::too_many_lines, reason = "tables of mistakes read best in one piece")]
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

mod api;
mod certificates;
mod config;
mod garbage;
mod jobs;
mod lab;
mod liars;
mod site;
