//! Which payload goes next, on which connection, and which may be forgotten. Pure: no socket, no clock.
//!
//! Owns stage 4: lanes, turns between jobs within a lane, what a job may send at most, what is in flight on each connection. Leaves
//! transmitting to the parent module. Promises: a lane goes before every lower one, unless the jobs in it have sent all they may for the
//! moment; jobs of a lane take turns by bytes; a payload is kept until the peer accepted it and is sent again when its connection dies;
//! nothing is sent for a job that was closed.

mod cap;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use longhaul_common::ids::{Attempt, JobId, Round, Sequence};
use longhaul_common::wire::batch::BatchHeader;
use longhaul_common::wire::sequences::Sequences;
use tokio::sync::OwnedSemaphorePermit;

use self::cap::Cap;

/// Priority classes, highest first. Control messages go before all of them, on two-way streams (`common/src/link/endpoint.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// A VM is stopped and waits for it.
    Handover,
    /// A VM's RAM stream.
    Ram,
    /// A disk's rounds after the first.
    Dirty,
    /// A disk's first round.
    Bulk,
}

/// How many lanes there are.
const LANES: usize = 4;

impl Lane {
    /// In the order in which they go.
    pub const ALL: [Self; LANES] = [Self::Handover, Self::Ram, Self::Dirty, Self::Bulk];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Handover => "handover",
            Self::Ram => "ram",
            Self::Dirty => "dirty",
            Self::Bulk => "bulk",
        }
    }

    /// The lane that a batch belongs to.
    pub fn of(header: &BatchHeader) -> Self {
        match (header.urgent, &header.ram, header.round) {
            (true, ..) => Self::Handover,
            (false, Some(_), _) => Self::Ram,
            (false, None, Round(0)) => Self::Bulk,
            (false, None, _) => Self::Dirty,
        }
    }

    /// As [`longhaul_common::link::Link::open_uni`] wants it: higher goes first.
    pub fn priority(self) -> u8 {
        (LANES - 1) as u8 - self as u8
    }
}

/// One of the connections to the peer, for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// A job's attempt, as far as sending is concerned.
pub type Flow = (JobId, Attempt);

/// One stream's worth: header, encoding and payload, ready to be written.
#[derive(Clone, Debug)]
pub struct Ready {
    pub flow: Flow,
    pub sequence: Sequence,
    pub lane: Lane,
    /// Raw data it stands for, in bytes.
    pub raw: u64,
    /// Bytes to be written, in order.
    pub parts: [Bytes; 2],
    /// Memory that is given back when the last copy of this is dropped.
    pub hold: Option<Arc<OwnedSemaphorePermit>>,
    /// It was on a connection that died: taking it counts as sending it again.
    pub again: bool,
}

impl Ready {
    /// Bytes on the stream.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }

    /// Whether there is nothing to write; never true of a real payload.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[derive(Default)]
struct FlowQueue {
    waiting: VecDeque<Ready>,
    /// Bytes taken so far, beyond what flows that are not waiting were given: the flow with the least goes next.
    taken: u64,
}

/// How much may be in flight on a connection, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Of a lane and those before it.
    pub window: u64,
    /// Of all lanes, where the next is of this one: what is written, and is not taken by the peer yet, leaves room in its receive window for
    /// what goes before it. By lane.
    pub ahead: [u64; LANES],
}

/// What waits and what is in flight to one peer.
#[derive(Default)]
pub struct Outbox {
    lanes: BTreeMap<Lane, BTreeMap<Flow, FlowQueue>>,
    in_flight: HashMap<(Flow, Sequence), (ConnectionId, Ready)>,
    /// Bytes in flight by lane.
    on_connection: HashMap<ConnectionId, [u64; LANES]>,
    again: HashMap<Flow, SentAgain>,
    /// Of flows that may not send all they could.
    caps: HashMap<Flow, Cap>,
}

/// What had to be sent a second time because its connection died, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentAgain {
    pub raw: u64,
    pub wan: u64,
}

impl Outbox {
    /// Takes a payload in.
    pub fn push(&mut self, ready: Ready) {
        let lane = self.lanes.entry(ready.lane).or_default();
        // A flow that was idle starts level with the others, instead of making up for its silence.
        let level = lane
            .values()
            .filter(|flow| !flow.waiting.is_empty())
            .map(|flow| flow.taken)
            .min();
        let flow = lane.entry(ready.flow).or_default();
        if flow.waiting.is_empty() {
            flow.taken = flow.taken.max(level.unwrap_or(0));
        }
        flow.waiting.push_back(ready);
    }

    /// Whether anything waits.
    pub fn has_waiting(&self) -> bool {
        self.lanes
            .values()
            .flat_map(BTreeMap::values)
            .any(|flow| !flow.waiting.is_empty())
    }

    /// Has a flow send no more than so many bytes per second of payload from now on. What a VM waits for that stands is not held up by it.
    pub fn set_cap(&mut self, flow: Flow, bytes_per_second: u64, now: Instant) {
        self.caps.insert(flow, Cap::new(bytes_per_second, now));
    }

    /// The payload to send next on `connection`, unless there is no `room`; one payload may always be in flight. Lower lanes
    /// do not fill the window of higher ones: what they have in flight gives way on the connection itself.
    pub fn take(&mut self, connection: ConnectionId, room: &Room, now: Instant) -> Option<Ready> {
        let on_connection = self.on_connection.entry(connection).or_default();
        let caps = &self.caps;
        let may_go = |lane: Lane, of: &Flow, flow: &FlowQueue| {
            let is_free = lane == Lane::Handover || caps.get(of).is_none_or(|cap| cap.allows(now));
            !flow.waiting.is_empty() && is_free
        };
        let mut lanes = self.lanes.iter_mut();
        let (lane, flows) =
            lanes.find(|(lane, flows)| flows.iter().any(|(of, flow)| may_go(**lane, of, flow)))?;
        let ahead: u64 = on_connection[..=*lane as usize].iter().sum();
        let all: u64 = on_connection.iter().sum();
        if ahead > 0 && (ahead >= room.window || all >= room.ahead[*lane as usize]) {
            return None;
        }
        let (_, flow) = flows
            .iter_mut()
            .filter(|(of, flow)| may_go(*lane, of, flow))
            .min_by_key(|(_, flow)| flow.taken)?;
        let ready = flow.waiting.pop_front()?;
        flow.taken += ready.len();
        if let Some(cap) = self.caps.get_mut(&ready.flow) {
            cap.sent(ready.len(), now);
        }
        if ready.again {
            let counted = self.again.entry(ready.flow).or_default();
            counted.raw += ready.raw;
            counted.wan += ready.len();
        }
        on_connection[ready.lane as usize] += ready.len();
        self.in_flight
            .insert((ready.flow, ready.sequence), (connection, ready.clone()));
        Some(ready)
    }

    /// The peer has restored this one: it is forgotten. `None` where it was not in flight.
    pub fn accepted(&mut self, flow: Flow, sequence: Sequence) -> Option<Ready> {
        let (connection, ready) = self.in_flight.remove(&(flow, sequence))?;
        self.release(connection, ready.lane, ready.len());
        Some(ready)
    }

    /// As [`Self::accepted`], for each of `sequences` that is in flight.
    pub fn accepted_all(&mut self, flow: Flow, sequences: &Sequences) {
        // Other flows' numbers do no harm: they are not found under this one.
        for sequence in sequences.among(self.in_flight.keys().map(|(_, sequence)| *sequence)) {
            self.accepted(flow, sequence);
        }
    }

    fn release(&mut self, connection: ConnectionId, lane: Lane, bytes: u64) {
        if let Some(on_connection) = self.on_connection.get_mut(&connection) {
            let in_lane = &mut on_connection[lane as usize];
            *in_lane = in_lane.saturating_sub(bytes);
        }
    }

    /// The connection is gone: what was in flight on it goes to the front again. Gives the bytes that will be sent twice.
    pub fn connection_lost(&mut self, connection: ConnectionId) -> u64 {
        self.on_connection.remove(&connection);
        let lost: Vec<_> = self
            .in_flight
            .iter()
            .filter(|(_, (on, _))| *on == connection)
            .map(|(key, _)| *key)
            .collect();
        let mut again: Vec<_> = lost
            .iter()
            .filter_map(|key| self.in_flight.remove(key))
            .map(|(_, r)| r)
            .collect();
        again.sort_by_key(|ready| std::cmp::Reverse(ready.sequence));
        let bytes = again.iter().map(Ready::len).sum();
        for mut ready in again {
            ready.again = true;
            let lane = self.lanes.entry(ready.lane).or_default();
            lane.entry(ready.flow).or_default().waiting.push_front(ready);
        }
        bytes
    }

    /// Forgets everything of a flow: its attempt has ended. Gives what never was on any connection.
    pub fn close(&mut self, flow: Flow) -> Vec<Sequence> {
        let queues: Vec<_> = self
            .lanes
            .values_mut()
            .filter_map(|lane| lane.remove(&flow))
            .collect();
        let waiting = queues.iter().flat_map(|queue| &queue.waiting);
        let unsent = waiting
            .filter(|ready| !ready.again)
            .map(|ready| ready.sequence)
            .collect();
        self.again.remove(&flow);
        self.caps.remove(&flow);
        let gone: Vec<_> = self
            .in_flight
            .keys()
            .filter(|(of, _)| *of == flow)
            .copied()
            .collect();
        for (flow, sequence) in gone {
            self.accepted(flow, sequence);
        }
        unsent
    }

    /// What of an open flow was sent a second time.
    pub fn sent_again(&self, flow: Flow) -> SentAgain {
        self.again.get(&flow).copied().unwrap_or_default()
    }

    /// Bytes that wait for a connection.
    pub fn waiting(&self) -> u64 {
        let flows = self.lanes.values().flat_map(BTreeMap::values);
        flows.flat_map(|flow| &flow.waiting).map(Ready::len).sum()
    }

    /// Bytes of this lane and those before it that wait for a connection. Of a flow with a cap, no more than it may send soon: the rest
    /// says nothing of the link.
    pub fn waiting_up_to(&self, lane: Lane) -> u64 {
        let flows = self.lanes.range(..=lane).flat_map(|(_, flows)| flows);
        let waiting = flows.map(|(of, flow)| {
            let most = self.caps.get(of).map_or(u64::MAX, Cap::soon);
            flow.waiting.iter().map(Ready::len).sum::<u64>().min(most)
        });
        waiting.sum()
    }

    /// Whether a flow has more to send than its cap lets go; `None` where it has no cap.
    pub fn is_held(&self, flow: Flow, now: Instant) -> Option<bool> {
        let cap = self.caps.get(&flow)?;
        let has_waiting = |lane: &BTreeMap<Flow, FlowQueue>| {
            let queue = lane.get(&flow);
            queue.is_some_and(|queue| !queue.waiting.is_empty())
        };
        Some(!cap.allows(now) && self.lanes.values().any(has_waiting))
    }

    /// Bytes in flight on all connections.
    pub fn in_flight(&self) -> u64 {
        self.on_connection.values().flatten().sum()
    }
}

/// How many bytes may be in flight on a connection whose congestion window is `congestion_window`: enough that it never runs dry
/// between two acknowledgements (one window in the network, one on its way through the peer's restore), and two batches at least.
pub fn window(congestion_window: u64) -> u64 {
    congestion_window.saturating_mul(2).saturating_add(2 << 20)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ready(flow: Flow, sequence: u64, len: usize) -> Ready {
        let parts = [Bytes::from(vec![0; len]), Bytes::new()];
        Ready {
            flow,
            sequence: Sequence(sequence),
            lane: Lane::Bulk,
            raw: len as u64,
            parts,
            hold: None,
            again: false,
        }
    }

    fn room(window: u64) -> Room {
        Room {
            window,
            ahead: [u64::MAX; LANES],
        }
    }

    fn flow() -> Flow {
        (JobId::random(), Attempt(1))
    }

    #[test]
    fn bulk_leaves_room_for_what_goes_before_it() {
        let bulk = flow();
        let mut outbox = Outbox::default();
        (0..10).for_each(|n| outbox.push(ready(bulk, n, 100)));
        let room = Room {
            window: u64::MAX,
            ahead: [900, 800, 700, 500],
        };
        let next = |outbox: &mut Outbox| {
            outbox
                .take(ConnectionId(0), &room, Instant::now())
                .map(|next| next.lane)
        };
        while next(&mut outbox).is_some() {}
        assert_eq!(outbox.in_flight(), 500);
        let urgent = |n| Ready {
            lane: Lane::Handover,
            ..ready(bulk, n, 100)
        };
        (10..20).for_each(|n| outbox.push(urgent(n)));
        while next(&mut outbox) == Some(Lane::Handover) {}
        assert_eq!(outbox.in_flight(), 900);
    }

    #[test]
    fn jobs_take_turns_by_bytes() {
        let (big, small) = (flow(), flow());
        let mut outbox = Outbox::default();
        for n in 0..100 {
            outbox.push(ready(big, n, 1000));
            outbox.push(ready(small, n, 100));
        }
        let mut sent = HashMap::new();
        for _ in 0..55 {
            let next = outbox
                .take(ConnectionId(0), &room(u64::MAX), Instant::now())
                .unwrap();
            *sent.entry(next.flow).or_insert(0) += next.len();
        }
        assert!(sent[&big].abs_diff(sent[&small]) <= 1000, "{sent:?}");
    }

    #[test]
    fn a_full_window_waits_but_one_payload_always_goes() {
        let job = flow();
        let mut outbox = Outbox::default();
        outbox.push(ready(job, 0, 500));
        outbox.push(ready(job, 1, 500));
        assert!(outbox.take(ConnectionId(0), &room(10), Instant::now()).is_some());
        assert!(outbox.take(ConnectionId(0), &room(10), Instant::now()).is_none());
        assert!(
            outbox.take(ConnectionId(1), &room(10), Instant::now()).is_some(),
            "another connection has its own window"
        );
    }

    #[test]
    fn a_full_window_of_bulk_does_not_hold_up_a_handover() {
        let job = flow();
        let mut outbox = Outbox::default();
        for n in 0..4 {
            outbox.push(ready(job, n, 500));
        }
        while outbox
            .take(ConnectionId(0), &room(1000), Instant::now())
            .is_some()
        {}
        outbox.push(Ready {
            lane: Lane::Ram,
            ..ready(job, 8, 500)
        });
        outbox.push(Ready {
            lane: Lane::Handover,
            ..ready(job, 9, 500)
        });
        let mut taken = || {
            outbox
                .take(ConnectionId(0), &room(1000), Instant::now())
                .map(|next| next.sequence.0)
        };
        assert_eq!((taken(), taken(), taken()), (Some(9), Some(8), None));
        assert!(Lane::Handover.priority() > Lane::Ram.priority() && Lane::Bulk.priority() == 0);
    }

    #[test]
    fn a_job_with_a_cap_keeps_to_it_and_others_go_on() {
        let (capped, free) = (flow(), flow());
        let begin = Instant::now();
        let mut outbox = Outbox::default();
        outbox.set_cap(capped, 1_000_000, begin);
        let mut sent = HashMap::new();
        let mut number = 0;
        // Ten seconds, in steps of a millisecond: the link takes up to 4 MB/s in payloads of 1 kB.
        for ms in 0..10_000 {
            let now = begin + std::time::Duration::from_millis(ms);
            for flow in [capped, free] {
                // The free job has less to send than there is room.
                for _ in 0..if flow == capped { 4 } else { 2 } {
                    outbox.push(ready(flow, number, 1000));
                    number += 1;
                }
            }
            for _ in 0..4 {
                let Some(next) = outbox.take(ConnectionId(0), &room(u64::MAX), now) else {
                    break;
                };
                *sent.entry(next.flow).or_insert(0) += next.len();
                outbox.accepted(next.flow, next.sequence);
            }
        }
        assert!((9_900_000..10_200_000).contains(&sent[&capped]), "{sent:?}");
        assert_eq!(sent[&free], 20_000_000, "{sent:?}");
        let end = begin + std::time::Duration::from_millis(9_999);
        assert_eq!(outbox.is_held(capped, end), Some(true));
        assert_eq!(outbox.is_held(free, end), None);
        assert!(outbox.waiting() > 20_000_000 && outbox.waiting_up_to(Lane::Bulk) <= 500_000);
    }

    #[test]
    fn a_cap_holds_no_stopped_vm_up_and_no_lower_lane() {
        let (capped, other) = (flow(), flow());
        let now = Instant::now();
        let mut outbox = Outbox::default();
        outbox.set_cap(capped, 1000, now);
        let of = |lane, flow, number| Ready {
            lane,
            ..ready(flow, number, 5000)
        };
        (0..3).for_each(|n| outbox.push(of(Lane::Ram, capped, n)));
        outbox.push(of(Lane::Bulk, other, 7));
        let next = |outbox: &mut Outbox| {
            let next = outbox.take(ConnectionId(0), &room(u64::MAX), now)?;
            Some((next.lane, next.flow))
        };
        // One payload may always go; the next one is seconds away.
        assert_eq!(next(&mut outbox), Some((Lane::Ram, capped)));
        assert_eq!(next(&mut outbox), Some((Lane::Bulk, other)));
        assert_eq!(next(&mut outbox), None);
        outbox.push(of(Lane::Handover, capped, 9));
        assert_eq!(next(&mut outbox), Some((Lane::Handover, capped)));
        outbox.close(capped);
        assert_eq!(outbox.is_held(capped, now), None);
    }

    proptest! {
        /// Whatever connections die and whenever acceptance comes: each payload is accepted exactly once, or still known.
        #[test]
        fn nothing_is_lost(steps in prop::collection::vec((0u8..4, 0u64..3), 1..200)) {
            let job = flow();
            let mut outbox = Outbox::default();
            let mut pushed = 0;
            let mut on_wire: Vec<(u64, Sequence)> = Vec::new();
            let mut accepted = std::collections::BTreeSet::new();
            for (what, connection) in steps {
                match what {
                    0 => { outbox.push(ready(job, pushed, 100)); pushed += 1; }
                    1 => if let Some(next) = outbox.take(ConnectionId(connection), &room(350), Instant::now()) {
                        on_wire.push((connection, next.sequence));
                    },
                    2 => { outbox.connection_lost(ConnectionId(connection)); on_wire.retain(|(on, _)| *on != connection); }
                    _ => if let Some((_, sequence)) = on_wire.pop() {
                        prop_assert!(outbox.accepted(job, sequence).is_some());
                        prop_assert!(accepted.insert(sequence));
                    },
                }
                prop_assert_eq!(outbox.in_flight(), on_wire.len() as u64 * 100);
            }
            for _ in 0..pushed { // drain
                if let Some(next) = outbox.take(ConnectionId(9), &room(u64::MAX), Instant::now()) { on_wire.push((9, next.sequence)); }
            }
            accepted.extend(on_wire.iter().map(|(_, sequence)| *sequence));
            prop_assert_eq!(accepted.len() as u64, pushed);
            outbox.close(job);
            prop_assert!(!outbox.has_waiting() && outbox.in_flight() == 0);
        }
    }
}
