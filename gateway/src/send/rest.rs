//! When what a dead connection carried is sent again.
//!
//! Owns the wait for a sign that the peer outlived the connection, as a pure function of what the others hear. Leaves the payloads to
//! `outbox` and the dialling to `transmit`. Promises that a peer which died with all its connections is not sent in vain what each of
//! them carried.

use std::collections::BTreeMap;
use std::time::Duration;

use super::outbox::ConnectionId;

/// So long payloads rest at least: what the peer sent before it died, if it did, has arrived by then.
const REST: Duration = Duration::from_millis(250);
/// And no longer than this: then they wait in the outbox for whoever comes.
const REST_MAX: Duration = Duration::from_secs(5);

/// Packets received, by connection.
pub(super) type Heard = BTreeMap<ConnectionId, u64>;

/// The wait that follows one connection's death. Where the peer itself died, the connections beside it are dead as well and only do not
/// know it yet: what they would carry again would be sent in vain, and so would what a new connection carried to the peer's next life.
/// The job's attempt ends meanwhile instead.
pub(super) struct Rest {
    /// Who was there when it died, with what had been heard once the peer's last words must have arrived.
    beside: Heard,
    settled: bool,
    /// Since when none of them is left.
    gone: Option<Duration>,
}

impl Rest {
    /// Begins with the death; the connections that are there beside it.
    pub(super) fn begin(beside: Heard) -> Self {
        Self {
            beside,
            settled: false,
            gone: None,
        }
    }

    /// Whether it is over, `since` the death.
    pub(super) fn is_over(&mut self, since: Duration, heard: &Heard) -> bool {
        if since < REST {
            return false;
        }
        // Connections made meanwhile say nothing: they may belong to the peer's next life.
        self.beside.retain(|id, _| heard.contains_key(id));
        let mut old = heard
            .iter()
            .filter_map(|(id, now)| Some((self.beside.get(id)?, now)));
        let alive = self.settled && old.any(|(known, now)| now > known);
        if !self.settled {
            self.settled = true;
            self.beside.iter_mut().for_each(|(id, known)| *known = heard[id]);
        }
        // The attempts that they carried end by then; what goes on without them has waited long enough.
        let none_left = self.beside.is_empty() && since - *self.gone.get_or_insert(since) >= REST;
        alive || none_left || since >= REST + REST_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long payloads rest, in milliseconds, where the connections hear as `at` says by milliseconds since the death.
    fn rested(at: impl Fn(u64) -> Vec<(u64, u64)>) -> u64 {
        let heard = |ms| -> Heard { at(ms).into_iter().map(|(id, n)| (ConnectionId(id), n)).collect() };
        let mut rest = Rest::begin(heard(0));
        let mut looks = (0..).step_by(10);
        looks
            .find(|ms| rest.is_over(Duration::from_millis(*ms), &heard(*ms)))
            .unwrap()
    }

    #[test]
    fn a_living_connection_beside_it_takes_over_soon() {
        assert_eq!(rested(|ms| vec![(1, 10), (2, 10 + u64::from(ms > 300))]), 310);
    }

    #[test]
    fn last_words_are_no_sign_of_life() {
        assert_eq!(rested(|ms| vec![(1, 10 + ms.min(200))]), 5250);
    }

    #[test]
    fn a_new_connection_is_no_sign_that_the_peer_lived_on() {
        // The peer's next life answers after 100 ms; the others learn of the death one after the other.
        let waited = rested(|ms| {
            let old = [(1, 600), (2, 900)].into_iter().filter(|(_, dies)| ms < *dies);
            let new = (ms > 100).then_some((3, ms));
            old.map(|(id, _)| (id, 10)).chain(new).collect()
        });
        assert_eq!(waited, 1150);
    }

    #[test]
    fn silence_ends_some_time() {
        assert_eq!(rested(|_| vec![(1, 10)]), 5250);
        assert_eq!(rested(|_| Vec::new()), 500);
    }
}
