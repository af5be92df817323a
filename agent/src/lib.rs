//! Longhaul's agent: one per hypervisor host. Knows disks, file systems and QEMU; never opens a WAN connection.
//!
//! `session` speaks with the site's gateway and drives everything else; `disk` reads, filters and writes images and knows
//! nothing of networks or of the async runtime.

pub mod disk;
pub mod metrics;
pub mod session;
pub mod settings;
pub mod vm;
