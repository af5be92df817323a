//! LZ4, the only place that knows the library.
//!
//! Owns buffers and limits around it. Content that does not shrink is recognised by LZ4 itself, which steps over it in growing
//! strides, so a try costs little.

use longhaul_common::wire::batch::BatchError;
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

/// Less is not worth a restore.
const GAIN_MIN: usize = 64;

/// One LZ4 block, or `None` where it would not be smaller.
pub(super) fn lz4(raw: &[u8]) -> Option<Vec<u8>> {
    if raw.len() <= GAIN_MIN {
        return None;
    }
    let mut out = vec![0; get_maximum_output_size(raw.len())];
    let len = compress_into(raw, &mut out).ok()?;
    if len + GAIN_MIN > raw.len() {
        return None;
    }
    out.truncate(len);
    out.shrink_to_fit();
    Some(out)
}

/// The `raw_len` bytes that one LZ4 block stands for.
pub(super) fn unlz4(block: &[u8], raw_len: usize) -> Result<Vec<u8>, BatchError> {
    let mut raw = vec![0; raw_len];
    match decompress_into(block, &mut raw) {
        Ok(len) if len == raw_len => Ok(raw),
        Ok(len) => Err(BatchError::DataLength {
            expected: raw_len as u64,
            got: len as u64,
        }),
        Err(_) => Err(BatchError::Payload("its LZ4 block is damaged")),
    }
}
