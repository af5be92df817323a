//! The QEMU Machine Protocol, client side, over a unix socket.
//!
//! Owns one connection to one monitor: greeting, capabilities, commands with ids, events, passing of file descriptors.
//! Leaves alone what the commands mean. `wire` is pure: bytes in, messages or a refusal out; `tasks` holds the socket;
//! `wait` waits for a state, with a watchdog.
//!
//! Promises: the peer is not trusted (every line is bounded, nonsense ends the connection); a command ends within its time;
//! a dropped call leaves the connection in step; replies out of order and replies nobody waits for any more do no harm;
//! once the connection is lost, every call says why at once.
//! Source: <https://www.qemu.org/docs/master/interop/qmp-spec.html>.

mod client;
mod error;
mod event;
mod tasks;
mod wait;
pub mod wire;

pub use client::Qmp;
pub use error::{ErrorClass, QmpError};
pub use event::{Event, Events, Heard, MigrationStatus};
pub use wait::Watch;
pub use wire::{Greeting, Version};
