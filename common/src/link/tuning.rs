//! How a connection is tuned: the arithmetic from rate and delay to windows.
//!
//! Owns [`LinkSettings`] (what people configure) and [`Tuning`] (what quinn is told), with the sums in the open in [`tune`],
//! which is pure. Every window is bounded: what a peer may make us hold is `connection_window` received and `send_window` sent
//! per connection. Leaves alone how a window is used (`congestion`) and sockets (`socket`).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::congestion::{CapSchedule, Mode};

/// Bytes of IP and UDP headers around each QUIC packet: 20 (IPv4) + 8. The configured rate is meant to include them.
pub const PACKET_OVERHEAD: u64 = 28;
/// The largest UDP payload that fits a 1500-byte Ethernet over IPv6: 1500 - 40 - 8.
pub const MTU_WAN: u16 = 1452;
/// The largest UDP payload that fits a 9000-byte jumbo frame over IPv6: 9000 - 40 - 8. Up to [`MTU_NEAR`] quinn can hand ten
/// packets to the kernel at once, which may be faster still.
pub const MTU_JUMBO: u16 = 8952;

/// What is probed for within a site unless it is told: the largest packets of which one system call of UDP carries ten, as quinn hands them
/// over. Jumbo frames and the loopback device carry them, and each costs hardly more than one of 1452 bytes.
pub const MTU_NEAR: u16 = 65_507 / 10;

const MIB: u64 = 1 << 20;
/// A batch is at most 1 MiB raw and a header, so twice that never stalls the one stream that carries it.
const STREAM_WINDOW: u64 = 2 * MIB;
/// Enough for a 10 Gbit/s LAN at 1.6 ms. A larger one would be filled, and overflow the receiver's socket buffer.
const LAN_RECEIVE_WINDOW: u64 = 2 * MIB;
/// Between sites, where no rate is configured: what 4 Gbit/s hold in 32 ms, for each connection.
const FAR_WINDOW: u64 = 16 * MIB;
/// Two batches in the making for each of a few streams; the agent's whole budget is 160 MiB.
const LAN_SEND_WINDOW: u64 = 8 * MIB;
/// No connection holds more than this, whatever rate is configured.
const WINDOW_MAX: u64 = 64 * MIB;
/// From here on a link is not one of a site's own.
pub const WAN_RTT: Duration = Duration::from_millis(5);
/// What a connection sends before it knows anything: 22 packets, as many as two bursts that the network card cuts.
const STARTING_WINDOW: u64 = 32 << 10;
/// Assumed where a rate is configured, but no round-trip time.
const RTT_ASSUMED: Duration = Duration::from_millis(100);

/// Which congestion controller a link uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// `dedicated` where a rate is configured, or a round-trip time of 5 ms and more; `cubic` otherwise, as on a LAN.
    #[default]
    Auto,
    /// Fill the path, back off on queueing delay, do not mind random loss: for links that are ours.
    Dedicated,
    /// Fill the path while alone, and take one TCP connection's share beside others.
    Shared,
    /// Take what others leave.
    Background,
    /// RFC 9438, as quinn has it: fair to others, slow on lossy long links.
    Cubic,
    /// quinn's BBR version 1; experimental there.
    Bbr,
}

impl Congestion {
    /// How our own controller treats others.
    pub(crate) fn mode(self) -> Mode {
        match self {
            Self::Shared => Mode::Shared,
            Self::Background => Mode::Background,
            Self::Auto | Self::Dedicated | Self::Cubic | Self::Bbr => Mode::Dedicated,
        }
    }
}

/// What is configured about a link. All times and sizes are per connection unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    /// Most that the whole link may carry, in bit/s, IP headers included. `None`: what it finds.
    pub rate: Option<u64>,
    /// Lower caps by the local time of day.
    pub caps: CapSchedule,
    /// Round-trip time without queues: a first guess.
    pub rtt: Option<Duration>,
    /// Connections that share the rate, at least 1; each gets its part.
    pub connections: u32,
    /// It leads to another site: where no rate is configured, buffers are sized for a long path.
    pub far: bool,
    /// Largest UDP payload to probe for: [`MTU_WAN`], [`MTU_NEAR`], or [`MTU_JUMBO`] on a LAN that is said to have jumbo frames.
    pub mtu_max: u16,
    /// A path that carries less is not as it should be.
    pub mtu_due: u16,
    /// Congestion control.
    pub congestion: Congestion,
    /// Wanted size of the UDP socket's buffers, in bytes; the kernel may grant less.
    pub socket_buffer: usize,
    /// A link is dead when nothing was heard for this long.
    pub idle: Duration,
    /// A quiet link is kept open with a packet this often.
    pub keep_alive: Duration,
    /// A handshake must be complete within this time.
    pub handshake: Duration,
    /// One-way streams that the peer may have open at once.
    pub uni_streams: u32,
    /// Two-way streams that the peer may have open at once.
    pub bi_streams: u32,
    /// Let the network card cut packets (GSO). Switch off for drivers that cannot.
    pub segmentation_offload: bool,
    /// Packets that may arrive out of order before one counts as lost; more than 3 only for links that reorder.
    pub packet_threshold: u32,
    /// Links that a listener holds at once.
    pub links_max: usize,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            rate: None,
            caps: CapSchedule::default(),
            rtt: None,
            connections: 1,
            far: false,
            mtu_max: MTU_WAN,
            mtu_due: MTU_WAN,
            congestion: Congestion::Auto,
            socket_buffer: 8 << 20,
            idle: Duration::from_secs(30),
            keep_alive: Duration::from_secs(5),
            handshake: Duration::from_secs(10),
            uni_streams: 256,
            bi_streams: 64,
            segmentation_offload: true,
            packet_threshold: 3,
            links_max: 1024,
        }
    }
}

impl LinkSettings {
    /// For a hop within a site: no rate, large window.
    pub fn lan() -> Self {
        Self::default()
    }

    /// For a WAN link of `rate` bit/s and `rtt`, over `connections` connections.
    pub fn wan(rate: u64, rtt: Duration, connections: u32) -> Self {
        Self {
            rate: Some(rate),
            rtt: Some(rtt),
            connections: connections.max(1),
            ..Self::default()
        }
    }
}

/// What quinn is told. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// This connection's part of the configured rate, in bytes/s of QUIC packets (without IP and UDP headers).
    pub rate: Option<u64>,
    /// Rate times round-trip time, for this connection; 0 where no rate is known.
    pub bandwidth_delay: u64,
    /// What one stream may have in flight or unread.
    pub stream_window: u64,
    /// What all streams together may have in flight or unread: what the peer can make us hold.
    pub connection_window: u64,
    /// What we hold until the peer has it.
    pub send_window: u64,
    /// The congestion window of the first round trip.
    pub initial_window: u64,
    /// The round-trip time assumed until one is measured.
    pub initial_rtt: Duration,
    /// The UDP payload to start with: every path of QUIC carries it.
    pub mtu_initial: u16,
    /// The largest to probe for.
    pub mtu_max: u16,
    /// Whether the network card cuts packets. quinn hands over ten at a time, and the kernel takes 65,507 bytes at most: larger
    /// ones would silently be lost.
    pub segmentation_offload: bool,
    /// The controller, `Auto` resolved.
    pub congestion: Congestion,
}

impl Tuning {
    /// Bytes that may be written ahead on a connection, while only data of this `priority` (0 to 3) waits or lower ones: words and what
    /// goes before find room in the peer's window then. Holds where the peer's end is configured as ours.
    pub fn ahead(&self, priority: u8) -> u64 {
        self.connection_window / 8 * u64::from(4 + priority.min(3))
    }
}

/// From settings to windows; pure.
pub fn tune(settings: &LinkSettings) -> Tuning {
    let mtu_max = settings.mtu_max.clamp(1200, 65_000);
    let rate = cap(settings).map(|rate| (rate / u64::from(settings.connections.max(1))).max(1000));
    let rtt = settings
        .rtt
        .unwrap_or(RTT_ASSUMED)
        .clamp(Duration::from_micros(100), Duration::from_secs(5));
    let bandwidth_delay = rate.map_or(0, |rate| bytes_in(rate, rtt));
    let (connection_window, send_window) = match rate {
        None if settings.far => (FAR_WINDOW, FAR_WINDOW),
        None => (LAN_RECEIVE_WINDOW, LAN_SEND_WINDOW),
        // A full queue doubles the round-trip time, and two streams are for a reader that is scheduled late. Twice as much as that, for
        // quinn counts what is written, and bulk that is written ahead must leave room: see `ahead`.
        Some(_) => {
            let window = bandwidth_delay.saturating_mul(4);
            let window = window.saturating_add(4 * STREAM_WINDOW).min(WINDOW_MAX);
            (window, window)
        }
    };
    let congestion = match (settings.congestion, rate) {
        (Congestion::Auto, None) if rtt_of(settings) < WAN_RTT => Congestion::Cubic,
        (Congestion::Auto, _) => Congestion::Dedicated,
        (chosen, _) => chosen,
    };
    Tuning {
        rate,
        bandwidth_delay,
        stream_window: STREAM_WINDOW,
        connection_window,
        send_window,
        initial_window: starting_window(settings) / u64::from(settings.connections.max(1)),
        // Twice the configured time: a first packet must not count as lost because of a queue. A LAN without a word on
        // its delay is given 20 ms.
        initial_rtt: settings
            .rtt
            .or_else(|| settings.rate.map(|_| RTT_ASSUMED))
            .map_or(Duration::from_millis(20), |_| 2 * rtt),
        mtu_initial: 1200,
        mtu_max,
        segmentation_offload: settings.segmentation_offload && mtu_max <= MTU_NEAR,
        congestion,
    }
}

fn rtt_of(settings: &LinkSettings) -> Duration {
    settings.rtt.unwrap_or_default()
}

/// The configured rate of the whole link, in bytes/s of QUIC packets.
pub(crate) fn cap(settings: &LinkSettings) -> Option<u64> {
    settings
        .rate
        .map(|bits| payload_rate(bits, settings.mtu_max.clamp(1200, 65_000)))
}

/// From bit/s with IP and UDP headers to bytes/s of QUIC packets of `mtu` bytes; at least 1000.
pub(crate) fn payload_rate(bits_per_second: u64, mtu: u16) -> u64 {
    let packet = u128::from(mtu.max(1));
    let bytes = u128::from(bits_per_second / 8) * packet / (packet + u128::from(PACKET_OVERHEAD));
    u64::try_from(bytes).unwrap_or(u64::MAX).max(1000)
}

/// What all connections of a link send in the first round trip. Where rate and delay are configured, half of what the path would
/// hold if both were true; the rest is found as without them, doubling per round trip.
pub(crate) fn starting_window(settings: &LinkSettings) -> u64 {
    let connections = u64::from(settings.connections.max(1));
    let known = cap(settings).zip(settings.rtt);
    let hint = known.map_or(0, |(rate, rtt)| {
        bytes_in(rate, rtt.min(Duration::from_secs(5))) / 2
    });
    let least = connections.saturating_mul(STARTING_WINDOW);
    hint.max(least).min(WINDOW_MAX.saturating_mul(connections))
}

/// Bytes that pass at `rate` bytes/s within `time`, saturating.
pub(crate) fn bytes_in(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}
