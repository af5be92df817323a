//! LZ4 and zstd, the only place that knows the libraries.
//!
//! Owns the steps of the ladder, buffers and limits around them. Promises that what is compressed is smaller than its raw content, and
//! that decompression writes exactly the length that the caller knows, or fails.

use std::cell::RefCell;
use std::fmt;

use longhaul_common::wire::batch::BatchError;
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, compress_bound};

/// Base and content of a batch together, as a power of two: 2 MiB, and a little to spare.
const PATCH_WINDOW: u32 = 22;
/// Where most is found again, more search finds little more.
const PATCH_LEVEL_MAX: i32 = 3;
/// Less is not worth a restore.
const GAIN_MIN: usize = 64;

/// A step of the ladder: how much work is done for fewer bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Raw,
    #[default]
    Lz4,
    Zstd1,
    Zstd3,
    Zstd9,
}

impl Level {
    /// All, from the least work to the most.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Lz4, Self::Zstd1, Self::Zstd3, Self::Zstd9];

    /// As settings and status name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Zstd1 => "zstd1",
            Self::Zstd3 => "zstd3",
            Self::Zstd9 => "zstd9",
        }
    }

    /// The next one up; itself at the top.
    pub fn up(self) -> Self {
        Self::ALL.get(self as usize + 1).copied().unwrap_or(self)
    }

    /// The next one down; itself at the bottom.
    pub fn down(self) -> Self {
        Self::ALL[(self as usize).saturating_sub(1)]
    }

    fn zstd(self) -> Option<i32> {
        match self {
            Self::Raw | Self::Lz4 => None,
            Self::Zstd1 => Some(1),
            Self::Zstd3 => Some(3),
            Self::Zstd9 => Some(9),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How compressed bytes are to be read. One byte on the wire; zero means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Codec {
    Raw = 1,
    Lz4 = 2,
    Zstd = 3,
    /// A zstd frame that continues other content.
    Patch = 4,
}

impl Codec {
    pub(super) fn from_wire(byte: u8) -> Option<Self> {
        [Self::Raw, Self::Lz4, Self::Zstd, Self::Patch]
            .into_iter()
            .find(|codec| *codec as u8 == byte)
    }
}

thread_local! {
    /// A worker's compressor and the level it was made for: its tables are large.
    static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    /// Where a worker compresses to: fresh memory costs a fault for each of its pages.
    static SMALLER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// `raw` at `level`, or `None` where it would not be smaller.
pub(super) fn compress(raw: &[u8], level: Level) -> Option<(Codec, Vec<u8>)> {
    compress_then(raw, level, |codec, smaller| (codec, smaller.to_vec()))
}

/// Gives `raw` at `level` to `then`, unless it would not be smaller.
pub(super) fn compress_then<T>(raw: &[u8], level: Level, then: impl FnOnce(Codec, &[u8]) -> T) -> Option<T> {
    if raw.len() <= GAIN_MIN || level == Level::Raw {
        return None;
    }
    SMALLER.with_borrow_mut(|kept| {
        let most = get_maximum_output_size(raw.len()).max(compress_bound(raw.len()));
        if kept.len() < most {
            kept.resize(most, 0);
        }
        let (codec, len) = match level.zstd() {
            None => (Codec::Lz4, compress_into(raw, kept).ok()?),
            Some(level) => (Codec::Zstd, zstd_at(raw, level, kept)?),
        };
        let smaller = kept.get(..len)?;
        (len + GAIN_MIN <= raw.len()).then(|| then(codec, smaller))
    })
}

fn zstd_at(raw: &[u8], level: i32, into: &mut [u8]) -> Option<usize> {
    COMPRESSOR.with_borrow_mut(|kept| {
        if kept.as_ref().is_none_or(|(of, _)| *of != level) {
            *kept = Some((level, Compressor::new(level).ok()?));
        }
        kept.as_mut()?.1.compress_to_buffer(raw, into).ok()
    })
}

/// `raw` as what follows `base`, or `None` where that would not be smaller. Below level 3 zstd keeps too little of the base to find it again.
pub(super) fn compress_against(raw: &[u8], base: &[u8], level: Level) -> Option<Vec<u8>> {
    if raw.len() <= GAIN_MIN {
        return None;
    }
    let mut out: Vec<u8> = Vec::with_capacity(compress_bound(raw.len()));
    let mut context = CCtx::try_create()?;
    let level = level.zstd().unwrap_or(3).min(PATCH_LEVEL_MAX);
    context.set_parameter(CParameter::CompressionLevel(level)).ok()?;
    context.set_parameter(CParameter::WindowLog(PATCH_WINDOW)).ok()?;
    context.ref_prefix(base).ok()?;
    context.compress2(&mut out, raw).ok()?;
    (out.len() + GAIN_MIN <= raw.len()).then_some(out)
}

/// Writes what `bytes` stand for, as what follows `base`, over all of `raw`.
pub(super) fn decompress_against(bytes: &[u8], base: &[u8], raw: &mut [u8]) -> Result<(), BatchError> {
    let expected = raw.len() as u64;
    let mut patched = || {
        let mut context = DCtx::try_create()?;
        context.ref_prefix(base).ok()?;
        context.decompress(raw, bytes).ok()
    };
    match patched().ok_or(BatchError::Payload("its zstd frame is damaged"))? as u64 {
        got if got == expected => Ok(()),
        got => Err(BatchError::DataLength { expected, got }),
    }
}

/// Writes what `bytes` stand for over all of `raw`.
pub(super) fn decompress(codec: Codec, bytes: &[u8], raw: &mut [u8]) -> Result<(), BatchError> {
    let expected = raw.len() as u64;
    let len = match codec {
        Codec::Raw => {
            if bytes.len() == raw.len() {
                raw.copy_from_slice(bytes);
            }
            bytes.len()
        }
        Codec::Lz4 => {
            decompress_into(bytes, raw).map_err(|_| BatchError::Payload("its LZ4 block is damaged"))?
        }
        Codec::Zstd => unzstd(bytes, raw).ok_or(BatchError::Payload("its zstd frame is damaged"))?,
        Codec::Patch => return Err(BatchError::Payload("it continues content where there is none")),
    };
    match len as u64 {
        got if got == expected => Ok(()),
        got => Err(BatchError::DataLength { expected, got }),
    }
}

fn unzstd(bytes: &[u8], raw: &mut [u8]) -> Option<usize> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        if kept.is_none() {
            *kept = Some(Decompressor::new().ok()?);
        }
        kept.as_mut()?.decompress_to_buffer(bytes, raw).ok()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::block;
    use super::super::layout::BLOCK_LEN;
    use super::*;

    #[test]
    fn the_ladder_has_an_order_and_two_ends() {
        assert!(Level::ALL.is_sorted());
        assert_eq!((Level::Raw.down(), Level::Zstd9.up()), (Level::Raw, Level::Zstd9));
        assert_eq!((Level::Lz4.up(), Level::Lz4.down()), (Level::Zstd1, Level::Raw));
    }

    proptest! {
        #[test]
        fn every_level_gives_back_what_it_took(words in prop::collection::vec(0u8..20, 0..3000)) {
            for level in Level::ALL {
                let Some((codec, small)) = compress(&words, level) else { continue };
                prop_assert!(small.len() < words.len());
                let mut back = vec![0; words.len()];
                decompress(codec, &small, &mut back).unwrap();
                prop_assert_eq!(&back, &words);
                let mut longer = vec![0; words.len() + 1];
                prop_assert!(decompress(codec, &small, &mut longer).is_err());
                prop_assert!(decompress(codec, &small, &mut back[..words.len() - 1]).is_err());
            }
        }

        #[test]
        fn content_against_a_base_comes_back(base in prop::collection::vec(any::<u8>(), 100..3000), shift in 0usize..50, damage in any::<prop::sample::Index>()) {
            let raw = [&base[shift..], &base[..shift]].concat();
            if let Some(small) = compress_against(&raw, &base, Level::Zstd3) {
                let mut back = vec![0; raw.len()];
                decompress_against(&small, &base, &mut back).unwrap();
                prop_assert_eq!(&back, &raw);
                let mut damaged = small.clone();
                damaged[damage.index(small.len())] ^= 0x55;
                let _ = decompress_against(&damaged, &base, &mut back);
                prop_assert!(decompress_against(&small, &base, &mut vec![0; raw.len() + 1]).is_err());
            }
        }

        #[test]
        fn damage_is_refused_or_of_the_right_length(bytes in prop::collection::vec(any::<u8>(), 0..300), codec in 1u8..5, len in 0usize..5000) {
            let _ = decompress(Codec::from_wire(codec).unwrap(), &bytes, &mut vec![0; len]);
        }
    }

    /// What each way makes of changed blocks that are sent together, in bytes: XOR and LZ4, XOR and zstd 1, LZ4 and zstd 3 with the old content as
    /// their dictionary.
    fn ways(old: &[u8], new: &[u8]) -> [usize; 4] {
        let mut residue = new.to_vec();
        block::xor(&mut residue, old);
        let of = |small: Option<(Codec, Vec<u8>)>| small.map_or(new.len(), |(_, small)| small.len());
        let blocks = new.chunks(BLOCK_LEN).zip(old.chunks(BLOCK_LEN));
        let lz4 = blocks.map(|(new, old)| lz4_flex::block::compress_with_dict(new, old).len());
        [
            of(compress(&residue, Level::Lz4)),
            of(compress(&residue, Level::Zstd1)),
            lz4.sum::<usize>().min(new.len()),
            compress_against(new, old, Level::Zstd3).map_or(new.len(), |small| small.len()),
        ]
    }

    /// Of all changed blocks, by whether a third of their bytes changed or more: how many there are, and what each way makes of them.
    fn compared(old: &[u8], new: &[u8]) -> [(usize, [usize; 4]); 2] {
        let mut kinds = [const { (Vec::new(), Vec::new()) }; 2];
        for (old, new) in old.chunks_exact(BLOCK_LEN).zip(new.chunks_exact(BLOCK_LEN)) {
            if old != new && !block::is_zero(old) && !block::is_zero(new) {
                let kind = &mut kinds[usize::from(block::differing(old, new) > BLOCK_LEN / 3)];
                kind.0.extend_from_slice(old);
                kind.1.extend_from_slice(new);
            }
        }
        kinds.map(|(old, new)| {
            let batches = old.chunks(64 * BLOCK_LEN).zip(new.chunks(64 * BLOCK_LEN));
            let sum = batches.fold([0; 4], |sum: [usize; 4], (old, new)| {
                let more = ways(old, new);
                std::array::from_fn(|n| sum[n] + more[n])
            });
            (new.len() / BLOCK_LEN, sum)
        })
    }

    /// Blocks of which the first kind is written in a few places, the other has moved within the block.
    fn changed() -> (Vec<u8>, Vec<u8>) {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize
        };
        // Records as programs keep them: text, and numbers that differ.
        let mut old = Vec::new();
        while old.len() < 512 * BLOCK_LEN {
            old.extend(
                format!(
                    "{:08x} name={} value={:>6};",
                    next(),
                    next() % 97,
                    next() % 100_000
                )
                .bytes(),
            );
        }
        old.truncate(512 * BLOCK_LEN);
        let mut new = old.clone();
        for (index, block) in new.chunks_mut(BLOCK_LEN).enumerate() {
            if index % 2 == 0 {
                (0..6).for_each(|_| block[next() % BLOCK_LEN] = next() as u8);
            } else {
                block.rotate_right(16 + next() % 200);
            }
        }
        (old, new)
    }

    #[test]
    fn each_kind_of_change_is_sent_in_the_way_that_is_smallest() {
        // Two images of one guest's memory, as QEMU's `pmemsave` writes them, where they are named: their figures are in ARCHITECTURE.md.
        let named = std::env::var("LONGHAUL_MEMORY_IMAGES").ok();
        if let Some((old, new)) = named.as_deref().and_then(|names| names.split_once(',')) {
            let [old, new] = [old, new].map(|name| std::fs::read(name).unwrap());
            eprintln!("{:?}", compared(&old, &new));
        }
        let (old, new) = changed();
        let [(few, written), (many, moved)] = compared(&old, &new);
        assert_eq!((few, many), (256, 256));
        let [xor_lz4, xor_zstd, lz4, zstd] = written;
        assert!(xor_zstd < xor_lz4 && xor_zstd < lz4, "small writes: {written:?}");
        assert!(zstd < lz4, "small writes: {written:?}");
        let [.., lz4, zstd] = moved;
        assert!(
            zstd < lz4 && 4 * zstd < moved[0].min(moved[1]),
            "moved: {moved:?}"
        );
    }
}
