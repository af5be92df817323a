//! What a server answers to commands.

use super::super::export::Headers;
use super::{Fields, ServerError, WireError, printable};

/// Largest payload of one block status chunk: 128 Ki extents in 64 bits, what QEMU's server stays within.
pub const BLOCK_STATUS_MAX: u64 = 8 + 128 * 1024 * 16;
/// Largest payload of one error chunk: code, message length, a message of 4,096 bytes, an offset.
pub const ERROR_MAX: u64 = 2 + 4 + 4096 + 8;

const MAGIC_SIMPLE: u32 = 0x6744_6698;
const MAGIC_STRUCTURED: u32 = 0x668e_33ef;
const MAGIC_EXTENDED: u32 = 0x6e8a_278c;
const CHUNK_DONE: u16 = 1;
const CHUNK_ERROR: u16 = 1 << 15;

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

/// Answer to a block status request for one context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    pub context: u32,
    /// Length in bytes, and flags as the context defines them.
    pub runs: Vec<(u64, u64)>,
}

/// Bytes that a message of the server's starts with, by the negotiated headers and the magic number in its
/// first 4 bytes.
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
