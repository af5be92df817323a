//! `bench-wan`: runs the side-by-side benchmark, and makes its page. A checklist.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use longhaul_benches::micro;
use longhaul_benches::wan::plan::Wanted;
use longhaul_benches::wan::record;
use longhaul_benches::wan::runner::Lab;
use longhaul_benches::wan::{page, plan};

/// Longhaul, QEMU alone and the usual tools over the same emulated links, with the same guest.
#[derive(Debug, Parser)]
#[command(name = "bench-wan", version)]
struct Line {
    #[command(subcommand)]
    part: Part,
    /// Folder of the page; results lie in its `results`
    #[arg(long, default_value = "benches", global = true)]
    folder: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Run what is not in the results yet
    Run(Box<Runs>),
    /// Show what would be run
    Plan(Choice),
    /// Take criterion's figures over into the results
    Micro {
        /// Criterion's folder
        #[arg(long, default_value = "target/criterion")]
        criterion: PathBuf,
    },
    /// Make RESULTS.md and its pictures from the results
    Report,
}

/// Which runs. Lists are separated by commas; without a list it is all.
#[derive(Args, Debug)]
struct Choice {
    /// Links: veth, 250-2, 200-40, 100-80, 50-100, 20-200, 100-300
    #[arg(long, value_delimiter = ',')]
    profiles: Vec<String>,
    /// What is moved: idle, mixed, redis, fsync, template, back, cold, noise, beside
    #[arg(long, value_delimiter = ',')]
    workloads: Vec<String>,
    /// Who moves: longhaul, longhaul-no-filter, qemu-xbzrle, rsync, ...
    #[arg(long, value_delimiter = ',')]
    contestants: Vec<String>,
    /// Runs of each, over which medians are taken
    #[arg(long, default_value_t = 3)]
    runs: u32,
}

#[derive(Args, Debug)]
struct Runs {
    #[command(flatten)]
    choice: Choice,
    /// Stop after so many runs; the next call goes on
    #[arg(long)]
    most: Option<usize>,
    /// Folder of the programs; default: this program's own
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Folder for what a run needs: room for two disks of 4 GiB
    #[arg(long)]
    directory: Option<PathBuf>,
    /// QEMU's program, for both sides
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// Keep the lab's whole report of each run in this folder
    #[arg(long)]
    reports: Option<PathBuf>,
}

impl Choice {
    fn wanted(&self) -> io::Result<Wanted> {
        let kept = |list: &[String]| list.iter().filter(|name| !name.is_empty()).cloned().collect();
        let wanted = Wanted {
            profiles: kept(&self.profiles),
            cases: kept(&self.workloads),
            contestants: kept(&self.contestants),
            runs: self.runs.max(1),
        };
        match wanted.unknown() {
            Some(name) => Err(io::Error::other(format!(
                "nothing is called '{name}'; see --help"
            ))),
            None => Ok(wanted),
        }
    }
}

fn main() -> ExitCode {
    match act(&Line::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-wan: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(line: &Line) -> io::Result<()> {
    let results = line.folder.join("results");
    let (runs, parts) = (results.join("runs.jsonl"), results.join("micro.json"));
    match &line.part {
        Part::Run(asked) => run(asked, &runs),
        Part::Plan(choice) => show(&choice.wanted()?, &runs),
        Part::Micro { criterion } => {
            let found = micro::read(criterion)?;
            std::fs::create_dir_all(&results)?;
            std::fs::write(parts, serde_json::to_string_pretty(&found)? + "\n")
        }
        Part::Report => {
            let text = std::fs::read_to_string(parts).unwrap_or_else(|_| "[]".to_owned());
            page::write(
                &line.folder,
                &record::read(&runs)?,
                &serde_json::from_str::<Vec<_>>(&text)?,
            )
        }
    }
}

fn show(wanted: &Wanted, runs: &std::path::Path) -> io::Result<()> {
    let done = record::read(runs)?;
    for cell in wanted.cells() {
        let contestants = wanted.contestants(cell);
        let names: Vec<_> = contestants.iter().map(|contestant| contestant.name).collect();
        let finished = done.iter().filter(|record| plan::is_of(record, cell)).count();
        println!(
            "{:8} {:9} {finished:3} done, {} each of {}",
            cell.profile.name,
            cell.case.name(),
            wanted.runs,
            names.join(", ")
        );
    }
    Ok(())
}

fn run(asked: &Runs, runs: &std::path::Path) -> io::Result<()> {
    let wanted = asked.choice.wanted()?;
    let own = std::env::current_exe()?;
    let beside = own.parent().map(PathBuf::from).unwrap_or_default();
    let lab = Lab {
        programs: asked.programs.clone().unwrap_or(beside).canonicalize()?,
        image: std::path::absolute(".lab/bench/standard.raw")?,
        directory: asked.directory.clone(),
        qemu: asked.qemu.clone(),
        reports: asked.reports.clone(),
    };
    let mut done = record::read(runs)?;
    for _ in 0..asked.most.unwrap_or(usize::MAX) {
        let Some(next) = wanted.next(&done) else {
            println!("all is done");
            break;
        };
        if !next.cell.case.is_live() {
            lab.prepare()?;
        }
        println!(
            "{} {} {} run {} (at most {} s)",
            next.cell.profile.name,
            next.cell.case.name(),
            next.contestant.name,
            next.number,
            next.limit.as_secs()
        );
        let record = lab.play(&next)?;
        println!(
            "  {:?} in {:.1} s, {:.0} MB{}",
            record.end,
            record.seconds,
            record.wan_bytes as f64 / 1e6,
            record
                .cause
                .as_ref()
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default()
        );
        record::append(runs, &record)?;
        done.push(record);
    }
    Ok(())
}
