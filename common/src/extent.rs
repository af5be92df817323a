//! Byte ranges of a disk, and their algebra.
//!
//! Owns the one type in which every program speaks of "from here to there". Leaves alone what lies in a range. Promises that
//! no operation overflows: an extent is only made where `offset + len` fits in 64 bits.

use serde::{Deserialize, Serialize};

/// A block: guest page, file-system block and dedup unit alike, in bytes.
pub const BLOCK: u64 = 4096;

/// A byte range `[offset, offset + len)` of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u64, u64)", into = "(u64, u64)")]
pub struct Extent {
    offset: u64,
    len: u64,
}

/// A range whose end does not fit in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range of {len} bytes at offset {offset} ends beyond 64 bits")]
pub struct ExtentOverflow {
    offset: u64,
    len: u64,
}

impl Extent {
    /// The range of `len` bytes at `offset`; an error where its end does not fit in 64 bits.
    pub fn new(offset: u64, len: u64) -> Result<Self, ExtentOverflow> {
        match offset.checked_add(len) {
            Some(_) => Ok(Self { offset, len }),
            None => Err(ExtentOverflow { offset, len }),
        }
    }

    /// The range from `start` up to `end`; empty at `start` where `end` is not behind it.
    pub const fn between(start: u64, end: u64) -> Self {
        Self {
            offset: start,
            len: end.saturating_sub(start),
        }
    }

    /// First byte.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds no byte at all.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte behind it.
    pub const fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The bytes that both ranges hold; `None` where they share none.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::between(start, end))
    }

    /// The largest range inside this one whose ends are multiples of `align`; `None` where there is none.
    pub fn shrink_to(&self, align: u64) -> Option<Self> {
        let start = self.offset.checked_next_multiple_of(align)?;
        let end = self.end() / align * align;
        (start < end).then(|| Self::between(start, end))
    }
}

impl TryFrom<(u64, u64)> for Extent {
    type Error = ExtentOverflow;

    fn try_from((offset, len): (u64, u64)) -> Result<Self, ExtentOverflow> {
        Self::new(offset, len)
    }
}

impl From<Extent> for (u64, u64) {
    fn from(extent: Extent) -> Self {
        (extent.offset, extent.len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn intersect_is_symmetric_and_inside_both(a in any::<(u32, u32)>(), b in any::<(u32, u32)>()) {
            let a = Extent::new(a.0.into(), a.1.into()).unwrap();
            let b = Extent::new(b.0.into(), b.1.into()).unwrap();
            prop_assert_eq!(a.intersect(&b), b.intersect(&a));
            if let Some(both) = a.intersect(&b) {
                prop_assert!(!both.is_empty() && both.offset() >= a.offset() && both.end() <= a.end());
            }
        }

        #[test]
        fn shrinking_stays_inside_and_aligned(offset in any::<u32>(), len in any::<u32>(), shift in 0u32..20) {
            let extent = Extent::new(offset.into(), len.into()).unwrap();
            if let Some(inner) = extent.shrink_to(1 << shift) {
                prop_assert!(inner.offset() >= extent.offset() && inner.end() <= extent.end());
                prop_assert_eq!((inner.offset() | inner.len()) & ((1 << shift) - 1), 0);
            }
        }
    }

    #[test]
    fn an_end_beyond_64_bits_is_refused() {
        assert!(Extent::new(u64::MAX, 1).is_err());
        assert!(Extent::new(u64::MAX - 1, 1).is_ok());
        assert!(Extent::between(u64::MAX - 1, u64::MAX).shrink_to(4096).is_none());
    }
}
