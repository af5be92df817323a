//! What a bottleneck is like, and what a run through it showed.

use super::{PACKET, WIRE};

/// What the bottleneck does. Times in seconds, rate in bytes/s of packets on the wire.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    pub rate: f64,
    pub rtt: f64,
    /// Bytes that wait at most.
    pub queue: f64,
    pub loss: f64,
    /// Most extra delay of an acknowledgement, drawn evenly.
    pub jitter: f64,
    /// The sending machine stalls for up to so long, busy for as long in between.
    pub stalls: f64,
}

impl Path {
    /// `mbit` Mbit/s and `ms` with a queue of one product (100 ms at least), as the lab has it.
    pub fn new(mbit: f64, ms: f64) -> Self {
        let (rate, rtt) = (mbit * 1e6 / 8.0, ms / 1e3);
        Self {
            rate,
            rtt,
            queue: rate * rtt.max(0.1),
            loss: 0.0,
            jitter: 0.0,
            stalls: 0.0,
        }
    }

    pub fn lossy(self, percent: f64) -> Self {
        Self {
            loss: percent / 100.0,
            ..self
        }
    }

    /// The rate without headers.
    pub fn payload_rate(&self) -> f64 {
        self.rate * PACKET as f64 / WIRE
    }
}

/// What a stretch of a run showed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub seconds: f64,
    /// Payload bytes/s of our flows together, and of each rival.
    pub goodput: f64,
    pub rivals: Vec<f64>,
    pub lost_part: f64,
    /// Delay in the queue as a packet met it, in seconds.
    pub queue_mean: f64,
    pub queue_99: f64,
    /// Bytes acknowledged for each of our flows.
    pub flows: Vec<f64>,
}
