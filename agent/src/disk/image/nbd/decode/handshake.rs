//! What a server says before an export is agreed on.

use super::super::export::BlockSizes;
use super::super::handshake::MAGIC_OPTION;
use super::{Fields, Refusal, WireError, expect};

/// Largest payload of one option reply. The protocol's strings end at 4,096 bytes; servers may say a little
/// more.
pub const OPTION_REPLY_MAX: u32 = 16 * 1024;
/// Bytes of the server's greeting.
pub const HELLO_LEN: usize = 18;
/// Bytes of an option reply's header.
pub const OPTION_REPLY_LEN: usize = 20;

const MAGIC_HELLO: u64 = 0x4e42_444d_4147_4943;
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Set in the type of a reply that refuses the option.
pub(super) const OPTION_ERROR: u32 = 1 << 31;

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

/// One piece of information about an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Info {
    Export { size: u64, flags: u16 },
    BlockSizes(BlockSizes),
    Other(u16),
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
