//! What a neighbour on the same link gets: one TCP flow beside the job.
//!
//! Owns the flow between the two sites, the time in which it is alone, and what it received while the job sent. Leaves alone
//! the link and the job. Promises that both ends of the flow are gone when it is dropped, and that figures come from one
//! stretch of the job for all: after the first seconds, before the last part of the data.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::lab::{End, Lab};

const PORT: u16 = 7604;
/// Until the flow has found its rate.
const WARM: Duration = Duration::from_secs(4);
/// How long it is watched alone.
const ALONE: Duration = Duration::from_secs(10);
/// Of the job, until what it does is watched: it has found its rate, too.
const BEGIN: Duration = Duration::from_secs(5);
/// How long both are watched; then the flow ends, for who yields to it would take for ever.
const WATCHED: Duration = Duration::from_secs(30);
/// Of the job's progress, until when it is watched at most.
const END_PERCENT: f64 = 90.0;
/// A packet of 1500 bytes of IP carries so many bytes of TCP's stream, with timestamps.
const SEGMENT: (f64, f64) = (1448.0, 1500.0);

/// Who decides how fast the flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Neighbour {
    Bbr,
    Cubic,
}

impl Neighbour {
    /// The kernel's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bbr => "bbr",
            Self::Cubic => "cubic",
        }
    }
}

/// What the two did to each other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BesideReport {
    /// The flow's congestion control.
    pub congestion: String,
    /// What the flow received per second while it was alone, in bits of its stream.
    pub alone_bit_per_s: f64,
    /// The same beside the job.
    pub beside_bit_per_s: f64,
    /// That as a part of what it got alone.
    pub kept: f64,
    /// The job's part of all that the link delivered meanwhile.
    pub share: f64,
    /// How long both were watched.
    pub seconds: f64,
}

/// A running flow, and what was seen of it.
pub struct Beside {
    congestion: Neighbour,
    /// `None` once it has ended.
    flow: Option<Flow>,
    alone_bit_per_s: f64,
    began: Option<Mark>,
    last: Option<Mark>,
}

/// Counts at one time.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Instant,
    /// Bytes that the flow received.
    received: u64,
    /// Bytes of IP that the link delivered.
    delivered: u64,
}

impl Beside {
    /// Starts the flow, and watches it alone.
    ///
    /// # Errors
    /// When there is no link to share, or the kernel does not have this congestion control.
    pub fn start(lab: &mut Lab, congestion: Neighbour) -> io::Result<Self> {
        lab.favour_tcp()?;
        let flow = Flow::start(lab, congestion)?;
        std::thread::sleep(WARM);
        let begin = flow.mark(lab)?;
        std::thread::sleep(ALONE);
        let end = flow.mark(lab)?;
        Ok(Self {
            congestion,
            flow: Some(flow),
            alone_bit_per_s: begin.rate(&end),
            began: None,
            last: None,
        })
    }

    /// Looks at both; `since` is the job's age, `percent` its progress.
    ///
    /// # Errors
    /// When the link does not say what it delivered.
    pub fn look(&mut self, lab: &mut Lab, since: Duration, percent: f64) -> io::Result<()> {
        let Some(flow) = self
            .flow
            .as_ref()
            .filter(|_| since >= BEGIN && percent < END_PERCENT)
        else {
            return Ok(());
        };
        let mark = flow.mark(lab)?;
        self.began.get_or_insert(mark);
        self.last = Some(mark);
        if since >= BEGIN + WATCHED {
            self.flow = None;
        }
        Ok(())
    }

    /// The figures.
    ///
    /// # Errors
    /// When the job was over before anything could be seen.
    pub fn report(&self) -> io::Result<BesideReport> {
        let (Some(began), Some(last)) = (self.began, self.last.filter(|_| self.alone_bit_per_s > 0.0)) else {
            return Err(io::Error::other(
                "the job was too short to see what a flow beside it gets",
            ));
        };
        let seconds = (last.at - began.at).as_secs_f64();
        if seconds < BEGIN.as_secs_f64() {
            return Err(io::Error::other(format!(
                "the job sent beside the flow for {seconds:.1} s only; give it more to move, or a slower link"
            )));
        }
        let beside = began.rate(&last);
        let flow = (last.received - began.received) as f64 * SEGMENT.1 / SEGMENT.0;
        let delivered = last.delivered.saturating_sub(began.delivered).max(1) as f64;
        Ok(BesideReport {
            congestion: self.congestion.name().to_owned(),
            alone_bit_per_s: self.alone_bit_per_s,
            beside_bit_per_s: beside,
            kept: beside / self.alone_bit_per_s,
            share: (1.0 - flow / delivered).max(0.0),
            seconds,
        })
    }
}

impl Mark {
    /// What the flow received from here to `later`, in bit/s.
    fn rate(&self, later: &Self) -> f64 {
        let seconds = (later.at - self.at).as_secs_f64().max(1e-3);
        (later.received - self.received) as f64 * 8.0 / seconds
    }
}

/// A TCP connection from source to target with a thread at each end.
struct Flow {
    received: Arc<AtomicU64>,
    ends: [TcpStream; 2],
    threads: Vec<JoinHandle<()>>,
}

impl Flow {
    fn start(lab: &Lab, congestion: Neighbour) -> io::Result<Self> {
        let address = (lab.address(End::Target), PORT);
        let listener = lab.inside(End::Target, || TcpListener::bind(address))??;
        let sender = lab.inside(End::Source, || TcpStream::connect(address))??;
        rustix::net::sockopt::set_tcp_congestion(&sender, congestion.name()).map_err(|error| {
            let name = congestion.name();
            io::Error::other(format!("this kernel's TCP has no {name}: {error}"))
        })?;
        let (receiver, _) = listener.accept()?;
        let received = Arc::new(AtomicU64::new(0));
        let ends = [sender.try_clone()?, receiver.try_clone()?];
        let count = Arc::clone(&received);
        let threads = vec![
            std::thread::spawn(move || send(sender)),
            std::thread::spawn(move || receive(receiver, &count)),
        ];
        Ok(Self {
            received,
            ends,
            threads,
        })
    }

    fn mark(&self, lab: &mut Lab) -> io::Result<Mark> {
        let delivered = lab.delivered()?;
        let delivered = delivered.ok_or_else(|| io::Error::other("there is no link that two could share"))?;
        Ok(Mark {
            at: Instant::now(),
            received: self.received.load(Ordering::Relaxed),
            delivered: delivered.0,
        })
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Until the connection is shut down.
fn send(mut sender: TcpStream) {
    let block = vec![0x5a; 64 << 10];
    while sender.write_all(&block).is_ok() {}
}

fn receive(mut receiver: TcpStream, count: &AtomicU64) {
    let mut block = vec![0; 64 << 10];
    while let Ok(length @ 1..) = receiver.read(&mut block) {
        count.fetch_add(length as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beside(began: Option<Mark>, last: Option<Mark>) -> Beside {
        let pair = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(pair.local_addr().unwrap()).unwrap();
        let receiver = pair.accept().unwrap().0;
        let flow = Flow {
            received: Arc::default(),
            ends: [sender, receiver],
            threads: Vec::new(),
        };
        Beside {
            congestion: Neighbour::Cubic,
            flow: Some(flow),
            alone_bit_per_s: 96e6,
            began,
            last,
        }
    }

    #[test]
    fn figures_are_of_the_stretch_in_which_both_sent() {
        let at = Instant::now();
        let mark = |seconds, received, delivered| Mark {
            at: at + Duration::from_secs(seconds),
            received,
            delivered,
        };
        // 10 s: the flow got 60 MB of its stream, of 125 MB that the link delivered.
        let report = beside(Some(mark(0, 1000, 5000)), Some(mark(10, 60_001_000, 125_005_000)));
        let report = report.report().unwrap();
        assert_eq!((report.congestion.as_str(), report.seconds), ("cubic", 10.0));
        assert!((report.kept - 0.5).abs() < 1e-9, "{report:?}");
        assert!(
            (report.share - (1.0 - 60.0 * 1500.0 / 1448.0 / 125.0)).abs() < 1e-9,
            "{report:?}"
        );
    }

    #[test]
    fn too_short_a_job_gives_no_figures() {
        assert!(beside(None, None).report().is_err());
        let mark = Mark {
            at: Instant::now(),
            received: 0,
            delivered: 0,
        };
        let error = beside(Some(mark), Some(mark)).report().unwrap_err();
        assert!(error.to_string().contains("give it more to move"), "{error}");
    }
}
