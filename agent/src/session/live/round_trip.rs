//! How long it takes to the target agent and back.
//!
//! Owns what is concluded from probes and their echoes. Pure: time is an argument. Leaves sending them to `source`. Promises that one probe
//! that was lost or waited in a queue does not make the way look longer, and that a way that became longer is known within `MEMORY`.

use std::time::{Duration, Instant};

/// The least of so long counts.
const MEMORY: Duration = Duration::from_secs(30);

/// The probes of one job.
#[derive(Debug, Default)]
pub(super) struct RoundTrip {
    /// The last probe, and when it left.
    probe: Option<(u64, Instant)>,
    /// The least since then.
    least: Option<(Duration, Instant)>,
    /// The least of as long before.
    before: Option<Duration>,
}

impl RoundTrip {
    /// A probe leaves.
    pub(super) fn sent(&mut self, number: u64, at: Instant) {
        self.probe = Some((number, at));
    }

    /// A probe has come back. One that is not the last, or comes again, tells nothing.
    pub(super) fn echo(&mut self, number: u64, at: Instant) {
        let Some((_, left)) = self.probe.take_if(|(sent, _)| *sent == number) else {
            return;
        };
        let took = at.saturating_duration_since(left);
        self.least = Some(match self.least {
            Some((least, since)) if at.saturating_duration_since(since) < MEMORY / 2 => {
                (least.min(took), since)
            }
            past => {
                self.before = past.map(|(least, _)| least);
                (took, at)
            }
        });
    }

    /// There and back without queues, once it was measured. A stopped VM's bytes go before all others, so what waits behind those does not
    /// count.
    pub(super) fn least(&self) -> Option<Duration> {
        let (least, _) = self.least?;
        Some(self.before.map_or(least, |before| before.min(least)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A probe each second that takes so many milliseconds; what is known after each.
    fn known(took: &[u64]) -> Vec<u64> {
        let (mut round_trip, begin) = (RoundTrip::default(), Instant::now());
        let mut known = Vec::new();
        for (number, took) in (0..).zip(took) {
            let left = begin + Duration::from_secs(number);
            round_trip.sent(number, left);
            round_trip.echo(number, left + Duration::from_millis(*took));
            known.extend(round_trip.least().map(|least| least.as_millis() as u64));
        }
        known
    }

    #[test]
    fn one_probe_that_was_lost_does_not_make_the_way_longer() {
        // Wherever in the row it comes, but for its beginning, when nothing else is known.
        for lost in 1..90 {
            let mut took = [300; 90];
            took[lost] = 900;
            assert_eq!(known(&took), [300; 90], "{lost}");
        }
    }

    #[test]
    fn a_way_that_became_longer_or_shorter_is_known() {
        let mut took = [80; 90];
        took[40..].fill(300);
        let told = known(&took);
        assert!(told[..40].iter().all(|told| *told == 80));
        assert!(told[72..].iter().all(|told| *told == 300), "{told:?}");
        took.reverse();
        assert_eq!(known(&took)[50], 80);
    }

    #[test]
    fn an_echo_of_another_probe_tells_nothing() {
        let (mut round_trip, begin) = (RoundTrip::default(), Instant::now());
        round_trip.sent(7, begin);
        round_trip.echo(6, begin);
        assert_eq!(round_trip.least(), None);
        round_trip.echo(7, begin + Duration::from_millis(80));
        round_trip.echo(7, begin + Duration::from_millis(1));
        assert_eq!(round_trip.least(), Some(Duration::from_millis(80)));
    }
}
