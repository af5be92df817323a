//! Longhaul's site gateway: knows the WAN, jobs and plans; never opens a disk image.

pub mod agents;
pub mod api;
pub mod job;
pub mod metrics;
pub mod operator;
pub mod pki;
pub mod receive;
pub mod reduction;
pub mod send;
pub mod settings;
pub mod store;
