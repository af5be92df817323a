//! The tap on QEMU's RAM stream against streams written by hand: every kind of section and record, whole, cut and damaged.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "vm_ram/made.rs"]
mod made;

use longhaul_agent::vm::ram::{OpaqueReason, PART_LEN_MAX, Part, Phase, Tokenizer};
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
use longhaul_common::wire::batch::{BatchHeader, Leaves};
use longhaul_common::wire::ram::{Records, TOKENS_MAX, Token};
use made::{DIRTY, RAM, Stream, put_together, same};
use proptest::prelude::*;

const WHOLE: usize = 1 << 20;

fn plain() -> Stream {
    let mut stream = Stream::with_blocks(&[("pc.ram", 64 << 12), ("vga", 16 << 12)]);
    stream
        .part(RAM)
        .page("pc.ram", 3, 1)
        .next_page(4, 2)
        .next_page(5, 3);
    stream
        .next_zero(6)
        .next_zero(7)
        .zero("vga", 0)
        .next_zero(1)
        .page("vga", 2, 9);
    stream
        .eos(RAM)
        .part(RAM)
        .next_page(3, 4)
        .page("pc.ram", 4, 5)
        .eos(RAM);
    stream.end(RAM).next_page(5, 6).eos(RAM).device_state();
    stream
}

#[test]
fn pages_become_tokens() {
    let stream = plain();
    let (tokenizer, parts) = same(&stream.0, WHOLE, || usize::MAX);
    let [part] = parts.as_slice() else {
        panic!("{} parts", parts.len())
    };
    let run = |block, first, count, continued| Records {
        block,
        first,
        count,
        continued,
    };
    let tokens: Vec<_> = part
        .header
        .tokens
        .iter()
        .filter(|token| !matches!(token, Token::Raw(_)))
        .collect();
    let block = |index, name: &str| Token::Block {
        index,
        name: name.as_bytes().to_vec(),
    };
    assert_eq!(
        tokens,
        [
            &block(0, "pc.ram"),
            &Token::Pages(run(0, 3, 3, false)),
            &Token::Zeros(run(0, 6, 2, true)),
            &block(1, "vga"),
            &Token::Zeros(run(1, 0, 2, false)),
            &Token::Pages(run(1, 2, 1, false)),
            &Token::Pages(run(1, 3, 1, true)),
            &Token::Pages(run(0, 4, 1, false)),
            &Token::Pages(run(0, 5, 1, true)),
        ]
    );
    let counts = tokenizer.totals();
    assert_eq!((counts.pages, counts.zeros), (7, 4));
    assert_eq!(
        (counts.resent_pages, counts.resent_zeros, counts.unfollowed),
        (2, 0, 0)
    );
    assert_eq!(tokenizer.phase(), Phase::Tail);
    assert_eq!(tokenizer.opaque_reason(), None);
}

#[test]
fn slices_of_any_size_give_the_same() {
    let stream = plain();
    let (_, whole) = same(&stream.0, 1 << 14, || usize::MAX);
    for size in (1..40).chain([100, 4095, 4096, 4097, 4104, 5000]) {
        let (_, parts) = same(&stream.0, 1 << 14, || size);
        assert!(parts == whole, "slices of {size} give other parts");
    }
}

/// Taken apart in whole and in small slices, the stream is understood to its end and gives so many pages and zero pages.
fn understood(stream: &Stream, pages: u64, zeros: u64) -> Tokenizer {
    same(&stream.0, 1 << 14, || 3);
    let (tokenizer, _) = same(&stream.0, WHOLE, || usize::MAX);
    assert_eq!(tokenizer.opaque_reason(), None);
    let counts = tokenizer.totals();
    assert_eq!((counts.pages, counts.zeros), (pages, zeros));
    tokenizer
}

/// The stream comes through, but is not understood.
fn opaque(stream: &Stream, reason: OpaqueReason) {
    for slice in [1, 7, usize::MAX] {
        let (tokenizer, _) = same(&stream.0, WHOLE, || slice);
        let found = (tokenizer.phase(), tokenizer.opaque_reason());
        assert_eq!(found, (Phase::Opaque, Some(reason)));
    }
}

const SMALL: &[(&str, u64)] = &[("pc.ram", 8 << 12)];

#[test]
fn commands_pass() {
    let mut stream = Stream::begun();
    stream.command(1, &[]).command(2, &[0, 0, 0, 1]).command(3, &[]);
    stream.ram_start(SMALL).part(RAM).page("pc.ram", 0, 1).eos(RAM);
    assert_eq!(understood(&stream, 1, 0).phase(), Phase::Iterating);
    stream.command(11, &[]);
    assert_eq!(understood(&stream, 1, 0).phase(), Phase::Tail);
    stream.end(RAM).next_page(1, 1).eos(RAM).device_state();
    assert_eq!(understood(&stream, 2, 0).phase(), Phase::Tail);
}

#[test]
fn phases_are_told() {
    let mut stream = Stream::begun();
    assert_eq!(understood(&stream, 0, 0).phase(), Phase::Header);
    stream.ram_start(SMALL);
    assert_eq!(understood(&stream, 0, 0).phase(), Phase::Header);
    stream.part(RAM);
    assert_eq!(understood(&stream, 0, 0).phase(), Phase::Iterating);
    stream.eos(RAM).end(RAM);
    assert_eq!(understood(&stream, 0, 0).phase(), Phase::Tail);
}

#[test]
fn configuration_subsections_pass() {
    let mut stream = Stream::begun();
    stream
        .put(&[5])
        .str8("configuration/uuid")
        .be32(1)
        .put(&[0x05; 16]);
    stream
        .put(&[5])
        .str8("configuration/target-page-bits")
        .be32(1)
        .be32(12);
    stream
        .put(&[5])
        .str8("configuration/capabilities")
        .be32(1)
        .be32(0);
    let begun = stream.clone();
    stream.ram_start(SMALL).part(RAM).zero("pc.ram", 1).eos(RAM);
    understood(&stream, 0, 1);

    let mut other = begun.clone();
    other
        .put(&[5])
        .str8("configuration/target-page-bits")
        .be32(1)
        .be32(14);
    opaque(&other, OpaqueReason::Configuration);
    let mut other = begun.clone();
    other.put(&[5]).str8("configuration/new").be32(1).be32(14);
    opaque(&other, OpaqueReason::Configuration);
    let mut other = begun;
    other
        .put(&[5])
        .str8("configuration/capabilities")
        .be32(1)
        .be32(1)
        .str8("mapped-ram");
    opaque(&other, OpaqueReason::Configuration);
}

#[test]
fn block_lists_with_more_fields_pass() {
    // Guest addresses.
    let mut stream = Stream::begun();
    stream
        .put(&[5])
        .str8("configuration/capabilities")
        .be32(1)
        .be32(1)
        .str8("x-ignore-shared");
    stream.start(RAM, "ram", 4).be64(0x5000 | 4);
    stream
        .str8("pc.ram")
        .be64(0x3000)
        .be64(0)
        .str8("rom")
        .be64(0x2000)
        .be64(0xfffc_0000)
        .eos(RAM);
    stream.part(RAM).page("rom", 1, 1).zero("pc.ram", 2).eos(RAM);
    understood(&stream, 1, 1);

    // Page sizes of those blocks that have others than the host: first, in the middle, last; or none at all.
    for sizes in 0..8_u64 {
        let mut stream = Stream::begun();
        let advice = [0x20_1000_u64.to_be_bytes(), 4096_u64.to_be_bytes()].concat();
        stream
            .command(3, &advice)
            .start(RAM, "ram", 4)
            .be64(0x60_0000 | 4);
        for (bit, name) in ["a", "b", "c"].iter().enumerate() {
            stream.str8(name).be64(0x20_0000);
            if (sizes >> bit) & 1 == 1 {
                stream.be64(0x20_0000);
            }
        }
        stream.be64(0x200).eos(RAM);
        stream.part(RAM).page("c", 1, 1).zero("a", 2).eos(RAM);
        assert_eq!(understood(&stream, 1, 1).blocks().len(), 3);
    }
}

#[test]
fn dirty_bitmap_sections_pass() {
    let mut stream = Stream::begun();
    stream.command(3, &[]).ram_start(SMALL);
    stream.start(DIRTY, "dirty-bitmap", 1);
    stream.put(&[0x1c]).str8("d0").str8("bm0").be32(0x10000).put(&[1]);
    stream
        .put(&[0x14])
        .str8("bm1")
        .be32(512)
        .put(&[3])
        .put(&[1])
        .footer(DIRTY);
    stream.part(RAM).page("pc.ram", 0, 1).eos(RAM);
    stream
        .part(DIRTY)
        .put(&[0x4c])
        .str8("d0")
        .str8("bm0")
        .be64(0)
        .be32(100)
        .be64(5)
        .put(&[1; 5]);
    stream
        .put(&[0x42])
        .be64(128)
        .be32(64)
        .put(&[0x80, 0x01])
        .footer(DIRTY);
    stream.part(RAM).next_page(1, 1).eos(RAM);
    stream.part(DIRTY).put(&[0x80, 0x80, 0, 0x20, 1]).footer(DIRTY);
    stream.part(RAM).next_page(2, 1).eos(RAM).end(RAM).eos(RAM);
    stream.end(DIRTY).put(&[1]).footer(DIRTY).device_state();
    understood(&stream, 3, 0);
}

#[test]
fn records_that_are_no_tokens_pass() {
    let mut stream = Stream::with_blocks(SMALL);
    stream.part(RAM).be64(0x200).page("pc.ram", 0, 1);
    stream.be64(0x1000 | 0x60).put(&[1]).be16(5).put(b"delta");
    stream
        .be64(0x2000 | 0x40)
        .str8("pc.ram")
        .put(&[1])
        .be16(4096)
        .put(&[9; 4096]);
    stream.be64(0x3000 | 0x120).be32(6).put(b"zipped");
    // A page that is filled, not zero; one beyond its block; one of a block that is not in the list.
    stream.be64(0x4000 | 0x22).put(&[7]);
    stream
        .next_page(8, 1)
        .next_zero(9)
        .zero("other", 1)
        .next_page(2, 5)
        .page("other", 1, 4);
    stream.next_zero(3).page("pc.ram", 7, 3).next_zero(1).eos(RAM);
    understood(&stream, 2, 1);
}

#[test]
fn sections_without_footers_pass() {
    let mut stream = Stream::begun();
    stream
        .start(RAM, "ram", 4)
        .be64(0x8000 | 4)
        .str8("pc.ram")
        .be64(0x8000)
        .be64(0x10);
    stream
        .part(RAM)
        .page("pc.ram", 0, 1)
        .be64(0x10)
        .part(RAM)
        .next_page(1, 1)
        .be64(0x10);
    stream.end(RAM).next_page(2, 1).be64(0x10).device_state();
    assert_eq!(understood(&stream, 3, 0).phase(), Phase::Tail);
}

#[test]
fn early_state_of_an_unknown_device_is_passed_over() {
    let mut stream = Stream::with_blocks(SMALL);
    stream
        .put(&[4])
        .be32(5)
        .str8("vm0/virtio-mem-device-early")
        .be32(0)
        .be32(1);
    stream.put(&[0x7e; 50]).put(&[2, 0, 0, 0]).footer(5);
    stream
        .start(6, "0000:00:04.0/vfio", 1)
        .be64(0xffff_ffff_ef10_0003)
        .be64(0xffff_ffff_ef10_0001)
        .footer(6);
    stream
        .part(RAM)
        .page("pc.ram", 0, 1)
        .eos(RAM)
        .part(RAM)
        .next_page(1, 1)
        .eos(RAM);
    understood(&stream, 2, 0);
    // What goes on sending while the VM runs is not understood.
    stream.part(6).be64(0xffff_ffff_ef10_0001).footer(6);
    opaque(&stream, OpaqueReason::Section);
    let mut endless = Stream::with_blocks(SMALL);
    endless
        .put(&[4])
        .put(&vec![0x55; 2 << 20])
        .footer(5)
        .part(RAM)
        .page("pc.ram", 0, 1);
    let (tokenizer, _) = same(&endless.0, WHOLE, || 99_999);
    assert_eq!(tokenizer.opaque_reason(), Some(OpaqueReason::Section));
}

#[test]
fn what_is_not_known_passes_as_it_is() {
    let mut other = Stream::default();
    other.put(b"\x11\x22\x33\x44 multifd").put(&[3; 10_000]);
    opaque(&other, OpaqueReason::NotQemu);
    let iterating = {
        let mut stream = Stream::with_blocks(SMALL);
        stream.part(RAM).page("pc.ram", 0, 1);
        stream
    };
    let between = {
        let mut stream = iterating.clone();
        stream.eos(RAM);
        stream
    };
    type Make = fn(&mut Stream) -> &mut Stream;
    let in_section: &[(Make, OpaqueReason)] = &[
        (|s| s.be64(0x80), OpaqueReason::Record),
        (|s| s.be64(0x1000 | 0x10), OpaqueReason::Record),
        (|s| s.be64(0x1000 | 4), OpaqueReason::Record),
        (|s| s.be64(8).str8("").put(&[0; 4096]), OpaqueReason::Record),
        (|s| s.be64(0x60).put(&[1]).be16(4097), OpaqueReason::Record),
        (|s| s.be64(0x120).be32(u32::MAX), OpaqueReason::Record),
        (|s| s.eos(99), OpaqueReason::Footer),
    ];
    let at_section: &[(Make, OpaqueReason)] = &[
        (|s| s.command(4, &[]), OpaqueReason::Command),
        (|s| s.command(7, &[0, 0, 0, 9]), OpaqueReason::Command),
        (|s| s.command(2, &[1]), OpaqueReason::Command),
        (|s| s.command(99, &[]), OpaqueReason::Command),
        (|s| s.part(77), OpaqueReason::Section),
        (|s| s.device_state(), OpaqueReason::Section),
        (|s| s.start(5, "ram", 4), OpaqueReason::Section),
        (|s| s.put(&[0]), OpaqueReason::EarlyEnd),
        (|s| s.put(&[6]), OpaqueReason::Section),
    ];
    let all = [(iterating, in_section), (between, at_section)];
    for (begun, cases) in all {
        for (number, (make, reason)) in cases.iter().enumerate() {
            println!("case {number}");
            let mut stream = begun.clone();
            make(&mut stream);
            stream.part(RAM).page("pc.ram", 3, 5).put(&[0xee; 20_000]);
            opaque(&stream, *reason);
        }
    }
    let mut list = Stream::begun();
    list.start(RAM, "ram", 4).be64(0x1000 | 4).str8("a").be64(0x2000);
    opaque(&list, OpaqueReason::BlockList);
    let mut bitmap = Stream::with_blocks(SMALL);
    bitmap.start(DIRTY, "dirty-bitmap", 1).put(&[0x81, 0x01]);
    opaque(&bitmap, OpaqueReason::DirtyBitmap);
}

#[test]
fn a_cut_gives_all_whole_records_at_once() {
    let stream = plain().0;
    let mut at_device_state = false;
    let mut tokenizer = Tokenizer::new(&made::options(WHOLE));
    let mut parts: Vec<Part> = Vec::new();
    for (at, byte) in stream.iter().enumerate() {
        tokenizer.push(&[*byte]);
        if at % 611 == 0 || at_device_state {
            parts.extend(tokenizer.cut());
            assert!(tokenizer.cut().is_none());
            assert!(tokenizer.pending() <= if at_device_state { 0 } else { 8 + 256 + 4096 });
        }
        at_device_state = at + 300 > stream.len();
    }
    tokenizer.finish();
    parts.extend(std::iter::from_fn(|| tokenizer.cut()));
    assert!(put_together(&parts).1 == stream);
    let counts = tokenizer.totals();
    assert_eq!((counts.pages, counts.zeros), (7, 4));
}

/// Every part keeps the limits of the wire, and its header fits into a batch's.
fn within_limits(parts: &[Part], target: usize) {
    for part in parts {
        part.header.check().unwrap();
        assert_eq!(part.header.data_len(), part.data.len() as u64);
        assert!(part.data.len() <= target && (1..=PART_LEN_MAX).contains(&part.header.len));
        let header = BatchHeader {
            job: JobId::random(),
            attempt: Attempt(1),
            disk: DiskIndex(0),
            round: Round(0),
            sequence: Sequence(u64::MAX),
            pieces: Vec::new(),
            leaves: Leaves::default(),
            ram: Some(part.header.clone()),
            urgent: true,
            digest: longhaul_common::digest::Digest([0; 32]),
        };
        let encoded = header.encode().unwrap();
        BatchHeader::decode(&encoded).unwrap();
    }
}

#[test]
fn parts_keep_every_limit() {
    // Names as long as can be, another block with each record.
    let names: Vec<_> = (0..1030).map(|number| format!("{number:0>255}")).collect();
    let blocks: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), (u64::MAX >> 12) & !0xfff))
        .collect();
    let mut stream = Stream::with_blocks(&blocks);
    stream.part(RAM);
    for round in 0..3 {
        for (number, name) in names.iter().enumerate() {
            stream
                .zero(name, (1 << 38) + number as u64 * 2 + round)
                .next_page(round, 1);
        }
    }
    let (tokenizer, parts) = same(&stream.0, WHOLE, || 54_321);
    within_limits(&parts, WHOLE);
    assert_eq!(tokenizer.blocks().len(), 1024);
    assert_eq!(tokenizer.totals().zeros, 3 * 1024);

    // Zero pages that are no run; zero pages that are; both without data.
    let mut stream = Stream::with_blocks(&[("pc.ram", 1 << 40)]);
    stream.part(RAM).zero("pc.ram", 0);
    for number in 0..20_000 {
        stream.next_zero(number * 2);
    }
    for number in 0..600_000 {
        stream.next_zero(number);
    }
    let (_, parts) = same(&stream.0, 1 << 14, || 54_321);
    within_limits(&parts, 1 << 14);
    assert!(parts.len() < 20, "{} parts", parts.len());
    assert!(
        parts
            .iter()
            .any(|part| part.header.tokens.len() > TOKENS_MAX - 10)
    );

    // Device state alone, behind many zero pages.
    stream.eos(RAM).end(RAM).eos(RAM).put(&vec![0xdd; 5 << 20]);
    let (_, parts) = same(&stream.0, WHOLE, || 54_321);
    within_limits(&parts, WHOLE);
}

#[test]
fn every_truncation_passes() {
    let stream = plain().0;
    for end in (0..stream.len()).filter(|end| end % 7 == 0 || *end < 400 || stream.len() - end < 1000) {
        same(&stream[..end], 1 << 14, || 1 << 16);
    }
}

/// Something that a stream may go on with.
fn step() -> impl Strategy<Value = (u8, u64, u8)> {
    (0_u8..22, 0_u64..40, any::<u8>())
}

fn apply(stream: &mut Stream, (kind, page, fill): (u8, u64, u8)) {
    let block = if page % 2 == 0 { "pc.ram" } else { "vga" };
    match kind {
        0..5 => stream.next_page(page, fill),
        5..9 => stream.next_zero(page),
        9 => stream.page(block, page, fill),
        10 => stream.zero(block, page),
        11 => stream.eos(RAM).part(RAM),
        12 => stream
            .be64((page << 12) | 0x60)
            .put(&[1])
            .be16(u16::from(fill))
            .put(&vec![fill; fill.into()]),
        13 => stream.be64((page << 12) | 0x22).put(&[fill]),
        14 => stream.zero("no such block", page),
        15 => stream.be64(0x200),
        16 => stream.eos(RAM).command(1, &[]).part(RAM),
        17 if fill < 20 => stream.eos(RAM).end(RAM),
        18 if fill < 20 => stream.put(&vec![fill; 5000]),
        19 if fill < 20 => stream.device_state(),
        _ => stream.next_page(page, fill),
    };
}

proptest! {
    #[test]
    fn any_stream_in_any_slices_and_any_order_comes_out_unchanged(
        steps in prop::collection::vec(step(), 0..60),
        flips in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..4),
        slices in prop::collection::vec(1_usize..9000, 1..40),
        order in any::<u64>(),
        target in 1_usize..40_000,
    ) {
        let mut stream = Stream::with_blocks(&[("pc.ram", 32 << 12), ("vga", 16 << 12)]);
        stream.part(RAM).page("pc.ram", 0, 1);
        steps.into_iter().for_each(|one| apply(&mut stream, one));
        for (at, bit) in flips {
            let at = at.index(stream.0.len());
            stream.0[at] ^= 1 << (bit % 8);
        }
        let mut slices = slices.into_iter().cycle();
        let (_, parts) = same(&stream.0, target, || slices.next().unwrap());
        within_limits(&parts, target.max(8192));
        let mut shuffled: Vec<_> = parts.iter().chain(&parts).collect();
        shuffled.sort_by_key(|part| (part.header.offset ^ order).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        prop_assert!(put_together(shuffled).1 == stream.0);
    }
}
