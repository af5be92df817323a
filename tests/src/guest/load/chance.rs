//! Numbers that look random and are the same for the same seed, and the checksum over records.
//!
//! Owns nothing but arithmetic. Guest and lab must agree on it for ever within one build; it is no
//! cryptography, and hits by accident only with a chance of 2^-64.

/// Mixes all bits of a number (the finalizer of splitmix64).
pub fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A number drawn for `seed` at `step`, below `limit` (which must not be 0).
pub fn below(seed: u64, step: u64, limit: u64) -> u64 {
    mix(seed ^ mix(step)) % limit.max(1)
}

/// Fills bytes from a seed.
pub fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed;
    for chunk in bytes.chunks_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = ((state ^ (state >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9)).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

/// Checksum of bytes; any change of up to eight neighbouring bytes changes it.
pub fn checksum(bytes: &[u8]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64;
    bytes.chunks(8).fold(start, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word))
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(23)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_changes_the_checksum() {
        let mut bytes = vec![0; 200];
        fill(&mut bytes, 3);
        let sum = checksum(&bytes);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(checksum(&bytes), sum, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert_ne!(checksum(&bytes[..199]), sum);
    }
}
