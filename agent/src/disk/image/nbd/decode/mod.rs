//! What an NBD server says: bytes in, values or a refusal out.
//!
//! Owns the layout of every message a client receives: `handshake` and `reply` by the phase they belong to,
//! `refusal` for what a server could not do. Leaves alone sockets, order of messages and whether an answer
//! fits the question. Promises: pure, no panic on any input, and no memory taken beyond what the input itself
//! holds.

mod handshake;
mod refusal;
mod reply;

pub use handshake::{
    HELLO_LEN, Hello, Info, OPTION_REPLY_LEN, OPTION_REPLY_MAX, OptionReply, OptionReplyKind, hello, info,
    meta_context, option_reply,
};
pub use refusal::{Refusal, ServerError};
pub use reply::{
    BLOCK_STATUS_MAX, BlockStatus, Chunk, ChunkKind, ERROR_MAX, block_status, chunk, data_offset, error,
    header_len, hole,
};

/// How a server's bytes violate the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("{field} is {got:#x} where {expected} was expected")]
    Unexpected {
        field: &'static str,
        got: u64,
        expected: &'static str,
    },
    #[error("{what} is {got} bytes long where {expected} fit")]
    Length {
        what: &'static str,
        got: u64,
        expected: &'static str,
    },
    #[error("{what} is cut short")]
    Truncated { what: &'static str },
    #[error("{0}")]
    Contradiction(&'static str),
}

/// A server's message made safe for logs: lossy UTF-8 without control characters, at most 256 characters.
pub fn printable(message: &[u8]) -> String {
    let text = String::from_utf8_lossy(message);
    text.chars().filter(|c| !c.is_control()).take(256).collect()
}

fn expect(field: &'static str, got: u64, wanted: u64, expected: &'static str) -> Result<(), WireError> {
    if got == wanted {
        Ok(())
    } else {
        Err(WireError::Unexpected { field, got, expected })
    }
}

/// Big-endian fields, taken from the front.
struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(WireError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(WireError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_be_bytes)
    }

    fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(WireError::Contradiction("a message is longer than its fields"))
        }
    }
}
