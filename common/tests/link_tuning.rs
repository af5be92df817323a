//! The arithmetic from rate and delay to windows.

use std::time::Duration;

use longhaul_common::link::{Congestion, LinkSettings, MTU_JUMBO, tune};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

#[test]
fn a_wan_gets_windows_of_its_bandwidth_delay_product() {
    let tuning = tune(&LinkSettings::wan(200_000_000, Duration::from_millis(80), 1));
    // 200 Mbit/s are 25 MB/s; of each 1480 bytes on the wire 1452 are QUIC's: 24.527 MB/s.
    assert_eq!(tuning.rate, Some(24_527_027));
    assert_eq!(tuning.bandwidth_delay, 1_962_162);
    assert_eq!(tuning.connection_window, 4 * 1_962_162 + 8 * MIB);
    assert_eq!(tuning.send_window, tuning.connection_window);
    assert_eq!(tuning.stream_window, 2 * MIB);
    assert_eq!(tuning.initial_rtt, Duration::from_millis(160));
    assert_eq!(tuning.congestion, Congestion::Dedicated);
}

#[test]
fn connections_share_rate_and_windows() {
    let settings = LinkSettings::wan(10_000_000_000, Duration::from_millis(100), 4);
    let (one, four) = (
        tune(&LinkSettings {
            connections: 1,
            ..settings.clone()
        }),
        tune(&settings),
    );
    assert_eq!(one.rate.unwrap() / 4, four.rate.unwrap());
    assert_eq!(
        four.connection_window,
        (4 * four.bandwidth_delay + 8 * MIB).min(64 * MIB)
    );
    assert_eq!(
        one.connection_window,
        64 * MIB,
        "no connection holds more, whatever is configured"
    );
}

#[test]
fn another_site_gets_a_long_window_without_a_rate_and_each_lane_leaves_room() {
    let far = tune(&LinkSettings {
        far: true,
        ..LinkSettings::default()
    });
    assert_eq!((far.connection_window, far.send_window), (16 * MIB, 16 * MIB));
    assert_eq!(
        [0, 1, 2, 3, 9].map(|lane| far.ahead(lane)),
        [8, 10, 12, 14, 14].map(|mib| mib * MIB)
    );
}

#[test]
fn a_lan_gets_cubic_and_a_bounded_window() {
    let tuning = tune(&LinkSettings {
        mtu_max: MTU_JUMBO,
        ..LinkSettings::lan()
    });
    assert_eq!((tuning.connection_window, tuning.send_window), (2 * MIB, 8 * MIB));
    assert_eq!(tuning.congestion, Congestion::Cubic);
    assert_eq!((tuning.mtu_initial, tuning.mtu_max), (1200, 8952));
}

#[test]
fn what_is_chosen_is_taken_with_and_without_a_rate() {
    let settings = LinkSettings {
        congestion: Congestion::Shared,
        ..LinkSettings::lan()
    };
    assert_eq!(tune(&settings).congestion, Congestion::Shared);
    let far = LinkSettings {
        rtt: Some(Duration::from_millis(80)),
        ..LinkSettings::lan()
    };
    assert_eq!(tune(&far).congestion, Congestion::Dedicated);
    let chosen = LinkSettings {
        congestion: Congestion::Bbr,
        ..LinkSettings::wan(1_000_000, Duration::ZERO, 1)
    };
    assert_eq!(tune(&chosen).congestion, Congestion::Bbr);
}

proptest! {
    #[test]
    fn memory_is_bounded_whatever_is_configured(
        rate in proptest::option::of(any::<u64>()), rtt in proptest::option::of(0u64..u64::MAX / 2), connections: u32, mtu: u16,
    ) {
        let rtt = rtt.map(Duration::from_nanos);
        let tuning = tune(&LinkSettings { rate, rtt, connections, mtu_max: mtu, ..LinkSettings::default() });
        prop_assert!(tuning.connection_window <= 64 * MIB && tuning.send_window <= 64 * MIB);
        prop_assert!(tuning.connection_window >= tuning.stream_window);
        prop_assert!(tuning.initial_window <= 64 * MIB && tuning.initial_window >= 32 << 10);
        prop_assert!(tuning.rate.is_none_or(|rate| rate >= 1000));
        prop_assert!(tuning.mtu_max >= 1200 && !tuning.initial_rtt.is_zero());
    }
}
