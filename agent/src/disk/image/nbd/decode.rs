//! What an NBD server says: bytes in, values or a refusal out.
//!
//! Owns the layout of every message a client receives. Leaves alone sockets, order of messages and whether an answer fits
//! the question. Promises: pure, no panic on any input, and no memory taken beyond what the input itself holds.

use std::io;

use super::export::{BlockSizes, Headers};

/// Largest payload of one option reply. The protocol's strings end at 4,096 bytes; servers may say a little more.
pub const OPTION_REPLY_MAX: u32 = 16 * 1024;
/// Largest payload of one block status chunk: 128 Ki extents in 64 bits, what QEMU's server stays within.
pub const BLOCK_STATUS_MAX: u64 = 8 + 128 * 1024 * 16;
/// Largest payload of one error chunk: code, message length, a message of 4,096 bytes, an offset.
pub const ERROR_MAX: u64 = 2 + 4 + 4096 + 8;
/// Bytes of the server's greeting.
pub const HELLO_LEN: usize = 18;
/// Bytes of an option reply's header.
pub const OPTION_REPLY_LEN: usize = 20;

pub(super) const MAGIC_HELLO: u64 = 0x4e42_444d_4147_4943;
pub(super) const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_SIMPLE: u32 = 0x6744_6698;
const MAGIC_STRUCTURED: u32 = 0x668e_33ef;
const MAGIC_EXTENDED: u32 = 0x6e8a_278c;
const OPTION_ERROR: u32 = 1 << 31;
const CHUNK_DONE: u16 = 1;
const CHUNK_ERROR: u16 = 1 << 15;

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

/// The server's first words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Whether the server closes with 124 zeroes less, if asked.
    pub no_zeroes: bool,
}

/// One answer to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub kind: OptionReplyKind,
    /// Bytes of payload that follow.
    pub len: u32,
}

/// What an option reply is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionReplyKind {
    Ack,
    Info,
    MetaContext,
    /// An error; the payload is a message for people.
    Refused(Refusal),
    /// Something this client never asked for.
    Other(u32),
}

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

/// One piece of information about an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Info {
    Export { size: u64, flags: u16 },
    BlockSizes(BlockSizes),
    Other(u16),
}

/// The header of one reply or reply chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub kind: ChunkKind,
    /// Whether this is the last chunk for its request.
    pub done: bool,
    /// The request's cookie.
    pub cookie: u64,
    /// Bytes of payload that follow.
    pub len: u64,
}

/// What a chunk carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// A simple reply without error: a read's data follows without a length of its own.
    Simple,
    /// A simple reply with an error.
    SimpleError(u32),
    None,
    OffsetData,
    OffsetHole,
    BlockStatus {
        wide: bool,
    },
    Error {
        with_offset: bool,
    },
}

/// What a server could not do, in its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// The protocol's error number; equal to Linux's errno where both have it.
    pub code: u32,
    /// The server's message; empty where it gave none.
    pub message: String,
}

/// Answer to a block status request for one context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    pub context: u32,
    /// Length in bytes, and flags as the context defines them.
    pub runs: Vec<(u64, u64)>,
}

/// Reads the greeting; only fixed newstyle servers are accepted.
pub fn hello(bytes: &[u8; HELLO_LEN]) -> Result<Hello, WireError> {
    let mut input = Fields {
        rest: bytes,
        what: "greeting",
    };
    expect("greeting", input.u64()?, MAGIC_HELLO, "NBDMAGIC")?;
    expect("style", input.u64()?, MAGIC_OPTION, "IHAVEOPT (newstyle)")?;
    let flags = input.u16()?;
    if flags & 1 == 0 {
        return Err(WireError::Unexpected {
            field: "handshake flags",
            got: flags.into(),
            expected: "the fixed newstyle bit",
        });
    }
    Ok(Hello {
        no_zeroes: flags & 2 != 0,
    })
}

/// Reads the header of a reply to `option`.
pub fn option_reply(bytes: &[u8; OPTION_REPLY_LEN], option: u32) -> Result<OptionReply, WireError> {
    let mut input = Fields {
        rest: bytes,
        what: "option reply",
    };
    expect(
        "option reply magic",
        input.u64()?,
        MAGIC_OPTION_REPLY,
        "0x3e889045565a9",
    )?;
    expect(
        "option of the reply",
        input.u32()?.into(),
        option.into(),
        "the option that was sent",
    )?;
    let kind = input.u32()?;
    let len = input.u32()?;
    if len > OPTION_REPLY_MAX {
        return Err(WireError::Length {
            what: "an option reply",
            got: len.into(),
            expected: "16,384",
        });
    }
    let kind = match kind {
        1 => OptionReplyKind::Ack,
        3 => OptionReplyKind::Info,
        4 => OptionReplyKind::MetaContext,
        error if error & OPTION_ERROR != 0 => OptionReplyKind::Refused(Refusal::from(error)),
        other => OptionReplyKind::Other(other),
    };
    Ok(OptionReply { kind, len })
}

/// Reads the payload of an information reply.
pub fn info(payload: &[u8]) -> Result<Info, WireError> {
    let mut input = Fields {
        rest: payload,
        what: "export information",
    };
    let info = match input.u16()? {
        0 => Info::Export {
            size: input.u64()?,
            flags: input.u16()?,
        },
        3 => Info::BlockSizes(BlockSizes::checked(input.u32()?, input.u32()?, input.u32()?)?),
        other => return Ok(Info::Other(other)),
    };
    input.end()?;
    Ok(info)
}

/// Reads the payload of a metadata context reply: its number and name.
pub fn meta_context(payload: &[u8]) -> Result<(u32, String), WireError> {
    let mut input = Fields {
        rest: payload,
        what: "metadata context",
    };
    let id = input.u32()?;
    let name = std::str::from_utf8(input.rest)
        .map_err(|_| WireError::Contradiction("a metadata context's name is not UTF-8"))?;
    Ok((id, name.to_owned()))
}

/// Bytes that a message of the server's starts with, by the negotiated headers and the magic number in its first 4 bytes.
pub fn header_len(magic: [u8; 4], headers: Headers) -> Result<usize, WireError> {
    match (u32::from_be_bytes(magic), headers) {
        (MAGIC_SIMPLE, Headers::Simple | Headers::Structured) => Ok(16),
        (MAGIC_STRUCTURED, Headers::Structured) => Ok(20),
        (MAGIC_EXTENDED, Headers::Extended) => Ok(32),
        (got, _) => Err(WireError::Unexpected {
            field: "reply magic",
            got: got.into(),
            expected: match headers {
                Headers::Simple => "a simple reply",
                Headers::Structured => "a simple or structured reply",
                Headers::Extended => "an extended reply",
            },
        }),
    }
}

/// Reads a whole reply header, magic number included; `bytes` are as many as [`header_len`] says.
pub fn chunk(bytes: &[u8]) -> Result<Chunk, WireError> {
    let mut input = Fields {
        rest: bytes,
        what: "reply header",
    };
    let magic = input.u32()?;
    if magic == MAGIC_SIMPLE {
        let error = input.u32()?;
        let kind = if error == 0 {
            ChunkKind::Simple
        } else {
            ChunkKind::SimpleError(error)
        };
        return Ok(Chunk {
            kind,
            done: true,
            cookie: input.u64()?,
            len: 0,
        });
    }
    let flags = input.u16()?;
    let kind = input.u16()?;
    let cookie = input.u64()?;
    let len = match magic {
        MAGIC_EXTENDED => {
            input.u64()?; // The request's offset once more; the cookie already says which request it is.
            input.u64()?
        }
        _ => input.u32()?.into(),
    };
    let kind = chunk_kind(kind)?;
    let chunk = Chunk {
        kind,
        done: flags & CHUNK_DONE != 0,
        cookie,
        len,
    };
    check_chunk_len(&chunk)?;
    Ok(chunk)
}

fn chunk_kind(kind: u16) -> Result<ChunkKind, WireError> {
    Ok(match kind {
        0 => ChunkKind::None,
        1 => ChunkKind::OffsetData,
        2 => ChunkKind::OffsetHole,
        5 => ChunkKind::BlockStatus { wide: false },
        6 => ChunkKind::BlockStatus { wide: true },
        // Unknown error kinds start as the known ones do, says the protocol.
        error if error & CHUNK_ERROR != 0 => ChunkKind::Error {
            with_offset: error == CHUNK_ERROR + 2,
        },
        other => {
            return Err(WireError::Unexpected {
                field: "chunk type",
                got: other.into(),
                expected: "none, data, hole, block status or error",
            });
        }
    })
}

fn check_chunk_len(chunk: &Chunk) -> Result<(), WireError> {
    let (fits, what, expected) = match chunk.kind {
        ChunkKind::Simple | ChunkKind::SimpleError(_) => (true, "", ""),
        ChunkKind::None if !chunk.done => {
            return Err(WireError::Contradiction("an empty chunk is not the last one"));
        }
        ChunkKind::None => (chunk.len == 0, "an empty chunk", "0"),
        ChunkKind::OffsetData => (chunk.len > 8, "a data chunk", "at least 9"),
        ChunkKind::OffsetHole => (chunk.len == 12, "a hole chunk", "12"),
        ChunkKind::BlockStatus { .. } => (
            (12..=BLOCK_STATUS_MAX).contains(&chunk.len),
            "a status chunk",
            "12 to 2 Mi",
        ),
        ChunkKind::Error { .. } => (
            (6..=ERROR_MAX).contains(&chunk.len),
            "an error chunk",
            "6 to 4,110",
        ),
    };
    if fits {
        Ok(())
    } else {
        Err(WireError::Length {
            what,
            got: chunk.len,
            expected,
        })
    }
}

/// Reads the 8 bytes in front of a data chunk's data: where it goes.
pub fn data_offset(bytes: [u8; 8]) -> u64 {
    u64::from_be_bytes(bytes)
}

/// Reads the payload of a hole chunk: offset and length in bytes.
pub fn hole(bytes: &[u8; 12]) -> Result<(u64, u32), WireError> {
    let mut input = Fields {
        rest: bytes,
        what: "hole chunk",
    };
    Ok((input.u64()?, input.u32()?))
}

/// Reads the payload of an error chunk.
pub fn error(payload: &[u8], with_offset: bool) -> Result<ServerError, WireError> {
    let mut input = Fields {
        rest: payload,
        what: "error chunk",
    };
    let code = input.u32()?;
    let message_len = input.u16()?;
    let message = input.bytes(message_len.into())?;
    if with_offset {
        input.u64()?;
        input.end()?;
    }
    if code == 0 {
        return Err(WireError::Contradiction("an error chunk carries error number 0"));
    }
    Ok(ServerError {
        code,
        message: printable(message),
    })
}

/// Reads the payload of a block status chunk, `wide` for 64-bit lengths and flags. Empty runs are refused.
pub fn block_status(payload: &[u8], wide: bool) -> Result<BlockStatus, WireError> {
    let mut input = Fields {
        rest: payload,
        what: "status chunk",
    };
    let context = input.u32()?;
    let count = if wide { Some(input.u32()?) } else { None };
    let entry = if wide { 16 } else { 8 };
    let entries = input.rest.len() / entry;
    if !input.rest.len().is_multiple_of(entry) || entries == 0 {
        return Err(WireError::Length {
            what: "a list of runs",
            got: input.rest.len() as u64,
            expected: "one or more whole runs",
        });
    }
    if count.is_some_and(|count| count as usize != entries) {
        return Err(WireError::Contradiction(
            "a status chunk announces another number of runs than it holds",
        ));
    }
    let mut runs = Vec::with_capacity(entries);
    for _ in 0..entries {
        let run = if wide {
            (input.u64()?, input.u64()?)
        } else {
            (input.u32()?.into(), input.u32()?.into())
        };
        if run.0 == 0 {
            return Err(WireError::Contradiction("a status chunk holds a run of 0 bytes"));
        }
        runs.push(run);
    }
    Ok(BlockStatus { context, runs })
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

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
