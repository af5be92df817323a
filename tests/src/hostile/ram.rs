//! QEMU's RAM stream: its tap, fed with anything; and what puts it together again, fed with any part.

use std::io;

use bytes::Bytes;
use longhaul_agent::vm::ram::{Part, Rebuilder, Tokenizer, TokenizerOptions};
use longhaul_common::wire::frame;
use longhaul_common::wire::ram::{RamPart, Records, Token};

/// Most bytes that may wait for others, in these entries.
const WINDOW: u64 = 256 << 10;

/// Two bytes say how the stream is cut and sliced; what is put together must be what was fed.
pub(super) fn stream(bytes: &[u8]) {
    let Some((&[slice, target], stream)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    let mut tokenizer = Tokenizer::new(&TokenizerOptions {
        target: usize::from(target) << 10,
        followed_max: 1 << 20,
        ..TokenizerOptions::default()
    });
    let mut parts: Vec<Part> = Vec::new();
    for (number, slice) in stream.chunks(usize::from(slice).pow(2) + 1).enumerate() {
        tokenizer.push(slice);
        parts.extend(std::iter::from_fn(|| tokenizer.next_part()));
        if number % 5 == 4 {
            parts.extend(tokenizer.cut());
        }
    }
    tokenizer.finish();
    parts.extend(std::iter::from_fn(|| tokenizer.cut()));
    let mut rebuilder = Rebuilder::new(0, u64::MAX);
    let mut out = Vec::new();
    for part in parts.iter().rev() {
        assert!(part.header.check().is_ok(), "a part breaks the wire's limits");
        let accepted = rebuilder.accept(&part.header, part.data.clone());
        assert!(accepted.is_ok(), "a part of the tap is refused: {accepted:?}");
    }
    std::iter::from_fn(|| rebuilder.next_chunk()).for_each(|chunk| out.extend_from_slice(&chunk));
    assert!(out == stream, "the stream is another one");
    assert_eq!(rebuilder.digest(), tokenizer.digest());
}

pub(super) fn streams() -> io::Result<Vec<Vec<u8>>> {
    let word = |number: u64| number.to_be_bytes().to_vec();
    let page = [word(0x28), vec![5; 4096]].concat();
    let end = [word(0x10), b"\x7e\0\0\0\x02".to_vec()].concat();
    let begin: &[&[u8]] = &[
        b"QEVM\0\0\0\x03\x07\0\0\0\x03q35\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\0",
        b"\x08\0\x01\0\0\x08\0\x02\0\x04\0\0\0\x01\x08\0\x03\0\x10\0\0\0\0\0\x20\x10\0\0\0\0\0\0\0\x10\0",
        b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04",
        &word(0x20_1004),
        b"\x03ram",
        &word(0x20_0000),
        &word(0x20_0000),
        b"\x03rom",
        &word(0x1000),
        &end,
        b"\x01\0\0\0\x03\x0cdirty-bitmap\0\0\0\0\0\0\0\x01\x1c\x01d\x01b\0\x01\0\0\x01\x01\x7e\0\0\0\x03",
        b"\x02\0\0\0\x02",
        &word(0x2000 | 8),
        b"\x03ram",
        &[1; 4096],
        &page,
        &word(0x3022),
        &[0],
        &word(0x4060),
        b"\x01\0\x02ab",
        &word(0x5120),
        b"\0\0\0\x01z",
        &end,
        b"\x02\0\0\0\x03\x42",
        &word(0),
        b"\0\0\0\x01\x01\x7e\0\0\0\x03",
        b"\x08\0\x0b\0\0\x03\0\0\0\x02",
        &page,
        &end,
        b"\x04\0\0\0\x09\x03cpu\0\0\0\0\0\0\0\x01state\x7e\0\0\0\x09\0\x06\0\0\0\x02{}",
    ];
    let whole = begin.concat();
    let cuts = [(255, 255), (0, 8), (9, 0)];
    Ok(cuts
        .iter()
        .map(|(slice, target)| [&[*slice, *target], whole.as_slice()].concat())
        .collect())
}

/// Parts, each behind four bytes of length, one after the other; and as much data as each asks for, within reason.
pub(super) fn parts(bytes: &[u8]) {
    let mut rebuilder = Rebuilder::new(0, WINDOW);
    let mut rest = bytes;
    let mut taken = 0;
    while let Some((len, later)) = rest.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        let (body, later) = later.split_at(len.min(later.len()));
        rest = later;
        let Ok(part) = frame::decode::<RamPart>(body) else {
            continue;
        };
        let data = Bytes::from(vec![0x5a; part.data_len().min(WINDOW) as usize]);
        let _ = rebuilder.accept(&part, data);
        assert!(rebuilder.held() <= WINDOW, "more is held than the window allows");
        if part.tokens.len() % 2 == 1 {
            taken += std::iter::from_fn(|| rebuilder.next_chunk())
                .map(|chunk| chunk.len() as u64)
                .sum::<u64>();
        }
        assert!(taken == rebuilder.taken() && taken <= rebuilder.received());
    }
}

pub(super) fn part_lists() -> io::Result<Vec<Vec<u8>>> {
    let run = |first, count, continued| Records {
        block: 1,
        first,
        count,
        continued,
    };
    let named = Token::Block {
        index: 1,
        name: b"ram".to_vec(),
    };
    let part = |offset, len, tokens| {
        let part = RamPart {
            generation: 0,
            offset,
            len,
            tokens,
        };
        frame::encode(&part).map_err(io::Error::other)
    };
    let first = part(0, 10, vec![Token::Raw(10)])?;
    let pages = part(10, 4 + 3 * 4104, vec![named, Token::Pages(run(3, 3, false))])?;
    let zeros = part(
        10 + 4 + 3 * 4104,
        95,
        vec![Token::Zeros(run(9, 10, true)), Token::Raw(5)],
    )?;
    Ok(vec![
        [first.as_slice(), &pages, &zeros].concat(),
        [zeros.as_slice(), &pages, &pages, &first].concat(),
    ])
}
