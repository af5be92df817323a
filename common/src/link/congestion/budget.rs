//! What the connections to one peer may have in flight together, and each one's part of it. Pure: time is an argument.
//!
//! Owns the members (one per path of a connection), their base delays, who is active, and the cap. The window itself comes
//! from `control`. Promises: the parts of active members add up to the window (but for a floor of two packets each); a member that
//! is silent, or has nothing to send, gives its part to the others within half a second or four round trips; members that have
//! something again at the same moment do not each take all; a member that went away is forgotten.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::control::Control;
use super::epoch::{Acks, ControlConfig, Mode, Verdict};

/// A member is active for so long after it last used its part.
const ACTIVE: Duration = Duration::from_millis(500);

/// The longest that a peer waits before it acknowledges fewer than ten packets (5 ms, and its timer's grain), in seconds.
const ACK_WAIT: f64 = 0.006;

/// Names a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(u64);

#[derive(Clone, Debug, Default)]
struct Member {
    /// Least delay, in seconds.
    base: Option<f64>,
    /// Least delay since a dip began.
    heard: Option<f64>,
    /// When it last used its part.
    used: Option<Instant>,
    in_flight: u64,
    /// Since when an acknowledgement of it is awaited.
    waits: Option<Instant>,
}

impl Member {
    fn patience(&self) -> Duration {
        ACTIVE.max(Duration::from_secs_f64(4.0 * self.base.unwrap_or(0.0).min(10.0)))
    }

    fn is_recent(&self, now: Instant, at: Option<Instant>) -> bool {
        at.is_some_and(|at| now.saturating_duration_since(at) <= self.patience())
    }
}

/// What a member needs to know of the others to tell its part.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// What all may have in flight together, in bytes.
    pub window: u64,
    /// How many lately used their part, at least 1; and how many there are.
    pub active: usize,
    pub members: usize,
    /// What all have in flight, in bytes, without those that are not heard any more. 0 in the mode that shares the path: a newcomer
    /// that begins so gently is pushed aside by those that are there: beside Cubic a tenth of the path is left instead of a third (simulated).
    pub in_flight: u64,
}

impl Share {
    /// What a member may have in flight that has `own` bytes there. One that has had nothing to send for a while counts for nobody, but all may
    /// find something at once, so that beyond its part of all a member takes only what the others leave.
    pub fn part(&self, own: u64, packet: u64) -> u64 {
        let among = |members: usize| self.window / members.max(1) as u64;
        let others = self.in_flight.saturating_sub(own);
        let left = self.window.saturating_sub(others);
        let part = among(self.active).min(left).max(among(self.members));
        // quinn sends while less than the window would be in flight: two packets at least.
        part.max(2 * packet + packet / 2)
    }
}

/// What one acknowledgement showed to one member.
#[derive(Clone, Copy, Debug)]
pub struct MemberAcks {
    /// When the newest packet in it was sent.
    pub newest_sent: Instant,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Bytes that were in flight when it came, with these.
    pub in_flight: u64,
    /// Sum over packets of bytes times the seconds they were in flight.
    pub byte_seconds: f64,
    /// Whether the window was what kept the member from sending more.
    pub limited: bool,
}

/// The budget of one peer.
#[derive(Clone, Debug)]
pub struct Budget {
    control: Control,
    members: BTreeMap<MemberId, Member>,
    next: u64,
    packet: u64,
}

impl Budget {
    /// Without members.
    pub fn new(config: ControlConfig, now: Instant) -> Self {
        Self {
            packet: config.packet,
            control: Control::new(config, now),
            members: BTreeMap::new(),
            next: 0,
        }
    }

    /// A new connection, or a new path of one.
    pub fn join(&mut self, now: Instant) -> MemberId {
        let id = MemberId(self.next);
        self.next += 1;
        // It counts from the start: several that begin together must not each take all.
        let member = Member {
            used: Some(now),
            ..Member::default()
        };
        self.members.insert(id, member);
        id
    }

    /// A connection is gone.
    pub fn leave(&mut self, id: MemberId) {
        self.members.remove(&id);
    }

    /// At most so many bytes/s, all members together.
    pub fn set_cap(&mut self, bytes_per_second: Option<u64>) {
        self.control.set_cap(bytes_per_second);
    }

    /// A full packet's size changed.
    pub fn set_packet(&mut self, bytes: u64) {
        self.packet = bytes;
        self.control.set_packet(bytes);
    }

    /// The window's state, for figures.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// One acknowledgement came.
    pub fn on_acks(&mut self, now: Instant, id: MemberId, acks: &MemberAcks) {
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        let delay = now
            .saturating_duration_since(acks.newest_sent)
            .as_secs_f64()
            .max(1e-6);
        let base = member.base.map_or(delay, |base| base.min(delay));
        member.base = Some(base);
        member.heard = Some(member.heard.map_or(delay, |heard| heard.min(delay)));
        if acks.limited {
            member.used = Some(now);
        }
        member.in_flight = acks.in_flight.saturating_sub(acks.bytes);
        member.waits = (member.in_flight > 0).then_some(now);
        // With so few packets under way the peer must wait for its timer.
        let waited = if acks.in_flight < 12 * self.packet {
            ACK_WAIT
        } else {
            0.0
        };
        let verdict = self.control.on_acks(
            now,
            &Acks {
                sent: acks.newest_sent,
                queue: (delay - base - waited).max(0.0),
                base,
                bytes: acks.bytes,
                byte_seconds: acks.byte_seconds,
                limited: acks.limited,
            },
        );
        self.obey(verdict);
    }

    /// A member has so many bytes in flight now.
    pub fn on_sent(&mut self, now: Instant, id: MemberId, in_flight: u64) {
        if let Some(member) = self.members.get_mut(&id) {
            member.in_flight = in_flight;
            member.waits.get_or_insert(now);
        }
    }

    fn obey(&mut self, verdict: Verdict) {
        for member in self.members.values_mut() {
            match verdict {
                Verdict::Stay => return,
                Verdict::Listen => member.heard = None,
                Verdict::Rebase => member.base = member.heard.or(member.base),
            }
        }
    }

    /// `bytes` of a member, sent at `sent` or before, were declared lost.
    pub fn on_lost(&mut self, now: Instant, sent: Instant, bytes: u64, persistent: bool) {
        self.control.on_lost(now, sent, bytes, persistent);
    }

    /// How the window is shared at `now`.
    pub fn share(&self, now: Instant) -> Share {
        let members = || self.members.values();
        let heard = members().filter(|member| member.is_recent(now, member.waits));
        Share {
            window: self.window(),
            active: members()
                .filter(|member| member.is_recent(now, member.used))
                .count()
                .max(1),
            members: self.members.len(),
            in_flight: match self.control.mode() {
                Mode::Shared => 0,
                Mode::Dedicated | Mode::Background => heard.map(|member| member.in_flight).sum(),
            },
        }
    }

    /// What all members may have in flight together.
    pub fn window(&self) -> u64 {
        self.control.window()
    }

    /// A full packet's size.
    pub fn packet(&self) -> u64 {
        self.packet
    }
}
