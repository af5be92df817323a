//! The budget behind quinn's `Controller` trait.
//!
//! Owns the sharing between threads and the clock's edge: a lock per acknowledgement, atomics for the window that quinn asks for with
//! each packet, and the cap that changes with the time of day. Leaves all decisions to `budget`. quinn clones a controller when a
//! peer's address changes: the clone is a member of its own, and the old path falls silent.

use std::any::Any;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory};

use super::budget::{Budget, MemberAcks, MemberId, Share};
use super::cap::CapSchedule;
use super::epoch::ControlConfig;
use crate::link::knock::KNOCK_EVERY;
use crate::link::tuning::{LinkSettings, payload_rate, starting_window};

/// Bytes that a burst of offloaded packets may leave of a full window, in packets.
const BURST: u64 = 12;
/// Packets that may go beyond the window for each [`KNOCK_EVERY`] of silence: a knock, and the probes that QUIC sends beside it and
/// counts.
const KNOCK: u64 = 4;
/// Others hear of what a member sends after so many packets.
const TOLD_EVERY: u64 = 8;
/// No more than so often.
const KNOCKS_MAX: u64 = 25;
/// How often the time of day is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A [`Budget`] that the connections to one peer share.
#[derive(Clone)]
pub struct SharedBudget(Arc<Shared>);

struct Shared {
    timed: Mutex<Timed>,
    window: AtomicU64,
    active: AtomicUsize,
    members: AtomicUsize,
    in_flight: AtomicU64,
}

impl Shared {
    /// Each as it was published last; that they may be of different moments does no harm.
    fn share(&self) -> Share {
        Share {
            window: self.window.load(Ordering::Relaxed),
            active: self.active.load(Ordering::Relaxed),
            members: self.members.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
        }
    }
}

/// A [`SharedBudget`] that does not keep it alive.
pub(crate) struct WeakBudget(Weak<Shared>);

impl WeakBudget {
    pub(crate) fn upgrade(&self) -> Option<SharedBudget> {
        self.0.upgrade().map(SharedBudget)
    }
}

/// A budget, and the caps that hold at some times of the day.
struct Timed {
    budget: Budget,
    caps: CapSchedule,
    /// In bit/s with IP headers, of the configuration or of [`SharedBudget::set_cap`].
    rate: Option<u64>,
    /// This budget's part of caps.
    parts: u64,
    mtu: u16,
    look_at: Instant,
}

impl Timed {
    /// Looks at the clock on the wall once per second, where that matters.
    fn look(&mut self, now: Instant) {
        if !self.caps.windows.is_empty() && now >= self.look_at {
            self.look_at = now + LOOK_EVERY;
            self.apply();
        }
    }

    fn apply(&mut self) {
        let rate = match self.caps.windows.is_empty() {
            true => self.rate,
            false => self.caps.at(jiff::Zoned::now().time(), self.rate),
        };
        let cap = rate.map(|bits| payload_rate(bits, self.mtu) / self.parts);
        self.budget.set_cap(cap);
    }
}

impl std::fmt::Debug for SharedBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "a budget of {} bytes in flight",
            self.0.window.load(Ordering::Relaxed)
        )
    }
}

impl SharedBudget {
    /// For all connections of a link.
    pub(crate) fn of_link(settings: &LinkSettings) -> Self {
        Self::new(settings, 1)
    }

    /// For one of a link's connections that shares with no other.
    pub(crate) fn of_connection(settings: &LinkSettings) -> Self {
        Self::new(settings, u64::from(settings.connections.max(1)))
    }

    fn new(settings: &LinkSettings, parts: u64) -> Self {
        let config = ControlConfig {
            mode: settings.congestion.mode(),
            initial_window: starting_window(settings) / parts,
            packet: 1200,
        };
        let now = Instant::now();
        let mut timed = Timed {
            budget: Budget::new(config, now),
            caps: settings.caps.clone(),
            rate: settings.rate,
            parts,
            mtu: settings.mtu_max.clamp(1200, 65_000),
            look_at: now,
        };
        timed.apply();
        Self(Arc::new(Shared {
            window: AtomicU64::new(timed.budget.window()),
            timed: Mutex::new(timed),
            active: AtomicUsize::new(1),
            members: AtomicUsize::new(1),
            in_flight: AtomicU64::new(0),
        }))
    }

    pub(crate) fn downgrade(&self) -> WeakBudget {
        WeakBudget(Arc::downgrade(&self.0))
    }

    fn lock(&self) -> MutexGuard<'_, Timed> {
        self.0.timed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, budget: &Budget, now: Instant) {
        let share = budget.share(now);
        self.0.window.store(share.window, Ordering::Relaxed);
        self.0.active.store(share.active, Ordering::Relaxed);
        self.0.members.store(share.members, Ordering::Relaxed);
        self.0.in_flight.store(share.in_flight, Ordering::Relaxed);
    }

    /// Caps the rate from now on: bit/s with IP headers, at packets of `mtu` bytes.
    pub(crate) fn set_cap(&self, bits_per_second: u64, mtu: u16) {
        let mut timed = self.lock();
        (timed.rate, timed.mtu) = (Some(bits_per_second), mtu);
        timed.apply();
    }
}

/// Makes members of a budget for quinn.
pub(crate) struct MemberFactory(pub(crate) SharedBudget);

impl ControllerFactory for MemberFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Plugged::join(self.0.clone(), current_mtu, now))
    }
}

/// A member of a budget behind quinn's trait.
struct Plugged {
    shared: SharedBudget,
    id: MemberId,
    mtu: u16,
    /// Bytes in flight, and those of them that the others have not heard of.
    in_flight: u64,
    untold: u64,
    acked: u64,
    byte_seconds: f64,
    newest_sent: Option<Instant>,
    /// Since when an acknowledgement is awaited.
    silent_since: Option<Instant>,
    /// The most that was in flight within this member's part since it was heard last.
    granted: u64,
    rtt: Duration,
}

impl Plugged {
    fn join(shared: SharedBudget, mtu: u16, now: Instant) -> Self {
        let mut timed = shared.lock();
        let id = timed.budget.join(now);
        shared.publish(&timed.budget, now);
        drop(timed);
        Self {
            shared,
            id,
            mtu,
            in_flight: 0,
            untold: 0,
            acked: 0,
            byte_seconds: 0.0,
            newest_sent: None,
            silent_since: None,
            granted: 0,
            rtt: Duration::ZERO,
        }
    }

    /// This member's part of what all may have in flight.
    fn part(&self) -> u64 {
        let share = self.shared.0.share();
        share.part(self.in_flight, u64::from(self.mtu))
    }

    /// How often a peer that is not heard may be knocked at by now.
    fn knocks(&self, now: Instant) -> u64 {
        let Some(since) = self.silent_since else {
            return 0;
        };
        let every = KNOCK_EVERY.max(2 * self.rtt);
        let times = now.saturating_duration_since(since).as_millis() / every.as_millis();
        u64::try_from(times).unwrap_or(KNOCKS_MAX).min(KNOCKS_MAX)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut timed = self.shared.lock();
        timed.budget.leave(self.id);
        self.shared.publish(&timed.budget, now);
    }
}

impl Controller for Plugged {
    fn on_sent(&mut self, now: Instant, bytes: u64, _: u64) {
        // Acknowledgements are not acknowledged, and small words fill no window.
        if bytes < u64::from(self.mtu) / 2 {
            return;
        }
        self.silent_since.get_or_insert(now);
        // quinn names the bytes of all packets that leave together, and calls for each of them.
        let packet = u64::from(self.mtu);
        self.in_flight += packet;
        if self.in_flight <= self.part() {
            self.granted = self.in_flight;
        }
        self.untold += packet;
        if self.untold >= TOLD_EVERY * packet {
            self.untold = 0;
            let mut timed = self.shared.lock();
            timed.budget.on_sent(now, self.id, self.in_flight);
            self.shared.publish(&timed.budget, now);
        }
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, rtt: &RttEstimator) {
        self.rtt = rtt.get();
        let delay = now.saturating_duration_since(sent).min(Duration::from_secs(3600));
        self.acked = self.acked.saturating_add(bytes);
        self.byte_seconds += bytes as f64 * delay.as_secs_f64();
        self.newest_sent = Some(self.newest_sent.map_or(sent, |newest| newest.max(sent)));
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        self.silent_since = (in_flight > 0).then_some(now);
        (self.in_flight, self.granted, self.untold) = (in_flight, in_flight, 0);
        let Some(newest_sent) = self.newest_sent.take() else {
            return;
        };
        let before = in_flight.saturating_add(self.acked);
        let limited = !app_limited && before + BURST * u64::from(self.mtu) >= self.window() / 4 * 3;
        let acks = MemberAcks {
            newest_sent,
            bytes: std::mem::take(&mut self.acked),
            in_flight: before,
            byte_seconds: std::mem::take(&mut self.byte_seconds),
            limited,
        };
        let mut timed = self.shared.lock();
        timed.look(now);
        timed.budget.on_acks(now, self.id, &acks);
        self.shared.publish(&timed.budget, now);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(lost_bytes);
        self.granted = self.granted.min(self.in_flight);
        let mut timed = self.shared.lock();
        timed.budget.on_lost(now, sent, lost_bytes, persistent);
        self.shared.publish(&timed.budget, now);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        self.shared.lock().budget.set_packet(u64::from(new_mtu));
    }

    fn window(&self) -> u64 {
        // With all of it in flight nothing but QUIC's own, ever rarer probes would go out at a peer that is not heard. What is in flight
        // may be more than the part by then, for others have taken theirs of it.
        match self.knocks(Instant::now()) {
            0 => self.part(),
            knocks => self.part().max(self.granted) + KNOCK * u64::from(self.mtu) * knocks,
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self::join(self.shared.clone(), self.mtu, Instant::now()))
    }

    fn initial_window(&self) -> u64 {
        self.window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: u64 = 1200;

    /// Sends as quinn does: while less than the window would be in flight.
    fn fill(member: &mut Plugged, at: Instant) {
        while member.in_flight + PACKET < member.window() {
            member.on_sent(at, PACKET, 0);
        }
    }

    #[test]
    fn a_member_with_more_in_flight_than_its_part_can_knock() {
        let settings = LinkSettings {
            rate: Some(100_000_000),
            rtt: Some(Duration::from_millis(80)),
            ..LinkSettings::default()
        };
        let shared = SharedBudget::of_link(&settings);
        let cut = Instant::now();
        let long_ago = cut.checked_sub(Duration::from_secs(10)).unwrap_or(cut);
        // One had the path for itself, and the others find their least parts of it: more than a window, and then the path is cut.
        let mut members: Vec<_> = [cut, long_ago, long_ago, long_ago]
            .map(|used| Plugged::join(shared.clone(), PACKET as u16, used))
            .into();
        members.iter_mut().for_each(|member| fill(member, cut));
        let most = members[0].in_flight;
        assert!(
            most > 50 * PACKET && members[0].window() <= most,
            "{most} of {}",
            members[0].window()
        );
        for silent in [2_u64, 5, 9] {
            let member = &mut members[0];
            member.silent_since = Instant::now().checked_sub(Duration::from_millis(410 * silent));
            let room = member.window() - most;
            assert!(
                (KNOCK * PACKET..=KNOCK * PACKET * silent).contains(&room),
                "{room} bytes"
            );
            // A knock takes no more than its room, however large its packets are.
            fill(member, Instant::now());
            assert!(
                member.in_flight <= most + KNOCK * PACKET * silent,
                "{silent} knocks"
            );
        }
        let member = &mut members[0];
        member.on_end_acks(Instant::now(), 0, false, None);
        assert_eq!((member.granted, member.silent_since), (0, None));
    }
}
