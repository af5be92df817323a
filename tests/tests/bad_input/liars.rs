//! Peers with good certificates that follow the dialogue and lie in it: the job ends or waits with a reason, the program goes on.

use std::sync::Arc;
use std::time::Duration;

use longhaul_common::digest::Digest;
use longhaul_common::extent::Extent;
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
use longhaul_common::link::{Link, LinkSettings, Listener, RecvStream, Role, SendStream, connect};
use longhaul_common::wire::batch::{BatchHeader, Content, Leaves, Piece};
use longhaul_common::wire::frame;
use longhaul_common::wire::sequences::Sequences;
use longhaul_common::wire::session::{
    AgentTask, DiskCounts, FromSource, FromTarget, Have, OpenedDisk, PeerTask, Refusal, RefusalKind,
    SourceDisk, SourceOpen, TargetDisk, TargetOpen, ToSource, ToTarget,
};
use longhaul_common::wire::{ALPN_AGENT, ALPN_PEER};
use tokio::runtime::Runtime;

use crate::site::{Program, Running, SOURCE, Sites, TARGET, said, wait};

const SIZE: u64 = 4 << 20;

/// Starts a job and gives its number.
fn submit(running: &Running, job: &str) -> String {
    let file = running.sites.write("liar.toml", job).display().to_string();
    let output = running
        .sites
        .finish(running.longhaul(&["run", &file, "--detach", "--json"]));
    let record: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(&output)));
    record["id"].as_str().unwrap().to_owned()
}

/// Waits until the job's status, as the operator reads it, holds one of `words`.
fn wait_status(running: &Running, id: &str, words: &[&str]) -> String {
    let mut last = String::new();
    wait(&format!("a status with one of {words:?}"), || {
        let output = running.sites.finish(running.longhaul(&["status", id, "--json"]));
        let now = String::from_utf8_lossy(&output.stdout).into_owned();
        if now != last {
            println!("{now}");
            last.clone_from(&now);
        }
        words.iter().any(|word| now.contains(word)).then(|| now.clone())
    })
}

fn sequences(runs: &[(u64, u64)]) -> Sequences {
    Sequences::try_from(runs.to_vec()).unwrap()
}

fn opened(size: u64) -> OpenedDisk {
    OpenedDisk {
        size,
        format: "raw".to_owned(),
        allocated: size,
        free: size,
        used: size,
        parts: vec![],
        notes: vec!["\u{1b}[31mred\nsecond line".to_owned()],
        scan_ms: u64::MAX,
        sent_before: 0,
        since: None,
    }
}

async fn say<T: serde::Serialize>(send: &mut SendStream, message: &T) {
    let _ = frame::write(send, message).await;
}

/// An agent of the source site that plays the `play`th play for each task.
async fn agent(link: Link, play: usize) {
    while let Ok((mut send, mut recv)) = link.accept_bi().await {
        if let Ok(Some(AgentTask::Source(open))) = frame::read(&mut recv).await {
            perform(play, &link, &open, &mut send, &mut recv).await;
        }
    }
}

fn zeros_batch(open: &SourceOpen, disk: u16, extent: Extent, pieces: usize, leaves: Leaves) -> Vec<u8> {
    let mut header = BatchHeader {
        job: open.job,
        attempt: open.attempt,
        disk: DiskIndex(disk),
        round: Round(0),
        sequence: Sequence(0),
        pieces: vec![
            Piece {
                extent,
                content: Content::Zero
            };
            pieces
        ],
        leaves,
        ram: None,
        urgent: false,
        digest: Digest([0; 32]),
    };
    header.digest = header.digest_of(&[]).unwrap();
    header.encode().unwrap()
}

async fn perform(play: usize, link: &Link, open: &SourceOpen, send: &mut SendStream, recv: &mut RecvStream) {
    let size = if play == 0 { u64::MAX } else { SIZE };
    say(
        send,
        &FromSource::Opened {
            disks: vec![opened(size)],
            definition: None,
            live: None,
        },
    )
    .await;
    loop {
        match frame::read::<ToSource>(recv).await {
            Ok(Some(ToSource::Start)) => break,
            Ok(Some(_)) => {}
            _ => return,
        }
    }
    let endless = Leaves {
        first: 0,
        count: u64::MAX,
        digests: vec![],
    };
    let bytes = match play {
        1 => zeros_batch(open, 0, Extent::between(0, u64::MAX), 1, Leaves::default()),
        2 => zeros_batch(open, 0, Extent::between(0, 4096), 900, endless),
        3 => zeros_batch(open, 77, Extent::between(0, 4096), 1, Leaves::default()),
        _ => vec![],
    };
    if !bytes.is_empty()
        && let Ok(mut stream) = link.open_uni(0).await
    {
        let _ = stream.write_all(&bytes).await;
        let _ = stream.finish();
    }
    let most = u64::MAX;
    let absurd = DiskCounts {
        batches: most,
        data: most,
        hole: most,
        zero: most,
        free: most,
        kept: most,
        read_ms: most,
        hash_ms: most,
    };
    let promise = DiskCounts {
        batches: 1000,
        ..DiskCounts::default()
    };
    let done = |counts| FromSource::DiskDone {
        disk: DiskIndex(0),
        digest: Digest([1; 32]),
        counts,
    };
    match play {
        4 => say(send, &done(promise)).await,
        5 => say(send, &FromSource::Finished).await,
        6 => say(send, &done(absurd)).await,
        _ => {}
    }
    while let Ok(Some(_)) = frame::read::<ToSource>(recv).await {}
}

/// A source agent whose numbers are beyond all sense, or that promises batches that never come.
#[test]
fn a_source_agent_that_lies_ends_its_own_job_only() {
    let mut running = Running::start(Sites::new(&[(SOURCE, Role::Agent, "evil-agent")]));
    let runtime = Runtime::new().unwrap();
    let sites = &running.sites;
    let tls = sites.tls(SOURCE, Role::Agent, "evil-agent");
    let gateway = sites.identity(SOURCE, Role::Gateway, "source-gateway");
    let address = sites.agents_port(SOURCE).parse().unwrap();
    for (play, words) in [
        &["failed", "larger than"][..],
        &["failed", "beyond the disk"],
        &["failed", "out of order or beyond"],
        &["failed", "speaks of disk 77"],
        &["never arrived"],
        &["failed", "out of turn"],
        &["failed", "out of turn"],
    ]
    .iter()
    .enumerate()
    {
        let settings = LinkSettings::lan();
        let link = runtime
            .block_on(connect(address, &gateway, ALPN_AGENT, &tls, &settings))
            .unwrap();
        let playing = runtime.spawn(agent(link.clone(), play));
        wait("the agent is linked", || {
            let output = sites.finish(running.longhaul(&["status", "--json"]));
            String::from_utf8_lossy(&output.stdout)
                .contains("evil-agent")
                .then_some(())
        });
        let job = sites
            .job("disk", &format!("copy-{play}"))
            .replace("\"source-agent\"", "\"evil-agent\"");
        let id = submit(&running, &job);
        let status = wait_status(&running, &id, &words[..1]);
        assert!(
            words.iter().all(|word| status.contains(word)),
            "{play}: {words:?} in {status}"
        );
        assert!(!status.contains("\\u001b"), "{status}");
        let _ = sites.finish(running.longhaul(&["cancel", &id]));
        playing.abort();
        link.close(0, "enough");
    }
    running.assert_well();
}

/// A target site that claims to have accepted and stored what was never sent, and holds leaves the disk does not have.
#[test]
fn a_target_site_that_lies_ends_the_job_with_a_reason() {
    let sites = Sites::new(&[]);
    std::fs::write(sites.path("source-agent/disks/disk"), vec![7; SIZE as usize]).unwrap();
    let runtime = Runtime::new().unwrap();
    let tls = sites.tls(TARGET, Role::Gateway, "target-gateway");
    let address = sites.peers_port(TARGET).parse().unwrap();
    let settings = LinkSettings::lan();
    let listener = runtime.block_on(async {
        Arc::new(Listener::bind(address, &tls, &[ALPN_PEER], &[Role::Gateway], &settings).unwrap())
    });
    let scripts = Arc::new(std::sync::Mutex::new(0));
    runtime.spawn(serve_lies(Arc::clone(&listener), Arc::clone(&scripts)));
    let programs = vec![
        Program::usual(&sites, SOURCE, Role::Gateway),
        Program::usual(&sites, SOURCE, Role::Agent),
    ];
    let mut running = Running { sites, programs };
    running
        .program("source-gateway")
        .wait_for(&["linked to the peer"]);
    running.program("source-gateway").wait_for(&["agent linked"]);
    for (script, words) in [
        (0, &["leaves that the disk does not have"][..]),
        (1, &["out of turn"]),
        (2, &["differs"]),
        (3, &["no such luck"]),
        (4, &["out of turn"]),
    ] {
        *scripts.lock().unwrap() = script;
        let id = submit(&running, &running.sites.job("disk", &format!("copy-{script}")));
        let status = wait_status(&running, &id, words);
        assert!(!status.contains("\\u001b"), "{status}");
        let output = running.sites.finish(running.longhaul(&["status"]));
        assert!(output.status.success(), "{}", said(&output));
        let _ = running.sites.finish(running.longhaul(&["cancel", &id]));
    }
    running.assert_well();
    let resident = running.program("source-gateway").resident_kib();
    assert!(resident < 256 << 10, "{resident} KiB");
}

async fn serve_lies(listener: Arc<Listener>, script: Arc<std::sync::Mutex<u32>>) {
    while let Some(link) = listener.accept().await {
        let script = Arc::clone(&script);
        tokio::spawn(async move {
            let payloads = link.clone();
            tokio::spawn(async move {
                while let Ok(mut stream) = payloads.accept_uni().await {
                    let _ = stream.read_to_end(8 << 20).await;
                }
            });
            while let Ok((send, mut recv)) = link.accept_bi().await {
                let script = *script.lock().unwrap();
                tokio::spawn(async move {
                    if let Ok(Some(PeerTask::Target { open, .. })) = frame::read(&mut recv).await {
                        lie(script, &open, send, recv).await;
                    }
                });
            }
        });
    }
}

async fn lie(script: u32, open: &TargetOpen, mut send: SendStream, mut recv: RecvStream) {
    say(
        &mut send,
        &FromTarget::Opened {
            notes: vec!["\u{1b}]0;owned\u{7}".repeat(10_000)],
        },
    )
    .await;
    let everything = Have {
        disk: DiskIndex(0),
        first: 0,
        count: u64::MAX,
        digests: vec![],
        shadow: None,
    };
    if script == 0 {
        say(&mut send, &FromTarget::Have(everything)).await;
    }
    say(&mut send, &FromTarget::Ready).await;
    say(&mut send, &FromTarget::Credit(u64::MAX)).await;
    say(&mut send, &FromTarget::Credit(u64::MAX)).await;
    let all = sequences(&[(0, u64::MAX)]);
    match script {
        // All that ever was is durable: the job goes on to the proof, where the next lie ends it.
        1 | 2 => {
            for _ in 0..50 {
                say(&mut send, &FromTarget::Accepted(all.clone())).await;
                say(&mut send, &FromTarget::Durable(all.clone())).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        3 => {
            let text = format!("no such luck\n\u{1b}[2J{}", "x".repeat(900_000));
            say(
                &mut send,
                &FromTarget::Failed(Refusal::new(RefusalKind::Refused, text)),
            )
            .await;
        }
        4 => {
            say(
                &mut send,
                &FromTarget::Committed {
                    paths: vec![],
                    hook: None,
                },
            )
            .await
        }
        _ => {}
    }
    let lie = FromTarget::Verified {
        disk: DiskIndex(if script == 1 { 9 } else { 0 }),
        digest: Digest([3; 32]),
        verify_ms: u64::MAX,
        flush_ms: u64::MAX,
    };
    if script == 1 || script == 2 {
        // Until the gateway asks for the proof, whatever else it says meanwhile is the same lie again.
        loop {
            if open.dry_run {
                break;
            }
            say(&mut send, &FromTarget::Durable(all.clone())).await;
            match tokio::time::timeout(Duration::from_millis(50), frame::read::<ToTarget>(&mut recv)).await {
                Ok(Ok(Some(ToTarget::Verify))) => break,
                Ok(Ok(Some(_))) | Err(_) => {}
                Ok(_) => return,
            }
        }
        say(
            &mut send,
            &FromTarget::Verifying {
                disk: DiskIndex(0),
                bytes: u64::MAX,
            },
        )
        .await;
        say(&mut send, &lie).await;
    }
    while let Ok(Some(message)) = frame::read::<ToTarget>(&mut recv).await {
        if let ToTarget::Abort(_) = message {
            say(&mut send, &FromTarget::Aborted).await;
        }
    }
}

/// A gateway that asks its agent for the absurd.
#[test]
fn an_agent_outlives_a_gateway_that_lies() {
    let sites = Sites::new(&[]);
    std::fs::write(sites.path("target-agent/disks/disk"), vec![7; SIZE as usize]).unwrap();
    let runtime = Runtime::new().unwrap();
    let tls = sites.tls(TARGET, Role::Gateway, "target-gateway");
    let address = sites.agents_port(TARGET).parse().unwrap();
    let settings = LinkSettings::lan();
    let listener = runtime
        .block_on(async { Listener::bind(address, &tls, &[ALPN_AGENT], &[Role::Agent], &settings).unwrap() });
    let mut program = Program::usual(&sites, TARGET, Role::Agent);
    let link = runtime.block_on(listener.accept()).unwrap();
    let before = program.resident_kib();
    let inside = sites.path("target-agent/disks");
    let refusals = runtime.block_on(async {
        let mut refusals = Vec::new();
        for size in [0, 1, SIZE + 1, 1 << 52, 1 << 60, u64::MAX] {
            refusals.push(target(&link, &inside.join(format!("new-{size}")), size).await);
        }
        for path in ["/etc/passwd", "relative", "", "/", "/dev/null", "/dev/zero"] {
            refusals.push(target(&link, path.as_ref(), 4096).await);
        }
        refusals.push(target(&link, &inside.join("line\nbreak"), 4096).await);
        refusals.push(source(&link, vec![]).await);
        refusals.push(source(&link, vec![disk("/dev/zero".as_ref()); 5000]).await);
        refusals.push(source(&link, vec![disk("/proc/kcore".as_ref())]).await);
        refusals.push(flood(&link, &inside.join("disk")).await);
        refusals
    });
    for (refusal, words) in &refusals {
        println!("{words}: {refusal:?}");
        let text = refusal.as_ref().map(|refusal| refusal.text.clone());
        assert!(text.as_ref().is_none_or(|text| !text.contains('\n')), "{text:?}");
    }
    let refused = refusals.iter().filter(|(refusal, _)| refusal.is_some()).count();
    assert!(refused >= refusals.len() - 3, "{refused} of {}", refusals.len());
    let after = program.resident_kib();
    assert!(after < before + (96 << 10), "from {before} to {after} KiB");
    program.assert_well();
    assert!(link.close_reason().is_none(), "{:?}", link.close_reason());
}

fn disk(path: &std::path::Path) -> SourceDisk {
    SourceDisk {
        path: path.to_owned(),
        format: Some("raw".to_owned()),
        flatten: false,
    }
}

/// Asks for a copy, sends batches that make no sense, and gives what the agent says to that.
async fn target(link: &Link, path: &std::path::Path, size: u64) -> (Option<Refusal>, String) {
    let what = format!("{} of {size} bytes", path.display());
    let wanted = TargetDisk {
        path: path.to_owned(),
        format: "raw".to_owned(),
        size,
        needed: 0,
        preallocate: false,
        overwrite: false,
        shadow: false,
        since: None,
    };
    let open = TargetOpen {
        job: JobId::random(),
        attempt: Attempt(1),
        name: "liar".to_owned(),
        disks: vec![wanted],
        definition: None,
        dry_run: false,
        live: None,
    };
    let (mut send, mut recv) = link.open_bi().await.unwrap();
    say(&mut send, &AgentTask::Target(open.clone())).await;
    let mut header = BatchHeader {
        job: open.job,
        attempt: open.attempt,
        disk: DiskIndex(0),
        round: Round(u32::MAX),
        sequence: Sequence(u64::MAX),
        pieces: vec![Piece {
            extent: Extent::between(0, 4096.min(size)),
            content: Content::Data,
        }],
        leaves: Leaves {
            first: 0,
            count: u64::MAX,
            digests: vec![],
        },
        ram: None,
        urgent: false,
        digest: Digest([0; 32]),
    };
    let mut refusal = None;
    while let Ok(Ok(Some(message))) =
        tokio::time::timeout(Duration::from_secs(20), frame::read::<FromTarget>(&mut recv)).await
    {
        match message {
            FromTarget::Credit(_) if header.sequence.0 == u64::MAX => {
                header.sequence.0 = 0;
                for leaves in [
                    Leaves {
                        first: 0,
                        count: u64::MAX,
                        digests: vec![],
                    },
                    Leaves::default(),
                ] {
                    header.leaves = leaves;
                    let mut stream = link.open_uni(0).await.unwrap();
                    let _ = stream.write_all(&header.encode().unwrap()).await;
                    let _ = stream.write_all(&[1; 4096]).await;
                    let _ = stream.finish();
                }
            }
            FromTarget::Failed(said) => {
                refusal = Some(said);
                break;
            }
            _ => {}
        }
    }
    (refusal, what)
}

async fn source(link: &Link, disks: Vec<SourceDisk>) -> (Option<Refusal>, String) {
    let what = format!("a source of {} disks", disks.len());
    let open = SourceOpen {
        job: JobId::random(),
        attempt: Attempt(1),
        disks,
        definition: None,
        filter: true,
        live: None,
    };
    let (mut send, mut recv) = link.open_bi().await.unwrap();
    say(&mut send, &AgentTask::Source(open)).await;
    match tokio::time::timeout(Duration::from_secs(20), frame::read::<FromSource>(&mut recv)).await {
        Ok(Ok(Some(FromSource::Failed(refusal)))) => (Some(refusal), what),
        _ => (None, what),
    }
}

/// A good source, told ten thousand times the same leaves: it must end the attempt instead of serving for ever.
async fn flood(link: &Link, path: &std::path::Path) -> (Option<Refusal>, String) {
    let what = "a flood of leaves".to_owned();
    let open = SourceOpen {
        job: JobId::random(),
        attempt: Attempt(1),
        disks: vec![disk(path)],
        definition: None,
        filter: true,
        live: None,
    };
    let (mut send, mut recv) = link.open_bi().await.unwrap();
    say(&mut send, &AgentTask::Source(open)).await;
    let _ = frame::read::<FromSource>(&mut recv).await;
    let have = Have {
        disk: DiskIndex(0),
        first: 0,
        count: SIZE >> 20,
        digests: vec![],
        shadow: None,
    };
    for _ in 0..10_000 {
        if frame::write(&mut send, &ToSource::Have(have.clone()))
            .await
            .is_err()
        {
            break;
        }
    }
    match tokio::time::timeout(Duration::from_secs(20), frame::read::<FromSource>(&mut recv)).await {
        Ok(Ok(Some(FromSource::Failed(refusal)))) => (Some(refusal), what),
        other => panic!("{other:?}"),
    }
}
