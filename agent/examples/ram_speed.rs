//! How fast QEMU's RAM stream is taken apart and put together: `cargo run --release -p longhaul-agent --example ram_speed [FILE]`.
//!
//! Takes a captured stream, or makes one of 512 MiB of pages with content; reads it in slices of 256 KiB as from a socket.
//! Counts processor time, so that other programs do not matter.

use std::time::Duration;

use longhaul_agent::vm::ram::{Part, Rebuilder, Tokenizer, TokenizerOptions};
use longhaul_common::digest::Digest;
use rustix::time::{ClockId, clock_gettime};

const SLICE: usize = 256 << 10;
const ROUNDS: usize = 3;

fn main() -> std::io::Result<()> {
    let stream = match std::env::args_os().nth(1) {
        Some(path) => std::fs::read(path)?,
        None => made(128 << 10),
    };
    println!("{} MB in slices of {SLICE} bytes", stream.len() / 1_000_000);
    for target in [256 << 10, 1 << 20] {
        for _ in 0..ROUNDS {
            let began = on_cpu();
            let (mut tokenizer, mut parts) = (tokenizer(target), 0);
            for slice in stream.chunks(SLICE) {
                tokenizer.push(slice);
                parts += std::iter::from_fn(|| tokenizer.next_part()).count();
            }
            say(
                &format!("taken apart, {parts} parts of {target}"),
                &stream,
                on_cpu() - began,
            );
            let all = taken_apart(&stream, target);
            let began = on_cpu();
            let mut rebuilder = Rebuilder::new(0, 64 << 20);
            let mut out = 0;
            for Part { header, data, .. } in all {
                if let Err(error) = rebuilder.accept(&header, data) {
                    return Err(std::io::Error::other(error));
                }
                out += std::iter::from_fn(|| rebuilder.next_chunk())
                    .map(|chunk| chunk.len())
                    .sum::<usize>();
            }
            say("put together", &stream, on_cpu() - began);
            assert_eq!((out, rebuilder.digest()), (stream.len(), tokenizer.digest()));
        }
    }
    let began = on_cpu();
    Digest::of(&stream);
    say("digest alone", &stream, on_cpu() - began);
    Ok(())
}

/// Time that this program has had on a processor.
fn on_cpu() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

fn tokenizer(target: usize) -> Tokenizer {
    Tokenizer::new(&TokenizerOptions {
        target,
        ..TokenizerOptions::default()
    })
}

fn taken_apart(stream: &[u8], target: usize) -> Vec<Part> {
    let mut tokenizer = tokenizer(target);
    let mut parts = Vec::new();
    for slice in stream.chunks(SLICE) {
        tokenizer.push(slice);
        parts.extend(std::iter::from_fn(|| tokenizer.next_part()));
    }
    tokenizer.finish();
    parts.extend(std::iter::from_fn(|| tokenizer.cut()));
    parts
}

fn say(what: &str, stream: &[u8], took: Duration) {
    println!(
        "{what}: {:.2} GB/s",
        stream.len() as f64 / took.as_secs_f64() / 1e9
    );
}

/// One block, sent in sections of 1,024 pages.
fn made(pages: u64) -> Vec<u8> {
    let mut stream = b"QEVM\0\0\0\x03\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    stream.extend(((pages << 12) | 4).to_be_bytes());
    stream.extend(b"\x06pc.ram");
    stream.extend((pages << 12).to_be_bytes());
    stream.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
    for page in 0..pages {
        if page % 1024 == 0 {
            stream.extend(b"\x02\0\0\0\x01");
        }
        if page == 0 {
            stream.extend(0x08_u64.to_be_bytes());
            stream.extend(b"\x06pc.ram");
        } else {
            stream.extend(((page << 12) | 0x28).to_be_bytes());
        }
        let word = (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        stream.extend(word.iter().cycle().take(4096));
        if page % 1024 == 1023 {
            stream.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
        }
    }
    stream
}
