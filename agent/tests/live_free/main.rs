//! Free blocks of file systems in use: the kernel writes to a mounted file system while its image is read.
//!
//! A loop device shares the page cache with its file, so that reading the file shows what a read-only export of a running
//! guest's disk would show. Mounting needs root and loop devices; where they are missing these tests fail and say so.
//! `LONGHAUL_LIVE_FREE_SEED` replays a seed, `LONGHAUL_LIVE_FREE_RUNS` makes the campaign longer.

// A test that fails here fails by panicking, in its helpers too.
#![allow(clippy::unwrap_used)]

mod campaign;
mod frozen;
mod guest;
mod hostile;
#[allow(dead_code, reason = "shared with filter_disk, which uses all of it")]
#[path = "../filter_disk/lvm_image.rs"]
mod lvm_image;
mod places;
mod refused;
mod replay;
