//! What is done to one block of 4 KiB: its digest, whether it is zeros or noise, its difference to another.
//!
//! Owns the inner loops. They are written over whole words and arrays so that the compiler turns them into vector instructions; the
//! benchmarks say what comes of it. Promises nothing about lengths but what is said: all work on equal lengths or on the shorter.

use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::layout::BLOCK_LEN;

/// A block's digest under this gateway's key.
pub type BlockDigest = [u8; 16];

/// A gateway's key for block digests.
///
/// A digest is GMAC (NIST SP 800-38D) with one nonce for all: a polynomial in a secret point, so that who does not know the key, and has
/// never seen a digest, finds two blocks of one digest with a chance of 2^-120 at each try (McGrew and Viega, "The Security and
/// Performance of the Galois/Counter Mode of Operation", 2004). **Seen digests tell the key**: they stay in this program and its folder, beside
/// the key. What is restored by them is held against the batch's own digest, which is BLAKE3. Eight times as fast as that over 4 KiB.
#[derive(Clone)]
pub struct DigestKey {
    pub(super) bytes: [u8; 32],
    /// None where the library will not take the key.
    mac: Option<Arc<LessSafeKey>>,
}

impl DigestKey {
    /// A new one.
    pub fn random() -> Self {
        Self::of(rand::random())
    }

    pub(super) fn of(bytes: [u8; 32]) -> Self {
        let key = UnboundKey::new(&AES_256_GCM, &bytes).ok();
        Self {
            bytes,
            mac: key.map(|key| Arc::new(LessSafeKey::new(key))),
        }
    }

    /// The digest of one block.
    pub fn digest(&self, block: &[u8]) -> BlockDigest {
        self.gmac(block).unwrap_or_else(|| self.without_gmac(block))
    }

    fn gmac(&self, block: &[u8]) -> Option<BlockDigest> {
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        let mac = self.mac.as_ref()?;
        let tag = mac.seal_in_place_separate_tag(nonce, Aad::from(block), &mut []);
        tag.ok()?.as_ref().try_into().ok()
    }

    /// Slower, and as good: a library that refuses to work costs time and nothing else.
    fn without_gmac(&self, block: &[u8]) -> BlockDigest {
        let mut digest = [0; 16];
        digest.copy_from_slice(&blake3::keyed_hash(&self.bytes, block).as_bytes()[..16]);
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
/// Of `SAMPLE` random bytes half of all bits are set on average, give or take 32.
const NOISE_ONES: std::ops::Range<u32> = 2048 - 6 * 32..2048 + 6 * 32;
/// Of `SAMPLE` random bytes the squares of how often each value occurs sum to 1534 on average, give or take 45.
const NOISE_SQUARES: u32 = 1534 + 6 * 45;

/// Whether a block looks like compressed or encrypted content, by a sample of its bytes.
pub fn is_noise(block: &[u8]) -> bool {
    if block.len() < BLOCK_LEN {
        return false;
    }
    let sample = || {
        block
            .chunks_exact(BLOCK_LEN / 8)
            .map(|piece| &piece[..SAMPLE / 8])
    };
    // Most content has too few bits set, which is seen at a glance.
    let words = sample().flat_map(|piece| piece.as_chunks::<8>().0);
    let ones = words
        .map(|word| u64::from_ne_bytes(*word).count_ones())
        .sum::<u32>();
    if !NOISE_ONES.contains(&ones) {
        return false;
    }
    let mut counts = [0_u16; 256];
    for byte in sample().flatten() {
        counts[usize::from(*byte)] += 1;
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
    fn a_digest_is_of_all_of_its_block_under_one_key() {
        let block: Vec<u8> = (0..BLOCK_LEN).map(|n| (n * n / 7) as u8).collect();
        let (one, other) = (DigestKey::of([1; 32]), DigestKey::of([2; 32]));
        let digest = one.gmac(&block).unwrap();
        assert_eq!(
            [one.digest(&block), DigestKey::of([1; 32]).digest(&block)],
            [digest; 2]
        );
        assert_ne!(digest, other.digest(&block));
        assert_ne!(digest, one.without_gmac(&block));
        for at in (0..BLOCK_LEN).step_by(61) {
            for bit in 0..8 {
                let mut changed = block.clone();
                changed[at] ^= 1 << bit;
                assert_ne!(digest, one.digest(&changed), "bit {bit} of byte {at}");
            }
        }
        assert_ne!(digest, one.digest(&block[..BLOCK_LEN - 1]));
        // Test case 13 of the specification's authors, whose key and nonce are zeros: what is empty.
        let expected = 0x530f_8afb_c745_36b9_a963_b4f1_c4cb_738b_u128.to_be_bytes();
        assert_eq!(DigestKey::of([0; 32]).digest(&[]), expected);
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
