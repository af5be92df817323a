//! A numbered, checksummed record, as workloads write it and the lab looks for it.
//!
//! Owns the layout. Promises that every byte of a record follows from seed, stream, number and length, so
//! that a reader who knows them can tell a torn or changed record from a whole one.
//!
//! ```text
//! 0   8   magic "LHRECORD"
//! 8   4   stream
//! 12  4   length of the payload
//! 16  8   number, from 1
//! 24  8   checksum over bytes 0..24 and the payload
//! 32  n   payload
//! ```

use super::chance::{checksum, fill, mix};

const MAGIC: &[u8; 8] = b"LHRECORD";
/// Bytes before the payload.
pub const HEAD: usize = 32;
/// Longest payload.
pub const PAYLOAD_MAX: usize = 1 << 20;

/// The record's bytes.
pub fn encode(seed: u64, stream: u32, number: u64, payload: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEAD + payload];
    fill(
        &mut bytes[HEAD..],
        mix(seed ^ mix((u64::from(stream) << 48) ^ number)),
    );
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&stream.to_le_bytes());
    bytes[12..16].copy_from_slice(&(payload as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&number.to_le_bytes());
    let sum = sum(&bytes);
    bytes[24..32].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn sum(record: &[u8]) -> u64 {
    mix(checksum(&record[..24])) ^ checksum(&record[HEAD..])
}

/// The whole record at the start of `bytes`: its stream, number and length with head; `None` if it is torn,
/// cut or none.
pub fn decode(bytes: &[u8]) -> Option<(u32, u64, usize)> {
    let head = bytes.get(..HEAD)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let long = |at: usize| u64::from(word(at)) | (u64::from(word(at + 4)) << 32);
    let payload = word(12) as usize;
    if &head[..8] != MAGIC || payload > PAYLOAD_MAX {
        return None;
    }
    let record = bytes.get(..HEAD + payload)?;
    (sum(record) == long(24)).then(|| (word(8), long(16), HEAD + payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_every_damage_is_seen() {
        let mut bytes = encode(9, 2, 41, 168);
        assert_eq!(bytes.len(), 200);
        assert_eq!(decode(&bytes), Some((2, 41, 200)));
        for at in 0..bytes.len() {
            bytes[at] ^= 0x10;
            assert_eq!(decode(&bytes), None, "byte {at}");
            bytes[at] ^= 0x10;
            assert_eq!(decode(&bytes[..at]), None, "cut at {at}");
        }
        assert_ne!(encode(9, 2, 42, 168)[HEAD..], bytes[HEAD..]);
        assert_ne!(encode(8, 2, 41, 168)[HEAD..], bytes[HEAD..]);
    }
}
