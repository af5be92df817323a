//! A batch: content of one disk, or a part of a VM's RAM stream, on its way, and how it lies on a stream.
//!
//! Owns the header, its limits and the digest that holds from source agent to target agent. Leaves alone how gateways reduce the
//! data between them. Promises that a batch that passes [`BatchHeader::check`] names ascending, separate pieces inside its disk,
//! at most [`RAW_MAX`] bytes of data, and each leaf at most once.
//!
//! ```text
//! agent <-> gateway:    header length u32 LE | header (postcard) | data, as long as the header's Data pieces together
//! gateway <-> gateway:  header length u32 LE | header (postcard) | encoding u8 | payload until the stream ends
//! ```

use serde::{Deserialize, Serialize};

use super::ram::RamPart;
use crate::digest::{Digest, LEAF, leaf_count};
use crate::extent::Extent;
use crate::ids::{Attempt, DiskIndex, JobId, Round, Sequence};

/// Most bytes of data in one batch.
pub const RAW_MAX: usize = 1 << 20;
/// Most pieces in one batch.
pub const PIECES_MAX: usize = 1024;
/// Most bytes of an encoded header: pieces and leaf digests at their limits.
pub const HEADER_MAX: usize = 128 << 10;
/// What a batch without data counts against credit, in bytes: its header has to be held, too.
pub const CREDIT_MIN: u64 = 4096;

/// What an extent of the disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Bytes that follow in the batch's data.
    Data,
    /// A hole of the source image; zeros.
    Hole,
    /// Zeros by content.
    Zero,
    /// Proven free in the guest's file system: its content stays behind, the target reads zeros.
    Free,
}

/// A byte range and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    pub extent: Extent,
    pub content: Content,
}

/// Leaves that this batch gives whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaves {
    /// First leaf.
    pub first: u64,
    /// How many, all covered by the batch's pieces.
    pub count: u64,
    /// Digests of those that are not zeros throughout, ascending.
    pub digests: Vec<(u64, Digest)>,
}

/// Everything of a batch but its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchHeader {
    pub job: JobId,
    pub attempt: Attempt,
    pub disk: DiskIndex,
    pub round: Round,
    pub sequence: Sequence,
    pub pieces: Vec<Piece>,
    /// None in rounds after the first: those give parts of leaves.
    pub leaves: Leaves,
    /// Where set, this is a part of the VM's RAM stream; disk, round, pieces and leaves mean nothing then, and are empty.
    pub ram: Option<RamPart>,
    /// The VM is stopped and waits for this: it goes before everything else.
    pub urgent: bool,
    /// BLAKE3 over all fields above and the data; see [`BatchHeader::digest_of`].
    pub digest: Digest,
}

/// Why a batch is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("the batch header of {len} bytes is larger than the limit of {HEADER_MAX}")]
    HeaderTooLarge { len: usize },
    #[error("the batch header is malformed; the peer may run another version")]
    Malformed,
    #[error("the batch has {pieces} pieces and {leaves} leaf digests, more than {PIECES_MAX}")]
    TooMany { pieces: usize, leaves: usize },
    #[error("the batch has {tokens} tokens of the RAM stream, more than its limit")]
    TooManyTokens { tokens: usize },
    #[error("the batch carries {bytes} bytes of data, more than {RAW_MAX}")]
    TooMuchData { bytes: u64 },
    #[error("the batch names bytes out of order or beyond the disk's {size} bytes")]
    OutOfPlace { size: u64 },
    #[error("the batch carries {got} bytes of data where its pieces ask for {expected}")]
    DataLength { expected: u64, got: u64 },
    #[error("the batch does not hold what its digest says; it was damaged on the way")]
    Digest,
    #[error("the payload cannot be restored: {0}")]
    Payload(&'static str),
}

impl BatchHeader {
    /// Bytes of data that belong to this header. Saturates where a hostile header says more than 64 bits.
    pub fn data_len(&self) -> u64 {
        let data = self.pieces.iter().filter(|piece| piece.content == Content::Data);
        let ram = self.ram.as_ref().map_or(0, RamPart::data_len);
        data.fold(ram, |sum, piece| sum.saturating_add(piece.extent.len()))
    }

    /// Its place on a LAN, as [`crate::link::Link::open_uni`] wants it: the order follows the lanes of the WAN.
    pub fn priority(&self) -> u8 {
        u8::from(self.urgent) * 2 + u8::from(self.ram.is_some())
    }

    /// What this batch takes from the job's credit, in bytes.
    pub fn credit(&self) -> u64 {
        self.data_len().max(CREDIT_MIN)
    }

    /// The digest over header and data, as the source agent states it.
    pub fn digest_of(&self, data: &[u8]) -> Result<Digest, BatchError> {
        let stated = (
            self.job,
            self.attempt,
            self.disk,
            self.round,
            self.sequence,
            &self.pieces,
            &self.leaves,
            &self.ram,
            self.urgent,
        );
        let fields = postcard::to_stdvec(&stated).map_err(|_| BatchError::Malformed)?;
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&(fields.len() as u64).to_le_bytes())
            .update(&fields)
            .update(data);
        Ok(Digest(*hasher.finalize().as_bytes()))
    }

    /// Checks the digest against `data`.
    pub fn verify(&self, data: &[u8]) -> Result<(), BatchError> {
        let expected = self.data_len();
        if expected != data.len() as u64 {
            return Err(BatchError::DataLength {
                expected,
                got: data.len() as u64,
            });
        }
        if self.digest_of(data)? == self.digest {
            Ok(())
        } else {
            Err(BatchError::Digest)
        }
    }

    /// Checks every limit, and every place against a disk of `size` bytes.
    pub fn check(&self, size: u64) -> Result<(), BatchError> {
        let out_of_place = || BatchError::OutOfPlace { size };
        self.check_limits()?;
        let mut at = 0;
        for piece in &self.pieces {
            let extent = piece.extent;
            if extent.is_empty() || extent.offset() < at || extent.end() > size {
                return Err(out_of_place());
            }
            at = extent.end();
        }
        self.check_leaves(size).then_some(()).ok_or_else(out_of_place)
    }

    /// Checks the limits that do not depend on the disk: what a gateway can check.
    pub fn check_limits(&self) -> Result<(), BatchError> {
        let (pieces, leaves) = (self.pieces.len(), self.leaves.digests.len());
        if pieces > PIECES_MAX || leaves > PIECES_MAX {
            return Err(BatchError::TooMany { pieces, leaves });
        }
        if let Some(ram) = &self.ram {
            if pieces > 0 || leaves > 0 || self.leaves.count > 0 {
                return Err(BatchError::Malformed);
            }
            ram.check()?;
        }
        match self.data_len() {
            bytes if bytes > RAW_MAX as u64 => Err(BatchError::TooMuchData { bytes }),
            _ => Ok(()),
        }
    }

    /// Whether the leaves lie in the disk, their digests ascend, and the pieces cover them without a gap.
    fn check_leaves(&self, size: u64) -> bool {
        let Leaves {
            first,
            count,
            digests,
        } = &self.leaves;
        let Some(end) = first.checked_add(*count).filter(|end| *end <= leaf_count(size)) else {
            return false;
        };
        let ascending = digests.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let inside = digests.iter().all(|(index, _)| (*first..end).contains(index));
        if *count == 0 {
            return digests.is_empty();
        }
        let (start, stop) = (first * LEAF, end.saturating_mul(LEAF).min(size));
        let mut covered = start;
        for piece in &self.pieces {
            if piece.extent.offset() <= covered && piece.extent.end() > covered {
                covered = piece.extent.end();
            }
        }
        ascending && inside && covered >= stop
    }

    /// The header as it stands on the stream, length included.
    pub fn encode(&self) -> Result<Vec<u8>, BatchError> {
        let mut bytes = postcard::to_extend(self, vec![0; 4]).map_err(|_| BatchError::Malformed)?;
        let len = bytes.len() - 4;
        if len > HEADER_MAX {
            return Err(BatchError::HeaderTooLarge { len });
        }
        bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
        Ok(bytes)
    }

    /// Takes a header apart that stands at the front of `stream`, and gives what follows it. Limits are checked.
    pub fn decode(stream: &[u8]) -> Result<(Self, &[u8]), BatchError> {
        let (len, rest) = stream.split_first_chunk::<4>().ok_or(BatchError::Malformed)?;
        let len = u32::from_le_bytes(*len) as usize;
        if len > HEADER_MAX {
            return Err(BatchError::HeaderTooLarge { len });
        }
        let (body, rest) = rest.split_at_checked(len).ok_or(BatchError::Malformed)?;
        let (header, trailing) =
            postcard::take_from_bytes::<Self>(body).map_err(|_| BatchError::Malformed)?;
        if !trailing.is_empty() {
            return Err(BatchError::Malformed);
        }
        header.check_limits()?;
        Ok((header, rest))
    }
}

/// What a payload may need beyond the raw data: its encoding, and which block is what.
pub const PAYLOAD_OVERHEAD: usize = 65;

/// Most bytes of a whole stream that carries a batch between agent and gateway, or a payload between gateways.
pub const STREAM_MAX: usize = 4 + HEADER_MAX + PAYLOAD_OVERHEAD + RAW_MAX;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(size: u64, data: &[u8]) -> BatchHeader {
        let data_end = data.len() as u64;
        let mut pieces = vec![Piece {
            extent: Extent::between(0, data_end),
            content: Content::Data,
        }];
        pieces.push(Piece {
            extent: Extent::between(data_end, size),
            content: Content::Hole,
        });
        pieces.retain(|piece| !piece.extent.is_empty());
        let leaves = Leaves {
            first: 0,
            count: leaf_count(size),
            digests: vec![(0, Digest::of(data))],
        };
        let mut header = BatchHeader {
            job: JobId::random(),
            attempt: Attempt(1),
            disk: DiskIndex(0),
            round: Round(0),
            sequence: Sequence(7),
            pieces,
            leaves,
            ram: None,
            urgent: false,
            digest: Digest([0; 32]),
        };
        header.digest = header.digest_of(data).unwrap();
        header
    }

    #[test]
    fn a_batch_survives_the_stream_and_any_damage_is_seen() {
        let data = vec![5; 9000];
        let header = header(3 * LEAF + 17, &data);
        header.check(3 * LEAF + 17).unwrap();
        let mut stream = header.encode().unwrap();
        stream.extend(&data);
        let (back, rest) = BatchHeader::decode(&stream).unwrap();
        back.verify(rest).unwrap();
        for at in (4..stream.len()).step_by(7) {
            let mut damaged = stream.clone();
            damaged[at] ^= 1;
            let seen = BatchHeader::decode(&damaged).map(|(header, data)| header.verify(data));
            assert!(!matches!(seen, Ok(Ok(()))), "a flip at {at} was not seen");
        }
    }

    #[test]
    fn wrong_places_are_refused() {
        let size = 2 * LEAF;
        let good = header(size, &[1; 4096]);
        assert!(good.check(size).is_ok());
        assert!(good.check(size - 1).is_err(), "beyond the disk");
        let mut gap = good.clone();
        gap.pieces[1].extent = Extent::between(8192, size);
        assert!(gap.check(size).is_err(), "a leaf not covered");
        let mut twice = good.clone();
        twice.pieces[1].extent = Extent::between(0, size);
        assert!(twice.check(size).is_err(), "overlap");
        let mut far = good.clone();
        far.leaves.first = u64::MAX;
        assert!(far.check(size).is_err(), "leaf beyond 64 bits");
        let mut much = good;
        much.pieces = vec![Piece {
            extent: Extent::between(0, 2 * LEAF),
            content: Content::Data,
        }];
        assert!(matches!(much.check(size), Err(BatchError::TooMuchData { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok((header, data)) = BatchHeader::decode(&bytes) {
                let _ = header.check(1 << 40);
                let _ = header.verify(data);
            }
        }
    }
}
