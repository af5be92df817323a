//! Benchmarks: content of known kinds for the small ones, and the side-by-side benchmark over the emulated WAN.
//!
//! Owns the generators, the same in every run. Leaves measuring of parts to the files in `benches/`.

pub mod micro;
pub mod wan;

/// `len` bytes that no compressor shrinks.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // xorshift64*: fast, and good enough to look like encrypted data to a compressor.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    };
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&next());
    }
    bytes.truncate(len);
    bytes
}

/// `len` bytes that shrink to about half, as programs and libraries do: noise in which every second run repeats an earlier one.
pub fn system(len: usize) -> Vec<u8> {
    let mut bytes = noise(len);
    for start in (8192..len.saturating_sub(64)).step_by(128) {
        bytes.copy_within(start - 8192..start - 8192 + 64, start);
    }
    bytes
}
