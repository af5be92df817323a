//! Garbage on every UDP port, from strangers and from peers with good certificates, while another peer's job runs.
//!
//! Promises: the programs stay up, their memory stays bounded, and the job completes at its first attempt.

use std::fs;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use longhaul_common::digest::Digest;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
use longhaul_common::link::{Link, LinkSettings, Role, connect};
use longhaul_common::wire::batch::{BatchHeader, Content, HEADER_MAX, Leaves, Piece, RAW_MAX};
use longhaul_common::wire::frame::{self, FRAME_MAX};
use longhaul_common::wire::session::{AgentTask, PeerTask, TargetDisk, TargetOpen};
use longhaul_common::wire::{ALPN_AGENT, ALPN_PEER};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use crate::site::{PATIENCE, Running, SOURCE, Sites, TARGET};

/// What garbage may cost a program, in KiB: two peers' windows and what the limits allow, never a multiple of what was sent.
const GROWTH_MAX: u64 = 160 << 10;

fn seed() -> u64 {
    let seed = std::env::var("LONGHAUL_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(rand::random);
    println!("LONGHAUL_SEED={seed}");
    seed
}

#[test]
fn garbage_on_every_port_harms_nobody() {
    let seed = seed();
    let sites = Sites::new(&[
        ("evil", Role::Gateway, "evil-gateway"),
        (TARGET, Role::Agent, "evil-agent"),
        (SOURCE, Role::Agent, "evil-agent"),
    ]);
    let mut image = vec![0; 40 << 20];
    StdRng::seed_from_u64(seed).fill_bytes(&mut image);
    fs::write(sites.path("source-agent/disks/disk"), &image).unwrap();
    let mut running = Running::start(sites);
    let before: Vec<_> = running
        .programs
        .iter()
        .map(|program| program.resident_kib())
        .collect();
    let sites = &running.sites;
    // 40 MiB at 60 Mbit/s: at least five seconds, during which everything below happens.
    let (job, attacks) = std::thread::scope(|scope| {
        let job = scope.spawn(|| running.run(&sites.job("disk", "copy")));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let until = Instant::now() + Duration::from_secs(5);
        let mut noise = StdRng::seed_from_u64(seed);
        let attacks = runtime.block_on(attack(sites, until, &mut noise));
        (job.join().unwrap(), attacks)
    });
    println!("attacks: {attacks}");
    assert!(attacks > 100, "only {attacks} attacks were made");
    let (code, job, said) = job;
    assert!(code == 0 && job["report"]["equal"] == true, "{job} {said}");
    assert_eq!(job["report"]["attempts"], 1, "the job was touched: {job}");
    assert!(fs::read(running.sites.path("target-agent/disks/copy")).unwrap() == image);
    running.assert_well();
    for (program, before) in running.programs.iter().zip(before) {
        let after = program.resident_kib();
        println!("{}: {before} KiB before, {after} KiB after", program.name);
        assert!(
            after < before + GROWTH_MAX,
            "{} grew from {before} to {after} KiB",
            program.name
        );
        let log = program.log();
        assert!(
            log.len() < 4 << 20,
            "{} wrote {} bytes of log",
            program.name,
            log.len()
        );
    }
}

/// Everything at once until `until`; gives how many attacks were made.
async fn attack(sites: &Sites, until: Instant, noise: &mut StdRng) -> usize {
    let evil = sites.tls("evil", Role::Gateway, "evil-gateway");
    let target = sites.identity(TARGET, Role::Gateway, "target-gateway");
    let settings = LinkSettings::lan();
    let peers = sites.peers_port(TARGET).parse().unwrap();
    let mut attacks = 0;
    let agents = [TARGET, SOURCE].map(|site| (site, sites.tls(site, Role::Agent, "evil-agent")));
    while Instant::now() < until {
        attacks += strangers(sites, noise);
        let peer = connect(peers, &target, ALPN_PEER, &evil, &settings)
            .await
            .unwrap();
        attacks += frames(&peer, noise).await;
        attacks += batches(&peer, true, noise).await;
        attacks += tasks(&peer).await;
        attacks += unfinished(&peer).await;
        peer.close(0, "enough");
        for (site, tls) in &agents {
            let gateway = sites.identity(site, Role::Gateway, &format!("{site}-gateway"));
            let address = sites.agents_port(site).parse().unwrap();
            let link = connect(address, &gateway, ALPN_AGENT, tls, &settings)
                .await
                .unwrap();
            attacks += batches(&link, false, noise).await;
            attacks += frames(&link, noise).await;
            attacks += unfinished(&link).await;
            link.close(0, "enough");
        }
    }
    attacks
}

/// Random datagrams, and first packets of handshakes that never go on.
fn strangers(sites: &Sites, noise: &mut StdRng) -> usize {
    let socket = UdpSocket::bind((sites.address.as_str(), 0)).unwrap();
    for port in [SOURCE, TARGET]
        .iter()
        .flat_map(|site| [sites.peers_port(site), sites.agents_port(site)])
    {
        for n in 0..40 {
            let mut packet = vec![0; noise.random_range(0..1500)];
            noise.fill_bytes(&mut packet);
            if n % 2 == 0 && packet.len() >= 1200 {
                // A long header of QUIC 1, initial packet, connection names of eight bytes.
                packet[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]);
                packet[14] = 8;
            }
            let _ = socket.send_to(&packet, &port);
        }
    }
    160
}

/// Two-way streams with frames that are cut, too long, or no message at all.
async fn frames(link: &Link, noise: &mut StdRng) -> usize {
    let mut random = vec![0; 200];
    noise.fill_bytes(&mut random);
    let with_len = |len: u32, body: &[u8]| [&len.to_le_bytes()[..], body].concat();
    let hostile = [
        random.clone(),
        with_len(u32::MAX, &random),
        with_len(FRAME_MAX as u32 + 1, &random),
        with_len(FRAME_MAX as u32, &random),
        with_len(7, &[0xff; 7]),
        with_len(200, &random),
        // PeerTask::Target with an agent's name of 2^60 bytes; a task of an unknown kind.
        with_len(11, &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f, 0]),
        with_len(1, &[99]),
        vec![1, 0],
    ];
    let count = hostile.len();
    for bytes in hostile {
        let Ok(Ok((mut send, _recv))) = soon(link.open_bi()).await else {
            return 0;
        };
        let _ = soon(send.write_all(&bytes)).await;
        let _ = send.finish();
    }
    count
}

fn header(noise: &mut StdRng) -> BatchHeader {
    BatchHeader {
        job: JobId::random(),
        attempt: Attempt(noise.random()),
        disk: DiskIndex(0),
        round: Round(0),
        sequence: Sequence(noise.random()),
        pieces: vec![Piece {
            extent: Extent::between(0, 4096),
            content: Content::Data,
        }],
        leaves: Leaves::default(),
        ram: None,
        urgent: false,
        digest: Digest([7; 32]),
    }
}

/// Batches for jobs that are not there, and batches that are none.
async fn batches(link: &Link, encoded: bool, noise: &mut StdRng) -> usize {
    let mut hostile: Vec<Vec<u8>> = Vec::new();
    let good = header(noise);
    let stranger = |header: &BatchHeader, len: usize| {
        let mut bytes = header.encode().unwrap();
        bytes.extend(encoded.then_some(2));
        bytes.resize(bytes.len() + len, 0xf0);
        bytes
    };
    hostile.push(stranger(&good, 4096));
    hostile.push(stranger(&good, 17));
    let mut whole = good.clone();
    whole.pieces[0].extent = Extent::between(0, RAW_MAX as u64);
    hostile.push(stranger(&whole, RAW_MAX));
    let mut absurd = good.clone();
    absurd.pieces = vec![
        Piece {
            extent: Extent::between(0, u64::MAX),
            content: Content::Zero
        };
        900
    ];
    absurd.leaves = Leaves {
        first: u64::MAX,
        count: u64::MAX,
        digests: vec![],
    };
    hostile.push(stranger(&absurd, 0));
    for len in [0, 1, 3, 4, 5, 1000] {
        let mut bytes = vec![0; len];
        noise.fill_bytes(&mut bytes);
        hostile.push(bytes);
    }
    hostile.push([&(HEADER_MAX as u32 + 1).to_le_bytes()[..], &[0; 100]].concat());
    // Longer than any stream may be.
    hostile.push(vec![1; RAW_MAX + 2 * HEADER_MAX]);
    let encoded = good.encode().unwrap();
    for _ in 0..20 {
        let mut bytes = encoded.clone();
        let at = noise.random_range(0..bytes.len());
        bytes[at] ^= 1 << noise.random_range(0..8);
        hostile.push(bytes);
    }
    let count = hostile.len();
    for bytes in hostile {
        let Ok(Ok(mut stream)) = soon(link.open_uni(0)).await else {
            return 0;
        };
        let _ = soon(stream.write_all(&bytes)).await;
        let _ = stream.finish();
    }
    count
}

/// Well-formed tasks that ask for the impossible or the forbidden.
async fn tasks(link: &Link) -> usize {
    let disk = |path: &str, size| TargetDisk {
        path: path.into(),
        format: "raw".to_owned(),
        size,
        needed: size,
        preallocate: false,
        overwrite: true,
        shadow: true,
        since: None,
    };
    let many = vec![disk("/x", 1); 5000];
    let hostile = [
        vec![],
        many,
        vec![disk("/etc/passwd", 4096)],
        vec![disk("/proc/sysrq-trigger", 4096)],
        vec![disk("../../etc/passwd", u64::MAX)],
        vec![disk("/", u64::MAX)],
        vec![disk("\0", 0)],
    ];
    let count = hostile.len();
    for disks in hostile {
        let open = TargetOpen {
            job: JobId::random(),
            attempt: Attempt(u32::MAX),
            name: "x".repeat(100_000),
            disks,
            definition: Some(vec![0; 200_000]),
            dry_run: false,
            live: None,
        };
        let task = PeerTask::Target {
            agent: "target-agent".to_owned(),
            tenant: "x".repeat(10_000),
            open,
        };
        let Ok(Ok((mut send, mut recv))) = soon(link.open_bi()).await else {
            return 0;
        };
        let _ = soon(send.write_all(&frame::encode(&task).unwrap())).await;
        // The refusal comes as a message; a stream that just ends would leave the peer without a reason.
        let answer = soon(frame::read::<longhaul_common::wire::session::FromTarget>(
            &mut recv,
        ))
        .await;
        assert!(
            matches!(
                answer,
                Ok(Ok(Some(longhaul_common::wire::session::FromTarget::Failed(_))))
            ),
            "{answer:?}"
        );
    }
    // What only an agent is asked.
    let wrong = AgentTask::Source(longhaul_common::wire::session::SourceOpen {
        job: JobId::random(),
        attempt: Attempt(1),
        disks: vec![],
        definition: None,
        filter: true,
        live: None,
    });
    if let Ok(Ok((mut send, _recv))) = soon(link.open_bi()).await {
        let _ = soon(send.write_all(&frame::encode(&wrong).unwrap())).await;
    }
    count + 1
}

/// As many streams as are allowed, each begun and never ended: they must not hold up anybody else.
async fn unfinished(link: &Link) -> usize {
    let (mut uni, mut bi) = (Vec::new(), Vec::new());
    while let Ok(Ok(mut stream)) = tokio::time::timeout(Duration::from_millis(100), link.open_uni(0)).await {
        let _ = soon(stream.write_all(&[1, 0, 0])).await;
        uni.push(stream);
    }
    while let Ok(Ok(mut stream)) = tokio::time::timeout(Duration::from_millis(100), link.open_bi()).await {
        let _ = soon(stream.0.write_all(&[1, 0, 0])).await;
        bi.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(700)).await;
    uni.len() + bi.len()
}

async fn soon<T>(what: impl Future<Output = T>) -> Result<T, tokio::time::error::Elapsed> {
    tokio::time::timeout(PATIENCE / 6, what).await
}
