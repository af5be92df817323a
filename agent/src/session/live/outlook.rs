//! What moving a VM would take, told before it is done: how fast it changes, sampled, and what `vm::converge` makes of that.
//!
//! Owns the sample and the guesses that a plan needs. Leaves the arithmetic to `vm::converge::forecast`. Promises that what is not known is
//! said to be unknown: never a verdict on a rate or a link that nobody measured.

use std::time::{Duration, Instant};

use longhaul_common::wire::session::{LinkForecast, LiveForecast, LivePolicy, OpenedDisk};

use super::pace::{DEVICE_STATE, STEPS, policy};
use crate::vm::converge::{DiskSurvey, Forecast, LinkView, Survey, forecast};
use crate::vm::qmp::Qmp;
use crate::vm::ram_rate;
use crate::vm::rounds::{Rounds, RoundsError};

/// How long disks are watched at least, and RAM.
const WATCH: Duration = Duration::from_secs(3);
pub(super) const RAM_SECONDS: u32 = 2;

/// How fast the VM changes, in bytes per second.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub disks: Vec<u64>,
    /// Or why it is not known.
    pub ram: Result<u64, String>,
    pub took: Duration,
}

/// What becomes of a byte on its way, from 0 to 1: `first` of what is sent for the first time, the others of what is sent again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shrinks {
    first_block: f64,
    first_page: f64,
    block: f64,
    page: f64,
}

impl std::fmt::Display for Shrinks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [block, page, block_again, page_again] =
            [self.first_block, self.first_page, self.block, self.page].map(|part| part * 100.0);
        write!(
            f,
            "the forecast takes it that disks shrink to {block:.0} % on the WAN and RAM to {page:.0} %, blocks that are sent again to \
             {block_again:.0} % and pages to {page_again:.0} %"
        )
    }
}

/// For a plan: what system disks and the RAM of ordinary guests have come to, on the careful side.
pub(super) const ASSUMED: Shrinks = Shrinks {
    first_block: 0.45,
    first_page: 0.25,
    block: 0.4,
    page: 0.25,
};

/// Where the link was measured in raw bytes of round 0, which shrink as `first_block` says.
pub(super) const RAW: Shrinks = Shrinks {
    first_block: 1.0,
    first_page: ASSUMED.first_page / ASSUMED.first_block,
    block: ASSUMED.block / ASSUMED.first_block,
    page: ASSUMED.page / ASSUMED.first_block,
};

/// Watches the VM for some seconds. `since`: when the bitmaps that record now were switched on.
pub(super) async fn sample(
    qmp: &Qmp,
    rounds: &Rounds,
    since: Instant,
    ram: u64,
) -> Result<Sample, RoundsError> {
    let ram = ram_rate::measure(qmp, ram, RAM_SECONDS).await;
    tokio::time::sleep(WATCH.saturating_sub(since.elapsed())).await;
    let dirty = rounds.dirty_bytes().await?;
    Ok(Sample::new(
        &dirty,
        ram.map_err(|error| error.to_string()),
        since.elapsed(),
    ))
}

impl Sample {
    /// From the bytes of each disk that became dirty in this time.
    pub(super) fn new(dirty: &[u64], ram: Result<u64, String>, took: Duration) -> Self {
        let per_s = |bytes: &u64| (*bytes as f64 / took.as_secs_f64().max(0.001)) as u64;
        Self {
            disks: dirty.iter().map(per_s).collect(),
            ram,
            took,
        }
    }
}

/// The same for a plan, which knows the link from the gateway.
pub(super) fn planned(
    sample: &Sample,
    disks: &[OpenedDisk],
    ram: u64,
    link: LinkForecast,
    live: &LivePolicy,
) -> LiveForecast {
    let used: Vec<_> = disks.iter().map(|disk| disk.used).collect();
    let rtt = Duration::from_micros(link.rtt_us);
    told(
        sample,
        &used,
        ram,
        link.bytes_per_s.map(|rate| rate as f64),
        rtt,
        ASSUMED,
        live,
    )
}

/// What it would take on a link that carries so many bytes per second, if that is known.
pub(super) fn told(
    sample: &Sample,
    used: &[u64],
    ram: u64,
    goodput: Option<f64>,
    rtt: Duration,
    shrinks: Shrinks,
    live: &LivePolicy,
) -> LiveForecast {
    let known = LiveForecast {
        disks_dirty: sample.disks.clone(),
        ram,
        ram_dirty: sample.ram.clone().ok(),
        sampled_ms: sample.took.as_millis() as u64,
        ..LiveForecast::default()
    };
    let Some(goodput) = goodput.filter(|goodput| *goodput > 0.0) else {
        let why = "cannot be told: how much the link carries is not known; give [[peer]] link.rate in the gateway's config, or let a \
                   job measure it";
        return LiveForecast {
            why: why.to_owned(),
            ..known
        };
    };
    let disk = |(used, rate): (&u64, &u64)| DiskSurvey {
        used: *used,
        dirty_rate: *rate as f64,
    };
    let survey = Survey {
        disks: used.iter().zip(&sample.disks).map(disk).collect(),
        ram,
        ram_dirty_rate: sample.ram.clone().unwrap_or(0) as f64,
        first_block_ratio: shrinks.first_block,
        first_page_ratio: shrinks.first_page,
        link: LinkView {
            goodput,
            rtt,
            page_ratio: shrinks.page,
            best_page_ratio: shrinks.page,
            block_ratio: shrinks.block,
        },
        device_state: (DEVICE_STATE as f64 * shrinks.first_page) as u64,
        steps: STEPS,
    };
    judged(known, forecast(&survey, &policy(live)), &sample.ram)
}

fn judged(known: LiveForecast, made: Forecast, ram: &Result<u64, String>) -> LiveForecast {
    let (converges, why) = match ram {
        // Even with quiet memory it does not: then the memory does not matter.
        _ if !made.converges => (Some(false), made.why),
        Ok(_) => (Some(true), made.why),
        Err(reason) => {
            let why = format!(
                "cannot be told: how fast the VM's memory changes is not known ({reason}); were it quiet, it {}",
                made.why
            );
            (None, why)
        }
    };
    LiveForecast {
        wan_bytes: made.wan_bytes,
        time_ms: u64::try_from(made.time.as_millis()).unwrap_or(u64::MAX),
        rounds: made.rounds,
        passes: made.passes,
        blackout_ms: u64::try_from(made.blackout.as_millis()).unwrap_or(u64::MAX),
        converges,
        why,
        ..known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const LINK: Option<f64> = Some(12e6);
    const RTT: Duration = Duration::from_millis(80);

    fn live(blackout_ms: u64) -> LivePolicy {
        LivePolicy {
            blackout_ms,
            auto_converge: false,
            io_throttle: false,
            give_up_ms: None,
            hold_ms: 60_000,
            granularity: 65_536,
            free_proof_age_ms: None,
        }
    }

    fn calm(ram: Result<u64, String>) -> Sample {
        Sample::new(&[3 * 65_536], ram, Duration::from_secs(3))
    }

    fn verdict(sample: &Sample, goodput: Option<f64>, blackout_ms: u64) -> LiveForecast {
        told(
            sample,
            &[700 * MIB],
            512 * MIB,
            goodput,
            RTT,
            ASSUMED,
            &live(blackout_ms),
        )
    }

    #[test]
    fn a_calm_vm_converges_and_a_busy_one_does_not() {
        let fine = verdict(&calm(Ok(2 * MIB)), LINK, 300);
        assert_eq!(fine.converges, Some(true), "{fine:?}");
        assert!(
            fine.blackout_ms <= 300 && fine.rounds >= 2 && fine.passes >= 1,
            "{fine:?}"
        );
        assert_eq!(fine.disks_dirty, [65_536]);
        // 0.45 of the disks and 0.25 of RAM at 12 MB/s.
        assert!((35_000..60_000).contains(&fine.time_ms), "{fine:?}");
        let busy = verdict(&calm(Ok(80 * MIB)), LINK, 300);
        assert_eq!(busy.converges, Some(false));
        assert!(busy.why.contains("auto_converge"), "{}", busy.why);
        let tight = verdict(&calm(Ok(0)), LINK, 100);
        assert!(
            tight.converges == Some(false) && tight.why.contains("allow a longer"),
            "{tight:?}"
        );
    }

    #[test]
    fn what_is_not_known_is_said_to_be_unknown() {
        let unknown = || calm(Err("no such command".to_owned()));
        let quiet = verdict(&unknown(), LINK, 300);
        assert_eq!((quiet.converges, quiet.ram_dirty), (None, None));
        assert!(
            quiet.why.contains("no such command") && quiet.why.contains("will converge"),
            "{}",
            quiet.why
        );
        assert_eq!(
            verdict(&unknown(), LINK, 100).converges,
            Some(false),
            "not even with quiet memory"
        );
        for goodput in [None, Some(0.0)] {
            let blind = verdict(&calm(Ok(MIB)), goodput, 300);
            assert_eq!((blind.converges, blind.wan_bytes), (None, 0));
            assert!(blind.why.contains("link.rate"), "{}", blind.why);
        }
    }
}
