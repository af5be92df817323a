//! A running VM: how it is spoken with, what it is, and how it is moved without stopping it for long.
//!
//! Owns everything that concerns a running QEMU. `qmp` is the language; `attach` and `facts` say what a VM is and what
//! keeps it from moving; `rounds` reads its disks while they change; `ram_rate`, `io_limit` and `media` say how fast its memory changes, hold
//! its writes down and take media out; `outgoing` and `incoming` are the two ends of QEMU's own migration; `ram` is its stream; `converge` decides when to hand the VM over, `handover` and its `journal` who may
//! run it then; `guest_agent` speaks with the program inside the guest.
//!
//! Leaves alone the wire between the sites (`session`). Everything that Longhaul adds to a QEMU
//! is named `longhaul-...`, so that it is found and removed after a crash.

pub mod attach;
pub mod converge;
pub mod facts;
pub mod guest_agent;
pub mod handover;
pub mod incoming;
pub mod io_limit;
pub mod journal;
pub mod media;
pub mod outgoing;
pub mod qmp;
pub mod ram;
pub mod ram_rate;
pub mod rounds;

/// What the names of everything begin with that Longhaul adds to a QEMU.
pub const PREFIX: &str = "longhaul-";
