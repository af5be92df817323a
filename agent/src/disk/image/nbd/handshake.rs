//! From a fresh connection to an export that takes commands.
//!
//! Owns the order of the newstyle handshake: greeting, extended headers or else structured replies, metadata
//! contexts, GO. Leaves alone the commands. Promises to end within the handshake's deadline and after a
//! bounded number of replies.

use super::decode::{self, Info, OptionReplyKind, Refusal};
use super::export::{BlockSizes, Context, Export, ExportFlags, Headers};
use super::transport::{Link, Timed};
use super::{ConnectOptions, NbdError, WireError};

/// Starts every option, and ends the greeting of a newstyle server.
pub(super) const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const OPTION_SET_META_CONTEXT: u32 = 10;
const OPTION_EXTENDED_HEADERS: u32 = 11;
const INFO_BLOCK_SIZE: u16 = 3;
const CLIENT_FIXED_NEWSTYLE: u32 = 1;
const CLIENT_NO_ZEROES: u32 = 2;
/// Most metadata contexts of one connection.
const CONTEXTS_MAX: usize = 16;
/// Most replies to one option; an honest server sends a handful.
const REPLIES_MAX: usize = 64;
/// The protocol's limit for names.
const NAME_MAX: usize = 4096;

/// What a server answered to one option, in the order of arrival; the final acknowledgement is not among
/// them.
enum Outcome {
    Granted(Vec<(OptionReplyKind, Vec<u8>)>),
    Refused(Refusal, String),
}

/// Negotiates the export `name`.
pub(super) fn negotiate<T: Timed>(
    link: &mut Link<T>,
    name: &str,
    options: &ConnectOptions,
) -> Result<Export, NbdError> {
    check_names(name, &options.contexts)?;
    link.begin("the handshake", options.timeouts.handshake);
    let greeting = link.array()?;
    let hello = decode::hello(&greeting).map_err(|error| link.violation(error))?;
    let flags = CLIENT_FIXED_NEWSTYLE | if hello.no_zeroes { CLIENT_NO_ZEROES } else { 0 };
    link.write(&flags.to_be_bytes())?;
    let headers = agree_on_headers(link)?;
    let contexts = match headers {
        Headers::Simple => Vec::new(),
        Headers::Structured | Headers::Extended => set_contexts(link, name, &options.contexts)?,
    };
    go(link, name, headers, contexts)
}

fn check_names(name: &str, contexts: &[String]) -> Result<(), NbdError> {
    if name.len() > NAME_MAX || contexts.iter().any(|context| context.len() > NAME_MAX) {
        return Err(NbdError::Unusable("NBD names end at 4,096 bytes".into()));
    }
    if contexts.len() > CONTEXTS_MAX {
        return Err(NbdError::Unusable(format!(
            "at most {CONTEXTS_MAX} metadata contexts fit in one connection"
        )));
    }
    Ok(())
}

fn agree_on_headers<T: Timed>(link: &mut Link<T>) -> Result<Headers, NbdError> {
    if let Outcome::Granted(_) = ask(link, OPTION_EXTENDED_HEADERS, &[])? {
        return Ok(Headers::Extended);
    }
    Ok(match ask(link, OPTION_STRUCTURED_REPLY, &[])? {
        Outcome::Granted(_) => Headers::Structured,
        Outcome::Refused(..) => Headers::Simple,
    })
}

fn set_contexts<T: Timed>(
    link: &mut Link<T>,
    name: &str,
    wanted: &[String],
) -> Result<Vec<Context>, NbdError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut request = Vec::new();
    push_string(&mut request, name);
    request.extend_from_slice(&(wanted.len() as u32).to_be_bytes());
    for context in wanted {
        push_string(&mut request, context);
    }
    let Outcome::Granted(replies) = ask(link, OPTION_SET_META_CONTEXT, &request)? else {
        return Ok(Vec::new()); // If the reason was the export itself, GO says so next.
    };
    let mut contexts: Vec<Context> = Vec::new();
    for (kind, payload) in replies {
        if kind != OptionReplyKind::MetaContext {
            continue;
        }
        let (id, name) = decode::meta_context(&payload).map_err(|error| link.violation(error))?;
        if !wanted.contains(&name) {
            return Err(link.violation(WireError::Contradiction(
                "a metadata context was granted that was not asked for",
            )));
        }
        if contexts
            .iter()
            .any(|context| context.id == id || context.name == name)
        {
            return Err(link.violation(WireError::Contradiction("a metadata context was granted twice")));
        }
        contexts.push(Context { id, name });
    }
    Ok(contexts)
}

fn go<T: Timed>(
    link: &mut Link<T>,
    name: &str,
    headers: Headers,
    contexts: Vec<Context>,
) -> Result<Export, NbdError> {
    let mut request = Vec::new();
    push_string(&mut request, name);
    request.extend_from_slice(&1u16.to_be_bytes());
    request.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    let replies = match ask(link, OPTION_GO, &request)? {
        Outcome::Granted(replies) => replies,
        Outcome::Refused(refusal, message) => {
            let reason = if message.is_empty() {
                refusal.to_string()
            } else {
                format!("{refusal} ({message})")
            };
            return Err(NbdError::Refused {
                what: format!("the export {name:?}"),
                reason,
            });
        }
    };
    let mut size_and_flags = None;
    let mut block = BlockSizes::UNSTATED;
    for (kind, payload) in replies {
        if kind != OptionReplyKind::Info {
            continue;
        }
        match decode::info(&payload).map_err(|error| link.violation(error))? {
            Info::Export { size, flags } => size_and_flags = Some((size, ExportFlags(flags))),
            Info::BlockSizes(sizes) => block = sizes,
            Info::Other(_) => {}
        }
    }
    let Some((size, flags)) = size_and_flags else {
        return Err(link.violation(WireError::Contradiction("an export was granted without its size")));
    };
    // Offsets are signed 64-bit numbers to every file system and to QEMU.
    if size > i64::MAX as u64 {
        return Err(link.violation(WireError::Contradiction(
            "an export is larger than any disk can be",
        )));
    }
    if size % u64::from(block.min) != 0 {
        return Err(link.violation(WireError::Contradiction(
            "an export's size is no multiple of its smallest block",
        )));
    }
    Ok(Export {
        size,
        flags,
        block,
        headers,
        contexts,
    })
}

/// Sends one option and collects its replies up to the acknowledgement or refusal.
fn ask<T: Timed>(link: &mut Link<T>, option: u32, data: &[u8]) -> Result<Outcome, NbdError> {
    let mut request = Vec::with_capacity(16 + data.len());
    request.extend_from_slice(&MAGIC_OPTION.to_be_bytes());
    request.extend_from_slice(&option.to_be_bytes());
    request.extend_from_slice(&(data.len() as u32).to_be_bytes()); // At most 17 names of 4,096 bytes.
    request.extend_from_slice(data);
    link.write(&request)?;
    let mut replies = Vec::new();
    for _ in 0..REPLIES_MAX {
        let header = link.array()?;
        let reply = decode::option_reply(&header, option).map_err(|error| link.violation(error))?;
        let payload = link.payload(reply.len.into())?;
        match reply.kind {
            OptionReplyKind::Ack => return Ok(Outcome::Granted(replies)),
            OptionReplyKind::Refused(refusal) => {
                return Ok(Outcome::Refused(refusal, decode::printable(&payload)));
            }
            kind => replies.push((kind, payload)),
        }
    }
    Err(link.violation(WireError::Contradiction("an option was answered too many times")))
}

fn push_string(message: &mut Vec<u8>, text: &str) {
    message.extend_from_slice(&(text.len() as u32).to_be_bytes()); // At most 4,096 bytes: `check_names`.
    message.extend_from_slice(text.as_bytes());
}
