//! `lab demo`: a guest that works moves over an emulated WAN while somebody watches, and proves itself there. With `--cold`
//! its disk alone is moved, proved equal and booted.
//!
//! Owns the story and the live line. Leaves alone each of its parts. Promises a failure in words and in the
//! exit code when any part of the story fails, the guest's proof or boot included.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;

use longhaul_common::units::Span;

use crate::guest::boot::{Booted, boot};
use crate::guest::workload::Workload;
use crate::guest::{self, Kind};
use crate::ideas::Ideas;
use crate::live::args::{By, LiveArgs, Ram};
use crate::live::rival::RamMode;
use crate::live::verdict::LiveReport;
use crate::move_disk::{self, Moment, MoveArgs};
use crate::page::{Paint, page, span};
use crate::report::Report;
use crate::wan::spec::LinkSpec;

/// A guest under software emulation on a busy machine takes a while.
pub const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// Width of the live bar.
const BAR: usize = 40;

/// What the demonstration uses.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Which disk
    #[arg(long, value_enum, default_value = "small")]
    pub kind: Kind,
    /// Move a disk whose machine is off
    #[arg(long)]
    pub cold: bool,
    /// What the guest does meanwhile
    #[arg(long, value_enum, default_value = "mixed", conflicts_with = "cold")]
    pub workload: Workload,
    /// The guest's memory
    #[arg(long, default_value = "256M", conflicts_with = "cold")]
    pub ram: Ram,
}

/// Runs it, on this link; gives whether all went well.
///
/// # Errors
/// When a part cannot be started at all.
pub fn run(args: &DemoArgs, job: MoveArgs) -> io::Result<bool> {
    if args.cold {
        cold(args, job)
    } else {
        live(args, job.link)
    }
}

fn live(args: &DemoArgs, link: LinkSpec) -> io::Result<bool> {
    println!(
        "Longhaul moves a running Linux machine from one site to another: its disk, its memory, all of it."
    );
    println!("The machine works on, and says a heartbeat twenty times a second.\n");
    let step = |text: &str| println!("  {text} ...");
    guest::disk(args.kind, &step)?;
    let mut shown = Live::new();
    let report = crate::live::run::run(&job_of(args, link), &mut |moment| shown.show(&moment))?;
    print!("{}", crate::live::page::page(&report));
    println!("\n{}", live_closing(&report));
    Ok(report.report.ok)
}

fn live_closing(report: &LiveReport) -> String {
    if !report.report.ok {
        return "The demonstration failed. `cargo lab live --keep` keeps configs and logs to look at."
            .to_owned();
    }
    let silence = report.blackout_heartbeat_ms.unwrap_or_default();
    let handover = report.handover_heartbeat_ms.unwrap_or(silence);
    format!(
        "The machine works at the other site after {}. Its users missed it for {silence:.0} ms at most, for {handover:.0} ms at the handover.\n\
         `lab demo --cold` moves a machine that is off; `lab live --help` has faults to try.",
        span(report.report.seconds)
    )
}

/// The live migration that is shown.
fn job_of(args: &DemoArgs, link: LinkSpec) -> LiveArgs {
    let seconds = |seconds| Span(Duration::from_secs(seconds));
    LiveArgs {
        fs: guest::Fs::Ext4,
        guest_agent: false,
        fstrim: false,
        prepare: None,
        proof_age: None,
        kind: args.kind,
        disk: None,
        format: "raw".to_owned(),
        workload: args.workload,
        ram: Some(args.ram),
        qemu: None,
        core: None,
        link,
        cut: Vec::new(),
        kill: Vec::new(),
        cancel: None,
        target_format: None,
        blackout: None,
        give_up: None,
        vars: false,
        by: By::Longhaul,
        qemu_ram: RamMode::Plain,
        after_first: false,
        before: seconds(4),
        after: seconds(3),
        connections: None,
        compare_memory: false,
        bulk: None,
        back: false,
        forget_changes: false,
        ideas: Ideas::default(),
        keep: false,
        directory: None,
        limit: seconds(600),
    }
}

fn cold(args: &DemoArgs, mut job: MoveArgs) -> io::Result<bool> {
    let mut live = Live::new();
    let step = |text: &str| println!("  {text} ...");
    println!("Longhaul moves a Linux machine's disk from one site to another.\n");
    job.image = guest::disk(args.kind, &step)?;
    let kernel = guest::kernel(&step)?;
    let mut booted = None;
    let report = move_disk::run(&job, &mut |moment| live.show(&moment), &mut |copy: &Path| {
        println!("  booting the copy ...");
        booted = Some(boot(copy, &job.target_format, "/dev/vda", &kernel, BOOT_LIMIT)?);
        Ok(())
    })?;
    print!("{}", page(&report, booted.as_ref(), Paint::detect()));
    show_console(booted.as_ref());
    let well = report.ok && booted.as_ref().is_some_and(|booted| booted.ok);
    println!("\n{}", closing(&report, well));
    Ok(well)
}

fn closing(report: &Report, well: bool) -> String {
    if well {
        return format!(
            "The machine is at the other site after {}, and nothing is missing.",
            span(report.seconds)
        );
    }
    "The demonstration failed. `cargo lab move --image FILE --keep` keeps configs and logs to look at."
        .to_owned()
}

fn show_console(booted: Option<&Booted>) {
    for line in booted
        .filter(|booted| !booted.ok)
        .into_iter()
        .flat_map(|booted| booted.console.iter().rev().take(15).rev())
    {
        println!("  | {line}");
    }
}

/// What is shown while the job runs: on a terminal one line that changes, else a line every ten per cent.
#[derive(Debug)]
pub struct Live {
    terminal: bool,
    start: Instant,
    shown: i64,
    open: bool,
}

impl Default for Live {
    fn default() -> Self {
        Self::new()
    }
}

impl Live {
    /// For standard output.
    pub fn new() -> Self {
        Self {
            terminal: io::stdout().is_terminal(),
            start: Instant::now(),
            shown: -1,
            open: false,
        }
    }

    /// Shows one moment.
    pub fn show(&mut self, moment: &Moment) {
        match moment {
            Moment::Step(text) => {
                self.close();
                println!("  {text} ...");
                self.start = Instant::now();
            }
            Moment::Progress(percent) => self.progress(*percent),
        }
    }

    fn progress(&mut self, percent: f64) {
        let elapsed = span(self.start.elapsed().as_secs_f64());
        if self.terminal {
            let done = (percent / 100.0 * BAR as f64).round().clamp(0.0, BAR as f64) as usize;
            print!(
                "\r  [{}{}] {percent:>5.1} %  {elapsed:<12}",
                "#".repeat(done),
                ".".repeat(BAR - done)
            );
            self.open = true;
            let _ = io::stdout().flush();
            return;
        }
        let tenth = (percent / 10.0) as i64;
        if tenth > self.shown {
            self.shown = tenth;
            println!("    {:>3.0} %  after {elapsed}", percent);
        }
    }

    fn close(&mut self) {
        if std::mem::take(&mut self.open) {
            println!();
        }
    }
}
