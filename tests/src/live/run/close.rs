//! The end of a run: who owns the guest, what is left, what was measured, and everything put away.
//!
//! Owns the waiting for an owner and for clearing up, and taking the counts. Leaves the order of the run to the parent and the judgement to
//! `verdict`. Promises that every program is ended, and that nothing waits without a limit.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::super::faults::{SOURCE_QEMU, TARGET_QEMU};
use super::super::hearing::Gap;
use super::super::{leftovers, pause};
use super::{Run, TICK};
use crate::lab::End;
use crate::report::{LinkReport, ProgramReport};

/// After the job, how long it may take until exactly one machine runs the guest.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// So many of the longest times without a heartbeat are told.
const SILENCES: usize = 5;
/// Beyond the time that was asked for, how long the guest's figures are waited for.
const COUNTS_LIMIT: Duration = Duration::from_secs(5);
/// After the job, how long clearing up may take.
const TIDY_LIMIT: Duration = Duration::from_secs(10);

impl Run<'_> {
    /// Waits until nobody has anything more to say: a migration that was given up may be past its switchover, and takes the guest along.
    pub(super) fn hear_out(&mut self, lines: &Receiver<String>) -> io::Result<()> {
        let start = Instant::now();
        while start.elapsed() < SETTLE_LIMIT
            && lines.recv_timeout(TICK) != Err(RecvTimeoutError::Disconnected)
        {
            self.stage.tend()?;
        }
        Ok(())
    }

    /// Waits until exactly one machine runs the guest: after a kill, the programs may still be settling.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        let start = Instant::now();
        let mut owners = self.stage.owners();
        while owners.len() != 1 && start.elapsed() < SETTLE_LIMIT {
            self.idle(TICK * 10)?;
            owners = self.stage.owners();
        }
        self.report.owner = match owners[..] {
            [end] => end.name(),
            [] => "nobody",
            _ => "both",
        }
        .to_owned();
        Ok(())
    }

    /// Hears the guest for a while after the job: as long as was asked for, and until it has said twice how much it did, where it says so at
    /// all. It does once a second.
    pub(super) fn listen_on(&mut self, up: Duration, began: Duration, ended: Duration) -> io::Result<()> {
        let start = Instant::now();
        self.idle(self.args.after.0)?;
        let hears = |run: &Self, from, until| run.stage.consoles.hearing().throughput(from, until).is_some();
        while hears(self, up, began)
            && !hears(self, ended, self.stage.consoles.now())
            && start.elapsed() < self.args.after.0 + COUNTS_LIMIT
        {
            self.idle(TICK * 10)?;
        }
        Ok(())
    }

    /// What the job has left behind, once it had time to clear up.
    pub(super) fn leftovers(&mut self) -> io::Result<Vec<String>> {
        let start = Instant::now();
        loop {
            let found = leftovers::find(&self.stage, &self.report, &self.settings);
            if found.is_empty() || start.elapsed() > TIDY_LIMIT {
                return Ok(found);
            }
            self.idle(TICK * 20)?;
        }
    }

    pub(super) fn measure(&mut self, up: Duration, began: Duration, ended: Duration) {
        let now = self.stage.consoles.now();
        let (source, target) = (
            self.stage.monitor(End::Source).events(),
            self.stage.monitor(End::Target).events(),
        );
        let report = &mut self.report;
        report.blackout_qmp_ms = pause::pause(&source, &target, self.clock).map(pause::Pause::ms);
        report.interruptions_ms = pause::interruptions(&source, self.clock);
        let hearing = self.stage.consoles.hearing();
        let gap = |from, until| {
            let gap = hearing.longest_gap(from, until);
            gap.map(|gap| gap.length.as_secs_f64() * 1e3)
        };
        report.heartbeat_before_ms = gap(up, began);
        let handover = hearing.handover_gap(began, now);
        report.handover_heartbeat_ms = handover.map(|gap| gap.as_secs_f64() * 1e3);
        report.blackout_heartbeat_ms = gap(began.saturating_sub(TICK * 10), now);
        let silences = hearing.longest_gaps(began, now, SILENCES).into_iter();
        let told = |gap: Gap| {
            (
                gap.at.saturating_sub(began).as_secs_f64(),
                gap.length.as_secs_f64() * 1e3,
            )
        };
        report.silences = silences.map(told).collect();
        report.irregular_heartbeats = hearing.irregular_beats();
        report.guest_before_per_s = hearing.throughput(up, began);
        let slack = Duration::from_millis(1100);
        report.guest_during_per_s = hearing.throughput(began.saturating_sub(slack), ended + slack);
        report.guest_after_per_s = hearing.throughput(ended, now);
    }

    /// Ends everything in order and takes the counts.
    pub(super) fn put_away(&mut self, link_began: f64) -> io::Result<()> {
        let programs = &mut self.report.report.programs;
        for process in &mut self.stage.running {
            process.stop()?;
            programs.insert(process.name().to_owned(), ProgramReport::of(process));
        }
        let machines = [
            (SOURCE_QEMU, Some(self.stage.source.usage())),
            (TARGET_QEMU, self.stage.target_usage()),
        ];
        for (name, used) in machines {
            if let Some(usage) = used {
                let part = ProgramReport {
                    usage,
                    ..ProgramReport::default()
                };
                programs.insert(name.to_owned(), part);
            }
        }
        if let Some(link) = self.stage.lab.take_link() {
            let stats = link.stop()?;
            let until = link_began + self.report.report.seconds;
            let link = LinkReport::new(&self.args.link, stats, link_began, until);
            self.report.report.link = Some(link);
        }
        Ok(())
    }
}
