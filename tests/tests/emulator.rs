//! The emulator as packets feel it: rate, delay, loss and cuts, measured with plain UDP between two
//! namespaces.
//!
//! Needs the right to make namespaces and TUN devices; without it each test says so and passes, because the
//! lab itself falls back to loopback there.

#![allow(clippy::unwrap_used)] // helpers of tests fail like tests

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use clap::Parser;
use longhaul_lab::namespace::{self, SOURCE_ADDRESS, Site, Sites, TARGET_ADDRESS};
use longhaul_lab::wan::link::Link;
use longhaul_lab::wan::spec::LinkSpec;

const PORT: u16 = 4000;
/// IP and UDP headers.
const HEADERS: usize = 28;

#[derive(Parser)]
struct Words {
    #[command(flatten)]
    link: LinkSpec,
}

fn link(words: &[&str]) -> LinkSpec {
    Words::parse_from(std::iter::once(&"lab").chain(words)).link
}

fn emulated(words: &[&str]) -> Option<(Sites, Link)> {
    if let Some(cause) = namespace::missing_rights() {
        eprintln!("not tested here: {cause}");
        return None;
    }
    let sites = Sites::create().unwrap();
    let link = Link::start(&link(words), &sites.source, &sites.target).unwrap();
    Some((sites, link))
}

fn socket(site: &Site) -> UdpSocket {
    let socket = namespace::inside(&site.namespace, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)))
        .unwrap()
        .unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket
}

fn to(address: Ipv4Addr) -> SocketAddr {
    SocketAddr::from((address, PORT))
}

/// Sends datagrams of full MTU at `bit_per_s` for `time`; gives how many.
fn offer(socket: &UdpSocket, bit_per_s: u64, time: Duration) -> u64 {
    let packet = [0; 1500 - HEADERS];
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < time {
        let due = (start.elapsed().as_nanos() * u128::from(bit_per_s) / 12_000_000_000_000) as u64;
        while sent < due {
            socket.send_to(&packet, to(TARGET_ADDRESS)).unwrap();
            sent += 1;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    sent
}

#[test]
fn the_rate_is_kept_within_three_per_cent() {
    let Some((sites, mut link)) = emulated(&["--rate=60mbit", "--rtt=20ms"]) else {
        return;
    };
    let (from, into) = (socket(&sites.source), socket(&sites.target));
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 2000];
        let mut arrivals = Vec::new();
        while into.recv(&mut bytes).is_ok() {
            arrivals.push(Instant::now());
        }
        arrivals
    });
    offer(&from, 75_000_000, Duration::from_secs(2));
    let arrivals = reader.join().unwrap();
    // From the time the queue had filled until the last packet.
    let arrivals = &arrivals[arrivals.len() / 4..];
    let time = arrivals[arrivals.len() - 1] - arrivals[0];
    let rate = (arrivals.len() - 1) as f64 * 12_000.0 / time.as_secs_f64();
    let stats = link.stats().unwrap();
    assert!((58.2e6..=61.8e6).contains(&rate), "{rate} bit/s; {stats:?}");
    assert!(
        stats.forth.dropped_queue > 0 && stats.forth.queue_peak_bytes <= 750_000,
        "{stats:?}"
    );
}

#[test]
fn the_delay_is_half_the_round_trip_within_two_milliseconds() {
    let Some((sites, _link)) = emulated(&["--rate=100mbit", "--rtt=40ms"]) else {
        return;
    };
    let (from, back) = (socket(&sites.source), socket(&sites.target));
    let mut trips: Vec<Duration> = (0..41)
        .map(|_| {
            let start = Instant::now();
            from.send_to(&[0; 64], to(TARGET_ADDRESS)).unwrap();
            back.recv(&mut [0; 64]).unwrap();
            let there = start.elapsed();
            back.send_to(&[0; 64], to(SOURCE_ADDRESS)).unwrap();
            from.recv(&mut [0; 64]).unwrap();
            there
        })
        .collect();
    trips.sort_unstable();
    let median = trips[trips.len() / 2];
    assert!(
        (Duration::from_millis(20)..Duration::from_millis(22)).contains(&median),
        "{median:?}"
    );
}

#[test]
fn loss_and_cuts_hit_the_packets_they_should() {
    let Some((sites, mut link)) = emulated(&["--rate=0", "--rtt=2ms", "--loss=5%", "--seed=3"]) else {
        return;
    };
    let from = socket(&sites.source);
    let sent = offer(&from, 40_000_000, Duration::from_millis(900));
    std::thread::sleep(Duration::from_millis(50));
    let before = link.stats().unwrap();
    let share = before.forth.dropped_loss as f64 / sent as f64;
    assert!((0.03..0.07).contains(&share), "{share}");
    link.set_cut(true).unwrap();
    let lost = offer(&from, 10_000_000, Duration::from_millis(200));
    link.set_cut(false).unwrap();
    let after = link.stop().unwrap();
    assert!(
        after.forth.dropped_cut >= lost - 1,
        "{lost} sent into the cut; {after:?}"
    );
    assert_eq!(after.forth.delivered_packets, before.forth.delivered_packets);
}

#[test]
fn labs_run_side_by_side_and_leave_nothing() {
    if let Some(cause) = namespace::missing_rights() {
        eprintln!("not tested here: {cause}");
        return;
    }
    let names: Vec<_> = std::thread::scope(|scope| {
        let labs: Vec<_> = (0..3).map(|n| scope.spawn(move || one_of_many(n))).collect();
        labs.into_iter().flat_map(|lab| lab.join().unwrap()).collect()
    });
    for name in names {
        assert!(!namespace::path(&name).exists(), "{name} is still there");
    }
}

fn one_of_many(number: u8) -> [String; 2] {
    let sites = Sites::create().unwrap();
    let _link = Link::start(
        &link(&["--rate=10mbit", "--rtt=10ms"]),
        &sites.source,
        &sites.target,
    )
    .unwrap();
    let (from, into) = (socket(&sites.source), socket(&sites.target));
    for _ in 0..20 {
        from.send_to(&[number], to(TARGET_ADDRESS)).unwrap();
        let mut byte = [0];
        into.recv(&mut byte).unwrap();
        assert_eq!(byte, [number], "a packet of another lab");
    }
    [sites.source.namespace.clone(), sites.target.namespace.clone()]
}
