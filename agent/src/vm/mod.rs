//! A running VM: when it may be handed over, and who may run it then.
//!
//! Owns decisions and their journal. Leaves sockets, clocks and QEMU itself to the session.

pub mod converge;
pub mod handover;
pub mod journal;
