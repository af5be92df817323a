//! What the controller is told and what it collects between two decisions.
//!
//! Owns plain data and no decision; `control` thinks about it. Times are in seconds where they are numbers.

use std::time::Instant;

/// Whom a link yields to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The path is ours: fill it, keep its queue short, do not mind losses.
    #[default]
    Dedicated,
    /// Fill it while alone, and take a TCP connection's share beside others.
    Shared,
    /// Take what others leave.
    Background,
}

/// What [`Control`] starts from.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// How to treat others.
    pub mode: Mode,
    /// Bytes in flight in the first round trip, all connections together.
    pub initial_window: u64,
    /// Bytes of a full packet.
    pub packet: u64,
}

/// What one acknowledgement showed.
#[derive(Clone, Copy, Debug)]
pub struct Acks {
    /// When the newest packet in it was sent.
    pub sent: Instant,
    /// That packet's delay beyond its connection's base, in seconds.
    pub queue: f64,
    /// The connection's base delay, in seconds.
    pub base: f64,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Sum over packets of bytes times the seconds they were in flight.
    pub byte_seconds: f64,
    /// Whether the window was what kept the connection from sending more.
    pub limited: bool,
}

/// What the owner of the base delays must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Stay,
    /// A dip begins: note the least delays anew.
    Listen,
    /// What was least since [`Verdict::Listen`] is the base delay from now on.
    Rebase,
}

#[derive(Clone, Debug)]
pub(super) struct Epoch {
    pub(super) started: Instant,
    /// The first acknowledgement of a packet sent since.
    pub(super) heard: Option<Instant>,
    pub(super) queue: f64,
    pub(super) samples: u32,
    pub(super) acked: f64,
    pub(super) lost: f64,
    pub(super) limited: f64,
    pub(super) byte_seconds: f64,
}

impl Epoch {
    pub(super) fn new(started: Instant) -> Self {
        Self {
            started,
            heard: None,
            queue: f64::INFINITY,
            samples: 0,
            acked: 0.0,
            lost: 0.0,
            limited: 0.0,
            byte_seconds: 0.0,
        }
    }
}
