//! Our own NBD client: how images of any format, and later the disks of a running VM, are read and written
//! through QEMU.
//!
//! Owns the protocol as <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md> states it,
//! client side, over unix sockets: fixed newstyle handshake, structured replies, extended headers where
//! offered, metadata contexts. Leaves alone who started the server and what the content means. `decode` is
//! pure: bytes in, values or a refusal out; `transport` holds the socket and its deadlines; `handshake`
//! negotiates; `connection` runs commands.
//!
//! Promises: the server is not trusted. Every length is checked before memory is taken for it, every reply
//! ends within its deadline however slowly bytes drip in, and a connection whose framing was violated is
//! never used again.

mod connection;
mod coverage;
pub mod decode;
mod exchange;
mod export;
mod handshake;
mod pool;
mod replay;
mod request;
mod transport;

use std::io;
use std::time::Duration;

pub use connection::{Connection, StatusRun};
pub use decode::{ServerError, WireError};
pub use export::{BlockSizes, Context, Export, ExportFlags, Headers};
pub(super) use pool::Pool;
pub use replay::replay;
pub use transport::{Timed, Timeouts, UnixTransport, unconnected};

/// The metadata context that says what is a hole and what reads as zero.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// `base:allocation`: nothing is stored here. Says nothing of what a read returns.
pub const STATE_HOLE: u64 = 1;
/// `base:allocation`: reads as zero.
pub const STATE_ZERO: u64 = 2;
/// `qemu:dirty-bitmap:NAME`: written since the bitmap was switched on.
pub const STATE_DIRTY: u64 = 1;

/// How a connection is made.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Metadata contexts to ask for, at most 16; those the server does not have are left out of
    /// [`Export::contexts`].
    pub contexts: Vec<String>,
    /// How long each phase may take.
    pub timeouts: Timeouts,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            contexts: vec![BASE_ALLOCATION.to_owned()],
            timeouts: Timeouts::default(),
        }
    }
}

/// Why an NBD server could not be used, or a command failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error("the connection to the NBD server failed during {during}: {source}")]
    Io { during: &'static str, source: io::Error },
    #[error("the NBD server closed the connection during {during}")]
    Closed { during: &'static str },
    #[error("the NBD server did not finish {during} within {} s", limit.as_secs_f32())]
    Timeout { during: &'static str, limit: Duration },
    #[error("the NBD server broke the protocol during {during}: {source}")]
    Protocol { during: &'static str, source: WireError },
    #[error("the NBD server refused {what}: {reason}")]
    Refused { what: String, reason: String },
    /// The server answered in good order that it could not do it; the connection is still usable.
    #[error("the NBD server could not {command} {len} bytes at {offset}: {error}")]
    Command {
        command: &'static str,
        offset: u64,
        len: u64,
        error: ServerError,
    },
    #[error("{0}")]
    Unusable(String),
    #[error("the range of {len} bytes at {offset} is not inside the export of {size} bytes")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    #[error(
        "{command} at {offset}, {len} bytes, is not a multiple of the server's smallest block, {min} bytes"
    )]
    Misaligned {
        command: &'static str,
        offset: u64,
        len: u64,
        min: u32,
    },
    #[error("this NBD connection failed earlier and cannot be used again")]
    Broken,
}

impl NbdError {
    /// The kind that fits best where an `io::Error` is wanted.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Io { source, .. } => source.kind(),
            Self::Closed { .. } | Self::Broken => io::ErrorKind::ConnectionAborted,
            Self::Timeout { .. } => io::ErrorKind::TimedOut,
            Self::Protocol { .. } => io::ErrorKind::InvalidData,
            Self::Refused { .. } | Self::Unusable(_) => io::ErrorKind::Unsupported,
            Self::Command { error, .. } => error.kind(),
            Self::OutOfRange { .. } => io::ErrorKind::UnexpectedEof,
            Self::Misaligned { .. } => io::ErrorKind::InvalidInput,
        }
    }

    /// Whether the connection stays in step with the server in spite of this error.
    fn keeps_connection(&self) -> bool {
        matches!(
            self,
            Self::Command { .. } | Self::OutOfRange { .. } | Self::Misaligned { .. } | Self::Unusable(_)
        )
    }
}
