//! What a live migration would take, before a byte moves: for `longhaul plan`.
//!
//! Owns the recurrence: each round and pass sends what the one before left dirty. Leaves surveying to the session. Promises: it
//! ends after a bounded number of steps, and says why where it says no.

use std::time::Duration;

use super::blackout::{floor, ratio, sane, seconds, transfer, utilisation};
use super::{DiskView, LinkView, Policy, RamView, View, predict};

/// Passes beyond which nobody would wait.
const PASSES_MAX: u32 = 60;
const ROUNDS_MAX: u32 = 30;
/// Where rounds of the disks end, as in `decide`.
const NEARLY_CLEAN: Duration = Duration::from_secs(1);

/// One disk as it was surveyed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DiskSurvey {
    /// Bytes that round 0 has to send: used, not zero, not proven free.
    pub used: u64,
    /// Bytes per second that become dirty anew, sampled from the VM.
    pub dirty_rate: f64,
}

/// What is known before the start.
#[derive(Clone, Debug, PartialEq)]
pub struct Survey {
    pub disks: Vec<DiskSurvey>,
    /// Bytes of memory that QEMU will send.
    pub ram: u64,
    /// Bytes per second, sampled (`calc-dirty-rate`).
    pub ram_dirty_rate: f64,
    /// Reduced bytes for each byte sent for the first time: blocks, pages.
    pub first_block_ratio: f64,
    pub first_page_ratio: f64,
    /// `page_ratio` and `block_ratio` are those of what is sent again.
    pub link: LinkView,
    pub device_state: u64,
    pub steps: Duration,
}

/// What it would take.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Reduced bytes on the WAN.
    pub wan_bytes: u64,
    /// From the start until the target runs.
    pub time: Duration,
    /// Rounds of the disks, with round 0 and the last.
    pub rounds: u32,
    /// Passes over memory.
    pub passes: u32,
    pub blackout: Duration,
    pub converges: bool,
    /// One sentence.
    pub why: String,
}

struct Run<'a> {
    survey: &'a Survey,
    sent: f64,
    time: Duration,
    /// Dirty bytes of each disk.
    dirty: Vec<f64>,
}

impl Run<'_> {
    /// Sends reduced bytes while the disks become dirty; how long it took.
    fn send(&mut self, bytes: f64) -> Duration {
        let took = transfer(bytes, &self.survey.link);
        self.sent += bytes;
        self.time = self.time.saturating_add(took);
        for (dirty, disk) in self.dirty.iter_mut().zip(&self.survey.disks) {
            // A disk has no more to write again than what it uses, nearly.
            let most = (disk.used as f64).max(64.0 * 1024.0 * 1024.0);
            *dirty = (*dirty + sane(disk.dirty_rate) * took.as_secs_f64()).min(most);
        }
        took
    }

    /// Takes the dirty bytes of all disks, reduced.
    fn take_dirty(&mut self) -> f64 {
        let dirty: f64 = self.dirty.iter_mut().map(std::mem::take).sum();
        dirty * ratio(self.survey.link.block_ratio)
    }

    fn view(&self, ram: f64) -> View {
        let disk = |(dirty, disk): (&f64, &DiskSurvey)| DiskView {
            dirty: *dirty as u64,
            unsent: 0,
            dirty_rate: disk.dirty_rate,
        };
        View {
            disks: self.dirty.iter().zip(&self.survey.disks).map(disk).collect(),
            round_running: false,
            ram: Some(RamView {
                remaining: ram as u64,
                dirty_rate: self.survey.ram_dirty_rate,
                ..RamView::default()
            }),
            ram_dirty_rate: None,
            link: self.survey.link,
            device_state: self.survey.device_state,
            steps: self.survey.steps,
            cpu_slowed: 0,
            io_limit: None,
        }
    }
}

/// Works out what a migration would take.
pub fn forecast(survey: &Survey, policy: &Policy) -> Forecast {
    let mut run = Run {
        survey,
        sent: 0.0,
        time: Duration::ZERO,
        dirty: vec![0.0; survey.disks.len()],
    };
    let used: f64 = survey.disks.iter().map(|disk| disk.used as f64).sum();
    run.send(used * ratio(survey.first_block_ratio));
    let mut rounds = 1;
    let mut last = f64::INFINITY;
    while rounds < ROUNDS_MAX {
        let dirty: f64 = run.dirty.iter().sum::<f64>() * ratio(survey.link.block_ratio);
        if transfer(dirty, &survey.link) <= NEARLY_CLEAN.max(policy.blackout) || dirty > last * 0.9 {
            break;
        }
        last = run.take_dirty();
        run.send(last);
        rounds += 1;
    }
    let mut left = survey.ram as f64;
    let mut passes = 0;
    let mut share = ratio(survey.first_page_ratio);
    let fits = loop {
        let disks = if passes == 0 { 0.0 } else { run.take_dirty() };
        let took = run.send(left * share + disks);
        passes += 1;
        rounds += u32::from(disks > 0.0);
        left = (sane(survey.ram_dirty_rate) * took.max(Duration::from_millis(150)).as_secs_f64())
            .min(survey.ram as f64);
        share = ratio(survey.link.page_ratio);
        if predict(&run.view(left)).total <= policy.blackout {
            break true;
        }
        if passes >= PASSES_MAX || utilisation(&run.view(left)) >= 1.0 {
            break false;
        }
    };
    conclude(&run, policy, left, rounds, passes, fits)
}

fn conclude(run: &Run<'_>, policy: &Policy, left: f64, rounds: u32, passes: u32, fits: bool) -> Forecast {
    let view = run.view(left);
    let blackout = predict(&view);
    let (least, load) = (floor(&view).total, utilisation(&view));
    let why = if fits {
        format!(
            "will converge: after {rounds} rounds and {passes} passes what is left takes {} ms of {} ms allowed; the guest's \
             changes use {:.0} % of the link",
            blackout.total.as_millis(),
            policy.blackout.as_millis(),
            load * 100.0
        )
    } else if sane(run.survey.link.goodput) <= 0.0 {
        "will not converge: the link carries nothing".to_owned()
    } else if load >= 1.0 {
        format!(
            "will not converge: the guest's changes would need {:.0} % of the link; a faster link, a calmer hour, or leave to slow \
             the guest (auto_converge, io_throttle) would help",
            load * 100.0
        )
    } else {
        format!(
            "will not converge: no blackout shorter than about {} ms is possible here, {} ms are allowed; allow a longer one",
            least.max(blackout.total.min(least * 2)).as_millis(),
            policy.blackout.as_millis()
        )
    };
    let last = blackout.disk_bytes + blackout.ram_bytes + blackout.device_bytes;
    Forecast {
        wan_bytes: (run.sent + last) as u64,
        time: seconds(run.time.as_secs_f64() + blackout.total.as_secs_f64()),
        rounds: rounds + 1,
        passes,
        blackout: blackout.total,
        converges: fits,
        why,
    }
}
