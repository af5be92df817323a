//! Strangers on the port: garbage, half-open handshakes, peers that never speak. Others are not touched, memory is bounded.

#![allow(clippy::unwrap_used)]

mod link_support;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use link_support::{Authority, agent, call, gateway, listen, quick};
use longhaul_common::link::{ALPN_AGENT, LinkSettings, code, connect};

fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

fn garbage(seed: &mut u64, length: usize) -> Vec<u8> {
    (0..length).map(|_| random(seed) as u8).collect()
}

/// The first packets of `count` real clients, as they go over the wire, each with a connection name of its own.
async fn first_packets(count: usize) -> Vec<Vec<u8>> {
    let sink = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let authority = Authority::new("sink");
    let address = sink.local_addr().unwrap();
    let settings = LinkSettings {
        handshake: Duration::from_millis(500),
        ..quick()
    };
    let tls = authority.tls(&agent("a-1"));
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..count {
        let (tls, settings) = (Arc::clone(&tls), settings.clone());
        calls.spawn(
            async move { drop(connect(address, &gateway("munich"), ALPN_AGENT, &tls, &settings).await) },
        );
    }
    let mut packets = std::collections::HashMap::new();
    let mut packet = vec![0; 2000];
    while packets.len() < count {
        let received = tokio::time::timeout(Duration::from_secs(5), sink.recv_from(&mut packet)).await;
        let (length, _) = received.expect("too few first packets").unwrap();
        let name = packet[6..6 + usize::from(packet[5])].to_vec();
        packets.entry(name).or_insert_with(|| packet[..length].to_vec());
    }
    calls.shutdown().await;
    packets.into_values().collect()
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

async fn link_works(address: SocketAddr, authority: &Authority) {
    let link = call(
        address,
        &gateway("munich"),
        ALPN_AGENT,
        &authority.tls(&agent("good")),
    )
    .await;
    link.expect("a good peer was not served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_the_port_does_no_harm() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let live = call(
        address,
        &gateway("munich"),
        ALPN_AGENT,
        &authority.tls(&agent("a-1")),
    )
    .await
    .unwrap();
    let far = listener.accept().await.unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut seed = 0x1234_5678_9abc_def1;
    let real = first_packets(1).await.remove(0);
    for round in 0..4000u64 {
        let length = (random(&mut seed) % 1500) as usize;
        let packet = match round % 4 {
            0 => garbage(&mut seed, length),
            // Looks like QUIC: long header of version 1.
            1 => [&[0xc0, 0, 0, 0, 1][..], &garbage(&mut seed, length)].concat(),
            2 => real[..length.min(real.len())].to_vec(),
            _ => {
                let mut damaged = real.clone();
                let at = random(&mut seed) as usize % damaged.len();
                damaged[at] ^= 1 << (round % 8);
                damaged
            }
        };
        let _ = socket.send_to(&packet, address);
        if round % 64 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    link_works(address, &authority).await;
    let mut stream = live.open_uni(0).await.unwrap();
    stream.write_all(b"still here").await.unwrap();
    stream.finish().unwrap();
    assert_eq!(
        far.accept_uni().await.unwrap().read_to_end(100).await.unwrap(),
        b"still here"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_handshakes_are_bounded_and_leave_room() {
    let authority = Authority::new("a");
    let settings = LinkSettings {
        handshake: Duration::from_secs(2),
        ..quick()
    };
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &settings);
    link_works(address, &authority).await;
    let packets = first_packets(150).await;
    let before = resident_kib();
    // Each packet from a socket of its own, again and again: callers that never answer, some of them proving their address.
    let mut most = 0;
    let sockets: Vec<_> = packets
        .iter()
        .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
        .collect();
    for _ in 0..10 {
        for (socket, packet) in sockets.iter().zip(&packets) {
            let _ = socket.send_to(packet, address);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        most = most.max(listener.handshakes());
    }
    let grown = resident_kib().saturating_sub(before);
    assert!((16..=64).contains(&most), "{most} handshakes at once");
    assert!(grown < 32 << 10, "{grown} KiB more");
    // A good peer proves its address and is served, at the latest when the half-open ones are timed out.
    let mut served = false;
    for _ in 0..10 {
        let tls = authority.tls(&agent("good"));
        if call(address, &gateway("munich"), ALPN_AGENT, &tls).await.is_ok() {
            served = true;
            break;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(served);
    for _ in 0..100 {
        if listener.handshakes() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{} half-open handshakes are still held", listener.handshakes());
}

#[tokio::test]
async fn a_peer_that_is_done_with_tls_but_never_says_welcome_is_dropped() {
    let authority = Authority::new("a");
    let settings = LinkSettings {
        handshake: Duration::from_millis(500),
        ..quick()
    };
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &settings);
    let files = authority.issue("mute", &link_support::Wish::of(&agent("mute")));
    let (_endpoint, mute) = link_support::bare_client(address, &authority, Some(files)).await;
    let connection = mute.unwrap();
    let told = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
    assert!(told.is_ok(), "the mute peer still has a place");
    let log = link_support::refusal(&listener).await;
    assert!(
        log.contains("the handshake was not finished within 0.5 s"),
        "{log}"
    );
}

#[tokio::test]
async fn more_links_than_allowed_are_refused_as_busy() {
    let authority = Authority::new("a");
    let settings = LinkSettings {
        links_max: 2,
        ..quick()
    };
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &settings);
    let tls = authority.tls(&agent("a-1"));
    let mut links = Vec::new();
    for _ in 0..2 {
        links.push(call(address, &gateway("munich"), ALPN_AGENT, &tls).await.unwrap());
        links.push(listener.accept().await.unwrap());
    }
    let refused = call(address, &gateway("munich"), ALPN_AGENT, &tls)
        .await
        .unwrap_err();
    assert!(
        refused.is_transient() && refused.to_string().contains("too many links"),
        "{refused}"
    );
    links.clear();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(call(address, &gateway("munich"), ALPN_AGENT, &tls).await.is_ok());
}

#[tokio::test]
async fn a_program_that_stops_says_so() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let link = call(
        address,
        &gateway("munich"),
        ALPN_AGENT,
        &authority.tls(&agent("a-1")),
    )
    .await
    .unwrap();
    let _far = Arc::new(listener.accept().await.unwrap());
    listener.close("the program stops");
    let told = link.closed().await;
    assert!(told.is_transient(), "{told}");
    assert_eq!(
        told.to_string(),
        format!(
            "the peer closed the link: the program stops (code {})",
            code::STOPPING
        )
    );
    assert!(listener.accept().await.is_none());
}
