//! When to knock at a peer that is not heard.
//!
//! Owns the decision, from two counters that somebody looks at every [`KNOCK_EVERY`]. Pure. After a cut of n seconds QUIC's own probes
//! come up to n seconds apart, so that a path which is whole again would stay unused for as long: a small write keeps them coming. The
//! congestion controller leaves room for it (`congestion::plug`). Promises that a link on which nothing is outstanding stays quiet.

use std::time::Duration;

/// How long nothing is heard before the first knock, and between two.
pub const KNOCK_EVERY: Duration = Duration::from_millis(400);

/// What was seen of a link at the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Silence {
    sent: u64,
    received: u64,
    /// Something was sent since anything was heard.
    waiting: bool,
}

impl Silence {
    /// Whether to knock now, from the packets sent and received since the link began.
    pub fn look(&mut self, sent: u64, received: u64) -> bool {
        if received != self.received {
            *self = Self {
                sent,
                received,
                waiting: false,
            };
            return false;
        }
        // The acknowledgement of what was heard last is among those that were counted at that look.
        self.waiting |= sent != self.sent;
        self.sent = sent;
        self.waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knocks_only_while_an_answer_is_awaited() {
        let mut silence = Silence::default();
        assert!(!silence.look(20, 30), "it is heard");
        assert!(!silence.look(20, 30), "nothing is outstanding");
        assert!(silence.look(25, 30), "something was sent, and nothing is heard");
        assert!(silence.look(25, 30), "QUIC's own probes are far apart by now");
        assert!(!silence.look(26, 31), "it is heard again");
        assert!(!silence.look(26, 31));
        assert!(!silence.look(40, 60), "a busy link is not silent");
    }
}
