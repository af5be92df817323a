//! Putting a RAM stream together from parts that come late, twice, damaged or with bad intent.

#[path = "vm_ram/made.rs"]
mod made;

use bytes::Bytes;
use longhaul_agent::vm::ram::{Accepted, PART_LEN_MAX, RebuildError, Rebuilder};
use longhaul_common::digest::Digest;
use longhaul_common::wire::ram::{RamPart, Records, Token};
use made::{RAM, Stream, taken_apart};
use proptest::prelude::*;

fn part(offset: u64, len: u64, tokens: Vec<Token>) -> RamPart {
    RamPart {
        generation: 1,
        offset,
        len,
        tokens,
    }
}

fn raw(offset: u64, len: u32) -> (RamPart, Bytes) {
    let data = (offset..offset + u64::from(len)).map(|at| at as u8).collect();
    (part(offset, len.into(), vec![Token::Raw(len)]), data)
}

fn rebuilder(window: u64) -> Rebuilder {
    Rebuilder::new(1, window)
}

fn run(count: u32, continued: bool) -> Records {
    Records {
        block: 3,
        first: 5,
        count,
        continued,
    }
}

fn named() -> Token {
    Token::Block {
        index: 3,
        name: b"ram".to_vec(),
    }
}

#[test]
fn parts_wait_for_those_before_them() {
    let mut rebuilder = rebuilder(100);
    let accept = |rebuilder: &mut Rebuilder, offset, len| {
        let (part, data) = raw(offset, len);
        rebuilder.accept(&part, data)
    };
    assert_eq!(accept(&mut rebuilder, 20, 10), Ok(Accepted::Held));
    assert_eq!(accept(&mut rebuilder, 10, 10), Ok(Accepted::Held));
    assert_eq!(accept(&mut rebuilder, 20, 10), Ok(Accepted::Duplicate));
    assert_eq!((rebuilder.held(), rebuilder.received()), (20, 0));
    assert!(rebuilder.next_chunk().is_none());
    assert_eq!(accept(&mut rebuilder, 0, 10), Ok(Accepted::Ready));
    assert_eq!(
        (rebuilder.held(), rebuilder.received(), rebuilder.taken()),
        (0, 30, 0)
    );
    let all: Vec<_> = std::iter::from_fn(|| rebuilder.next_chunk()).flatten().collect();
    assert_eq!(all, (0..30).collect::<Vec<u8>>());
    assert_eq!((rebuilder.taken(), rebuilder.digest()), (30, Digest::of(&all)));
    assert_eq!(accept(&mut rebuilder, 10, 10), Ok(Accepted::Duplicate));
    assert_eq!(accept(&mut rebuilder, 12, 3), Ok(Accepted::Duplicate));
}

#[test]
fn raw_bytes_are_not_copied() {
    let mut rebuilder = rebuilder(100);
    let (part, data) = raw(0, 50);
    rebuilder.accept(&part, data.clone()).unwrap();
    assert_eq!(rebuilder.next_chunk().unwrap().as_ptr(), data.as_ptr());
}

#[test]
fn overlaps_are_refused() {
    let mut rebuilder = rebuilder(1000);
    let accept = |rebuilder: &mut Rebuilder, offset, len| {
        let (part, data) = raw(offset, len);
        rebuilder.accept(&part, data)
    };
    accept(&mut rebuilder, 0, 10).unwrap();
    accept(&mut rebuilder, 20, 10).unwrap();
    accept(&mut rebuilder, 40, 10).unwrap();
    for (offset, len) in [
        (5, 10),
        (9, 2),
        (15, 10),
        (20, 9),
        (20, 11),
        (25, 1),
        (29, 12),
        (15, 50),
        (0, 11),
        (39, 5),
    ] {
        let refused = accept(&mut rebuilder, offset, len);
        assert_eq!(refused, Err(RebuildError::Overlap { offset }), "{offset}, {len}");
    }
    assert_eq!((rebuilder.held(), rebuilder.received()), (20, 10));
    assert_eq!(accept(&mut rebuilder, 10, 10), Ok(Accepted::Ready));
    assert_eq!(accept(&mut rebuilder, 30, 10), Ok(Accepted::Ready));
    assert_eq!(rebuilder.received(), 50);
}

#[test]
fn the_window_holds() {
    let mut rebuilder = rebuilder(100);
    let accept = |rebuilder: &mut Rebuilder, offset, len| {
        let (part, data) = raw(offset, len);
        rebuilder.accept(&part, data)
    };
    accept(&mut rebuilder, 50, 50).unwrap();
    let too_far = |end, taken| {
        Err(RebuildError::TooFar {
            end,
            taken,
            window: 100,
        })
    };
    assert_eq!(accept(&mut rebuilder, 100, 1), too_far(101, 0));
    // Whatever the window, the next part is taken where QEMU has all before it.
    assert_eq!(accept(&mut rebuilder, 0, 50), Ok(Accepted::Ready));
    assert_eq!(accept(&mut rebuilder, 100, 1), too_far(101, 0));
    rebuilder.next_chunk().unwrap();
    assert_eq!(accept(&mut rebuilder, 100, 50), Ok(Accepted::Ready));
    assert_eq!(accept(&mut rebuilder, 150, 500), too_far(650, 50));
    while rebuilder.next_chunk().is_some() {}
    assert_eq!(accept(&mut rebuilder, 150, 500), Ok(Accepted::Ready));
    assert_eq!(accept(&mut rebuilder, u64::MAX - 50, 50), too_far(u64::MAX, 150));
}

#[test]
#[expect(clippy::too_many_lines, reason = "one of each refusal: a table")]
fn what_a_part_says_must_be_what_it_makes() {
    let mut rebuilder = rebuilder(u64::MAX);
    let mut refused = |part: RamPart, data: usize| {
        let error = rebuilder.accept(&part, Bytes::from(vec![0; data])).unwrap_err();
        assert_eq!((rebuilder.received(), rebuilder.held()), (0, 0));
        assert!(error.to_string().len() > 20);
        error
    };
    let other = RamPart {
        generation: 2,
        ..raw(0, 10).0
    };
    assert_eq!(
        refused(other, 10),
        RebuildError::Generation { expected: 1, got: 2 }
    );
    assert!(matches!(
        refused(part(0, 0, vec![]), 0),
        RebuildError::Length { made: 0, .. }
    ));
    assert!(matches!(
        refused(part(0, 0, vec![named()]), 0),
        RebuildError::Length { .. }
    ));
    assert!(matches!(
        refused(raw(0, 10).0, 9),
        RebuildError::DataLength {
            expected: 10,
            got: 9,
            ..
        }
    ));
    assert!(matches!(
        refused(part(0, 11, vec![Token::Raw(10)]), 10),
        RebuildError::Length { made: 10, .. }
    ));
    assert!(matches!(
        refused(part(0, 0, vec![Token::Raw(0)]), 0),
        RebuildError::Part { .. }
    ));
    assert!(matches!(
        refused(part(u64::MAX, 1, vec![Token::Raw(1)]), 1),
        RebuildError::Part { .. }
    ));
    let zeros = vec![Token::Zeros(run(u32::MAX, true))];
    let made = u64::from(u32::MAX) * 9;
    assert_eq!(
        refused(part(0, made, zeros), 0),
        RebuildError::Length {
            offset: 0,
            said: made,
            made
        }
    );
    let most = (PART_LEN_MAX / 9) as u32;
    let zeros = vec![Token::Zeros(run(most + 1, true))];
    assert!(matches!(
        refused(part(0, u64::from(most + 1) * 9, zeros), 0),
        RebuildError::Length { .. }
    ));
    // A name counts from its token on, in its part alone.
    for tokens in [
        vec![Token::Zeros(run(1, false))],
        vec![Token::Zeros(run(1, false)), named()],
        vec![Token::Raw(1), Token::Pages(run(1, false))],
    ] {
        let data = part(0, 0, tokens.clone()).data_len() as usize;
        let error = refused(part(0, 13, tokens), data);
        assert!(
            matches!(error, RebuildError::UnnamedBlock { block: 3, .. }),
            "{error}"
        );
    }
    let (good, data) = raw(0, 4);
    assert_eq!(rebuilder.accept(&good, data), Ok(Accepted::Ready));
    let tokens = vec![named(), Token::Zeros(run(2, false)), Token::Raw(1)];
    let accepted = rebuilder.accept(&part(4, 23, tokens), Bytes::from_static(&[0xee]));
    assert_eq!(accepted, Ok(Accepted::Ready));
    let all: Vec<u8> = std::iter::from_fn(|| rebuilder.next_chunk())
        .flatten()
        .skip(4)
        .collect();
    assert_eq!(all, *b"\0\0\0\0\0\0\x50\x02\x03ram\0\0\0\0\0\0\0\x60\x22\0\xee");
}

#[test]
fn a_small_window_is_enough_where_parts_come_nearly_in_order() {
    let mut stream = Stream::with_blocks(&[("pc.ram", 1 << 20)]);
    stream.part(RAM).page("pc.ram", 0, 0);
    for page in 1..250 {
        stream.next_page(page, page as u8);
    }
    let (_, parts) = taken_apart(&stream.0, 8192, || 5000);
    let mut rebuilder = Rebuilder::new(7, 100_000);
    let mut out = Vec::new();
    for group in parts.chunks(8) {
        for part in group.iter().rev() {
            rebuilder.accept(&part.header, part.data.clone()).unwrap();
        }
        assert_eq!(rebuilder.held(), 0);
        std::iter::from_fn(|| rebuilder.next_chunk()).for_each(|chunk| out.extend_from_slice(&chunk));
    }
    assert!(out == stream.0);
}

fn token() -> impl Strategy<Value = Token> {
    let records = (
        0_u16..5,
        prop_oneof![0_u64..10, any::<u64>()],
        prop_oneof![0_u32..5, any::<u32>()],
        any::<bool>(),
    );
    let records = records.prop_map(|(block, first, count, continued)| Records {
        block,
        first,
        count,
        continued,
    });
    prop_oneof![
        (0_u32..10).prop_map(Token::Raw),
        any::<u32>().prop_map(Token::Raw),
        (0_u16..5, prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(index, name)| Token::Block { index, name }),
        records.clone().prop_map(Token::Pages),
        records.prop_map(Token::Zeros),
    ]
}

proptest! {
    #[test]
    fn no_part_harms(
        parts in prop::collection::vec((prop_oneof![0_u64..200, any::<u64>()], any::<bool>(), 0_u64..200, prop::collection::vec(token(), 0..6)), 0..40),
    ) {
        const WINDOW: u64 = 20_000;
        let mut rebuilder = rebuilder(WINDOW);
        let mut taken = 0;
        for (offset, honest, len, tokens) in parts {
            let offset = if honest { rebuilder.received() } else { offset };
            let mut part = part(offset, len, tokens);
            let data = Bytes::from(vec![7; part.data_len().min(1 << 20) as usize]);
            // What it makes, found by asking.
            if let (true, Err(RebuildError::Length { made, .. })) = (honest, rebuilder.accept(&part, data.clone())) {
                part.len = made;
            }
            let _ = rebuilder.accept(&part, data);
            prop_assert!(rebuilder.held() <= WINDOW);
            if offset % 3 == 0 {
                taken += std::iter::from_fn(|| rebuilder.next_chunk()).map(|chunk| chunk.len() as u64).sum::<u64>();
            }
            prop_assert_eq!(taken, rebuilder.taken());
            prop_assert!(rebuilder.taken() <= rebuilder.received());
        }
    }
}
