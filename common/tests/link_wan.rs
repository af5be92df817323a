//! Real links through an emulated bottleneck, and over loopback: what part of the rate they reach.
//!
//! `LONGHAUL_WAN="RATE_MBIT RTT_MS LOSS_PERCENT CONNECTIONS SECONDS [cubic|bbr]"` measures any other path and prints the figures:
//! `LONGHAUL_WAN="200 80 0 1 10" cargo test --release -p longhaul-common --test link_wan -- --nocapture measure`.

#![allow(clippy::unwrap_used)]

mod link_support;

use std::time::{Duration, Instant};

use link_support::{Authority, Wan, Wish, bulk, bulk_ahead, gateway, listen};
use longhaul_common::link::{ALPN_PEER, Congestion, Link, LinkSettings, MTU_JUMBO, MTU_NEAR, connect};

async fn links(settings: &LinkSettings, wan: Option<Wan>) -> (Vec<Link>, Vec<Link>, impl Sized + use<>) {
    let authority = Authority::new("wan");
    let (listener, server) = listen(&authority.tls(&gateway("munich")), settings);
    let own = authority.tls_of(
        &gateway("berlin"),
        &Wish {
            serial: 8,
            ..Wish::of(&gateway("berlin"))
        },
    );
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for _ in 0..settings.connections {
        let address = wan.map_or(server, |wan| wan.relay(server));
        near.push(
            connect(address, &gateway("munich"), ALPN_PEER, &own, settings)
                .await
                .unwrap(),
        );
        far.push(listener.accept().await.unwrap());
    }
    (near, far, (authority, listener))
}

/// One link over 20 Mbit/s and 60 ms, as it is configured.
async fn thin(loss: f64) -> (Wan, Vec<Link>, Vec<Link>, impl Sized) {
    let wan = Wan {
        rate: 20e6,
        rtt: Duration::from_millis(60),
        loss,
        queue: 1.0,
    };
    let settings = LinkSettings::wan(20_000_000, wan.rtt, 1);
    let (near, far, keep) = links(&settings, Some(wan)).await;
    (wan, near, far, keep)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configured_rate_is_filled_in_spite_of_random_loss() {
    let (wan, near, far, _keep) = thin(0.005).await;
    let goodput = bulk(&near, &far, 6).await * 8.0;
    let stats = near[0].stats();
    println!("{:.1} Mbit/s of {:.1}; {stats:?}", goodput / 1e6, wan.rate / 1e6);
    assert!(
        // Cubic stays below a tenth here. A quiet machine reaches 94 %; a busy one starves the emulator in this process.
        goodput > 0.6 * wan.rate,
        "{:.1} Mbit/s; {stats:?}",
        goodput / 1e6
    );
    assert!(stats.lost_packets * 50 < stats.sent_packets, "{stats:?}");
}

/// Two streams of bulk are written and wait for the path; each takes 400 ms of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn words_and_urgent_streams_pass_bulk_that_is_written_already() {
    let (wan, near, far, _keep) = thin(0.0).await;
    let (sender, receiver) = (near[0].clone(), far[0].clone());
    // As much as a gateway writes ahead: less than the receive window, which words need as well.
    let flows = tokio::spawn(async move { bulk_ahead(2, &near, &far, 6).await });
    tokio::spawn(async move {
        while let Ok((mut reply, mut question)) = receiver.accept_bi().await {
            let word = question.read_to_end(64).await.unwrap();
            reply.write_all(&word).await.unwrap();
            let _ = reply.finish();
        }
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (mut words, mut urgent) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let began = Instant::now();
        let (mut ask, mut answer) = sender.open_bi().await.unwrap();
        ask.write_all(b"word").await.unwrap();
        ask.finish().unwrap();
        assert_eq!(answer.read_to_end(64).await.unwrap(), b"word");
        words.push(began.elapsed());
        let began = Instant::now();
        let mut stream = sender.open_uni(3).await.unwrap();
        stream.write_all(&[1; 20_000]).await.unwrap();
        stream.finish().unwrap();
        // Until the peer has all of it.
        stream.stopped().await.unwrap();
        urgent.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(70)).await;
    }
    let goodput = flows.await.unwrap() * 8.0;
    words.sort();
    urgent.sort();
    println!(
        "words {words:?}, urgent {urgent:?}, bulk {:.1} Mbit/s",
        goodput / 1e6
    );
    // The round trip is 60 ms, and a full queue would add as much.
    assert!(words[4] < Duration::from_millis(150), "{words:?}");
    assert!(urgent[4] < Duration::from_millis(170), "{urgent:?}");
    assert!(goodput > 0.5 * wan.rate, "{goodput}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jumbo_packets_pass_without_being_taken_for_a_black_hole() {
    let settings = LinkSettings {
        mtu_max: MTU_JUMBO,
        ..LinkSettings::lan()
    };
    let (near, far, _keep) = links(&settings, None).await;
    bulk(&near, &far, 3).await;
    let stats = near[0].stats();
    assert_eq!((stats.mtu, stats.black_holes), (MTU_JUMBO, 0), "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_within_a_site_finds_large_packets_by_itself() {
    let settings = longhaul_common::settings::sections::LinkSection::default().settings();
    let (near, far, _keep) = links(&settings, None).await;
    bulk(&near, &far, 3).await;
    let stats = near[0].stats();
    assert!(stats.mtu > MTU_NEAR - 20 && stats.black_holes == 0, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn measure() {
    let Ok(wish) = std::env::var("LONGHAUL_WAN") else {
        return;
    };
    let word = |at: usize| wish.split_whitespace().nth(at);
    let number = |at: usize, default: f64| word(at).map_or(default, |w| w.parse().unwrap());
    let (rate, rtt) = (
        number(0, 200.0) * 1e6,
        Duration::from_secs_f64(number(1, 80.0) / 1000.0),
    );
    let wan = Wan {
        rate,
        rtt,
        loss: number(2, 0.0) / 100.0,
        queue: 1.0,
    };
    let mut settings = match rate > 0.0 {
        true => LinkSettings::wan(rate as u64, rtt, number(3, 1.0) as u32),
        false => LinkSettings {
            mtu_max: number(6, 1452.0) as u16,
            ..LinkSettings::lan()
        },
    };
    settings.congestion = match word(5) {
        Some("cubic") => Congestion::Cubic,
        Some("bbr") => Congestion::Bbr,
        _ => Congestion::Auto,
    };
    let (near, far, _keep) = links(&settings, (rate > 0.0).then_some(wan)).await;
    let cpu = cpu_seconds();
    let seconds = number(4, 10.0) as u64;
    let goodput = bulk(&near, &far, seconds).await;
    let cpu = (cpu_seconds() - cpu) / seconds as f64;
    println!(
        "{:.1} MB/s = {:.1} Mbit/s ({:.1} % of the rate), {cpu:.2} cores",
        goodput / 1e6,
        goodput * 8e-6,
        goodput * 800.0 / rate
    );
    for link in &near {
        println!("{:?}", link.stats());
    }
}

/// User and system time of this process, both ends and the emulator together.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}
