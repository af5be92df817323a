//! A captured stream without what its pages hold: small enough to be kept, and all that a parser has to understand is real.
//!
//! `(u32 LE length, so many bytes of the stream, one page)` again and again; the last group has no page. Each page is filled with
//! noise of its own when the stream is made again.

use longhaul_agent::vm::ram::Part;
use longhaul_common::wire::ram::{Records, Token};

const PAGE: usize = 4096;

/// The skeleton of `stream`, whose parts are known.
pub(crate) fn of(stream: &[u8], parts: &[Part]) -> Vec<u8> {
    let (mut skeleton, mut kept, mut at) = (Vec::new(), 0, 0);
    let name = |run: &Records, names: &[(u16, usize)]| {
        let named = names
            .iter()
            .find(|(index, _)| !run.continued && *index == run.block);
        named.map_or(0, |(_, len)| 1 + len)
    };
    for part in parts {
        let mut names = Vec::new();
        for token in &part.header.tokens {
            match token {
                Token::Raw(bytes) => at += *bytes as usize,
                Token::Block { index, name } => names.push((*index, name.len())),
                Token::Zeros(run) => at += run.count as usize * 9 + name(run, &names),
                Token::Pages(run) => {
                    at += name(run, &names);
                    for _ in 0..run.count {
                        at += 8;
                        skeleton.extend((at as u32 - kept as u32).to_le_bytes());
                        skeleton.extend(&stream[kept..at]);
                        at += PAGE;
                        kept = at;
                    }
                }
            }
        }
    }
    skeleton.extend((stream.len() as u32 - kept as u32).to_le_bytes());
    skeleton.extend(&stream[kept..]);
    skeleton
}

/// A stream around `skeleton`, and how many pages it has.
pub(crate) fn fleshed(mut skeleton: &[u8]) -> (Vec<u8>, u64) {
    let (mut stream, mut pages) = (Vec::new(), 0_u64);
    loop {
        let (len, rest) = skeleton.split_first_chunk::<4>().unwrap();
        let (bytes, rest) = rest.split_at(u32::from_le_bytes(*len) as usize);
        stream.extend(bytes);
        if rest.is_empty() {
            return (stream, pages);
        }
        skeleton = rest;
        pages += 1;
        let noise = pages.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        stream.extend(noise.iter().cycle().take(PAGE));
    }
}
