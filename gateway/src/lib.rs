//! Longhaul's site gateway: knows the WAN, jobs and plans; never opens a disk image.

pub mod pki;
pub mod reduction;
pub mod send;
