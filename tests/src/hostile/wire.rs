//! What crosses the links: frames of every message, batches, payloads.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use longhaul_common::digest::Digest;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
use longhaul_common::wire::batch::{BatchHeader, Content, Leaves, Piece, RAW_MAX};
use longhaul_common::wire::frame;
use longhaul_common::wire::operator::{OperatorAnswer, OperatorTask, OperatorWord};
use longhaul_common::wire::sequences::Sequences;
use longhaul_common::wire::session::{
    AgentTask, DiskCounts, FromSource, FromTarget, Have, OpenedDisk, PartReport, PeerTask, Refusal,
    RefusalKind, ShadowId, SourceDisk, SourceOpen, TargetDisk, TargetOpen, ToSource, ToTarget,
};
use longhaul_common::wire::window::WindowHello;
use longhaul_gateway::reduction::{self, Encoding, Level, Method, Pair, Payload, Size, Vm, Windows};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The first byte says which message is expected.
pub(super) fn frame(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else {
        return;
    };
    match kind % 7 {
        0 => again::<AgentTask>(body),
        1 => again::<PeerTask>(body),
        2 => again::<FromSource>(body),
        3 => again::<ToSource>(body),
        4 => again::<FromTarget>(body),
        5 => again::<ToTarget>(body),
        _ => again::<OperatorAnswer>(body),
    }
}

/// What decodes can be encoded and shown.
fn again<T: Serialize + DeserializeOwned + std::fmt::Debug>(body: &[u8]) {
    if let Ok(message) = frame::decode::<T>(body) {
        let encoded = frame::encode(&message);
        assert!(
            encoded.is_ok() || body.len() > frame::FRAME_MAX / 8,
            "what was decoded cannot be encoded"
        );
        let _ = format!("{message:?}").len();
    }
}

/// A frame's body behind the byte that says what it is.
fn body<T: Serialize>(kind: u8, message: &T) -> Vec<u8> {
    let encoded = frame::encode(message).unwrap_or_default();
    [&[kind], encoded.get(4..).unwrap_or_default()].concat()
}

#[expect(clippy::too_many_lines, reason = "one of each message: a table")]
pub(super) fn frames() -> io::Result<Vec<Vec<u8>>> {
    let job = JobId::random();
    let shadow = ShadowId {
        job,
        generation: 2,
        disk: DiskIndex(0),
    };
    let target = TargetOpen {
        job,
        attempt: Attempt(1),
        name: "vm".to_owned(),
        disks: vec![TargetDisk {
            path: "/disk".into(),
            format: "raw".to_owned(),
            size: 4096,
            needed: 4096,
            preallocate: false,
            overwrite: true,
            shadow: true,
            since: Some(shadow),
        }],
        definition: Some(vec![1, 2, 3]),
        dry_run: false,
        live: None,
    };
    let source = SourceOpen {
        job,
        attempt: Attempt(2),
        disks: vec![SourceDisk {
            path: "/disk".into(),
            format: None,
            flatten: true,
        }],
        definition: Some("/definition".into()),
        filter: true,
        live: None,
    };
    let part = PartReport {
        name: "partition 1".to_owned(),
        extent: Extent::between(0, 4096),
        kind: "ext4".to_owned(),
        proof: Some("unmounted".to_owned()),
        free_bytes: 1,
        reason: None,
    };
    let opened = OpenedDisk {
        size: 4096,
        format: "raw".to_owned(),
        allocated: 4096,
        free: 1,
        used: 4095,
        parts: vec![part],
        notes: vec!["note".to_owned()],
        scan_ms: 1,
        sent_before: 0,
        since: Some(shadow),
    };
    let have = Have {
        disk: DiskIndex(0),
        first: 0,
        count: 2,
        digests: vec![(1, Digest::of(b"x"))],
        shadow: Some(shadow),
    };
    let numbers: Sequences = [1, 2, 5].map(Sequence).into_iter().collect();
    let refusal = Refusal::new(RefusalKind::NoSpace, "no space");
    let counts = DiskCounts::default();
    Ok(vec![
        body(0, &AgentTask::Source(source)),
        body(0, &AgentTask::Target(target.clone())),
        body(
            0,
            &AgentTask::Operator(OperatorTask {
                job: job.short(),
                word: OperatorWord::Forget,
            }),
        ),
        body(
            6,
            &OperatorAnswer::Done {
                lines: vec!["line".to_owned()],
                changed: true,
            },
        ),
        body(
            1,
            &PeerTask::Target {
                agent: "agent".to_owned(),
                tenant: "acme".to_owned(),
                open: target,
            },
        ),
        body(
            1,
            &PeerTask::Window {
                tenant: "acme".to_owned(),
                hello: WindowHello { epoch: 3, slots: 9 },
            },
        ),
        body(
            2,
            &FromSource::Opened {
                disks: vec![opened],
                definition: Some(vec![7]),
                live: None,
            },
        ),
        body(
            2,
            &FromSource::DiskDone {
                disk: DiskIndex(0),
                digest: Digest::of(b"x"),
                counts,
            },
        ),
        body(3, &ToSource::Have(have.clone())),
        body(3, &ToSource::Durable(numbers.clone())),
        body(4, &FromTarget::Have(have)),
        body(4, &FromTarget::Accepted(numbers)),
        body(4, &FromTarget::Failed(refusal.clone())),
        body(
            4,
            &FromTarget::Committed {
                paths: vec!["/disk".into()],
                hook: Some("failed".to_owned()),
            },
        ),
        body(
            5,
            &ToTarget::Commit {
                digests: vec![Digest::of(b"x")],
            },
        ),
        body(5, &ToTarget::Abort(refusal)),
    ])
}

pub(super) fn batch(bytes: &[u8]) {
    let Ok((header, data)) = BatchHeader::decode(bytes) else {
        return;
    };
    let _ = header.verify(data);
    for size in [0, 4096, 3 << 20, 1 << 40, u64::MAX] {
        if header.check(size).is_ok() {
            let end = header.pieces.last().map_or(0, |piece| piece.extent.end());
            assert!(
                end <= size && header.data_len() <= RAW_MAX as u64,
                "a checked batch lies outside"
            );
        }
    }
    assert!(header.credit() >= header.data_len());
}

pub(super) fn batches() -> io::Result<Vec<Vec<u8>>> {
    let whole = |data: &[u8]| {
        let pieces = vec![
            Piece {
                extent: Extent::between(0, data.len() as u64),
                content: Content::Data,
            },
            Piece {
                extent: Extent::between(data.len() as u64, 1 << 20),
                content: Content::Hole,
            },
        ];
        let mut header = BatchHeader {
            job: JobId::random(),
            attempt: Attempt(1),
            disk: DiskIndex(0),
            round: Round(0),
            sequence: Sequence(3),
            pieces,
            leaves: Leaves {
                first: 0,
                count: 1,
                digests: vec![(0, Digest::of(data))],
            },
            ram: None,
            urgent: false,
            digest: Digest([0; 32]),
        };
        header.digest = header.digest_of(data).unwrap_or(header.digest);
        let mut bytes = header.encode().unwrap_or_default();
        bytes.extend(data);
        bytes
    };
    Ok(vec![whole(&[7; 4096]), whole(b"short")])
}

/// A header for `len` bytes of a disk; its digest holds for `data`.
fn disk_header(len: usize, data: &[u8]) -> BatchHeader {
    let mut header = BatchHeader {
        job: JobId::random(),
        attempt: Attempt(1),
        disk: DiskIndex(0),
        round: Round(0),
        sequence: Sequence(3),
        pieces: vec![Piece {
            extent: Extent::between(0, len as u64),
            content: Content::Data,
        }],
        leaves: Leaves::default(),
        ram: None,
        urgent: false,
        digest: Digest([0; 32]),
    };
    header.digest = header.digest_of(data).unwrap_or(header.digest);
    header
}

/// Two gateways that have agreed on their windows; the first one has sent the second one something.
fn gateways() -> io::Result<[Arc<Pair>; 2]> {
    let size = Some(Size::of(0, 0));
    let pair = || {
        Windows::new(size, BTreeSet::new())
            .with("the other", "")
            .ok_or(io::ErrorKind::NotFound)
    };
    let (a, b) = (pair()?, pair()?);
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.answered(from.hello(), to.greet(from.hello()));
    }
    let known = Bytes::from((0..64 * 4096).map(|n: usize| (n / 9) as u8).collect::<Vec<_>>());
    let header = disk_header(known.len(), &known);
    let sent = reduction::reduce(&known, &header, Vm::named("vm"), Some(&a), METHOD);
    if reduction::restore(&sent.payload, &header, Vm::named("vm"), Some(&b)).is_ok() {
        a.accepted(&sent.kept);
    }
    Ok([a, b])
}

const METHOD: Method = Method {
    dedup: true,
    xor: true,
    level: Level::Lz4,
};

thread_local! {
    static RECEIVER: Option<Arc<Pair>> = gateways().ok().map(|[_, b]| b);
}

/// Three bytes of length, one of encoding, the payload.
pub(super) fn payload(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<4>() else {
        return;
    };
    let len = u32::from_le_bytes([head[0], head[1], head[2], 0]) as usize % (RAW_MAX + 1);
    let Ok(encoding) = Encoding::from_wire(head[3]) else {
        return;
    };
    let payload = Payload {
        encoding,
        bytes: Bytes::copy_from_slice(rest),
    };
    let header = disk_header(len, &[]);
    let restored =
        RECEIVER.with(|pair| reduction::restore(&payload, &header, Vm::named("vm"), pair.as_deref()));
    if let Ok(raw) = restored {
        assert_eq!(raw.len(), len, "restored to another length");
    }
}

pub(super) fn payloads() -> io::Result<Vec<Vec<u8>>> {
    let [a, _] = gateways()?;
    let seed = |raw: Vec<u8>| {
        let len = (raw.len() as u32).to_le_bytes();
        let header = disk_header(raw.len(), &raw);
        let payload = reduction::reduce(&raw.into(), &header, Vm::named("vm"), Some(&a), METHOD).payload;
        [&len[..3], &[payload.encoding as u8], &payload.bytes].concat()
    };
    let text = b"the same words again and again, ".repeat(500);
    let known = (0..8 * 4096)
        .map(|n: usize| (n / 9) as u8 ^ u8::from(n % 4096 == 5))
        .collect();
    let short = (0..=255).collect();
    Ok(vec![seed(text), seed(vec![0; 65536]), seed(known), seed(short)])
}
