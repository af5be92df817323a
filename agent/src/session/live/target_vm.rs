//! The target's QEMU of one session: started for a generation, fed, looked at, let run, ended.
//!
//! Owns the process and the socket for its stream. Leaves the decision to `arrive`. Promises that the QEMU of an earlier generation is
//! gone before the next one starts, and that its facts were compared with the source's before it is called ready.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use longhaul_common::ids::DiskIndex;
use longhaul_common::wire::session::ShadowId;

use super::ram_in::RamIn;
use super::target::LiveTarget;
use super::trial;
use super::word::VmWords;
use crate::vm::handover::{Generation, TargetQemu};
use crate::vm::incoming::{Files, Incoming, Template, Values};
use crate::vm::outgoing::stats;
use crate::vm::qmp::MigrationStatus;
use crate::vm::rounds;

/// The QEMU that a VM arrives in.
pub(super) struct TargetQemuVm {
    s: Arc<LiveTarget>,
    vm: Option<VmWords>,
    incoming: Option<Incoming>,
    paths: Vec<PathBuf>,
    /// Why it cannot be used, until somebody asks.
    why: Option<String>,
}

impl TargetQemuVm {
    pub(super) fn new(session: &Arc<LiveTarget>) -> Self {
        Self {
            s: Arc::clone(session),
            vm: None,
            incoming: None,
            paths: Vec::new(),
            why: None,
        }
    }

    /// What the source said of its VM.
    pub(super) fn set_vm(&mut self, vm: VmWords) {
        self.vm = Some(vm);
    }

    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    fn file(&self, end: &str) -> PathBuf {
        let name = format!("vm-{}.{end}", self.s.job.short());
        self.s.agent.settings.paths.run.join(name)
    }

    fn files(&self) -> Files {
        let name = format!("vm-{}", self.s.job.short());
        Files::in_folder(&self.s.agent.settings.paths.run, &name)
    }

    /// Starts a QEMU on these disks and lets it wait for the stream. Gives what people should know.
    pub(super) async fn start(
        &mut self,
        disks: &[PathBuf],
        generation: Generation,
    ) -> Result<Vec<String>, String> {
        self.paths = disks.to_vec();
        let said = |error: &dyn std::error::Error| longhaul_common::wire::session::chain(error);
        let incoming = match self.s.vm.qmp.clone() {
            Some(socket) => Incoming::adopt(&socket).await.map_err(|error| said(&error))?,
            None => self.launch(disks).await?,
        };
        let compared = match &self.vm {
            Some(words) => trial::compare(words, &incoming).await,
            None => Ok(Vec::new()),
        };
        let mut notes = match compared {
            Ok(notes) => notes,
            Err(why) => {
                incoming.abort().await;
                return Err(why);
            }
        };
        notes.extend(self.note_changes(&incoming, disks, generation).await);
        let socket = self.file("ram");
        let _ = std::fs::remove_file(&socket);
        if let Err(error) = incoming.listen(&socket).await {
            let why = said(&error);
            incoming.abort().await;
            return Err(why);
        }
        let window = self.s.agent.settings.vm.ram_memory.0.saturating_mul(2);
        let ram = RamIn::start(generation, &socket, window);
        let ram = ram.map_err(|error| format!("the target's QEMU does not take its stream: {error}"))?;
        self.s.ram.send_replace(Some(ram));
        self.incoming = Some(incoming);
        Ok(notes)
    }

    /// Has QEMU note what the VM will write, for the way back. Gives why it does not. Now, so that it costs no blackout: the VM does not
    /// run before its stream was loaded.
    async fn note_changes(
        &self,
        incoming: &Incoming,
        disks: &[PathBuf],
        generation: Generation,
    ) -> Option<String> {
        let settings = &self.s.agent.settings.vm;
        if !settings.note_changes {
            return None;
        }
        let why = match super::disks::nodes_of(incoming.qmp(), disks).await {
            Ok(nodes) => {
                let (job, generation) = (self.s.job, generation.0);
                let noted = (0..).map(DiskIndex).zip(nodes).filter_map(|(disk, node)| {
                    let shadow = ShadowId {
                        job,
                        generation,
                        disk,
                    };
                    Some((node?, shadow))
                });
                let noted: Vec<_> = noted.collect();
                let granularity =
                    u32::try_from(settings.changes_granularity.0).unwrap_or(rounds::GRANULARITY);
                match rounds::start_since(incoming.qmp(), &noted, granularity).await {
                    Ok(()) if noted.len() == disks.len() => return None,
                    Ok(()) => "not every disk is found in the target's QEMU".to_owned(),
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        Some(format!("a way back will have to compare digests: {why}"))
    }

    async fn launch(&self, disks: &[PathBuf]) -> Result<Incoming, String> {
        let disks: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
        let (qmp, files) = (self.file("qmp"), self.files());
        let _ = std::fs::remove_file(&qmp);
        let values = Values {
            disks: &disks,
            qmp: &qmp,
            pid_file: &files.pid,
            name: &self.s.open.name,
            uuid: self.vm.as_ref().and_then(|vm| vm.uuid.as_deref()),
        };
        let template = Template(self.s.agent.settings.vm.command.clone());
        let started = Incoming::start(&template, &values, &files).await;
        started.map_err(|error| longhaul_common::wire::session::chain(&error))
    }

    /// How QEMU is, asked now; `None` where it does not answer.
    pub(super) async fn look(&mut self) -> Option<TargetQemu> {
        let Some(incoming) = &self.incoming else {
            return self.find().await;
        };
        match stats(incoming.qmp()).await {
            Ok(stats) => match stats.status {
                MigrationStatus::Failed | MigrationStatus::Cancelled => {
                    let said = [stats.error.unwrap_or_default(), incoming.last_words()];
                    let why = said.join(" ").trim().to_owned();
                    tracing::warn!(job = %self.s.job, "the target's QEMU did not load the VM: {why}");
                    self.why = Some(why);
                    Some(TargetQemu::Gone)
                }
                MigrationStatus::Completed => match incoming.is_running().await {
                    Ok(true) => Some(TargetQemu::Running),
                    Ok(false) => Some(TargetQemu::Loaded),
                    Err(error) => error.is_lost().then_some(TargetQemu::Gone),
                },
                _ => match incoming.is_running().await {
                    Ok(true) => Some(TargetQemu::Running),
                    _ => Some(TargetQemu::Loading),
                },
            },
            Err(error) if error.is_lost() => {
                let why = incoming.last_words();
                tracing::warn!(job = %self.s.job, "the target's QEMU is gone: {why}");
                self.why = Some(match why.as_str() {
                    "" => "it ended without a word".to_owned(),
                    why => format!("it ended: {why}"),
                });
                self.incoming = None;
                Some(TargetQemu::Gone)
            }
            Err(_) => None,
        }
    }

    /// Why it cannot be used, if that was just found.
    pub(super) fn take_why(&mut self) -> Option<String> {
        self.why.take().filter(|why| !why.is_empty())
    }

    /// A QEMU of a former life of this agent.
    async fn find(&mut self) -> Option<TargetQemu> {
        match Incoming::find(&self.file("qmp"), None, &self.files()).await {
            Ok(Some(incoming)) => {
                self.incoming = Some(incoming);
                Box::pin(self.look()).await
            }
            Ok(None) => Some(TargetQemu::Gone),
            Err(error) => {
                tracing::warn!(job = %self.s.job, "a QEMU of ours may be there, but does not answer: {error}");
                None
            }
        }
    }

    /// Lets the VM run.
    pub(super) async fn run(&mut self) -> Result<(), String> {
        let Some(incoming) = &self.incoming else {
            return Err("the VM's QEMU is gone".to_owned());
        };
        incoming
            .run()
            .await
            .map_err(|error| longhaul_common::wire::session::chain(&error))
    }

    /// Ends it. Only while its VM must not run.
    pub(super) async fn kill(&mut self) {
        self.s.ram.send_replace(None);
        if self.incoming.is_none() && self.s.vm.qmp.is_none() {
            self.incoming = Incoming::find(&self.file("qmp"), None, &self.files())
                .await
                .ok()
                .flatten();
        }
        if let Some(incoming) = self.incoming.take() {
            incoming.abort().await;
        }
        let _ = std::fs::remove_file(self.file("ram"));
    }

    /// The VM runs: its QEMU is its own master now.
    pub(super) fn release(&mut self) {
        self.s.ram.send_replace(None);
        self.incoming = None;
        let _ = std::fs::remove_file(self.file("ram"));
    }
}
