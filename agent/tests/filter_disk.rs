//! Everything between an image and its file systems: partition tables, LVM, second signatures, shortfalls, and damage to all of
//! them. File systems are toys here (`filter_disk/toy.rs`); the tables are made by sfdisk, fdisk and LVM's own tools, which are
//! also the oracles. `LONGHAUL_FILTER_CASES` (default 300) sets the number of random damages for each image, and
//! `LONGHAUL_FILTER_SEED` replays a run.

// A test that fails here fails by panicking, in its helpers too.
#![allow(clippy::unwrap_used)]

#[path = "filter_disk/disk.rs"]
mod disk;
#[path = "filter_disk/hostile.rs"]
mod hostile;
#[path = "filter_disk/lvm.rs"]
mod lvm;
#[path = "filter_disk/lvm_image.rs"]
mod lvm_image;
#[path = "filter_disk/lvm_refused.rs"]
mod lvm_refused;
#[path = "filter_disk/tables.rs"]
mod tables;
#[path = "filter_disk/tools.rs"]
mod tools;
#[path = "filter_disk/toy.rs"]
mod toy;
#[path = "filter_disk/volumes.rs"]
mod volumes;
