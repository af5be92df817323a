//! `lab move`: one job through real programs over the emulated link.
//!
//! Owns the order of a run: lab, programs, job, faults while it runs, then the lab's own comparison and the
//! report. Leaves alone how the programs are called (`programs`). Promises a report in every case in which
//! the lab itself worked, also when the job fails or a program dies.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::Args;
use longhaul_common::units::Span;

use crate::beside::{Beside, Neighbour};
use crate::compare;
use crate::faults::{Faults, Kill};
use crate::ideas::Ideas;
use crate::lab::Lab;
use crate::process::Process;
use crate::programs::{self, JOB_FILE, Job, Line, Programs};
use crate::report::{LinkReport, ProgramReport, Report};
use crate::usage::usage;
use crate::wan::spec::{CutWindow, LinkSpec};

/// How often programs are looked after while the job runs.
const TICK: Duration = Duration::from_millis(100);

/// What is to be moved, over which link, and what is to go wrong.
#[derive(Args, Clone, Debug)]
pub struct MoveArgs {
    /// The disk to move; it is only read
    #[arg(long)]
    pub image: PathBuf,
    /// Its format, as QEMU names it; asked of qemu-img when not given
    #[arg(long)]
    pub format: Option<String>,
    /// Format of the copy
    #[arg(long, default_value = "raw", value_parser = ["raw", "qcow2"])]
    pub target_format: String,
    #[command(flatten)]
    pub link: LinkSpec,
    /// Cut the link in this window of the job, as "10s..25s"; may be given several times
    #[arg(long)]
    pub cut: Vec<CutWindow>,
    /// Kill a program with -9 at this progress, as "source-gateway@30%"; it is started again after a second
    #[arg(long)]
    pub kill: Vec<Kill>,
    /// QUIC connections between the gateways
    #[arg(long)]
    pub connections: Option<u32>,
    /// Have one TCP flow use the link, too, and report what it gets beside the job
    #[arg(long, value_enum)]
    pub beside: Option<Neighbour>,
    #[command(flatten)]
    pub ideas: Ideas,
    /// Keep the lab's directory: config files, logs, the copy
    #[arg(long)]
    pub keep: bool,
    /// Folder in which the lab's directory is made; needs room for the copy
    #[arg(long)]
    pub directory: Option<PathBuf>,
    /// Give up after this time
    #[arg(long, default_value = "2h")]
    pub limit: Span,
}

/// Something that happened while the job ran, for somebody who watches.
#[derive(Clone, Debug)]
pub enum Moment {
    Step(String),
    Progress(f64),
}

/// Runs the job. `watch` hears what happens; `after` may use the copy before the lab is removed.
///
/// # Errors
/// When the lab itself cannot work: no image, no programs, no directory.
pub fn run(
    args: &MoveArgs,
    watch: &mut dyn FnMut(Moment),
    after: &mut dyn FnMut(&std::path::Path) -> io::Result<()>,
) -> io::Result<Report> {
    let job = resolve(args)?;
    watch(Moment::Step("building the programs".to_owned()));
    let programs = Programs::find()?;
    let parent = args.directory.clone().unwrap_or_else(std::env::temp_dir);
    let mut lab = Lab::start(&args.link, &parent, args.keep)?;
    let not_emulated = lab.not_emulated().to_vec();
    let mut report = Report {
        emulated: not_emulated.is_empty(),
        not_emulated,
        ..Report::default()
    };
    for missing in lab.not_emulated() {
        watch(Moment::Step(format!("not emulated: {missing}")));
    }
    watch(Moment::Step("starting two sites".to_owned()));
    programs.prepare(&lab, &args.link, &job)?;
    let mut running = Vec::new();
    for launch in programs.launches(&lab) {
        running.push(Process::start(&mut lab, launch)?);
    }
    programs
        .wait_ready(&lab, &[])
        .map_err(|error| explain(&error, &running))?;
    let beside = args.beside.map(|congestion| {
        watch(Moment::Step("watching a TCP flow alone on the link".to_owned()));
        Beside::start(&mut lab, congestion)
    });
    let began = Instant::now();
    let link_began = lab
        .link()
        .map(|link| link.stats())
        .transpose()?
        .map_or(0.0, |stats| stats.seconds);
    let mut stage = Stage {
        args,
        lab: &mut lab,
        running: &mut running,
        report: &mut report,
        beside: beside.transpose()?,
    };
    if let Err(error) = stage.play(&programs, watch) {
        report.cause = Some(error.to_string());
    }
    report.seconds = began.elapsed().as_secs_f64();
    settle(&mut lab, &mut running, args, link_began, &mut report)?;
    judge(&lab, &job, &mut report, watch)?;
    if report.ok {
        after(&programs::target_image(lab.directory()))?;
    }
    if args.keep {
        watch(Moment::Step(format!("kept in {}", lab.directory().display())));
    }
    Ok(report)
}

fn resolve(args: &MoveArgs) -> io::Result<Job> {
    let image = args.image.canonicalize();
    let image =
        image.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", args.image.display())))?;
    if image.to_string_lossy().contains(['"', '\\', '\n', '?']) {
        return Err(io::Error::other(format!(
            "{}: please give it a plainer name",
            image.display()
        )));
    }
    let format = args.format.clone().map_or_else(|| sniff(&image), Ok)?;
    let (target_format, connections) = (args.target_format.clone(), args.connections);
    Ok(Job {
        image,
        format,
        target_format,
        connections,
        both_ways: false,
        ideas: args.ideas.clone(),
    })
}

/// The image's format by its first bytes: qcow2's magic, else raw. Others must be named.
fn sniff(image: &std::path::Path) -> io::Result<String> {
    let mut magic = [0; 4];
    let length = io::Read::read(&mut File::open(image)?, &mut magic)?;
    Ok(if length == 4 && &magic == b"QFI\xfb" {
        "qcow2"
    } else {
        "raw"
    }
    .to_owned())
}

/// Ends everything in order and takes the counts.
fn settle(
    lab: &mut Lab,
    running: &mut [Process],
    args: &MoveArgs,
    link_began: f64,
    report: &mut Report,
) -> io::Result<()> {
    for process in running {
        process.stop()?;
        let part = ProgramReport::of(process);
        report.programs.insert(process.name().to_owned(), part);
    }
    if let Some(link) = lab.take_link() {
        let stats = link.stop()?;
        report.link = Some(LinkReport::new(
            &args.link,
            stats,
            link_began,
            link_began + report.seconds,
        ));
    }
    Ok(())
}

/// Compares both disks, if the job got so far that there is a copy.
fn judge(lab: &Lab, job: &Job, report: &mut Report, watch: &mut dyn FnMut(Moment)) -> io::Result<()> {
    let target = programs::target_image(lab.directory());
    if report.cause.is_some() || !target.exists() {
        report.conclude(None);
        return Ok(());
    }
    watch(Moment::Step("comparing both disks, block by block".to_owned()));
    let source = compare::as_raw(&job.image, &job.format, &lab.directory().join("source.raw"))?;
    let target = compare::as_raw(&target, &job.target_format, &lab.directory().join("target.raw"))?;
    let comparison = compare::compare(&source, &target, report.skipped_free_bytes)?;
    report.conclude(Some(comparison));
    Ok(())
}

/// Adds the logs of programs that died to an error.
fn explain(error: &io::Error, running: &[Process]) -> io::Error {
    let logs: Vec<_> = running
        .iter()
        .map(|process| process.dead("was running").to_string())
        .collect();
    io::Error::new(error.kind(), format!("{error}\n{}", logs.join("\n")))
}

/// The time from the operator's command to its end.
struct Stage<'a> {
    args: &'a MoveArgs,
    lab: &'a mut Lab,
    running: &'a mut [Process],
    report: &'a mut Report,
    beside: Option<Beside>,
}

impl Stage<'_> {
    fn play(&mut self, programs: &Programs, watch: &mut dyn FnMut(Moment)) -> io::Result<()> {
        if let Some(link) = self.lab.link() {
            self.args
                .cut
                .iter()
                .try_for_each(|window| link.cut_between(*window))?;
        }
        let log = File::create(self.lab.directory().join("longhaul.log"))?;
        let mut command = programs.run_job(self.lab, JOB_FILE);
        let mut operator = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()?;
        self.lab.adopt(operator.id())?;
        watch(Moment::Step("moving".to_owned()));
        let outcome = self.follow(&mut operator, watch);
        let _ = operator.kill();
        operator.wait()?;
        outcome?;
        self.report.beside = self.beside.as_ref().map(Beside::report).transpose()?;
        Ok(())
    }

    /// Follows the operator program's lines until its report, and lets happen what is to happen.
    fn follow(&mut self, operator: &mut Child, watch: &mut dyn FnMut(Moment)) -> io::Result<()> {
        let stdout = operator
            .stdout
            .take()
            .ok_or_else(|| io::Error::other("longhaul has no output"))?;
        let lines = listen(stdout);
        let mut faults = Faults::new(&self.args.kill);
        let (start, mut progress) = (Instant::now(), 0.0);
        let outcome = loop {
            match lines.recv_timeout(TICK) {
                Ok(line) => match programs::read_line(&line) {
                    Line::Report(report) => {
                        self.report.read_job(report);
                        break Ok(());
                    }
                    Line::Progress(percent) => {
                        progress = percent;
                        self.strike(&mut faults, percent, watch)?;
                        watch(Moment::Progress(percent));
                    }
                    Line::Other => {}
                },
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break Err(self.without_report()),
            }
            if let Some(used) = usage(operator.id()) {
                self.report
                    .programs
                    .entry("longhaul".to_owned())
                    .or_default()
                    .usage = used;
            }
            if let Some(beside) = &mut self.beside {
                beside.look(self.lab, start.elapsed(), progress)?;
            }
            for process in self.running.iter_mut() {
                process.tend(self.lab, Instant::now())?;
            }
            if start.elapsed() > self.args.limit.0 {
                break Err(io::Error::other(format!(
                    "the job was given up after {}",
                    self.args.limit
                )));
            }
        };
        self.report.faults_missed = faults
            .waiting()
            .iter()
            .map(|kill| format!("{}@{}%", kill.program, kill.percent))
            .collect();
        outcome
    }

    fn strike(&mut self, faults: &mut Faults, percent: f64, watch: &mut dyn FnMut(Moment)) -> io::Result<()> {
        for kill in faults.due(percent) {
            watch(Moment::Step(format!(
                "killing {} at {percent:.1} %",
                kill.program
            )));
            for process in self
                .running
                .iter_mut()
                .filter(|process| process.name() == kill.program)
            {
                process.kill(Instant::now())?;
            }
        }
        Ok(())
    }

    fn without_report(&self) -> io::Error {
        let log = std::fs::read_to_string(self.lab.directory().join("longhaul.log")).unwrap_or_default();
        io::Error::other(format!("longhaul ended without a report: {}", log.trim()))
    }
}

/// Reads lines on a thread, so that the lab can look after its programs meanwhile.
fn listen(output: impl io::Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::sync_channel(64);
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines() {
            if line.map(|line| sender.send(line)).is_ok_and(|sent| sent.is_ok()) {
                continue;
            }
            return;
        }
    });
    lines
}
