//! The forecast of a move that has begun: what a plan would have said, made of what is measured on the way.
//!
//! Owns sampling how fast RAM changes while it does not migrate, and telling the verdict once, early in round 0. Leaves the words to
//! `outlook`. Promises that it delays nothing: round 0 is read meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::wire::session::LiveStage;
use tokio::task::JoinHandle;

use super::{Drive, Stop};
use crate::session::live::outlook::{self, Sample};
use crate::session::live::source::LiveSource;
use crate::session::live::uplink::Uplink;
use crate::vm::ram_rate;

/// How long the VM and the link are watched before anything is told.
const WATCH: Duration = Duration::from_secs(2);
/// Between two measurements of RAM while memory is held back.
const AGAIN: Duration = Duration::from_secs(5);

type Measured = Result<u64, String>;

/// What is known so far.
pub(super) struct Foretold {
    measuring: Option<JoinHandle<Measured>>,
    ram: Option<Measured>,
    /// When it was measured last.
    at: Instant,
    told: bool,
}

impl Drop for Foretold {
    fn drop(&mut self) {
        if let Some(measuring) = &self.measuring {
            measuring.abort();
        }
    }
}

impl Foretold {
    /// Begins to measure.
    pub(super) fn begin(session: &Arc<LiveSource>) -> Self {
        Self {
            measuring: Some(measure(session)),
            ram: None,
            at: Instant::now(),
            told: false,
        }
    }

    /// Bytes of RAM per second, as far as they are known.
    pub(super) fn ram_rate(&self) -> Option<f64> {
        Some(*self.ram.as_ref()?.as_ref().ok()? as f64)
    }

    /// Has RAM measured anew now and then, where it can be at all: a VM that was too busy may be calmer.
    pub(super) fn measure_ram_again(&mut self, session: &Arc<LiveSource>) {
        let can = self.ram.as_ref().is_some_and(Result::is_ok);
        if can && self.measuring.is_none() && self.at.elapsed() >= AGAIN {
            self.measuring = Some(measure(session));
        }
    }

    /// Takes a measurement that has ended.
    async fn take(&mut self) {
        let Some(measuring) = self.measuring.take_if(|measuring| measuring.is_finished()) else {
            return;
        };
        let died = |error: tokio::task::JoinError| Err(error.to_string());
        self.ram = Some(measuring.await.unwrap_or_else(died));
        self.at = Instant::now();
    }
}

fn measure(session: &Arc<LiveSource>) -> JoinHandle<Measured> {
    let (qmp, ram) = (session.qmp.clone(), session.ram_size);
    tokio::spawn(async move {
        let measured = ram_rate::measure(&qmp, ram, outlook::RAM_SECONDS).await;
        measured.map_err(|error| error.to_string())
    })
}

impl Drive {
    /// Tells once, as soon as enough was seen, whether the job will come to its end.
    pub(super) async fn foretell(&mut self, uplink: &Uplink) -> Result<(), Stop> {
        self.foretold.take().await;
        if self.foretold.told || self.began.elapsed() < WATCH {
            return Ok(());
        }
        let Some(ram) = self.foretold.ram.clone() else {
            return Ok(());
        };
        let Some(rtt) = self.s.heard.borrow().rtt() else {
            return Ok(());
        };
        self.foretold.told = true;
        // Rounds that ended meanwhile took their bytes with them: then the rate is that since the last one, and no forecast.
        if self.rounds.round() > 0 || self.vm.is_migrating() {
            return Ok(());
        }
        let dirty = self.rounds.dirty_bytes().await?;
        let sample = Sample::new(&dirty, ram, self.began.elapsed());
        let used = self.s.used();
        let view = self
            .pace
            .view(self.began.elapsed(), &dirty, None, None, uplink, Some(rtt));
        let (goodput, live) = (Some(view.link.goodput), self.s.vm.policy);
        let told = outlook::told(&sample, &used, self.s.ram_size, goodput, rtt, outlook::RAW, &live);
        let words = format!(
            "forecast: {}; expected pause {} ms, about {} s in all",
            told.why,
            told.blackout_ms,
            told.time_ms.div_ceil(1000)
        );
        tracing::info!(job = %self.s.job, "{words}");
        self.note(&words);
        self.state(LiveStage::Copy, 0, 0, words).await;
        Ok(())
    }
}
