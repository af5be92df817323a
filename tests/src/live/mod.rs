//! Live migrations in the lab: guests that run, the ears on their consoles and QMP sockets, the measuring of
//! pauses, and the proof of what arrived.
//!
//! Owns QEMU's command lines, the lab's own QMP connections, heartbeats and acknowledgements as the host
//! hears them, the offline check of a disk, and `lab live`. Leaves alone how Longhaul migrates: it is told by
//! a job file and the operator program's lines. Promises that each verdict rests on what guest, disk and QEMU
//! themselves show.

pub mod args;
pub mod back;
pub mod bulk;
pub mod check;
pub mod console;
pub mod faults;
pub mod hearing;
pub mod leftovers;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod page;
pub mod pause;
pub mod plain;
mod proof;
pub mod rival;
pub mod run;
pub mod settings;
pub mod stage;
pub mod template;
pub mod verdict;
pub mod vm;
