//! Requests: what they are called, how long they may take, how they look on the wire.

use std::time::Duration;

use super::NbdError;
use super::export::Headers;
use super::transport::Timeouts;

const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_REQUEST_EXTENDED: u32 = 0x21e4_1c71;
/// With zeroes: keep the range allocated.
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;
/// With extended headers: the length is the payload's, not that of an effect.
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
    BlockStatus = 7,
}

impl Command {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "zero",
            Self::BlockStatus => "tell the state of",
        }
    }

    pub(super) const fn during(self) -> &'static str {
        match self {
            Self::Read => "a read",
            Self::Write => "a write",
            Self::Disconnect => "the farewell",
            Self::Flush => "a flush",
            Self::Trim => "a trim",
            Self::WriteZeroes => "a write of zeroes",
            Self::BlockStatus => "a block status query",
        }
    }

    pub(super) const fn limit(self, timeouts: &Timeouts) -> Duration {
        match self {
            Self::Read | Self::Write | Self::BlockStatus | Self::Disconnect => timeouts.transfer,
            Self::Flush | Self::Trim | Self::WriteZeroes => timeouts.settle,
        }
    }
}

/// A request under way.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) cookie: u64,
}

impl Request {
    /// The request's header.
    pub(super) fn encode(&self, headers: Headers, flags: u16) -> Result<Vec<u8>, NbdError> {
        let extended = headers == Headers::Extended;
        let flags = if extended && self.command == Command::Write {
            flags | FLAG_PAYLOAD_LEN
        } else {
            flags
        };
        let magic = if extended {
            MAGIC_REQUEST_EXTENDED
        } else {
            MAGIC_REQUEST
        };
        let mut header = Vec::with_capacity(32);
        header.extend_from_slice(&magic.to_be_bytes());
        header.extend_from_slice(&flags.to_be_bytes());
        header.extend_from_slice(&(self.command as u16).to_be_bytes());
        header.extend_from_slice(&self.cookie.to_be_bytes());
        header.extend_from_slice(&self.offset.to_be_bytes());
        if extended {
            header.extend_from_slice(&self.len.to_be_bytes());
            return Ok(header);
        }
        let len = u32::try_from(self.len).map_err(|_| {
            NbdError::Unusable(format!(
                "a request of {} bytes does not fit in a 32-bit NBD header",
                self.len
            ))
        })?;
        header.extend_from_slice(&len.to_be_bytes());
        Ok(header)
    }
}
