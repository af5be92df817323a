//! The emulated WAN: a link between two namespaces with a rate, delay, jitter, loss, a queue and cuts.
//!
//! `direction` is the pure machine, `path` joins two of them with the cut windows, `pump` moves real packets
//! between two TUN devices, `control` is the line protocol that the emulator process speaks on its standard
//! input and output, `link` is the lab's handle on that process. The emulator is a process of its own, so
//! that its CPU time is not counted with the programs', and it ends when its standard input closes: it cannot
//! outlive the lab.

pub mod control;
pub mod direction;
pub mod link;
pub mod path;
pub mod pump;
pub mod spec;
