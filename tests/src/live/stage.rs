//! Everything of a live lab that runs: two sites, their programs, the guest's QEMU, ears at both ends.
//!
//! Owns the order in which it is built, and who owns the guest. Leaves alone the job and the judgement.
//! Promises that the ears are there before QEMU is, that the target's QEMU, which an agent starts, ends with
//! the lab, and that nothing outlives the lab.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::args::LiveArgs;
use super::console::Consoles;
use super::machine::{Disk, Machine};
use super::monitor::Monitor;
use super::vm::Vm;
use super::{bulk, memory, rival, settings, template};
use crate::guest::workload::{Program, with_program, workload_kernel};
use crate::guest::{self, Fs, Kind};
use crate::lab::{End, Lab};
use crate::process::Process;
use crate::programs::{Job, Programs};
use crate::usage::{Usage, usage};

/// How long a guest under software emulation may take until its workload runs: redis loads its documents.
const READY_LIMIT: Duration = Duration::from_secs(420);

/// A running lab. The order of the fields is the order in which they end.
#[derive(Debug)]
pub struct Stage {
    pub running: Vec<Process>,
    pub source: Vm,
    /// The target's QEMU, if the lab itself started it.
    pub target: Option<Vm>,
    pub monitors: [Monitor; 2],
    pub consoles: Consoles,
    pub machine: Machine,
    pub lab: Lab,
    /// The congestion control of TCP, where QEMU migrates alone.
    pub tcp: Option<String>,
    adopted: Option<u32>,
    target_used: Option<Usage>,
}

impl Stage {
    /// Builds it and waits until the guest's workload is in its steady state.
    ///
    /// # Errors
    /// When a part cannot be made or the guest does not come up.
    pub fn build(
        args: &LiveArgs,
        programs: Option<&Programs>,
        say: &mut dyn FnMut(String),
    ) -> io::Result<Self> {
        let parent = args.directory.clone().unwrap_or_else(std::env::temp_dir);
        let mut lab = Lab::start(&args.link, &parent, args.keep)?;
        let directory = lab.directory().to_owned();
        for missing in lab.not_emulated() {
            say(format!("not emulated: {missing}"));
        }
        let image = settings::disk(&directory, End::Source, 0);
        if let Some(programs) = programs {
            programs.prepare(&lab, &args.link, &job(args, &image))?;
        }
        let tcp = programs.is_none().then(|| lab.favour_tcp()).transpose()?;
        make_folders(&directory)?;
        say("making the guest's disk".to_owned());
        make_disk(args, &image, &|step| eprintln!("{step} ..."))?;
        make_bulk(args, &directory)?;
        let consoles = Consoles::listen(&directory)?;
        let socket = |end: End| directory.join(format!("{}-lab.sock", end.name()));
        let monitors = [
            Monitor::listen(&socket(End::Source))?,
            Monitor::listen(&socket(End::Target))?,
        ];
        let mut machine = machine(args, &directory, &consoles, &monitors)?;
        if args.after_first {
            machine = template::first(&machine, args);
        }
        let template = at_target(args, &directory, &machine, &consoles, &monitors);
        if programs.is_some() {
            // The way back starts a QEMU where the guest came from.
            let home = machine.template(&consoles.socket(End::Source), monitors[0].socket());
            settings::extend(&directory, &template, args.back.then_some(&home))?;
            if args.compare_memory {
                settings::add(&directory, End::Target, &memory::hook(&directory)?)?;
            }
            settings::write_job(&directory, &machine, args)?;
        }
        say("starting the guest at the source".to_owned());
        let log = directory.join("source-qemu.log");
        let source = Vm::start(
            &machine,
            &monitors[0],
            |program| lab.command(End::Source, program),
            &log,
        )?;
        lab.adopt(source.pid())?;
        let mut running = Vec::new();
        if let Some(programs) = programs {
            for launch in programs.launches(&lab) {
                running.push(Process::start(&mut lab, launch)?);
            }
            programs.wait_ready(&lab, &[])?;
        }
        let mut stage = Self {
            running,
            source,
            target: None,
            monitors,
            consoles,
            machine,
            lab,
            tcp,
            adopted: None,
            target_used: None,
        };
        stage
            .consoles
            .wait_for("LONGHAUL-GUEST-READY", Duration::ZERO, READY_LIMIT)?;
        if programs.is_none() {
            stage.start_target(&template)?;
        }
        Ok(stage)
    }

    /// Starts another guest at the source, where the last one has ended, and waits until its workload is in its steady state.
    ///
    /// # Errors
    /// When its disk cannot be made or it does not come up.
    pub fn replace(&mut self, args: &LiveArgs, machine: Machine) -> io::Result<()> {
        make_disk(args, &self.disk(End::Source), &|step| eprintln!("{step} ..."))?;
        self.consoles.forget();
        let from = self.consoles.now();
        let lab = &self.lab;
        let log = lab.directory().join("source-qemu-2.log");
        let program = |program: &Path| lab.command(End::Source, program);
        self.source = Vm::start(&machine, &self.monitors[0], program, &log)?;
        self.lab.adopt(self.source.pid())?;
        (self.machine, self.target_used) = (machine, None);
        self.consoles
            .wait_for("LONGHAUL-GUEST-READY", from, READY_LIMIT)?;
        Ok(())
    }

    /// Starts the target's QEMU as an agent would.
    fn start_target(&mut self, template: &Machine) -> io::Result<()> {
        let directory = self.lab.directory();
        let mut machine = template.clone();
        for (number, disk) in machine.disks.iter_mut().enumerate() {
            let image = settings::disk(directory, End::Target, number);
            rival::make_image(Path::new(&self.machine.disks[number].path), &image, &disk.format)?;
            disk.path = image.display().to_string();
        }
        machine.name.clone_from(&self.machine.name);
        machine.qmp = directory.join("target.qmp").display().to_string();
        machine.pidfile = directory.join("target.pid").display().to_string();
        let log = directory.join("target-qemu.log");
        let lab = &self.lab;
        let target = Vm::start(
            &machine,
            &self.monitors[1],
            |program| lab.command(End::Target, program),
            &log,
        )?;
        self.lab.adopt(target.pid())?;
        self.target = Some(target);
        Ok(())
    }

    /// Looks after the programs, and has the target's QEMU, as soon as it is there, end with the lab.
    ///
    /// # Errors
    /// When a program keeps dying.
    pub fn tend(&mut self) -> io::Result<()> {
        let _ = self.source.usage();
        if let Some(target) = &mut self.target {
            let _ = target.usage();
        }
        let pid = self.monitors[1].pid();
        if pid != self.adopted && self.target.is_none() {
            self.adopted = pid;
            pid.map_or(Ok(()), |pid| self.lab.adopt(pid))?;
        }
        if let Some(used) = pid.and_then(usage) {
            self.target_used = Some(self.target_used.unwrap_or_default().max(used));
        }
        let lab = &mut self.lab;
        self.running
            .iter_mut()
            .try_for_each(|process| process.tend(lab, Instant::now()))
    }

    /// The lab's QMP connection at an end.
    pub fn monitor(&self, end: End) -> &Monitor {
        match end {
            End::Source => &self.monitors[0],
            End::Target => &self.monitors[1],
        }
    }

    /// Who runs the guest now, by QEMU's own word.
    pub fn owners(&self) -> Vec<End> {
        let runs = |end: &End| self.monitor(*end).run_state().as_deref() == Some("running");
        [End::Source, End::Target].into_iter().filter(runs).collect()
    }

    /// Where the disk lies at an end.
    pub fn disk(&self, end: End) -> PathBuf {
        settings::disk(self.lab.directory(), end, 0)
    }

    /// What the target's QEMU has used.
    pub fn target_usage(&mut self) -> Option<Usage> {
        match &mut self.target {
            Some(target) => Some(target.usage()),
            None => self.target_used,
        }
    }
}

/// The machine as it is started at the target.
fn at_target(
    args: &LiveArgs,
    directory: &Path,
    machine: &Machine,
    consoles: &Consoles,
    monitors: &[Monitor; 2],
) -> Machine {
    let mut template = machine.template(&consoles.socket(End::Target), monitors[1].socket());
    if let Some(socket) = &mut template.guest_agent {
        *socket = settings::guest_agent(directory, End::Target);
    }
    for disk in &mut template.disks {
        args.target_format().clone_into(&mut disk.format);
    }
    template
}

/// What a store of firmware variables holds in the lab: as large as OVMF's, and no block like another.
pub fn vars() -> Vec<u8> {
    let blocks = (0..132_u32).flat_map(|block| [block.to_le_bytes(); 1024]);
    blocks.flatten().collect()
}

/// What the programs' settings need to know.
fn job(args: &LiveArgs, image: &Path) -> Job {
    Job {
        image: image.to_owned(),
        format: args.format.clone(),
        target_format: args.target_format().to_owned(),
        connections: args.connections,
        ideas: args.ideas.clone(),
        both_ways: args.back,
    }
}

fn make_folders(directory: &Path) -> io::Result<()> {
    for end in [End::Source, End::Target] {
        fs::create_dir_all(settings::qmp_folder(directory, end))?;
        if let Some(folder) = settings::disk(directory, end, 0).parent() {
            fs::create_dir_all(folder)?;
        }
    }
    Ok(())
}

/// The disk of the job beside the guest's.
fn make_bulk(args: &LiveArgs, directory: &Path) -> io::Result<()> {
    args.bulk
        .map_or(Ok(()), |bytes| bulk::prepare(directory, bytes.0))
}

fn make_disk(args: &LiveArgs, image: &Path, say: &dyn Fn(&str)) -> io::Result<()> {
    let raw = match &args.disk {
        Some(disk) => disk.clone(),
        None if args.fs == Fs::Ext4 => guest::disk(args.kind, say)?,
        None if args.kind == Kind::Tiny => guest::tiny(args.fs, say)?,
        None => {
            return Err(io::Error::other(
                "only the tiny disk can have another file system: --kind tiny",
            ));
        }
    };
    if args.format == "raw" {
        return guest::copy(&raw, image);
    }
    let made = Command::new("qemu-img")
        .args(["convert", "-O", &args.format])
        .args([&raw, image])
        .status()?;
    made.success().then_some(()).ok_or_else(|| {
        io::Error::other(format!(
            "qemu-img cannot make {} of {}",
            args.format,
            raw.display()
        ))
    })
}

fn machine(
    args: &LiveArgs,
    directory: &Path,
    consoles: &Consoles,
    monitors: &[Monitor; 2],
) -> io::Result<Machine> {
    let say = |step: &str| eprintln!("{step} ...");
    let mut kernel = workload_kernel(&say)?;
    if args.guest_agent {
        kernel = with_program(kernel, Program::GuestAgent, &say)?;
    }
    if args.fs == Fs::Ntfs {
        kernel = with_program(kernel, Program::Ntfs3g, &say)?;
    }
    let disk = Disk {
        path: settings::disk(directory, End::Source, 0).display().to_string(),
        format: args.format.clone(),
    };
    let mut machine = Machine::new(directory, &kernel, disk, args.fs, args.workload, args.link.seed);
    machine.guest_agent = args
        .guest_agent
        .then(|| settings::guest_agent(directory, End::Source));
    machine.console = consoles.socket(End::Source).display().to_string();
    machine.lab_qmp = monitors[0].socket().display().to_string();
    let folder = settings::qmp_folder(directory, End::Source);
    machine.qmp = folder.join("web.qmp").display().to_string();
    if args.vars {
        let store = settings::disk(directory, End::Source, 1);
        fs::write(&store, vars())?;
        machine.vars = Some(store.display().to_string());
    }
    machine.ram_mib = args.ram_mib();
    machine.core = args.core;
    if let Some(qemu) = &args.qemu {
        // The agents run elsewhere. A word without a slash is looked for in PATH, there as here.
        let found = if qemu.components().count() > 1 {
            std::path::absolute(qemu)?
        } else {
            qemu.clone()
        };
        machine.set_program(found.display().to_string());
    }
    Ok(machine)
}
