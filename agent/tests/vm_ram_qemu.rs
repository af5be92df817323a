//! The tap on real streams: of emulated VMs that write memory while they migrate. Needs Debian's `qemu-system-x86`.
//!
//! `LONGHAUL_QEMU` names another QEMU; `LONGHAUL_SEED` replays the random order of a run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "vm_ram/made.rs"]
mod made;
#[path = "vm_ram/qemu.rs"]
mod qemu;
#[path = "vm_ram/skeleton.rs"]
mod skeleton;

use std::sync::OnceLock;

use longhaul_agent::vm::ram::{Phase, Tokenizer};
use made::{put_together, same, taken_apart};
use qemu::{Captured, Kind, captured, loaded};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

const TARGET: usize = 256 << 10;

fn q35(ram_mib: u64) -> Kind<'static> {
    Kind {
        machine: "q35",
        ram_mib,
        more: &[],
    }
}

/// One stream for all tests that damage it.
fn small() -> &'static Captured {
    static SMALL: OnceLock<Captured> = OnceLock::new();
    SMALL.get_or_init(|| captured(&q35(16), &[], |_| {}))
}

fn random() -> StdRng {
    let seed = std::env::var("LONGHAUL_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random::<u64>);
    println!("LONGHAUL_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// The whole of the stream up to device state was understood.
fn understood(tokenizer: &Tokenizer, what: &str) {
    let reason = tokenizer.opaque_reason();
    assert_eq!((tokenizer.phase(), reason), (Phase::Tail, None), "{what}");
    let counts = tokenizer.totals();
    println!("{what}: {} bytes, {counts:?}", tokenizer.position());
    assert_eq!(counts.unfollowed, 0);
}

#[test]
fn streams_of_both_machines_come_out_unchanged() {
    let mut random = random();
    for (machine, ram_mib) in [("q35", 16), ("q35", 128), ("pc", 16), ("pc", 64)] {
        let kind = Kind {
            machine,
            ram_mib,
            more: &[],
        };
        let Captured { stream, .. } = captured(&kind, &[], |_| {});
        let (tokenizer, _) = same(&stream, TARGET, || random.random_range(1..300_000));
        understood(&tokenizer, &format!("{machine} with {ram_mib} MiB"));
        let counts = tokenizer.totals();
        let ram_pages = ram_mib << 8;
        let first = counts.pages + counts.zeros - counts.resent_pages - counts.resent_zeros;
        assert!(first >= ram_pages, "{first} of {ram_pages} pages were seen");
        assert!(counts.resent_pages > 100, "{counts:?}");
        assert!(counts.raw_bytes < 1 << 20, "{counts:?}");
        assert_eq!(tokenizer.blocks()[0].used_length, ram_mib << 20);
    }
}

#[test]
fn capabilities_that_change_the_stream_are_understood() {
    let uuid = Kind {
        more: &["-uuid", "5f2b1c7e-6d1f-4c5b-9d7b-1c2d3e4f5a6b"],
        ..q35(16)
    };
    for (kind, capability) in [
        (q35(16), "xbzrle"),
        (uuid, "validate-uuid"),
        (q35(16), "x-ignore-shared"),
        (q35(16), "dirty-bitmaps"),
        (q35(16), "multifd"),
    ] {
        let captured = captured(&kind, &[capability], |vm| {
            if capability == "dirty-bitmaps" {
                vm.add_bitmaps();
            }
        });
        let (tokenizer, _) = same(&captured.stream, TARGET, || 100_000);
        understood(&tokenizer, capability);
        // Its pages travel through other channels.
        assert_eq!(tokenizer.totals().pages == 0, capability == "multifd");
    }
}

#[test]
fn parts_come_in_any_order_and_more_than_once() {
    let stream = &small().stream;
    let mut random = random();
    let (_, parts) = taken_apart(stream, TARGET, || random.random_range(1..100_000));
    let mut order: Vec<_> = parts.iter().chain(&parts).chain(parts.iter().take(7)).collect();
    order.shuffle(&mut random);
    let (rebuilder, out) = put_together(order);
    assert!(out == *stream);
    assert_eq!(rebuilder.held(), 0);
}

#[test]
fn a_rebuilt_stream_is_what_qemu_loads() {
    let captured = small();
    let (_, parts) = taken_apart(&captured.stream, TARGET, || 77_777);
    let (_, out) = put_together(&parts);
    assert_eq!(loaded(&q35(16), [out.into()]), captured.memory);
}

#[test]
fn damage_costs_no_byte() {
    let stream = &small().stream;
    let mut random = random();
    let begin = stream.len().min(3 << 20);
    for _ in 0..60 {
        let mut damaged = stream[..random.random_range(0..begin)].to_vec();
        for _ in 0..random.random_range(0..4) {
            // Often in the header, where everything is decided.
            let last = if random.random() { 1500 } else { damaged.len() };
            if let Some(byte) = damaged.get_mut(random.random_range(0..last.max(1))) {
                *byte ^= 1 << random.random_range(0..8);
            }
        }
        same(&damaged, TARGET, || random.random_range(1..100_000));
    }
    for end in 0..1500 {
        same(&stream[..end], TARGET, || 64);
    }
    for bit in 0..1500 * 8 {
        let mut damaged = stream[..20_000].to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        same(&damaged, TARGET, || usize::MAX);
    }
}

/// QEMU 10.0.2, with bitmaps that travel along, SWITCHOVER_START and all device state. Made again with `LONGHAUL_QEMU` naming a
/// newer QEMU and `LONGHAUL_SKELETON` the file to write.
const QEMU_10: &[u8] = include_bytes!("vm_ram/qemu-10.0.2.skeleton");

#[test]
fn a_stream_of_qemu_10_comes_out_unchanged() {
    if let Some(path) = std::env::var_os("LONGHAUL_SKELETON") {
        let kind = Kind {
            more: &["-vga", "none"],
            ..q35(8)
        };
        let captured = captured(&kind, &["dirty-bitmaps"], qemu::Vm::add_bitmaps);
        let (_, parts) = taken_apart(&captured.stream, TARGET, || usize::MAX);
        std::fs::write(path, skeleton::of(&captured.stream, &parts)).unwrap();
    }
    let (stream, pages) = skeleton::fleshed(QEMU_10);
    let mut random = random();
    let (tokenizer, _) = same(&stream, TARGET, || random.random_range(1..100_000));
    understood(&tokenizer, "QEMU 10.0.2");
    assert_eq!(tokenizer.totals().pages, pages);
    assert!(tokenizer.totals().resent_pages > 1000);
    // The command that QEMU 10 sends when the VM has stopped.
    let switchover = stream.windows(5).rposition(|bytes| bytes == [8, 0, 11, 0, 0]);
    let (tokenizer, _) = taken_apart(&stream[..switchover.unwrap()], TARGET, || usize::MAX);
    assert_eq!(tokenizer.phase(), Phase::Iterating);
    let (tokenizer, _) = taken_apart(&stream[..switchover.unwrap() + 5], TARGET, || usize::MAX);
    assert_eq!(tokenizer.phase(), Phase::Tail);
}
