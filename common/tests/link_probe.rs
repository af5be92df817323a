//! `longhaul link`: what the test of a path finds, on good paths and bad.

#![allow(clippy::unwrap_used)]

mod link_support;

use std::sync::Arc;
use std::time::Duration;

use link_support::{Authority, Wan, Wish, agent, gateway, listen};
use longhaul_common::link::probe::{Check, ProbeLimits, ProbeReport, probe, serve_probe};
use longhaul_common::link::{ALPN_PROBE, LinkSettings, Listener, connect};

const BRIEF: ProbeLimits = ProbeLimits {
    time: Duration::from_millis(2000),
    bytes: 32 << 20,
};

fn settings() -> LinkSettings {
    LinkSettings {
        handshake: Duration::from_secs(3),
        ..LinkSettings::wan(20_000_000, Duration::from_millis(30), 1)
    }
}

fn serve(listener: Arc<Listener>) {
    tokio::spawn(async move {
        while let Some(link) = listener.accept().await {
            tokio::spawn(serve_probe(link));
        }
    });
}

fn check<'a>(report: &'a ProbeReport, name: &str) -> &'a Check {
    report
        .checks
        .iter()
        .find(|check| check.name == name)
        .unwrap_or_else(|| panic!("no {name}: {report:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_path_is_measured() {
    let authority = Authority::new("a");
    let (listener, server) = listen(&authority.tls(&gateway("munich")), &settings());
    serve(Arc::new(listener));
    let wan = Wan {
        rate: 20e6,
        rtt: Duration::from_millis(30),
        loss: 0.0,
        queue: 1.0,
    };
    let own = authority.tls_of(
        &gateway("berlin"),
        &Wish {
            serial: 8,
            ..Wish::of(&gateway("berlin"))
        },
    );
    let report = probe(wan.relay(server), &gateway("munich"), &own, &settings(), BRIEF).await;
    println!("{}", serde_json::to_string_pretty(&report).unwrap());
    assert_eq!(report.peer, Some(gateway("munich")));
    assert!((85.0..91.0).contains(&report.peer_certificate_days.unwrap()));
    assert!(report.mtu.unwrap() > 1430);
    assert!((29.0..60.0).contains(&report.rtt_min_ms.unwrap()));
    assert!(report.clock_offset_ms.unwrap().abs() < 20.0);
    assert!(report.rate_bit_per_s.unwrap() > 12e6 && report.rate_bit_per_s.unwrap() < 20e6);
    assert!(report.loss.unwrap() < 0.02);
    for name in ["reachable", "certificate", "mtu", "delay", "clock", "loss"] {
        assert!(check(&report, name).ok, "{name}: {report:?}");
    }
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(
        serde_json::from_str::<ProbeReport>(&json).unwrap().checks,
        report.checks
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slower_and_longer_path_than_configured_gets_remedies() {
    let authority = Authority::new("a");
    let (listener, server) = listen(&authority.tls(&gateway("munich")), &settings());
    serve(Arc::new(listener));
    let wan = Wan {
        rate: 8e6,
        rtt: Duration::from_millis(90),
        loss: 0.05,
        queue: 1.0,
    };
    let own = authority.tls_of(
        &gateway("berlin"),
        &Wish {
            serial: 8,
            ..Wish::of(&gateway("berlin"))
        },
    );
    let report = probe(wan.relay(server), &gateway("munich"), &own, &settings(), BRIEF).await;
    assert!(!report.ok);
    assert!(
        check(&report, "delay")
            .remedy
            .as_ref()
            .unwrap()
            .contains("30 ms are configured"),
        "{report:?}"
    );
    assert!(
        check(&report, "rate")
            .remedy
            .as_ref()
            .unwrap()
            .contains("20.0 Mbit/s are configured"),
        "{report:?}"
    );
    assert!(check(&report, "loss").remedy.is_some(), "{report:?}");
}

#[tokio::test]
async fn nobody_there_and_not_wanted_are_told_apart() {
    let authority = Authority::new("a");
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let own = authority.tls(&agent("a-1"));
    let quick = LinkSettings {
        handshake: Duration::from_millis(300),
        ..settings()
    };
    let report = probe(
        silent.local_addr().unwrap(),
        &gateway("munich"),
        &own,
        &quick,
        BRIEF,
    )
    .await;
    let reachable = check(&report, "reachable");
    assert!(
        !report.ok && reachable.finding.contains("no answer from"),
        "{report:?}"
    );
    assert!(
        reachable.remedy.as_ref().unwrap().contains("ss -ulpn"),
        "{report:?}"
    );

    let strange = Authority::new("b");
    let (_listener, server) = listen(&strange.tls(&gateway("munich")), &settings());
    let report = probe(server, &gateway("munich"), &own, &settings(), BRIEF).await;
    let reachable = check(&report, "reachable");
    assert!(
        reachable.finding.contains("unknown authority") && reachable.remedy.is_some(),
        "{report:?}"
    );
}

#[tokio::test]
async fn a_caller_that_says_nonsense_does_no_harm() {
    let authority = Authority::new("a");
    let (listener, server) = listen(&authority.tls(&gateway("munich")), &settings());
    let own = authority.tls(&agent("a-1"));
    let link = connect(server, &gateway("munich"), ALPN_PROBE, &own, &settings())
        .await
        .unwrap();
    let served = tokio::spawn(serve_probe(listener.accept().await.unwrap()));
    for length in [0usize, 1, 7, 9, 100] {
        let (mut ask, mut answer) = link.open_bi().await.unwrap();
        ask.write_all(&vec![0xff; length]).await.unwrap();
        ask.finish().unwrap();
        let reply = answer.read_to_end(1000).await.unwrap();
        assert_eq!(reply.len(), length / 8 * 16);
    }
    link.close(0, "done");
    tokio::time::timeout(Duration::from_secs(5), served)
        .await
        .unwrap()
        .unwrap();
}
