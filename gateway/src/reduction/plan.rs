//! What becomes of each block of a batch, and how that is written: runs of equal kind.
//!
//! Owns kinds and their coding. A run is one byte (kind, length) and, where it speaks of positions, the distance to where the last such
//! run ended: blocks that were sent one after the other are referred to by two or three bytes for all of them. Promises that what is
//! read has exactly the expected number of blocks, whatever the bytes are.

use longhaul_common::wire::batch::BatchError;

/// What becomes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Zero,
    /// The content at a position of the direction it is sent in.
    Own(u64),
    /// The content at a position of the other direction.
    Theirs(u64),
    /// The content of an earlier block of this batch.
    Same(u64),
    /// The difference to the content at a position.
    XorOwn(u64),
    XorTheirs(u64),
    /// Content, compressed with that of the others.
    Plain,
    /// Content that does not shrink.
    Raw,
}

impl Fate {
    fn parts(self) -> (u8, Option<u64>) {
        match self {
            Self::Zero => (0, None),
            Self::Own(at) => (1, Some(at)),
            Self::Theirs(at) => (2, Some(at)),
            Self::Same(at) => (3, Some(at)),
            Self::XorOwn(at) => (4, Some(at)),
            Self::XorTheirs(at) => (5, Some(at)),
            Self::Plain => (6, None),
            Self::Raw => (7, None),
        }
    }

    fn of(kind: u8, at: u64) -> Self {
        match kind {
            0 => Self::Zero,
            1 => Self::Own(at),
            2 => Self::Theirs(at),
            3 => Self::Same(at),
            4 => Self::XorOwn(at),
            5 => Self::XorTheirs(at),
            6 => Self::Plain,
            _ => Self::Raw,
        }
    }

    /// Whether its content takes a position of the window where the batch is stored.
    pub(super) fn is_stored(self) -> bool {
        matches!(
            self,
            Self::XorOwn(_) | Self::XorTheirs(_) | Self::Plain | Self::Raw
        )
    }

    /// Whether it is sent as what differs from a known block.
    pub(super) fn is_difference(self) -> bool {
        matches!(self, Self::XorOwn(_) | Self::XorTheirs(_))
    }

    /// Whether the window is needed to restore it.
    pub(super) fn is_reference(self) -> bool {
        matches!(
            self,
            Self::Own(_) | Self::Theirs(_) | Self::XorOwn(_) | Self::XorTheirs(_)
        )
    }
}

/// Ends of the last runs: positions of a direction lie near each other, whether they are referred to or differed from.
#[derive(Default)]
struct Ends([u64; 3]);

impl Ends {
    /// The one that belongs to a kind with a position.
    fn of(&mut self, kind: u8) -> &mut u64 {
        let which = match kind {
            1 | 4 => 0,
            2 | 5 => 1,
            _ => 2,
        };
        &mut self.0[which]
    }
}

/// Lengths up to this stand in the run's first byte.
const SHORT: u64 = 31;

/// Writes `fates`; `base` is a position of the own direction that most others lie near below.
pub(super) fn encode(fates: &[Fate], base: u64, out: &mut Vec<u8>) {
    let mut ends = Ends([base, 0, 0]);
    let mut rest = fates;
    while let Some(first) = rest.first() {
        let (kind, at) = first.parts();
        let follows = |n: usize, fate: &Fate| fate.parts() == (kind, at.map(|at| at.wrapping_add(n as u64)));
        let count = rest
            .iter()
            .enumerate()
            .take_while(|(n, fate)| follows(*n, fate))
            .count();
        let more = count as u64 - 1;
        out.push(kind << 5 | more.min(SHORT) as u8);
        if more >= SHORT {
            put(more - SHORT, out);
        }
        if let Some(at) = at {
            let end = ends.of(kind);
            let distance = at.wrapping_sub(*end) as i64;
            put((distance << 1 ^ distance >> 63) as u64, out);
            *end = at.wrapping_add(count as u64);
        }
        rest = &rest[count..];
    }
}

/// Reads the fates of `blocks` blocks off the front of `bytes`.
pub(super) fn decode(bytes: &mut &[u8], base: u64, blocks: usize) -> Result<Vec<Fate>, BatchError> {
    let mut ends = Ends([base, 0, 0]);
    let mut fates = Vec::with_capacity(blocks);
    while fates.len() < blocks {
        let first = take(bytes, 1)?[0];
        let (kind, mut more) = (first >> 5, u64::from(first & 31));
        if more == SHORT {
            more = get(bytes)?.saturating_add(SHORT);
        }
        if more >= (blocks - fates.len()) as u64 {
            return Err(BatchError::Payload("it speaks of more blocks than the batch has"));
        }
        let mut at = 0;
        if Fate::of(kind, 0).parts().1.is_some() {
            let coded = get(bytes)?;
            let distance = (coded >> 1) ^ (coded & 1).wrapping_neg();
            let end = ends.of(kind);
            at = end.wrapping_add(distance);
            *end = at.wrapping_add(more + 1);
        }
        fates.extend((0..=more).map(|n| Fate::of(kind, at.wrapping_add(n))));
    }
    Ok(fates)
}

/// Writes a number in groups of seven bits.
pub(super) fn put(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Reads a number off the front.
pub(super) fn get(bytes: &mut &[u8]) -> Result<u64, BatchError> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(BatchError::Payload("it holds a number of more than 64 bits"))
}

/// Takes `len` bytes off the front.
pub(super) fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Result<&'a [u8], BatchError> {
    let (front, rest) = bytes
        .split_at_checked(len)
        .ok_or(BatchError::Payload("it is cut short"))?;
    *bytes = rest;
    Ok(front)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fate() -> impl Strategy<Value = Fate> {
        (0u8..8, prop_oneof![0u64..300, any::<u64>()]).prop_map(|(kind, at)| Fate::of(kind, at))
    }

    proptest! {
        #[test]
        fn fates_come_back(runs in prop::collection::vec((fate(), 1usize..100), 0..20), base in any::<u64>()) {
            let run = |(fate, count): &(Fate, usize)| {
                let (kind, at) = fate.parts();
                (0..*count as u64).map(move |n| Fate::of(kind, at.unwrap_or(0).wrapping_add(n))).collect::<Vec<_>>()
            };
            let fates: Vec<_> = runs.iter().flat_map(run).collect();
            let mut bytes = Vec::new();
            encode(&fates, base, &mut bytes);
            bytes.push(77);
            let mut rest = &bytes[..];
            prop_assert_eq!(decode(&mut rest, base, fates.len()).unwrap(), fates);
            prop_assert_eq!(rest, &[77]);
        }

        #[test]
        fn any_bytes_give_as_many_blocks_as_there_are_or_none(bytes in prop::collection::vec(any::<u8>(), 0..60), blocks in 0usize..256) {
            if let Ok(fates) = decode(&mut &bytes[..], 1000, blocks) {
                prop_assert_eq!(fates.len(), blocks);
            }
        }
    }

    #[test]
    fn a_stretch_of_references_costs_a_few_bytes() {
        let fates: Vec<_> = (0..256).map(|n| Fate::Own(5_000_000 + n)).collect();
        let mut bytes = Vec::new();
        encode(&fates, 5_100_000, &mut bytes);
        assert!(bytes.len() <= 6, "{bytes:?}");
    }
}
