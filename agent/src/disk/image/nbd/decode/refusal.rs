//! What a server would not or could not do, in words.

use std::fmt;
use std::io;

use super::handshake::OPTION_ERROR;

/// Why a server refuses an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Unsupported,
    Policy,
    Invalid,
    Platform,
    TlsRequired,
    UnknownExport,
    ShuttingDown,
    BlockSizeRequired,
    TooBig,
    ExtendedHeadersRequired,
    Other(u32),
}

/// What a server could not do, in its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// The protocol's error number; equal to Linux's errno where both have it.
    pub code: u32,
    /// The server's message; empty where it gave none.
    pub message: String,
}

impl From<u32> for Refusal {
    fn from(kind: u32) -> Self {
        match kind & !OPTION_ERROR {
            1 => Self::Unsupported,
            2 => Self::Policy,
            3 => Self::Invalid,
            4 => Self::Platform,
            5 => Self::TlsRequired,
            6 => Self::UnknownExport,
            7 => Self::ShuttingDown,
            8 => Self::BlockSizeRequired,
            9 => Self::TooBig,
            10 => Self::ExtendedHeadersRequired,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "it does not know this request",
            Self::Policy => "its policy forbids it",
            Self::Invalid => "it finds the request malformed",
            Self::Platform => "its platform cannot do it",
            Self::TlsRequired => "it wants TLS",
            Self::UnknownExport => "it has no export of this name",
            Self::ShuttingDown => "it is shutting down",
            Self::BlockSizeRequired => "it wants block sizes negotiated",
            Self::TooBig => "the request is too big for it",
            Self::ExtendedHeadersRequired => "it wants extended headers",
            Self::Other(code) => return write!(f, "error {code} of its own"),
        })
    }
}

impl ServerError {
    /// The closest kind of `io::Error`.
    pub fn kind(&self) -> io::ErrorKind {
        match self.code {
            1 => io::ErrorKind::PermissionDenied,
            12 => io::ErrorKind::OutOfMemory,
            22 => io::ErrorKind::InvalidInput,
            28 => io::ErrorKind::StorageFull,
            75 => io::ErrorKind::InvalidInput,
            95 => io::ErrorKind::Unsupported,
            108 => io::ErrorKind::ConnectionAborted,
            _ => io::ErrorKind::Other,
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.code {
            1 => "not permitted",
            5 => "input/output error",
            12 => "out of memory",
            22 => "invalid request",
            28 => "no space left",
            75 => "too large a request",
            95 => "not supported",
            108 => "the server is shutting down",
            code => return write!(f, "error {code} {}", self.message),
        };
        match self.message.as_str() {
            "" => f.write_str(name),
            message => write!(f, "{name} ({message})"),
        }
    }
}
