//! Bits of a bitmap, least significant first, in bulk.
//!
//! Owns counting, filling and finding runs, eight bytes at a time. Leaves alone what a bit stands for.

use std::ops::Range;

/// Whether bit `at` is set; bits beyond the end are not.
pub(super) fn is_set(bits: &[u8], at: u32) -> bool {
    bits.get(at as usize / 8)
        .is_some_and(|byte| byte >> (at % 8) & 1 == 1)
}

/// Sets the bits of `range`, which must lie inside `bits`.
pub(super) fn set(bits: &mut [u8], range: Range<u32>) {
    let mut at = range.start;
    while at < range.end {
        if at.is_multiple_of(8) && range.end - at >= 8 {
            let (start, end) = (at as usize / 8, range.end as usize / 8);
            bits[start..end].fill(0xFF);
            at = range.end / 8 * 8;
        } else {
            bits[at as usize / 8] |= 1 << (at % 8);
            at += 1;
        }
    }
}

/// How many of the first `count` bits are not set.
pub(super) fn zeros(bits: &[u8], count: u32) -> u32 {
    let whole = &bits[..count as usize / 8];
    let ones: u32 = whole.iter().map(|byte| byte.count_ones()).sum();
    let rest = (count / 8 * 8..count).filter(|at| is_set(bits, *at)).count();
    count - ones - rest as u32
}

/// The first bit in `range` that equals `value`; the end of `range` where there is none.
pub(super) fn find(bits: &[u8], range: Range<u32>, value: bool) -> u32 {
    let skip: u8 = if value { 0 } else { 0xFF };
    let mut at = range.start;
    while at < range.end {
        if is_set(bits, at) == value {
            return at;
        }
        at += 1;
        if at.is_multiple_of(8) {
            let rest = &bits[at as usize / 8..range.end as usize / 8];
            at += 8 * equal_bytes(rest, skip) as u32;
        }
    }
    range.end
}

/// How many bytes from the front on equal `byte`.
fn equal_bytes(bytes: &[u8], byte: u8) -> usize {
    let (words, _) = bytes.as_chunks::<8>();
    let whole = words.iter().take_while(|word| **word == [byte; 8]).count() * 8;
    whole + bytes[whole..].iter().take_while(|other| **other == byte).count()
}

/// The runs of unset bits among the first `count`, in order.
pub(super) fn zero_runs(bits: &[u8], count: u32) -> impl Iterator<Item = Range<u32>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = find(bits, at..count, false);
        at = find(bits, start..count, true);
        (start < at).then_some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![Just(0u8), Just(0xFF), any::<u8>()];
        prop::collection::vec((byte, 1usize..12), 1..12).prop_map(|runs| {
            runs.into_iter()
                .flat_map(|(byte, len)| std::iter::repeat_n(byte, len))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn runs_and_counts_agree_with_single_bits(bits in bytes(), cut in any::<prop::sample::Index>()) {
            let count = cut.index(bits.len() * 8 + 1) as u32;
            let plain: Vec<u32> = (0..count).filter(|at| !is_set(&bits, *at)).collect();
            let runs: Vec<u32> = zero_runs(&bits, count).flatten().collect();
            prop_assert_eq!(zeros(&bits, count) as usize, plain.len());
            prop_assert_eq!(&runs, &plain);
            let lens: Vec<_> = zero_runs(&bits, count).collect();
            prop_assert!(lens.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn setting_sets_exactly_the_range(bits in bytes(), a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>()) {
            let (a, b) = (a.index(bits.len() * 8) as u32, b.index(bits.len() * 8) as u32);
            let mut changed = bits.clone();
            set(&mut changed, a.min(b)..a.max(b));
            for at in 0..bits.len() as u32 * 8 {
                let inside = at >= a.min(b) && at < a.max(b);
                prop_assert_eq!(is_set(&changed, at), inside || is_set(&bits, at));
            }
        }
    }
}
