//! What is done to one block of 4 KiB: its digest, whether it is zeros or noise, its difference to another.
//!
//! Owns the inner loops. They are written over whole words and arrays so that the compiler turns them into vector instructions; the
//! benchmarks say what comes of it. Promises nothing about lengths but what is said: all work on equal lengths or on the shorter.

use super::layout::BLOCK_LEN;

/// A block's digest under this gateway's key: BLAKE3, the first 16 bytes. Keyed, so that nobody finds two blocks of one digest who does
/// not know the key.
pub type BlockDigest = [u8; 16];

/// A gateway's key for block digests.
#[derive(Clone)]
pub struct DigestKey(pub(super) [u8; 32]);

impl DigestKey {
    /// A new one.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// The digest of one block.
    pub fn digest(&self, block: &[u8]) -> BlockDigest {
        let mut digest = [0; 16];
        digest.copy_from_slice(&blake3::keyed_hash(&self.0, block).as_bytes()[..16]);
        digest
    }
}

/// The key under which an index keeps a digest.
pub(super) fn short(digest: &BlockDigest) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|n| digest[n]))
}

/// Whether there is nothing but zeros.
pub fn is_zero(block: &[u8]) -> bool {
    let (wide, rest) = block.as_chunks::<64>();
    wide.iter()
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// `block ^= base`.
pub fn xor(block: &mut [u8], base: &[u8]) {
    for (byte, other) in block.iter_mut().zip(base) {
        *byte ^= other;
    }
}

/// How many bytes differ.
pub fn differing(block: &[u8], base: &[u8]) -> usize {
    let (a, _) = block.as_chunks::<64>();
    let (b, _) = base.as_chunks::<64>();
    // Sums of 64 fit in a byte: the inner loop stays within vectors of bytes, and without a check for overflow in each.
    let chunk = |(a, b): (&[u8; 64], &[u8; 64])| {
        let pairs = a.iter().zip(b);
        pairs.fold(0_u8, |sum, (a, b)| sum.wrapping_add(u8::from(a != b)))
    };
    a.iter().zip(b).map(|pair| usize::from(chunk(pair))).sum()
}

/// Bytes that [`is_noise`] looks at.
const SAMPLE: usize = 512;
/// Of `SAMPLE` random bytes the squares of how often each value occurs sum to 1534 on average, give or take 45.
const NOISE_SQUARES: u32 = 1534 + 6 * 45;

/// Whether a block looks like compressed or encrypted content, by a sample of its bytes.
pub fn is_noise(block: &[u8]) -> bool {
    if block.len() < BLOCK_LEN {
        return false;
    }
    let mut counts = [0_u16; 256];
    for piece in block.chunks_exact(BLOCK_LEN / 8) {
        for byte in &piece[..SAMPLE / 8] {
            counts[usize::from(*byte)] += 1;
        }
    }
    let squares = counts
        .iter()
        .map(|count| u32::from(*count) * u32::from(*count))
        .sum::<u32>();
    squares < NOISE_SQUARES
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_difference_gives_the_block_back(seed in any::<[u8; 32]>(), changes in prop::collection::vec((0usize..BLOCK_LEN, any::<u8>()), 0..40)) {
            let base: Vec<u8> = (0..BLOCK_LEN).map(|n| seed[n % 32].wrapping_mul(n as u8)).collect();
            let mut block = base.clone();
            for (at, byte) in changes {
                block[at] = byte;
            }
            let plain = block.iter().zip(&base).filter(|(a, b)| a != b).count();
            prop_assert_eq!(differing(&block, &base), plain);
            let mut residue = block.clone();
            xor(&mut residue, &base);
            prop_assert_eq!(is_zero(&residue), plain == 0);
            xor(&mut residue, &base);
            prop_assert_eq!(residue, block);
        }
    }

    #[test]
    fn noise_is_told_from_content() {
        let noise: Vec<u8> = std::iter::repeat_with(rand::random::<u8>)
            .take(BLOCK_LEN)
            .collect();
        assert!(is_noise(&noise));
        let text = b"The quick brown fox jumps over the lazy dog; 0123456789. ".repeat(80);
        assert!(!is_noise(&text[..BLOCK_LEN]));
        assert!(!is_noise(&[0; BLOCK_LEN]) && !is_noise(b"short"));
    }
}
