//! What the host has heard from a guest: heartbeats, acknowledgements, throughput, words.
//!
//! Owns putting bytes of both consoles together into lines and figures. Pure: the time of hearing is an
//! argument. Promises that a line that began on the source's console and ended on the target's is one line,
//! and that an acknowledgement once heard is never forgotten.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::lab::End;

/// Lines longer than this are cut.
const LINE_BYTES_MAX: usize = 4096;
/// Beats, figures and words that are kept: a day of heartbeats.
const KEPT_MAX: usize = 2_000_000;
const WORDS_MAX: usize = 5_000;

/// One heartbeat. Times are since some moment that the listener chose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beat {
    pub at: Duration,
    pub end: End,
    pub number: u64,
}

/// The longest time without a heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gap {
    /// When the last beat before it was heard.
    pub at: Duration,
    pub length: Duration,
}

/// A line that is no figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Word {
    pub at: Duration,
    pub end: End,
    pub text: String,
}

/// Everything heard.
#[derive(Clone, Debug, Default)]
pub struct Hearing {
    beats: Vec<Beat>,
    /// Operations so far, as the guest counts them.
    operations: Vec<(Duration, u64)>,
    acknowledged: BTreeMap<String, u64>,
    words: Vec<Word>,
    partial: BTreeMap<End, Vec<u8>>,
    target_spoke: bool,
}

impl Hearing {
    /// Takes bytes from a console.
    pub fn bytes(&mut self, at: Duration, end: End, bytes: &[u8]) {
        if end == End::Target && !self.target_spoke && !bytes.is_empty() {
            self.target_spoke = true;
            let begun = self.partial.remove(&End::Source).unwrap_or_default();
            self.partial.insert(End::Target, begun);
        }
        for byte in bytes {
            let partial = self.partial.entry(end).or_default();
            if *byte != b'\n' {
                if partial.len() < LINE_BYTES_MAX {
                    partial.push(*byte);
                }
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(partial)).into_owned();
            self.line(at, end, line.trim_end_matches('\r'));
        }
    }

    fn line(&mut self, at: Duration, end: End, line: &str) {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |word: &str| word.parse::<u64>().ok();
        match words[..] {
            ["HB", beat, _] if number(beat).is_some() && self.beats.len() < KEPT_MAX => {
                let number = number(beat).unwrap_or_default();
                self.beats.push(Beat { at, end, number });
            }
            ["TP", operations, _] if number(operations).is_some() && self.operations.len() < KEPT_MAX => {
                self.operations.push((at, number(operations).unwrap_or_default()));
            }
            ["ACK", stream, upto] if number(upto).is_some() => {
                let entry = self.acknowledged.entry(stream.to_owned()).or_default();
                *entry = (*entry).max(number(upto).unwrap_or_default());
            }
            [] => {}
            _ if self.words.len() < WORDS_MAX => self.words.push(Word {
                at,
                end,
                text: line.to_owned(),
            }),
            _ => {}
        }
    }

    /// The last heartbeat.
    pub fn last_beat(&self) -> Option<Beat> {
        self.beats.last().copied()
    }

    /// The longest time between two beats that were heard between `from` and `until`, on any console.
    pub fn longest_gap(&self, from: Duration, until: Duration) -> Option<Gap> {
        self.longest_gaps(from, until, 1).pop()
    }

    /// The longest times between two beats, longest first, at most `most`.
    pub fn longest_gaps(&self, from: Duration, until: Duration, most: usize) -> Vec<Gap> {
        let heard = |beat: &&Beat| beat.at >= from && beat.at <= until;
        let times: Vec<_> = self.beats.iter().filter(heard).map(|beat| beat.at).collect();
        let gap = |pair: &[Duration]| Gap {
            at: pair[0],
            length: pair[1].saturating_sub(pair[0]),
        };
        let mut gaps: Vec<_> = times.windows(2).map(gap).collect();
        gaps.sort_by_key(|gap| std::cmp::Reverse(gap.length));
        gaps.truncate(most);
        gaps
    }

    /// The time between the last beat on the source's console and the first one on the target's, between `from` and `until`.
    pub fn handover_gap(&self, from: Duration, until: Duration) -> Option<Duration> {
        let crosses = |pair: &&[Beat]| {
            let inside = pair[0].at >= from && pair[1].at <= until;
            inside && pair[0].end == End::Source && pair[1].end == End::Target
        };
        let pair = self.beats.windows(2).find(crosses)?;
        Some(pair[1].at.saturating_sub(pair[0].at))
    }

    /// Beats that were said and not heard, or heard twice: the counter must go up by one.
    pub fn irregular_beats(&self) -> u64 {
        let pairs = self.beats.windows(2);
        pairs.filter(|pair| pair[1].number != pair[0].number + 1).count() as u64
    }

    /// Operations per second between the first and the last count heard in this span.
    pub fn throughput(&self, from: Duration, until: Duration) -> Option<f64> {
        let mut counts = self
            .operations
            .iter()
            .filter(|(at, _)| *at >= from && *at <= until);
        let (first, last) = (counts.next()?, counts.next_back()?);
        let seconds = last.0.saturating_sub(first.0).as_secs_f64();
        (seconds > 0.0).then(|| last.1.saturating_sub(first.1) as f64 / seconds)
    }

    /// For each stream, the highest record that was acknowledged.
    pub fn acknowledged(&self) -> &BTreeMap<String, u64> {
        &self.acknowledged
    }

    /// Lines that are no figures, in the order in which they were heard.
    pub fn words(&self) -> &[Word] {
        &self.words
    }

    /// The first word heard after `from` that begins so; what follows the beginning is given.
    pub fn said(&self, beginning: &str, from: Duration) -> Option<(Word, String)> {
        let heard = self.words.iter().filter(|word| word.at >= from);
        heard
            .filter_map(|word| {
                // The kernel may have written something before on the same line.
                let at = word.text.find(beginning)?;
                let rest = word.text[at + beginning.len()..].trim().to_owned();
                Some((word.clone(), rest))
            })
            .next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_line_cut_by_the_handover_is_one_line() {
        let mut heard = Hearing::default();
        heard.bytes(ms(0), End::Source, b"HB 1 50\nACK log 8\r\nHB 2 1");
        heard.bytes(ms(300), End::Target, b"00\nHB 3 150\nACK log 16\n");
        let ends: Vec<_> = heard.beats.iter().map(|beat| (beat.number, beat.end)).collect();
        assert_eq!(ends, [(1, End::Source), (2, End::Target), (3, End::Target)]);
        assert_eq!(heard.acknowledged()["log"], 16);
        assert_eq!(heard.irregular_beats(), 0);
    }

    #[test]
    fn the_longest_gap_goes_across_both_consoles() {
        let mut heard = Hearing::default();
        for beat in 0..10_u64 {
            let (at, end) = if beat < 5 {
                (beat * 50, End::Source)
            } else {
                (beat * 50 + 420, End::Target)
            };
            heard.bytes(ms(at), end, format!("HB {beat} {at}\n").as_bytes());
        }
        let gap = heard.longest_gap(ms(0), ms(10_000)).unwrap();
        assert_eq!((gap.at, gap.length), (ms(200), ms(470)));
        assert_eq!(heard.longest_gap(ms(0), ms(160)).unwrap().length, ms(50));
        assert_eq!(heard.longest_gap(ms(5_000), ms(6_000)), None);
        assert_eq!(heard.handover_gap(ms(0), ms(10_000)), Some(ms(470)));
        assert_eq!(heard.handover_gap(ms(0), ms(160)), None);
        // A longer silence elsewhere is not the handover's.
        heard.bytes(ms(3_000), End::Target, b"HB 10 3000\n");
        assert_eq!(heard.longest_gap(ms(0), ms(10_000)).unwrap().at, ms(870));
        assert_eq!(heard.handover_gap(ms(0), ms(10_000)), Some(ms(470)));
    }

    #[test]
    fn throughput_is_counted_over_a_span_and_acknowledgements_never_go_back() {
        let mut heard = Hearing::default();
        for second in 0..6 {
            heard.bytes(
                ms(second * 1000),
                End::Source,
                format!("TP {} 0\n", second * 400).as_bytes(),
            );
        }
        assert_eq!(heard.throughput(ms(1000), ms(4000)), Some(400.0));
        assert_eq!(heard.throughput(ms(4500), ms(5500)), None);
        heard.bytes(ms(0), End::Source, b"ACK w0 7\nACK w0 5\nACK w0 x\n");
        assert_eq!(heard.acknowledged()["w0"], 7);
    }

    #[test]
    fn noise_is_kept_as_words_within_bounds_and_breaks_nothing() {
        let mut heard = Hearing::default();
        heard.bytes(ms(1), End::Source, &[b'x'; 100_000]);
        heard.bytes(
            ms(1),
            End::Source,
            b"\nHB\nHB x y\n\xff\xfe\n[ 1.0] LONGHAUL-GUEST-RAM ok 12\n",
        );
        assert!(heard.words()[0].text.len() <= LINE_BYTES_MAX);
        assert_eq!(heard.said("LONGHAUL-GUEST-RAM", ms(0)).unwrap().1, "ok 12");
        assert_eq!(heard.said("LONGHAUL-GUEST-RAM", ms(2)), None);
        for _ in 0..WORDS_MAX {
            heard.bytes(ms(1), End::Source, b"y\n");
        }
        assert_eq!(heard.words().len(), WORDS_MAX);
    }
}
