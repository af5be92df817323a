//! What a person asks of the emulated link, and the shapes that follow from it.
//!
//! Owns the command-line words of a link (rate, round-trip time, loss, jitter, queue, MTU, cut windows) and
//! their defaults. Leaves alone how packets are treated. Promises that what is printed back parses to the
//! same link.

use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use longhaul_common::units::{ByteSize, Rate, Share, Span};

use super::direction::Shape;

/// Shortest queue that is given without being asked: a WAN router has at least this much.
const QUEUE_SPAN_MIN: Duration = Duration::from_millis(100);

/// The link as asked for.
#[derive(Args, Clone, Debug)]
pub struct LinkSpec {
    /// Rate of the link, as "100mbit", or "100mbit:20mbit" for source to target and back; "0" is unlimited
    #[arg(long, default_value = "100mbit")]
    pub rate: Rates,
    /// Round-trip time; each direction delays by half of it
    #[arg(long, default_value = "80ms")]
    pub rtt: Span,
    /// Largest extra delay, as "5ms"; with ",reorder" packets may overtake each other
    #[arg(long, default_value = "0ms")]
    pub jitter: Jitter,
    /// Packets lost at random in each direction
    #[arg(long, default_value = "0%")]
    pub loss: Share,
    /// Drop-tail queue, as time ("100ms") or bytes ("1MB"); default: one bandwidth-delay product, at least
    /// 100 ms
    #[arg(long)]
    pub queue: Option<Queue>,
    /// Largest packet on the link, in bytes
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u16).range(1280..=9216))]
    pub mtu: u16,
    /// Seed of loss and jitter
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// No emulated link: all programs on this machine's loopback, to see what the programs themselves can do
    #[arg(long)]
    pub loopback: bool,
    /// No emulator: the sites are joined by a pair of virtual Ethernet devices, which shapes nothing
    #[arg(long, conflicts_with = "loopback")]
    pub veth: bool,
    /// Packets of 9000 bytes between agents and gateways (on loopback also between the gateways they are 1500)
    #[arg(long)]
    pub jumbo_lan: bool,
}

impl LinkSpec {
    /// The shapes from source to target and back.
    pub fn shapes(&self) -> (Shape, Shape) {
        (
            self.shape(self.rate.forth, self.seed),
            self.shape(self.rate.back, self.seed ^ 0x9e37_79b9_7f4a_7c15),
        )
    }

    fn shape(&self, rate: u64, seed: u64) -> Shape {
        Shape {
            rate_bit_per_s: rate,
            delay: self.rtt.0 / 2,
            jitter: self.jitter.most,
            reorder: self.jitter.reorder,
            loss: self.loss.fraction(),
            queue_bytes: self.queue_bytes(rate),
            seed,
        }
    }

    fn queue_bytes(&self, rate: u64) -> u64 {
        let of_time = |span: Duration| (u128::from(rate) * span.as_nanos() / 8_000_000_000) as u64;
        match self.queue {
            Some(Queue::Bytes(bytes)) => bytes,
            Some(Queue::Time(span)) => of_time(span),
            None => of_time(self.rtt.0.max(QUEUE_SPAN_MIN)),
        }
    }

    /// The same link as command-line words.
    pub fn to_args(&self) -> Vec<String> {
        let reorder = if self.jitter.reorder { ",reorder" } else { "" };
        let mut args = vec![
            format!("--rate={}bit:{}bit", self.rate.forth, self.rate.back),
            format!("--rtt={}us", self.rtt.0.as_micros()),
            format!("--jitter={}us{reorder}", self.jitter.most.as_micros()),
            format!("--loss={}%", self.loss.fraction() * 100.0),
            format!("--mtu={}", self.mtu),
            format!("--seed={}", self.seed),
        ];
        args.extend(self.queue.map(|queue| match queue {
            Queue::Bytes(bytes) => format!("--queue={bytes}b"),
            Queue::Time(span) => format!("--queue={}us", span.as_micros()),
        }));
        args
    }
}

/// Rates of both directions in bit/s; 0 is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    pub forth: u64,
    pub back: u64,
}

impl FromStr for Rates {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (forth, back) = text.split_once(':').unwrap_or((text, text));
        Ok(Self {
            forth: one_rate(forth)?,
            back: one_rate(back)?,
        })
    }
}

fn one_rate(text: &str) -> Result<u64, String> {
    match text {
        "0" => Ok(0),
        _ => text
            .parse::<Rate>()
            .map(|rate| rate.0)
            .map_err(|error| error.to_string()),
    }
}

/// Extra delay, drawn for each packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jitter {
    pub most: Duration,
    pub reorder: bool,
}

impl FromStr for Jitter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (most, reorder) = match text.split_once(',') {
            None => (text, false),
            Some((most, "reorder")) => (most, true),
            Some((_, other)) => {
                return Err(format!(
                    "'{other}' is not 'reorder'; write it like \"5ms,reorder\""
                ));
            }
        };
        let most = most.parse::<Span>().map_err(|error| error.to_string())?.0;
        Ok(Self { most, reorder })
    }
}

/// Size of the drop-tail queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    Time(Duration),
    Bytes(u64),
}

impl FromStr for Queue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(span) = text.parse::<Span>() {
            return Ok(Self::Time(span.0));
        }
        let size = text.parse::<ByteSize>();
        size.map(|size| Self::Bytes(size.0))
            .map_err(|_| format!("'{text}' is neither a time nor a size; write \"100ms\" or \"1MB\""))
    }
}

/// A window in which the link is cut, since the start of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutWindow {
    pub from: Duration,
    pub until: Duration,
}

impl FromStr for CutWindow {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("'{text}' is not a window; write it like \"10s..25s\"");
        let (from, until) = text.split_once("..").ok_or_else(refused)?;
        let time = |text: &str| text.parse::<Span>().map(|span| span.0).map_err(|_| refused());
        let window = Self {
            from: time(from)?,
            until: time(until)?,
        };
        if window.from >= window.until {
            return Err(format!("'{text}' ends before it begins"));
        }
        Ok(window)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        link: LinkSpec,
    }

    fn link(words: &[&str]) -> LinkSpec {
        Line::parse_from(std::iter::once(&"lab").chain(words)).link
    }

    #[test]
    fn the_default_queue_is_one_bandwidth_delay_product_of_at_least_100_ms() {
        assert_eq!(
            link(&["--rate=200mbit", "--rtt=400ms"]).shapes().0.queue_bytes,
            10_000_000
        );
        assert_eq!(
            link(&["--rate=100mbit", "--rtt=80ms"]).shapes().0.queue_bytes,
            1_250_000
        );
        assert_eq!(
            link(&["--rate=80mbit", "--queue=50ms"]).shapes().1.queue_bytes,
            500_000
        );
        assert_eq!(link(&["--queue=64KiB"]).shapes().1.queue_bytes, 65_536);
    }

    #[test]
    fn printed_words_give_the_same_link() {
        for words in [
            vec![],
            vec![
                "--rate=12.5mbit:1gbit",
                "--rtt=33ms",
                "--loss=0.5%",
                "--queue=40ms",
                "--mtu=9000",
                "--seed=9",
            ],
            vec!["--jitter=2ms,reorder", "--queue=3MB", "--rate=0"],
        ] {
            let asked = link(&words);
            let printed = asked.to_args();
            let again = link(&printed.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(
                (asked.shapes(), asked.mtu),
                (again.shapes(), again.mtu),
                "{printed:?}"
            );
        }
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        assert!(
            "25s..10s"
                .parse::<CutWindow>()
                .unwrap_err()
                .contains("before it begins")
        );
        assert!("10s-25s".parse::<CutWindow>().is_err());
        assert!("fast".parse::<Rates>().is_err());
        assert!("5ms,shuffle".parse::<Jitter>().unwrap_err().contains("reorder"));
        assert!("12".parse::<Queue>().is_err());
    }
}
