//! Control messages on a stream: length, then postcard.
//!
//! Owns framing and its limit. Leaves alone what a message means. Promises that no more than [`FRAME_MAX`] bytes are ever held for
//! one frame, whatever the peer claims, and that bytes behind a message inside its frame are refused.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest control message, in bytes without its length.
pub const FRAME_MAX: usize = 1 << 20;

/// Why a frame cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {len} bytes is larger than the limit of {FRAME_MAX}")]
    TooLarge { len: usize },
    #[error("a frame does not hold the expected message; the peer may run another version")]
    Malformed(#[source] postcard::Error),
    #[error("{extra} bytes follow the message in its frame; the peer may run another version")]
    Trailing { extra: usize },
    #[error("the stream ended inside a frame")]
    Truncated,
    #[error("the stream failed")]
    Stream(#[source] io::Error),
}

/// One message as the bytes of its frame, length included.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, vec![0; 4]).map_err(FrameError::Malformed)?;
    let len = bytes.len() - 4;
    if len > FRAME_MAX {
        return Err(FrameError::TooLarge { len });
    }
    bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(bytes)
}

/// One message from the body of its frame.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    let (message, rest) = postcard::take_from_bytes(body).map_err(FrameError::Malformed)?;
    match rest.len() {
        0 => Ok(message),
        extra => Err(FrameError::Trailing { extra }),
    }
}

/// Writes one message.
pub async fn write<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> Result<(), FrameError> {
    stream
        .write_all(&encode(message)?)
        .await
        .map_err(FrameError::Stream)
}

/// Reads one message; `None` where the stream ended between two frames. Not cancel-safe: call it from a task that only reads.
pub async fn read<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<Option<T>, FrameError> {
    let mut len = [0; 4];
    let mut filled = 0;
    while filled < len.len() {
        match stream
            .read(&mut len[filled..])
            .await
            .map_err(FrameError::Stream)?
        {
            0 if filled == 0 => return Ok(None),
            0 => return Err(FrameError::Truncated),
            n => filled += n,
        }
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > FRAME_MAX {
        return Err(FrameError::TooLarge { len });
    }
    let mut body = vec![0; len];
    stream
        .read_exact(&mut body)
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => FrameError::Truncated,
            _ => FrameError::Stream(error),
        })?;
    decode(&body).map(Some)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    proptest! {
        #[test]
        fn frames_come_back_in_order_and_every_cut_is_seen(messages in prop::collection::vec(".{0,40}", 0..5), cut in any::<prop::sample::Index>()) {
            let bytes: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
            let ends: Vec<usize> = messages.iter().scan(0, |at, message| { *at += encode(message).unwrap().len(); Some(*at) }).collect();
            let cut = cut.index(bytes.len() + 1);
            let mut stream = &bytes[..cut];
            for (end, message) in ends.iter().zip(&messages).filter(|(end, _)| **end <= cut) {
                let read = block_on(read::<String>(&mut stream)).unwrap();
                prop_assert_eq!(read.as_ref(), Some(message), "at {}", end);
            }
            let clean = cut == 0 || ends.contains(&cut);
            prop_assert_eq!(matches!(block_on(read::<String>(&mut stream)), Ok(None)), clean);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = block_on(read::<Vec<(u64, String)>>(&mut &bytes[..]));
        }
    }

    #[test]
    fn an_absurd_length_is_refused_before_it_is_allocated() {
        let claim = u32::MAX.to_le_bytes();
        assert!(matches!(
            block_on(read::<String>(&mut &claim[..])),
            Err(FrameError::TooLarge { .. })
        ));
        assert!(matches!(
            decode::<u8>(&[1, 2]),
            Err(FrameError::Trailing { extra: 1 })
        ));
    }
}
