//! `lab live`: one live migration through real processes with a real guest, and the proof of it.
//!
//! Owns the order of a run: stage, steady state, job with its faults, the look at who owns the guest, the
//! guest's own verification, its end, and the offline check of its disk. Leaves alone how each is done.
//! Promises a report in every case in which the lab itself worked, also when the job fails, a program dies or
//! the guest is lost.

mod close;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::args::{By, LiveArgs};
use super::bulk::Bulk;
use super::faults::{Cut, Fault, Faults, Kill, Phases, SOURCE_QEMU, TARGET_QEMU};
use super::leftovers::QemuSettings;
use super::memory::Comparison;
use super::rival::Rival;
use super::stage::Stage;
use super::verdict::LiveReport;
use super::{back, proof, template};
use crate::lab::End;
use crate::move_disk::Moment;
use crate::programs::{self, JOB_FILE, Line, Programs};
use crate::usage::usage;
use crate::wan::spec::CutWindow;

/// How often the lab looks around while the job runs: faults in a short phase need a short step.
const TICK: Duration = Duration::from_millis(10);

/// Runs it; `watch` hears what happens.
///
/// # Errors
/// When the lab itself cannot work: no programs, no guest, no directory.
pub fn run(args: &LiveArgs, watch: &mut dyn FnMut(Moment)) -> io::Result<LiveReport> {
    let programs = match args.by {
        By::Longhaul => {
            watch(Moment::Step("building the programs".to_owned()));
            Some(Programs::find()?)
        }
        By::Qemu => None,
    };
    let stage = Stage::build(args, programs.as_ref(), &mut |step| watch(Moment::Step(step)))?;
    let mut report = LiveReport {
        workload: args.workload.name().to_owned(),
        ram_mib: args.ram_mib(),
        seed: args.link.seed,
        by: match args.by {
            By::Longhaul => "longhaul",
            By::Qemu => "qemu",
        }
        .to_owned(),
        ..LiveReport::default()
    };
    report.report.emulated = stage.lab.not_emulated().is_empty();
    report.report.not_emulated = stage.lab.not_emulated().to_vec();
    report.report.tcp.clone_from(&stage.tcp);
    let mut run = Run {
        args,
        stage,
        report,
        phases: Phases::default(),
        percent: 0.0,
        job: String::new(),
        settings: QemuSettings::default(),
        clock: unix_now(),
    };
    run.play(programs.as_ref(), watch)?;
    if args.keep {
        watch(Moment::Step(format!(
            "kept in {}",
            run.stage.lab.directory().display()
        )));
    }
    Ok(run.report)
}

struct Run<'a> {
    args: &'a LiveArgs,
    stage: Stage,
    report: LiveReport,
    phases: Phases,
    percent: f64,
    /// The job's number, once it is known.
    job: String,
    /// QEMU's migration settings before the job.
    settings: QemuSettings,
    /// When the job began, in seconds since 1970: events before are no part of it.
    clock: f64,
}

/// Somebody who migrates, and the lines in which it tells.
enum Mover {
    Operator(Child),
    /// Set where nobody waits for it any longer.
    Qemu(Arc<AtomicBool>),
}

impl Run<'_> {
    fn play(&mut self, programs: Option<&Programs>, watch: &mut dyn FnMut(Moment)) -> io::Result<()> {
        watch(Moment::Step(format!(
            "the guest is up; watching it for {}",
            self.args.before
        )));
        let before = self.move_first(programs, watch)?;
        let up = self.stage.consoles.now();
        self.idle(self.args.before.0)?;
        if let (Some(programs), Some(ahead)) = (programs, self.args.prepare) {
            watch(Moment::Step(format!(
                "preparing it; the job begins {ahead} later"
            )));
            self.prepare(programs)?;
            self.idle(ahead.0)?;
        }
        self.settings = QemuSettings::of(self.stage.monitor(End::Source));
        let began = self.stage.consoles.now();
        self.clock = unix_now();
        let (link_began, delivered) = (self.link_stats()?, self.stage.lab.delivered()?);
        let bulk = programs.filter(|_| self.args.bulk.is_some());
        let bulk = bulk
            .map(|programs| Bulk::begin(&mut self.stage.lab, programs))
            .transpose()?;
        watch(Moment::Step("migrating".to_owned()));
        let comparison = self.args.compare_memory.then(|| self.compare_memory());
        if let Err(error) = self.migrate(programs, watch) {
            self.report.report.cause = Some(error.to_string());
        }
        if let Some((bulk, programs)) = bulk.zip(programs) {
            bulk.end(&self.stage.lab, programs)?;
        }
        self.report.memory_compared = comparison.map(Comparison::end).transpose()?.flatten();
        let ended = self.stage.consoles.now();
        self.report.report.seconds = (ended - began).as_secs_f64();
        let both = delivered.zip(self.stage.lab.delivered()?);
        self.report.link_bytes = both.map(|(one, two)| (two.0 - one.0, two.1 - one.1));
        watch(Moment::Step("looking who runs the guest".to_owned()));
        self.settle()?;
        self.listen_on(up, began, ended)?;
        self.measure(up, began, ended);
        if let Some(programs) = programs {
            let mut reduced = since(programs.reduced(&self.stage.lab), &before);
            let mut take = |name: &str| reduced.remove(name).unwrap_or_default();
            self.report.xor_payload_bytes = take("xor_payload");
            self.report.rewritten_bytes = take("rewritten");
            self.report.rewritten_payload_bytes = take("rewritten_payload");
            self.report.reduced_bytes = reduced;
            self.report.leftovers = self.leftovers()?;
        }
        if let Some(programs) = programs.filter(|_| self.args.back && self.report.owner == "target") {
            let back = back::go_back(self.args, &mut self.stage, programs, &self.job, watch)?;
            self.report.back = Some(back);
            self.settle()?;
            self.report
                .leftovers
                .extend(back::leftovers(&self.stage, &self.report));
        }
        proof::prove(self.args, &self.stage, &mut self.report, watch)?;
        self.put_away(link_began.map_or(0.0, |stats| stats.seconds))?;
        self.report.conclude();
        Ok(())
    }

    fn prepare(&mut self, programs: &Programs) -> io::Result<()> {
        let output = programs
            .with_job(&self.stage.lab, &["prepare", "--json"])
            .output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!(
            "the VM cannot be prepared: {}",
            said.trim()
        )))
    }

    /// Moves a first VM, where that is asked for; gives what the gateway made of data until now.
    fn move_first(
        &mut self,
        programs: Option<&Programs>,
        watch: &mut dyn FnMut(Moment),
    ) -> io::Result<BTreeMap<String, u64>> {
        let Some(programs) = programs else {
            return Ok(BTreeMap::new());
        };
        if self.args.after_first {
            watch(Moment::Step("moving a first VM of the same template".to_owned()));
            let bytes = template::move_first(self.args, &mut self.stage, programs)?;
            self.report.first_wan_bytes = Some(bytes);
            watch(Moment::Step("the guest is up".to_owned()));
        }
        Ok(programs.reduced(&self.stage.lab))
    }

    fn link_stats(&mut self) -> io::Result<Option<crate::wan::control::Stats>> {
        self.stage.lab.link().map(|link| link.stats()).transpose()
    }

    /// Lets time pass and looks after everything.
    fn idle(&mut self, span: Duration) -> io::Result<()> {
        let start = Instant::now();
        while start.elapsed() < span {
            std::thread::sleep(TICK);
            self.stage.tend()?;
        }
        Ok(())
    }

    fn migrate(&mut self, programs: Option<&Programs>, watch: &mut dyn FnMut(Moment)) -> io::Result<()> {
        if let Some(link) = self.stage.lab.link() {
            let mut cuts = self.args.cut.iter();
            cuts.try_for_each(|cut| match cut {
                Cut::Window(window) => link.cut_between(*window),
                Cut::From(..) => Ok(()),
            })?;
        }
        let (lines, mut mover) = match programs {
            Some(programs) => self.operator(programs)?,
            None => self.rival(),
        };
        let outcome = self.follow(&lines, &mover, programs, watch);
        match &mut mover {
            Mover::Operator(operator) => {
                let _ = operator.kill();
                operator.wait()?;
            }
            Mover::Qemu(given_up) => {
                given_up.store(true, Ordering::Relaxed);
                self.hear_out(&lines)?;
            }
        }
        outcome
    }

    fn operator(&mut self, programs: &Programs) -> io::Result<(Receiver<String>, Mover)> {
        let log = File::create(self.stage.lab.directory().join("longhaul.log"))?;
        let mut operator = programs
            .run_job(&self.stage.lab, JOB_FILE)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()?;
        self.stage.lab.adopt(operator.id())?;
        let stdout = operator
            .stdout
            .take()
            .ok_or_else(|| io::Error::other("longhaul has no output"))?;
        let (sender, lines) = mpsc::sync_channel(64);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok((lines, Mover::Operator(operator)))
    }

    fn compare_memory(&self) -> Comparison {
        let [source, target] = [End::Source, End::Target].map(|end| self.stage.monitor(end).clone());
        let bytes = self.stage.machine.ram_kib() << 10;
        Comparison::begin(self.stage.lab.directory(), source, target, bytes)
    }

    fn rival(&self) -> (Receiver<String>, Mover) {
        let given_up = Arc::new(AtomicBool::new(false));
        let (sender, lines) = mpsc::sync_channel(64);
        let rival = Rival {
            source: self.stage.monitor(End::Source).clone(),
            target: self.stage.monitor(End::Target).clone(),
            address: self.stage.lab.address(End::Target),
            disks: self.stage.machine.disks.len(),
            ram_mib: self.args.ram_mib(),
            mode: self.args.qemu_ram,
            downtime_ms: self.args.blackout.map_or(300, |span| span.0.as_millis() as u64),
            limit: self.args.limit.0,
            given_up: Arc::clone(&given_up),
        };
        std::thread::spawn(move || rival.run(&sender));
        (lines, Mover::Qemu(given_up))
    }

    /// Follows the lines until the report, and lets happen what is to happen.
    fn follow(
        &mut self,
        lines: &Receiver<String>,
        mover: &Mover,
        programs: Option<&Programs>,
        watch: &mut dyn FnMut(Moment),
    ) -> io::Result<()> {
        let start = Instant::now();
        let mut faults = Faults::new(self.args.faults());
        let outcome = loop {
            match lines.recv_timeout(TICK) {
                Ok(line) => {
                    if self.hear(&line, watch) {
                        break Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break Err(self.without_report()),
            }
            if let Mover::Operator(operator) = mover
                && let Some(used) = usage(operator.id())
            {
                let part = self.report.report.programs.entry("longhaul".to_owned());
                part.or_default().usage = used;
            }
            self.look_at_qemu();
            for fault in faults.due(self.stage.consoles.now(), self.percent, &self.phases) {
                watch(Moment::Step(format!("fault: {fault}")));
                self.let_happen(&fault, programs)?;
            }
            self.stage.tend()?;
            if start.elapsed() > self.args.limit.0 {
                break Err(io::Error::other(format!(
                    "the job was given up after {}",
                    self.args.limit
                )));
            }
        };
        self.report.report.faults_missed = faults.waiting().iter().map(ToString::to_string).collect();
        let phases = self.phases.lengths_ms(self.stage.consoles.now());
        if self.report.phases_ms.is_empty() {
            self.report.phases_ms = phases;
        }
        outcome
    }

    /// Takes a line; gives whether it was the report.
    fn hear(&mut self, line: &str, watch: &mut dyn FnMut(Moment)) -> bool {
        let value: Value = serde_json::from_str(line).unwrap_or_default();
        if let Some(job) = value["job"].as_str() {
            job.clone_into(&mut self.job);
        }
        if let Some(phase) = value["progress"]["phase"].as_str() {
            if let Some(words) = self.phases.begins(phase).then(|| phase_words(phase)).flatten() {
                watch(Moment::Step(words.to_owned()));
            }
            self.phases.see(phase, self.stage.consoles.now());
        }
        self.hear_decision(value["progress"]["live"]["decision"].as_str().unwrap_or_default());
        match programs::read_line(line) {
            Line::Report(job) => {
                let heard = std::mem::take(&mut self.report.decisions);
                self.report.read_job(job);
                // A job that failed says no more than why.
                if self.report.decisions.is_empty() {
                    self.report.decisions = heard;
                }
                return true;
            }
            Line::Progress(percent) => {
                self.percent = percent;
                watch(Moment::Progress(percent));
            }
            Line::Other => {}
        }
        false
    }

    /// Keeps what the job decides on its way, each reason once in a row; the figures behind it change all the time.
    fn hear_decision(&mut self, said: &str) {
        let reason = |text: &str| text.split(": a stop now").next().unwrap_or_default().to_owned();
        let last = self.report.decisions.last().map(|last| reason(last));
        if !said.is_empty() && last != Some(reason(said)) {
            self.report.decisions.push(said.to_owned());
        }
    }

    /// Phases that QEMU itself names: states of the migration at the source, and the guest's stop and start. The freeze is seen by the
    /// agent's record of it.
    fn look_at_qemu(&mut self) {
        let now = self.stage.consoles.now();
        let freezing = self.stage.lab.directory().join("source-agent/state/freezing");
        if std::fs::read_dir(freezing).is_ok_and(|mut files| files.next().is_some()) {
            self.phases.see("freeze", now);
        }
        for (end, guest) in [
            (End::Source, ("STOP", "stop")),
            (End::Target, ("RESUME", "resume")),
        ] {
            for event in self.stage.monitor(end).events() {
                if event.time < self.clock {
                    continue;
                }
                if event.name == guest.0 {
                    self.phases.see(guest.1, now);
                } else if let (End::Source, "MIGRATION", Some(status)) =
                    (end, event.name.as_str(), event.data["status"].as_str())
                {
                    self.phases.see(status, now);
                }
            }
        }
    }

    fn let_happen(&mut self, fault: &Fault, programs: Option<&Programs>) -> io::Result<()> {
        match (fault, programs) {
            (Fault::Kill(kill), _) => self.strike(kill),
            (Fault::Cut(_, length), _) => {
                let window = CutWindow {
                    from: Duration::ZERO,
                    until: *length,
                };
                self.stage
                    .lab
                    .link()
                    .map_or(Ok(()), |link| link.cut_between(window))
            }
            (Fault::Cancel(_), Some(programs)) => {
                let log = File::create(self.stage.lab.directory().join("cancel.log"))?;
                let mut cancel = programs.cancel_job(&self.stage.lab, &self.job);
                // Its end says nothing that the job's report does not.
                let _ = cancel
                    .stdin(Stdio::null())
                    .stdout(log.try_clone()?)
                    .stderr(log)
                    .status()?;
                Ok(())
            }
            (Fault::Cancel(_), None) => Ok(()),
        }
    }

    fn strike(&mut self, kill: &Kill) -> io::Result<()> {
        match kill.who.as_str() {
            SOURCE_QEMU => self.stage.source.kill(),
            TARGET_QEMU => {
                let pid = self.stage.monitor(End::Target).pid();
                if let Some(pid) = pid.and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            who => {
                let mut running = self.stage.running.iter_mut();
                running
                    .by_ref()
                    .filter(|process| process.name() == who)
                    .try_for_each(|process| process.kill(Instant::now()))?;
            }
        }
        Ok(())
    }

    fn without_report(&self) -> io::Error {
        let log =
            std::fs::read_to_string(self.stage.lab.directory().join("longhaul.log")).unwrap_or_default();
        io::Error::other(format!("longhaul ended without a report: {}", log.trim()))
    }
}

/// A phase in words, for those who watch.
fn phase_words(phase: &str) -> Option<&'static str> {
    Some(match phase {
        "scan" => "looking what is free on its disk, while it writes",
        "transfer" => "copying its disk, while it writes",
        "rounds" => "sending what it wrote meanwhile",
        "ram" => "sending its memory, and again what changes",
        "handover" => "it stands: the rest goes, and the other site takes over",
        "in_doubt" => "handed over; waiting for word from the other site",
        _ => return None,
    })
}

/// What was counted since `before`.
fn since(mut now: BTreeMap<String, u64>, before: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    for (kind, bytes) in &mut now {
        *bytes -= before.get(kind).copied().unwrap_or_default().min(*bytes);
    }
    now
}

fn unix_now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0.0, |now| now.as_secs_f64())
}
