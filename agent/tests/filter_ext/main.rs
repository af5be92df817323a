//! The ext2/3/4 part of the free-block filter, held against e2fsprogs.
//!
//! `oracle`: what the filter calls free equals dumpe2fs's own list. `copy`: a copy without the free blocks is a clean file
//! system with the same files. `damage`: no damaged byte makes a used block free. `forged`: right checksums do not make wrong
//! metadata right. `unclean`: whatever is not settled is not filtered. `large`: a TiB costs little.
//!
//! Needs the Debian package e2fsprogs. `LONGHAUL_FILTER_CASES` sets how many random cases each test runs,
//! `LONGHAUL_FILTER_SEED` replays a printed seed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod copy;
mod damage;
mod forged;
mod image;
mod large;
mod oracle;
mod sealed;
mod unclean;
