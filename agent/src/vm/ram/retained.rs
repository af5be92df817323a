//! What the source keeps of the stream until the target's QEMU has it.
//!
//! Owns parts in order, each with its data. Leaves alone when to send again. Promises that every part behind the acknowledged position
//! is there, once, in order, and that no more is kept than the limit says.

use std::collections::VecDeque;

use super::part::Part;

/// Why a part cannot be kept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RetainError {
    #[error("the part begins at {offset} where {expected} comes next")]
    Gap { offset: u64, expected: u64 },
    #[error(
        "{bytes} bytes of the RAM stream are not acknowledged, {max} may be kept; the stream was read too far ahead"
    )]
    Full { bytes: u64, max: u64 },
    #[error("the target acknowledged {acked} bytes of the RAM stream, but only {end} were sent")]
    AckBeyondEnd { acked: u64, end: u64 },
}

/// Parts that may have to be sent again.
pub struct Retained {
    parts: VecDeque<Part>,
    /// Bytes of stream that may be kept.
    max: u64,
    acked: u64,
    end: u64,
}

impl Retained {
    /// Keeps up to `max` bytes of stream.
    pub fn new(max: u64) -> Self {
        Self {
            parts: VecDeque::new(),
            max,
            acked: 0,
            end: 0,
        }
    }

    /// Another limit from now on: the tail's, say. What is there stays.
    pub fn set_max(&mut self, max: u64) {
        self.max = max;
    }

    /// Keeps the next part.
    ///
    /// # Errors
    /// It is not the next one, or there is no room; it is not kept then.
    pub fn push(&mut self, part: Part) -> Result<(), RetainError> {
        if part.header.offset != self.end {
            return Err(RetainError::Gap {
                offset: part.header.offset,
                expected: self.end,
            });
        }
        let bytes = self.bytes().saturating_add(part.header.len);
        if bytes > self.max {
            return Err(RetainError::Full { bytes, max: self.max });
        }
        self.end = part.end();
        self.parts.push_back(part);
        Ok(())
    }

    /// The target's QEMU was given all bytes before `position`: parts that end there or before are dropped. An older position is
    /// nothing new.
    ///
    /// # Errors
    /// So much was never sent.
    pub fn ack(&mut self, position: u64) -> Result<(), RetainError> {
        if position > self.end {
            return Err(RetainError::AckBeyondEnd {
                acked: position,
                end: self.end,
            });
        }
        self.acked = self.acked.max(position);
        while self.parts.front().is_some_and(|part| part.end() <= self.acked) {
            self.parts.pop_front();
        }
        Ok(())
    }

    /// The parts to be sent again where the target has all bytes before `position` and, perhaps, some behind.
    pub fn from(&self, position: u64) -> impl Iterator<Item = &Part> {
        let first = self.parts.partition_point(|part| part.end() <= position);
        self.parts.range(first..)
    }

    /// Bytes of stream that are kept.
    pub fn bytes(&self) -> u64 {
        self.parts.front().map_or(0, |part| self.end - part.header.offset)
    }

    /// Bytes of data that are kept: what it costs in memory, but for the tokens.
    pub fn data_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.data.len() as u64).sum()
    }

    /// How many parts are kept.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// Whether all that was sent is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Stream position up to which all is acknowledged.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// Stream position behind the last part.
    pub fn end(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use longhaul_common::wire::ram::{RamPart, Token};

    use super::*;
    use crate::vm::ram::Counts;

    fn part(offset: u64, len: u32) -> Part {
        Part {
            header: RamPart {
                generation: 1,
                offset,
                len: len.into(),
                tokens: vec![Token::Raw(len)],
            },
            data: Bytes::from(vec![0; len as usize]),
            counts: Counts::default(),
        }
    }

    fn offsets(retained: &Retained, position: u64) -> Vec<u64> {
        retained.from(position).map(|part| part.header.offset).collect()
    }

    #[test]
    fn what_is_acknowledged_goes() {
        let mut retained = Retained::new(100);
        for offset in [0, 30, 60] {
            retained.push(part(offset, 30)).unwrap();
        }
        assert_eq!(
            (retained.bytes(), retained.data_bytes(), retained.end()),
            (90, 90, 90)
        );
        retained.ack(59).unwrap();
        assert_eq!((offsets(&retained, 0), retained.bytes()), (vec![30, 60], 60));
        assert_eq!(offsets(&retained, 60), [60]);
        assert_eq!(offsets(&retained, 61), [60]);
        assert!(offsets(&retained, 90).is_empty());
        retained.ack(20).unwrap();
        assert_eq!(retained.acked(), 59);
        retained.ack(90).unwrap();
        assert!(retained.is_empty() && retained.bytes() == 0);
        let error = retained.ack(91).unwrap_err();
        assert_eq!(error, RetainError::AckBeyondEnd { acked: 91, end: 90 });
    }

    #[test]
    fn gaps_and_too_much_are_refused() {
        let mut retained = Retained::new(50);
        assert!(matches!(
            retained.push(part(1, 5)),
            Err(RetainError::Gap { expected: 0, .. })
        ));
        retained.push(part(0, 30)).unwrap();
        let error = retained.push(part(30, 30)).unwrap_err();
        assert_eq!(error, RetainError::Full { bytes: 60, max: 50 });
        retained.set_max(60);
        retained.push(part(30, 30)).unwrap();
        assert!(matches!(
            retained.push(part(30, 30)),
            Err(RetainError::Gap { expected: 60, .. })
        ));
    }
}
