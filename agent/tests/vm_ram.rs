//! The tap on QEMU's RAM stream against streams written by hand: every kind of section and record, whole, cut and damaged.

#[path = "vm_ram/made.rs"]
mod made;

use longhaul_agent::vm::ram::Phase;
use longhaul_common::wire::ram::{Records, Token};
use made::{RAM, Stream, same};

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
