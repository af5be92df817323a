//! Two gateways and what may happen between them: batches in any order, lost, doubled, gateways restarted, windows lost.
//!
//! Whatever happens, a payload is restored to exactly the data it was made of, or it is asked for again; and what is sent again plainly
//! is always restored.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use longhaul_common::digest::Digest;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
use longhaul_common::wire::batch::{BatchHeader, Content, Leaves, Piece};
use longhaul_common::wire::ram::{RamPart, Records, Token};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

use super::*;

const BLOCK: usize = layout::BLOCK_LEN;
const ALL: Method = Method {
    dedup: true,
    xor: true,
    level: Level::Lz4,
};

pub(super) fn disk_header(offset: u64, data: &[u8]) -> BatchHeader {
    let mut header = BatchHeader {
        job: JobId::random(),
        attempt: Attempt(1),
        disk: DiskIndex(0),
        round: Round(0),
        sequence: Sequence(0),
        pieces: vec![Piece {
            extent: Extent::new(offset, data.len() as u64).unwrap(),
            content: Content::Data,
        }],
        leaves: Leaves::default(),
        ram: None,
        urgent: false,
        digest: Digest([0; 32]),
    };
    header.digest = header.digest_of(data).unwrap();
    header
}

fn ram_header(first: u64, pages: u32, raw: u32, data: &[u8]) -> BatchHeader {
    let mut header = disk_header(0, &[]);
    let records = Records {
        block: 0,
        first,
        count: pages,
        continued: true,
    };
    let mut tokens = vec![Token::Pages(records)];
    tokens.extend((raw > 0).then_some(Token::Raw(raw)));
    header.pieces.clear();
    header.ram = Some(RamPart {
        generation: 1,
        offset: 0,
        len: data.len() as u64,
        tokens,
    });
    header.digest = header.digest_of(data).unwrap();
    header
}

/// A gateway's end: the windows that it shares with the other one.
struct Gateway(Arc<Pair>, Arc<Windows>);

impl Gateway {
    fn new(size: Size) -> Self {
        let windows = Windows::new(Some(size), tenants());
        Self(windows.with("the other", "").unwrap(), windows)
    }

    fn in_folder(size: Size, folder: &Path) -> Self {
        let windows = Windows::in_folder(size, tenants(), folder).unwrap();
        Self(windows.with("the other", "").unwrap(), windows)
    }
}

fn tenants() -> std::collections::BTreeSet<String> {
    ["acme", "globex"].map(str::to_owned).into()
}

/// As a connection begins.
fn agree(from: &Pair, to: &Pair) {
    for _ in 0..3 {
        let hello = from.hello();
        if from.answered(hello, to.greet(hello)) {
            return;
        }
    }
    panic!("no agreement");
}

fn small() -> Size {
    Size::of(0, 0)
}

/// Content as disks and memory have it: few kinds of blocks, small changes, zeros, noise.
fn content(random: &mut StdRng, blocks: usize, loose: usize) -> Vec<u8> {
    let mut data = Vec::with_capacity(blocks * BLOCK + loose);
    for _ in 0..blocks {
        let mut block = match random.random_range(0..8) {
            0 => vec![0; BLOCK],
            1 => (0..BLOCK).map(|_| random.random()).collect(),
            _ => {
                let kind: u8 = random.random_range(0..40);
                (0..BLOCK)
                    .map(|n| (n as u8 / 3).wrapping_mul(kind))
                    .collect::<Vec<_>>()
            }
        };
        for _ in 0..random.random_range(0..4) {
            let at = random.random_range(0..BLOCK);
            block[at] = random.random();
        }
        data.extend(block);
    }
    data.extend((0..loose).map(|_| random.random::<u8>()));
    data
}

fn batch(random: &mut StdRng) -> (BatchHeader, Bytes) {
    let blocks = random.random_range(1..24);
    if random.random() {
        let loose = [0, 0, 100, 5000][random.random_range(0..4)];
        let data = content(random, blocks, loose);
        let first = random.random_range(0..40);
        (ram_header(first, blocks as u32, loose as u32, &data), data.into())
    } else {
        let data = content(random, blocks, 0);
        let offset = random.random_range(0..40) * BLOCK as u64 + [0, 0, 0, 512][random.random_range(0..4)];
        (disk_header(offset, &data), data.into())
    }
}

/// What is on its way from one gateway to the other.
struct Flight {
    header: BatchHeader,
    data: Bytes,
    reduced: Reduced,
}

/// Both gateways and both directions, driven by random numbers.
struct Story {
    random: StdRng,
    ends: [Gateway; 2],
    /// Of each direction: by who sends.
    flights: [Vec<Flight>; 2],
    size: Size,
    /// Of each gateway, where its windows are kept.
    folders: Option<[TempDir; 2]>,
    restored: u32,
    missing: u32,
    sums: ReductionCounts,
}

impl Story {
    fn new(seed: u64, size: Size, files: bool) -> Self {
        let folders = files.then(|| [(); 2].map(|()| tempfile::tempdir().unwrap()));
        let end = |n: usize| match &folders {
            Some(folders) => Gateway::in_folder(size, folders[n].path()),
            None => Gateway::new(size),
        };
        let story = Self {
            random: StdRng::seed_from_u64(seed),
            ends: [end(0), end(1)],
            flights: [Vec::new(), Vec::new()],
            size,
            folders,
            restored: 0,
            missing: 0,
            sums: ReductionCounts::default(),
        };
        story.link();
        story
    }

    fn link(&self) {
        agree(&self.ends[0].0, &self.ends[1].0);
        agree(&self.ends[1].0, &self.ends[0].0);
    }

    fn send(&mut self, from: usize) {
        let (header, data) = batch(&mut self.random);
        let levels = Level::ALL;
        let method = Method {
            dedup: self.random.random_range(0..8) > 0,
            xor: self.random.random_range(0..8) > 0,
            level: levels[self.random.random_range(0..levels.len())],
        };
        let reduced = reduce(&data, &header, Vm::named("vm"), Some(&self.ends[from].0), method);
        assert!(reduced.payload.bytes.len() <= data.len() + OVERHEAD);
        self.sums = self.sums.plus(reduced.counts);
        self.flights[from].push(Flight {
            header,
            data,
            reduced,
        });
    }

    /// A payload arrives, perhaps twice, perhaps without its acceptance getting through.
    fn arrive(&mut self, from: usize) {
        if self.flights[from].is_empty() {
            return;
        }
        let which = self.random.random_range(0..self.flights[from].len());
        let flight = self.flights[from].swap_remove(which);
        let (sender, receiver) = (&self.ends[from].0, &self.ends[1 - from].0);
        let restored = restore(
            &flight.reduced.payload,
            &flight.header,
            Vm::named("vm"),
            Some(receiver),
        );
        match restored {
            Ok(raw) => {
                assert_eq!(raw, flight.data);
                self.restored += 1;
                match self.random.random_range(0..6) {
                    0 => self.flights[from].push(flight),
                    1 => sender.given_up(&flight.reduced.kept),
                    _ => sender.accepted(&flight.reduced.kept),
                }
            }
            Err(RestoreError::Missing) => {
                self.missing += 1;
                assert!(
                    flight.reduced.kept.needs_window,
                    "its sender has kept nothing to send plainly"
                );
                sender.missing(&flight.reduced.kept);
                let plain = reduce_plainly(&flight.data, Level::Zstd1);
                let raw = restore(&plain.payload, &flight.header, Vm::named("vm"), Some(receiver)).unwrap();
                assert_eq!(raw, flight.data);
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// A gateway starts again, in order or after a crash; what it had sent is forgotten, or arrives all the same.
    fn restart(&mut self, end: usize) {
        if self.random.random() {
            self.ends[end].1.keep().unwrap();
        }
        self.ends[end] = match &self.folders {
            Some(folders) => Gateway::in_folder(self.size, folders[end].path()),
            None => Gateway::new(self.size),
        };
        if self.random.random() {
            self.flights[end].clear();
        }
        if self.random.random() {
            self.link();
        }
    }

    fn step(&mut self) {
        let end = self.random.random_range(0..2);
        match self.random.random_range(0..100) {
            0 => self.restart(end),
            1..4 => self.link(),
            4..8 => {
                // A payload that never arrives.
                if let Some(lost) = self.flights[end].pop() {
                    self.ends[end].0.given_up(&lost.reduced.kept);
                }
            }
            8..50 => self.send(end),
            _ => self.arrive(end),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_data_is_restored_or_asked_for_again(seed in any::<u64>(), files in any::<bool>()) {
        let size = Size::of(0, if files { 6 << 20 } else { 0 });
        let mut story = Story::new(seed, size, files);
        for _ in 0..150 {
            story.step();
        }
    }
}

#[test]
fn a_long_story_uses_every_way_and_seldom_misses() {
    let mut story = Story::new(7, small(), false);
    for _ in 0..3000 {
        let end = usize::from(story.random.random_range(0..3) == 0);
        // As few as the links of a fast site have on their way, for a window as small as this.
        if story.flights[end].len() < 4 && story.random.random() {
            story.send(end)
        } else {
            story.arrive(end)
        }
    }
    let ReductionCounts {
        zero,
        reference,
        xor,
        compressed,
        raw,
        payload,
        xor_payload,
        rewritten,
        rewritten_payload,
    } = story.sums;
    let all = zero + reference + xor + compressed + raw;
    for (name, part) in [
        ("zero", zero),
        ("reference", reference),
        ("xor", xor),
        ("compressed", compressed),
        ("raw", raw),
    ] {
        assert!(part > all / 100, "{name}: {part} of {all}");
    }
    assert!(xor_payload > 0 && xor_payload < xor.min(payload), "{xor_payload}");
    assert!(rewritten > 0 && rewritten <= xor && rewritten_payload <= xor_payload);
    assert!(payload < all / 2, "{payload} of {all}");
    assert!(
        story.missing * 50 < story.restored,
        "{} of {}",
        story.missing,
        story.restored
    );
}

/// Sends a batch and has it accepted; gives the size of its payload.
fn through(from: &Pair, to: &Pair, header: &BatchHeader, data: &Bytes, vm: Vm) -> Reduced {
    let reduced = reduce(data, header, vm, Some(from), ALL);
    let raw = restore(&reduced.payload, header, vm, Some(to)).unwrap();
    assert_eq!(raw, data);
    from.accepted(&reduced.kept);
    reduced
}

fn two() -> (Gateway, Gateway) {
    let (a, b) = (Gateway::new(small()), Gateway::new(small()));
    agree(&a.0, &b.0);
    agree(&b.0, &a.0);
    (a, b)
}

fn noise(seed: u64, blocks: usize) -> Bytes {
    let mut random = StdRng::seed_from_u64(seed);
    (0..blocks * BLOCK).map(|_| random.random::<u8>()).collect()
}

#[test]
fn the_second_vm_of_a_template_and_the_page_cache_are_nearly_free() {
    let (a, b) = two();
    let data = noise(1, 200);
    through(&a.0, &b.0, &disk_header(0, &data), &data, Vm::named("one"));
    let second = through(&a.0, &b.0, &disk_header(8192, &data), &data, Vm::named("two"));
    assert_eq!(second.counts.reference, data.len() as u64);
    assert!(second.payload.bytes.len() < 40, "{}", second.payload.bytes.len());
    let cached = through(
        &a.0,
        &b.0,
        &ram_header(77, 200, 0, &data),
        &data,
        Vm::named("two"),
    );
    assert!(cached.payload.bytes.len() < 40);
}

#[test]
fn a_tenant_gains_nothing_from_what_others_sent() {
    let (a, b) = two();
    let data = noise(7, 64);
    let header = disk_header(0, &data);
    let pairs = |tenant: &str| {
        let ends = [&a, &b].map(|end| end.1.with("the other", tenant));
        let [Some(from), Some(to)] = ends else {
            panic!("no window for '{tenant}'")
        };
        agree(&from, &to);
        (from, to)
    };
    for tenant in ["", "acme", "globex"] {
        let (from, to) = pairs(tenant);
        let first = through(&from, &to, &header, &data, Vm::named("one"));
        assert_eq!(first.counts.reference, 0, "'{tenant}' knows what others sent");
        let again = through(&from, &to, &header, &data, Vm::named("two"));
        assert_eq!(again.counts.reference, data.len() as u64, "'{tenant}'");
        // And a payload for one tenant is nothing to another's window.
        let other =
            b.1.with("the other", if tenant == "acme" { "globex" } else { "acme" });
        let wrong = restore(&again.payload, &header, Vm::named("two"), other.as_deref());
        assert_eq!(wrong, Err(RestoreError::Missing));
    }
    assert!(a.1.with("the other", "nobody").is_none());
}

#[test]
fn what_is_nearly_known_costs_little_wherever_it_lies() {
    let (a, b) = two();
    let mut data = noise(6, 200).to_vec();
    let template: Bytes = data.clone().into();
    let header = ram_header(5, 200, 0, &template);
    through(&a.0, &b.0, &header, &template, Vm::named("one"));
    let mut random = StdRng::seed_from_u64(6);
    for block in data.chunks_mut(BLOCK) {
        for _ in 0..6 {
            let at = random.random_range(0..BLOCK / 16) * 16;
            random.fill(&mut block[at..at + 16]);
        }
    }
    let data: Bytes = data.into();
    let header = ram_header(4711, 200, 0, &data);
    let second = through(&a.0, &b.0, &header, &data, Vm::named("two"));
    assert!(
        second.counts.xor * 10 > data.len() as u64 * 8,
        "{:?}",
        second.counts
    );
    let size = second.payload.bytes.len();
    assert!(size * 100 < data.len() * 25, "{size} of {}", data.len());
    // What is like a block that is still on its way is sent whole.
    let fresh = noise(7, 10);
    let header = ram_header(9000, 10, 0, &fresh);
    let waiting = reduce(&fresh, &header, Vm::named("one"), Some(&a.0), ALL);
    let mut like = fresh.to_vec();
    like.chunks_mut(BLOCK).for_each(|block| block[77] ^= 1);
    let like: Bytes = like.into();
    let header = ram_header(9500, 10, 0, &like);
    let early = reduce(&like, &header, Vm::named("two"), Some(&a.0), ALL);
    assert_eq!(early.counts.xor, 0);
    a.0.accepted(&waiting.kept);
    let header = ram_header(9900, 10, 0, &like);
    let late = reduce(&like, &header, Vm::named("three"), Some(&a.0), ALL);
    assert_eq!(late.counts.xor, like.len() as u64);
    assert_eq!(late.counts.rewritten, 0, "it never stood there");
}

#[test]
fn a_small_change_costs_little_and_a_failback_less() {
    let (a, b) = two();
    let vm = Vm::named("vm");
    let mut data = noise(2, 100).to_vec();
    through(
        &a.0,
        &b.0,
        &ram_header(5, 100, 0, &data),
        &data.clone().into(),
        vm,
    );
    for block in data.chunks_mut(BLOCK) {
        block[100..108].fill(7);
    }
    let changed = through(
        &a.0,
        &b.0,
        &ram_header(5, 100, 0, &data),
        &data.clone().into(),
        vm,
    );
    assert_eq!(changed.counts.xor, data.len() as u64);
    assert_eq!(changed.counts.rewritten, changed.counts.xor);
    assert_eq!(changed.counts.rewritten_payload, changed.counts.xor_payload);
    assert!(
        changed.payload.bytes.len() * 100 < data.len() * 3,
        "{}",
        changed.payload.bytes.len()
    );
    let back = through(&b.0, &a.0, &disk_header(0, &data), &data.clone().into(), vm);
    assert_eq!(back.counts.reference, data.len() as u64);
    for block in data.chunks_mut(BLOCK) {
        block[200..208].fill(9);
    }
    let back = through(
        &b.0,
        &a.0,
        &ram_header(5, 100, 0, &data),
        &data.clone().into(),
        vm,
    );
    assert_eq!(back.counts.xor, data.len() as u64);
}

#[test]
fn what_has_moved_within_its_block_is_found_from_level_3_on() {
    let vm = Vm::named("vm");
    let mut sizes = Vec::new();
    for level in [Level::Zstd1, Level::Zstd3, Level::Zstd9] {
        let (a, b) = two();
        // 64 values, as text: not taken for noise.
        let mut data: Vec<u8> = noise(2, 100).iter().map(|byte| byte & 0x3f).collect();
        through(
            &a.0,
            &b.0,
            &ram_header(5, 100, 0, &data),
            &data.clone().into(),
            vm,
        );
        data.chunks_mut(BLOCK)
            .for_each(|block| block.copy_within(..BLOCK - 8, 8));
        let header = ram_header(5, 100, 0, &data);
        let reduced = reduce(
            &data.clone().into(),
            &header,
            vm,
            Some(&a.0),
            Method { level, ..ALL },
        );
        assert_eq!(restore(&reduced.payload, &header, vm, Some(&b.0)).unwrap(), data);
        sizes.push(reduced.payload.bytes.len());
    }
    assert!(
        sizes[0] > 60 * BLOCK && sizes[1] < 10 * BLOCK && sizes[2] < 10 * BLOCK,
        "{sizes:?}"
    );
}

#[test]
fn nothing_is_referred_to_before_it_is_accepted() {
    let (a, b) = two();
    let vm = Vm::named("vm");
    let data = noise(3, 10);
    let header = disk_header(0, &data);
    let first = reduce(&data, &header, vm, Some(&a.0), ALL);
    let second = reduce(&data, &header, vm, Some(&a.0), ALL);
    assert_eq!((first.counts.reference, second.counts.reference), (0, 0));
    restore(&second.payload, &header, vm, Some(&b.0)).unwrap();
    a.0.accepted(&second.kept);
    let third = reduce(&data, &header, vm, Some(&a.0), ALL);
    assert_eq!(third.counts.reference, data.len() as u64);
    restore(&third.payload, &header, vm, Some(&b.0)).unwrap();
}

#[test]
fn a_slot_is_not_used_again_while_a_payload_needs_it() {
    let (a, b) = two();
    let vm = Vm::named("vm");
    let old = noise(4, 8);
    through(&a.0, &b.0, &disk_header(0, &old), &old, vm);
    let header = disk_header(1 << 30, &old);
    let waiting = reduce(&old, &header, vm, Some(&a.0), ALL);
    for n in 0..40 {
        let other = noise(100 + n, 64);
        through(&a.0, &b.0, &disk_header(0, &other), &other, vm);
    }
    assert_eq!(restore(&waiting.payload, &header, vm, Some(&b.0)).unwrap(), old);
    a.0.accepted(&waiting.kept);
    let other = noise(5, 64);
    through(&a.0, &b.0, &disk_header(0, &other), &other, vm);
    assert!(
        through(&a.0, &b.0, &disk_header(0, &other), &other, vm)
            .counts
            .reference
            > 0,
        "the ring turns again"
    );
}

#[test]
fn a_gateway_that_lost_its_window_asks_once_and_is_believed() {
    let (a, mut b) = two();
    let vm = Vm::named("vm");
    let data = noise(6, 20);
    let header = disk_header(0, &data);
    through(&a.0, &b.0, &header, &data, vm);
    b = Gateway::new(small());
    let reduced = reduce(&data, &header, vm, Some(&a.0), ALL);
    assert_eq!(
        restore(&reduced.payload, &header, vm, Some(&b.0)),
        Err(RestoreError::Missing)
    );
    a.0.missing(&reduced.kept);
    agree(&a.0, &b.0);
    assert_eq!(through(&a.0, &b.0, &header, &data, vm).counts.reference, 0);
    assert_eq!(
        through(&a.0, &b.0, &header, &data, vm).counts.reference,
        data.len() as u64
    );
}

#[test]
fn a_payload_that_refers_to_nothing_is_whole_without_a_window() {
    let (a, b) = two();
    let vm = Vm::named("vm");
    let data = noise(8, 20);
    let header = disk_header(0, &data);
    let reduced = reduce(&data, &header, vm, Some(&a.0), ALL);
    assert!(!reduced.kept.needs_window);
    let other = Gateway::new(small());
    for pair in [None, Some(&*other.0), Some(&*b.0)] {
        assert_eq!(restore(&reduced.payload, &header, vm, pair).unwrap(), data);
    }
}

/// A full window's index forgets a few in a thousand.
fn mostly(reduced: &Reduced, data: &[u8]) -> bool {
    reduced.counts.reference as usize >= data.len() / 100 * 95
}

/// How many files of the folders hold the beginning of `content`.
fn files_with(content: &[u8], folders: [&Path; 2]) -> usize {
    let files = folders
        .into_iter()
        .flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let holds = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        bytes.windows(64).any(|window| window == &content[..64])
    };
    files.filter(|file| holds(&file.as_ref().unwrap().path())).count()
}

#[test]
fn windows_survive_an_orderly_restart_and_no_crash() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Twice as much in the file as in memory.
    let size = Size::of(0, 8 << 20);
    let start = || {
        let (a, b) = (
            Gateway::in_folder(size, here.path()),
            Gateway::in_folder(size, there.path()),
        );
        agree(&a.0, &b.0);
        agree(&b.0, &a.0);
        (a, b)
    };
    let vm = Vm::named("vm");
    let disk: Vec<_> = (0..12).map(|n| noise(200 + n, 128)).collect();
    let memory = noise(300, 64);
    let (a, b) = start();
    for data in &disk {
        through(&a.0, &b.0, &disk_header(0, data), data, vm);
    }
    through(&a.0, &b.0, &ram_header(0, 64, 0, &memory), &memory, vm);
    let old = through(&a.0, &b.0, &disk_header(0, &disk[0]), &disk[0], vm);
    assert!(mostly(&old, &disk[0]), "older than what is in memory");
    let holds = |content: &[u8]| files_with(content, [here.path(), there.path()]);
    assert_eq!(
        (holds(&disk[3]), holds(&memory)),
        (2, 0),
        "memory is not in any file"
    );
    a.1.keep().unwrap();
    b.1.keep().unwrap();
    let (a, b) = start();
    for data in [&disk[0], &disk[11]] {
        let known = through(&a.0, &b.0, &disk_header(0, data), data, vm);
        assert!(mostly(&known, data));
        let back = through(&b.0, &a.0, &disk_header(0, data), data, vm);
        assert!(mostly(&back, data));
    }
    assert_eq!(
        through(&a.0, &b.0, &ram_header(0, 64, 0, &memory), &memory, vm)
            .counts
            .reference,
        0
    );
    // Nobody keeps anything: a crash.
    let (a, b) = start();
    assert_eq!(
        through(&a.0, &b.0, &disk_header(0, &disk[0]), &disk[0], vm)
            .counts
            .reference,
        0
    );
    a.1.keep().unwrap();
    b.1.keep().unwrap();
    // One byte of an index is damaged.
    let index = std::fs::read_dir(here.path())
        .unwrap()
        .map(|file| file.unwrap().path());
    for path in index.filter(|path| path.extension().is_some_and(|what| what == "index")) {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[100] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let (a, b) = start();
    assert_eq!(
        through(&a.0, &b.0, &disk_header(0, &disk[0]), &disk[0], vm)
            .counts
            .reference,
        0
    );
}

#[test]
fn an_index_takes_what_was_promised() {
    let gateway = Gateway::new(Size::of(64 << 20, 0));
    let bytes = gateway.0.outgoing.index_memory();
    assert!(bytes <= 64 * (64 << 20) / BLOCK, "{bytes}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn damaged_payloads_are_refused(seed in any::<u64>(), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>()) {
        let (a, b) = two();
        let mut random = StdRng::seed_from_u64(seed);
        let vm = Vm::named("vm");
        let (header, data) = batch(&mut random);
        through(&a.0, &b.0, &header, &data, vm);
        let (header, data) = batch(&mut random);
        let reduced = reduce(&data, &header, vm, Some(&a.0), ALL);
        let mut bytes = reduced.payload.bytes.to_vec();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= byte;
        }
        if random.random() {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        let damaged = Payload { encoding: reduced.payload.encoding, bytes: bytes.into() };
        if let Ok(raw) = restore(&damaged, &header, vm, Some(&b.0)) {
            prop_assert_eq!(raw, data);
        }
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), encoding in 1u8..5, len in 0usize..20_000) {
        let (_, b) = two();
        let header = disk_header(0, &vec![1; len]);
        let payload = Payload { encoding: Encoding::from_wire(encoding).unwrap(), bytes: bytes.into() };
        prop_assert!(restore(&payload, &header, Vm::named("vm"), Some(&b.0)).is_err() || len == 0);
    }
}
