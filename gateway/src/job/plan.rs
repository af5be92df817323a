//! What a run would do: both sides asked, nothing touched.
//!
//! Owns the dry run and its forecast. The forecast is pure: sizes, link and a guess at compression in, bytes and time out. Promises
//! that a plan which says "ready" was checked by both agents with the same code that runs the job.

use std::time::Duration;

use longhaul_common::ids::{Attempt, JobId};
use longhaul_common::wire::session::Refusal;
use serde::{Deserialize, Serialize};

use super::attempt::{Context, Source, Target, target_open};
use super::report::DiskReport;
use super::spec::JobSpec;

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
    pub notes: Vec<String>,
}

/// Asks both sides.
pub async fn plan(context: &Context, spec: &JobSpec) -> Plan {
    let mut plan = Plan::default();
    let asked = tokio::time::timeout(ANSWER_TIME, ask(context, spec, &mut plan)).await;
    match asked {
        Ok(Ok(())) => plan.ready = true,
        Ok(Err(refusal)) => plan.problems.push(refusal.text),
        Err(_) => {
            let site = &spec.target.site;
            let problem = context.peer.problem().unwrap_or_else(|| "no answer".to_owned());
            plan.problems.push(format!("site '{site}': {problem}"));
        }
    }
    let rate = context.peer.settings.link.rate.map(|rate| rate.0);
    (plan.wan_bytes, plan.seconds) = forecast(plan.used_bytes, rate);
    plan
}

async fn ask(context: &Context, spec: &JobSpec, plan: &mut Plan) -> Result<(), Refusal> {
    let (job, attempt) = (JobId::random(), Attempt(1));
    let source = Source::open(context, spec, job, attempt).await?;
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
    if let Some(problem) = context.peer.problem() {
        let text = format!("no link to site '{}': {problem}", spec.target.site);
        return Err(Refusal::new(
            longhaul_common::wire::session::RefusalKind::Lost,
            text,
        ));
    }
    let mut open = target_open(spec, job, attempt, &source.sizes(), None);
    open.dry_run = true;
    let target = Target::open(context, spec, open, None).await?;
    plan.notes.extend(target.notes.iter().cloned());
    Ok(())
}

/// Bytes on the WAN and seconds for them, each as (least, most).
fn forecast(used: u64, rate: Option<u64>) -> ((u64, u64), Option<(u64, u64)>) {
    let bytes = (used / 100 * LZ4_PER_CENT, used);
    // QUIC's packets and headers take about 5 % of what the link carries.
    let seconds = |bytes: u64, rate: u64| bytes.saturating_mul(8) / (rate / 100 * 95).max(1) + 1;
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
