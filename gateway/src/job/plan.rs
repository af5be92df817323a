//! What a run would do: both sides asked, nothing touched.
//!
//! Owns the dry run and the forecast for powered-off VMs, which is pure: sizes, link and a guess at compression in, bytes and time out.
//! Leaves the forecast for running VMs to their agent, which samples them. Promises that a plan which says "ready" was checked by both
//! agents with the same code that runs the job.

use std::time::Duration;

use longhaul_common::ids::{Attempt, JobId};
use longhaul_common::wire::session::{LinkForecast, LiveForecast, Refusal};
use serde::{Deserialize, Serialize};

use super::attempt::{Context, Source, Target, target_open};
use super::report::DiskReport;
use super::spec::{JobSpec, Kind};

/// How long both sides may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(120);
/// What LZ4 makes of used, non-zero blocks of an operating system's disk, in per cent: 226 of 454 MB on the standard disk.
const LZ4_PER_CENT: u64 = 50;

/// What a run would do. Sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Plan {
    /// Both sides would begin.
    pub ready: bool,
    /// What stands in the way.
    pub problems: Vec<String>,
    pub raw_bytes: u64,
    pub used_bytes: u64,
    pub skipped_free_bytes: u64,
    pub hole_bytes: u64,
    /// Between nothing compressible and everything as compressible as a system disk.
    pub wan_bytes: (u64, u64),
    /// At the configured rate; none where no rate is configured.
    pub seconds: Option<(u64, u64)>,
    pub disks: Vec<DiskReport>,
    /// Of a running VM: what following its changes would take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<LivePlan>,
    pub notes: Vec<String>,
}

/// What moving a running VM would take. Sizes in bytes, times in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LivePlan {
    pub ram_bytes: u64,
    /// Of each disk, bytes per second that the VM changes, as sampled.
    pub disks_dirty_bytes_per_s: Vec<u64>,
    /// The same of RAM; none where its QEMU cannot say.
    pub ram_dirty_bytes_per_s: Option<u64>,
    pub sampled_ms: u64,
    /// What the link is held to carry; none where it has no configured rate and no job has measured it.
    pub link_bit_per_s: Option<u64>,
    /// "configured", "measured" by earlier jobs, or "the job's cap"; what is least.
    pub link_known_by: Option<String>,
    pub rtt_ms: f64,
    /// Expected on the WAN, disks and RAM together.
    pub wan_bytes: u64,
    /// From the start until the VM runs at the target.
    pub time_ms: u64,
    /// Rounds of the disks, with the first and the last.
    pub rounds: u32,
    /// Passes over RAM.
    pub passes: u32,
    pub blackout_ms: u64,
    pub blackout_allowed_ms: u64,
    /// Whether the pause gets short enough; none where that cannot be told.
    pub converges: Option<bool>,
    /// The verdict in one sentence.
    pub verdict: String,
}

impl Plan {
    /// The job would begin, but not come to its end: a running VM changes too fast for the link.
    pub fn is_hopeless(&self) -> bool {
        self.live
            .as_ref()
            .is_some_and(|live| live.converges == Some(false))
    }
}

impl LivePlan {
    fn new(forecast: LiveForecast, link: &KnownLink, spec: &JobSpec) -> Self {
        Self {
            ram_bytes: forecast.ram,
            disks_dirty_bytes_per_s: forecast.disks_dirty,
            ram_dirty_bytes_per_s: forecast.ram_dirty,
            sampled_ms: forecast.sampled_ms,
            link_bit_per_s: link.rate,
            link_known_by: link.rate.map(|_| link.known_by.to_owned()),
            rtt_ms: link.rtt.as_secs_f64() * 1e3,
            wan_bytes: forecast.wan_bytes,
            time_ms: forecast.time_ms,
            rounds: forecast.rounds,
            passes: forecast.passes,
            blackout_ms: forecast.blackout_ms,
            blackout_allowed_ms: spec.live.blackout.0.as_millis() as u64,
            converges: forecast.converges,
            verdict: forecast.why,
        }
    }
}

/// What is known of the way to the target before anything is sent.
struct KnownLink {
    /// Bits per second.
    rate: Option<u64>,
    known_by: &'static str,
    rtt: Duration,
}

impl KnownLink {
    /// `measured`: what earlier jobs got, `cap`: what this one may take, in bits per second.
    fn of(context: &Context, measured: Option<u64>, cap: Option<u64>) -> Self {
        let settings = &context.peer.settings.link;
        let configured = settings.rate.map(|rate| rate.0);
        let seen = Duration::from_millis(context.peer.stats().rtt_ms);
        let rtt = settings.rtt.map_or(Duration::ZERO, |rtt| rtt.0);
        let (rate, known_by) = match configured {
            Some(rate) => (Some(rate), "configured"),
            None => (measured, "measured"),
        };
        let is_capped = cap.is_some_and(|cap| rate.is_none_or(|rate| cap < rate));
        Self {
            rate: if is_capped { cap } else { rate },
            known_by: if is_capped { "the job's cap" } else { known_by },
            rtt: if seen.is_zero() { rtt } else { seen },
        }
    }

    fn forecast(&self) -> LinkForecast {
        LinkForecast {
            bytes_per_s: self.rate.map(payload_of),
            rtt_us: u64::try_from(self.rtt.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

/// Bytes of payload per second on a link of so many bits: QUIC's packets and headers take about 5 %.
pub(super) fn payload_of(rate: u64) -> u64 {
    rate / 800 * 95
}

/// Asks both sides. `measured`: what earlier jobs got on this link, in bits per second.
pub async fn plan(context: &Context, spec: &JobSpec, measured: Option<u64>) -> Plan {
    let mut plan = Plan::default();
    let cap = spec.rate.map(|rate| rate.0);
    let link = KnownLink::of(context, measured, cap);
    let asked = tokio::time::timeout(ANSWER_TIME, ask(context, spec, &link, &mut plan)).await;
    match asked {
        Ok(Ok(())) => plan.ready = true,
        Ok(Err(refusal)) => plan.problems.push(refusal.text),
        Err(_) => {
            let site = &spec.target.site;
            let problem = context.peer.problem().unwrap_or_else(|| "no answer".to_owned());
            plan.problems.push(format!("site '{site}': {problem}"));
        }
    }
    let configured = context.peer.settings.link.rate.map(|rate| rate.0);
    let rate = configured.into_iter().chain(cap).min();
    (plan.wan_bytes, plan.seconds) = forecast(plan.used_bytes, rate);
    plan
}

async fn ask(context: &Context, spec: &JobSpec, link: &KnownLink, plan: &mut Plan) -> Result<(), Refusal> {
    let (job, attempt) = (JobId::random(), Attempt(1));
    let source = Source::open(context, spec, spec.source_plan(job, link.forecast())).await?;
    for (section, disk) in spec.disk.iter().zip(&source.disks) {
        let (from, to) = (
            section.source.display().to_string(),
            section.target.display().to_string(),
        );
        plan.disks.push(DiskReport::opened(&from, &to, disk));
        plan.notes.extend(disk.notes.iter().cloned());
        plan.raw_bytes += disk.size;
        plan.used_bytes += disk.used;
        plan.skipped_free_bytes += disk.free;
        plan.hole_bytes += disk.size.saturating_sub(disk.allocated);
    }
    if let Some(survey) = source.survey.as_deref().filter(|_| spec.kind == Kind::Live) {
        plan.notes.extend(survey.notes.iter().cloned());
        let forecast = survey.forecast.clone();
        plan.live = forecast.map(|forecast| LivePlan::new(forecast, link, spec));
    }
    if let Some(problem) = context.peer.problem() {
        let text = format!("no link to site '{}': {problem}", spec.target.site);
        return Err(Refusal::new(
            longhaul_common::wire::session::RefusalKind::Lost,
            text,
        ));
    }
    let mut open = target_open(spec, job, attempt, &source.sizes(), None, source.vm());
    open.dry_run = true;
    let target = Target::open(context, spec, open, None).await?;
    plan.notes.extend(target.notes.iter().cloned());
    Ok(())
}

/// Bytes on the WAN and seconds for them, each as (least, most).
fn forecast(used: u64, rate: Option<u64>) -> ((u64, u64), Option<(u64, u64)>) {
    let bytes = (used / 100 * LZ4_PER_CENT, used);
    let seconds = |bytes: u64, rate: u64| bytes / payload_of(rate).max(1) + 1;
    (
        bytes,
        rate.map(|rate| (seconds(bytes.0, rate), seconds(bytes.1, rate))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gigabyte_at_100_mbit() {
        let (bytes, seconds) = forecast(1_000_000_000, Some(100_000_000));
        assert_eq!(bytes, (500_000_000, 1_000_000_000));
        assert_eq!(seconds, Some((43, 85)));
        assert_eq!(forecast(1000, None).1, None);
    }
}
