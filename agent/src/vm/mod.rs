//! A running VM under QEMU, as the agent sees and moves it.
//!
//! `ram` takes QEMU's migration stream apart and puts it together again; it knows no socket and no clock.

pub mod ram;
