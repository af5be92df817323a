//! Fewer bytes for the same batch, and back.
//!
//! Owns the encodings of a payload and the choice between them. Leaves alone where payloads go. Promises that a payload is never
//! larger than the raw data, that restoring allocates exactly the raw length that the checked header names, and that a damaged
//! payload is an error, never wrong data: the batch digest is checked behind it.
//!
//! The window of blocks that both gateways share, XOR deltas and stronger compressors take their place beside [`Encoding`].

mod compress;
pub mod workers;

use bytes::Bytes;
use longhaul_common::wire::batch::BatchError;

/// How a payload's bytes stand for the raw data. One byte on the wire; zero is never sent, so a zeroed buffer means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// The data itself.
    Raw = 1,
    /// One LZ4 block.
    Lz4 = 2,
}

impl Encoding {
    /// From its byte on the wire.
    pub fn from_wire(byte: u8) -> Result<Self, BatchError> {
        match byte {
            1 => Ok(Self::Raw),
            2 => Ok(Self::Lz4),
            _ => Err(BatchError::Payload(
                "its encoding is unknown; the peer may run another version",
            )),
        }
    }
}

/// The data of one batch, reduced.
#[derive(Clone, Debug)]
pub struct Payload {
    pub encoding: Encoding,
    pub bytes: Bytes,
}

/// Reduces the data of one batch. CPU-bound: call it on [`workers`].
pub fn reduce(raw: Bytes) -> Payload {
    match compress::lz4(&raw) {
        Some(smaller) => Payload {
            encoding: Encoding::Lz4,
            bytes: smaller.into(),
        },
        None => Payload {
            encoding: Encoding::Raw,
            bytes: raw,
        },
    }
}

/// The raw data of `raw_len` bytes that `payload` stands for. CPU-bound: call it on [`workers`].
pub fn restore(payload: &Payload, raw_len: usize) -> Result<Bytes, BatchError> {
    match payload.encoding {
        Encoding::Raw if payload.bytes.len() == raw_len => Ok(payload.bytes.clone()),
        Encoding::Raw => Err(BatchError::DataLength {
            expected: raw_len as u64,
            got: payload.bytes.len() as u64,
        }),
        Encoding::Lz4 => compress::unlz4(&payload.bytes, raw_len).map(Bytes::from),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn restores_what_it_reduced_and_never_grows(
            seed in any::<u64>(), len in 0usize..200_000, repeat in 1usize..5_000, noise in any::<bool>(),
        ) {
            let mut state = seed;
            let mut raw: Vec<u8> = (0..len).map(|i| if noise {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            } else {
                (i % repeat) as u8
            }).collect();
            raw.truncate(len);
            let payload = reduce(raw.clone().into());
            prop_assert!(payload.bytes.len() <= raw.len());
            prop_assert_eq!(&restore(&payload, raw.len()).unwrap()[..], &raw[..]);
            prop_assert!(restore(&payload, raw.len() + 1).is_err());
        }

        #[test]
        fn hostile_payloads_are_refused_or_of_the_right_length(bytes in prop::collection::vec(any::<u8>(), 0..400), raw_len in 0usize..5000) {
            let payload = Payload { encoding: Encoding::Lz4, bytes: bytes.into() };
            if let Ok(raw) = restore(&payload, raw_len) {
                prop_assert_eq!(raw.len(), raw_len);
            }
        }
    }
}
