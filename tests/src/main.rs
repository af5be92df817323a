//! `cargo lab`: a checklist from words on the command line to one of the lab's parts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use longhaul_common::units::Span;
use longhaul_lab::cold_rival::{self, CopyArgs};
use longhaul_lab::demo::{self, BOOT_LIMIT, DemoArgs, Live};
use longhaul_lab::guest::{self, Kind};
use longhaul_lab::ideas::Ideas;
use longhaul_lab::janitor;
use longhaul_lab::live::args::LiveArgs;
use longhaul_lab::move_disk::{self, Moment, MoveArgs};
use longhaul_lab::namespace::{SOURCE_ADDRESS, Site, TARGET_ADDRESS};
use longhaul_lab::page::{Paint, page};
use longhaul_lab::wan::path::Path;
use longhaul_lab::wan::pump::{Pump, open};
use longhaul_lab::wan::spec::LinkSpec;

/// Two sites on one machine, joined by an emulated WAN.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Line {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Move a disk between two sites through real programs and print the report
    Move(Box<Move>),
    /// Make a guest's disk, move it, boot the copy, and show it all
    Demo(Box<Demo>),
    /// Migrate a running guest between two sites through real programs, prove it whole, and print the report
    Live(Box<LivePart>),
    /// Copy a disk by a tool that people use for it, for comparison, and print the report
    Copy(Box<Copy>),
    /// Make the disk of a guest that proves itself when booted
    Image(Image),
    /// Boot a disk made by `lab image` and let it prove itself
    Boot(Boot),
    /// Emulate a WAN between two network namespaces (the lab starts this itself)
    Wan(Wan),
    /// Clean up when standard input ends (the lab starts this itself)
    #[command(hide = true)]
    Janitor,
}

#[derive(Args, Debug)]
struct Wan {
    /// Namespace of the source site, as `ip netns` names it
    #[arg(long)]
    source: String,
    /// Namespace of the target site
    #[arg(long)]
    target: String,
    #[command(flatten)]
    link: LinkSpec,
}

#[derive(Args, Debug)]
struct Move {
    #[command(flatten)]
    args: MoveArgs,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Copy {
    #[command(flatten)]
    args: CopyArgs,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct LivePart {
    #[command(flatten)]
    args: LiveArgs,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Demo {
    #[command(flatten)]
    demo: DemoArgs,
    #[command(flatten)]
    link: LinkSpec,
}

#[derive(Args, Debug)]
struct Image {
    #[arg(long, value_enum, default_value = "small")]
    kind: Kind,
    /// File to make
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args, Debug)]
struct Boot {
    #[arg(long)]
    image: PathBuf,
    /// Format of the image, as QEMU names it
    #[arg(long, default_value = "raw")]
    format: String,
    /// The guest's root file system
    #[arg(long, default_value = "/dev/vda")]
    root: String,
}

fn main() -> ExitCode {
    let outcome = match Line::parse().part {
        Part::Move(part) => move_disk(&part),
        Part::Demo(part) => demo::run(&part.demo, plain_job(part.link)).map(verdict),
        Part::Live(part) => migrate(&part),
        Part::Copy(part) => copy_disk(&part),
        Part::Image(image) => make_image(&image).map(|()| ExitCode::SUCCESS),
        Part::Boot(boot) => boot_image(&boot),
        Part::Wan(wan) => emulate(wan).map(|()| ExitCode::SUCCESS),
        Part::Janitor => janitor::run().map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("lab: {error}");
        ExitCode::from(2)
    })
}

/// Exit code 0 for a good end, 1 for a bad one; 2 (from `main`) means that the lab itself could not work.
fn verdict(well: bool) -> ExitCode {
    if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Shows what happens: for people on the page, for programs beside the report.
fn show(live: &mut Live, json: bool, moment: Moment) {
    match (json, moment) {
        (false, moment) => live.show(&moment),
        (true, Moment::Step(step)) => eprintln!("{step} ..."),
        (true, Moment::Progress(_)) => {}
    }
}

fn migrate(part: &LivePart) -> std::io::Result<ExitCode> {
    let mut live = Live::new();
    let report = longhaul_lab::live::run::run(&part.args, &mut |moment| show(&mut live, part.json, moment))?;
    if part.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", longhaul_lab::live::page::page(&report));
    }
    Ok(verdict(report.report.ok))
}

fn move_disk(part: &Move) -> std::io::Result<ExitCode> {
    let mut live = Live::new();
    let mut watch = |moment: Moment| show(&mut live, part.json, moment);
    let report = move_disk::run(&part.args, &mut watch, &mut |_| Ok(()))?;
    if part.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", page(&report, None, Paint::detect()));
    }
    Ok(verdict(report.ok))
}

fn copy_disk(part: &Copy) -> std::io::Result<ExitCode> {
    let mut live = Live::new();
    let report = cold_rival::run(&part.args, &mut |moment| show(&mut live, part.json, moment))?;
    if part.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", page(&report, None, Paint::detect()));
    }
    Ok(verdict(report.ok))
}

/// A job with nothing but a link; the demonstration fills in the disk.
fn plain_job(link: LinkSpec) -> MoveArgs {
    MoveArgs {
        image: PathBuf::new(),
        format: Some("raw".to_owned()),
        target_format: "raw".to_owned(),
        link,
        cut: Vec::new(),
        kill: Vec::new(),
        connections: None,
        beside: None,
        ideas: Ideas::default(),
        keep: false,
        directory: None,
        limit: Span(Duration::from_secs(7200)),
    }
}

fn make_image(image: &Image) -> std::io::Result<()> {
    // Before the minutes that making it takes.
    let folder = image.out.parent().map(PathBuf::from).unwrap_or_default();
    if !PathBuf::from(".").join(folder).is_dir() {
        let problem = format!("{}: there is no folder to put it into", image.out.display());
        return Err(std::io::Error::other(problem));
    }
    let made = guest::disk(image.kind, &|step| eprintln!("{step} ..."))?;
    guest::copy(&made, &image.out)
}

fn boot_image(boot: &Boot) -> std::io::Result<ExitCode> {
    let kernel = guest::kernel(&|step| eprintln!("{step} ..."))?;
    let booted = guest::boot::boot(&boot.image, &boot.format, &boot.root, &kernel, BOOT_LIMIT)?;
    if booted.ok {
        println!(
            "the guest booted and proved {} files in {:.1} s",
            booted.files, booted.seconds
        );
        return Ok(ExitCode::SUCCESS);
    }
    for line in &booted.console {
        println!("{line}");
    }
    Ok(ExitCode::FAILURE)
}

fn emulate(wan: Wan) -> std::io::Result<()> {
    let mtu = wan.link.mtu;
    let source = open(
        &Site {
            namespace: wan.source,
            address: SOURCE_ADDRESS,
        },
        mtu,
    )?;
    let target = open(
        &Site {
            namespace: wan.target,
            address: TARGET_ADDRESS,
        },
        mtu,
    )?;
    let (forth, back) = wan.link.shapes();
    Pump::new(Path::new(forth, back), source, target, mtu).run()
}
