//! The target's QEMU: started (or adopted), loaded, let run.
//!
//! Owns its process from start to `cont`: command line from a template (`template`), process and its log (`process`), the
//! order of QMP commands (here). Leaves alone who decides that it may run (`handover`) and the stream's bytes.
//!
//! Promises: it is always started with `-S` and waits (`-incoming defer`); `cont` is given only once it has loaded
//! everything and no export of it is left; each wait has a watchdog; a QEMU that was not started here is never killed; one
//! that was is found again after the agent's restart by pid file, monitor and UUID. A QEMU whose load failed cannot be used
//! again: each attempt starts another.

mod error;
mod process;
mod template;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use crate::vm::outgoing::stats;
use crate::vm::qmp::{MigrationStatus, Qmp, QmpError, Watch};
use crate::vm::rounds;

pub use self::error::IncomingError;
pub use self::process::Files;
pub use self::template::{Template, TemplateError, Values};

use self::process::Process;

/// How long QEMU may take from its start to its monitor's greeting.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long an ordinary command's effect may take.
const STATE_LIMIT: Duration = Duration::from_secs(10);

/// A QEMU that waits for, or has taken, a VM.
#[derive(Debug)]
pub struct Incoming {
    qmp: Qmp,
    /// None where it was adopted.
    process: Option<Process>,
}

#[derive(Deserialize)]
struct Status {
    status: String,
    running: bool,
}

#[derive(Deserialize)]
struct Uuid {
    #[serde(rename = "UUID")]
    uuid: String,
}

impl Incoming {
    /// Starts QEMU as `template` says, in a session of its own, and waits for its monitor.
    ///
    /// # Errors
    /// [`IncomingError::Template`] before anything is started; [`IncomingError::Died`] with the end of its log where it
    /// ended; nothing is left running.
    pub async fn start(
        template: &Template,
        values: &Values<'_>,
        files: &Files,
    ) -> Result<Self, IncomingError> {
        let command = template.command(values)?;
        let mut process = Process::start(&command, files)?;
        let connected = tokio::time::timeout(START_LIMIT, connect(values.qmp, &mut process)).await;
        let qmp = match connected {
            Ok(Ok(qmp)) => qmp,
            Ok(Err(error)) => {
                process.kill().await;
                return Err(error);
            }
            Err(_) => {
                process.kill().await;
                return Err(IncomingError::NoMonitor {
                    socket: values.qmp.to_owned(),
                    limit: START_LIMIT,
                    said: process.last_words(),
                });
            }
        };
        let incoming = Self {
            qmp,
            process: Some(process),
        };
        match incoming.check_waiting().await {
            Ok(()) => Ok(incoming),
            Err(error) => {
                incoming.abort().await;
                Err(error)
            }
        }
    }

    /// Takes a QEMU that somebody started with `-S -incoming defer`, by its monitor.
    ///
    /// # Errors
    /// [`IncomingError::NotWaiting`] where it is not in that state.
    pub async fn adopt(socket: &Path) -> Result<Self, IncomingError> {
        let qmp = Qmp::connect(socket).await?;
        let incoming = Self { qmp, process: None };
        incoming.check_waiting().await?;
        Ok(incoming)
    }

    /// Finds a QEMU of ours again after the agent's restart: the process in the pid file is the one behind the monitor, and
    /// its VM has `uuid` (as text; None where the template gives none). None where it is gone.
    pub async fn find(
        socket: &Path,
        uuid: Option<&str>,
        files: &Files,
    ) -> Result<Option<Self>, IncomingError> {
        let Some(process) = Process::find(files) else {
            return Ok(None);
        };
        let qmp = match Qmp::connect(socket).await {
            Ok(qmp) => qmp,
            Err(QmpError::Connect { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let behind = crate::vm::attach::process_of(&qmp).await?;
        let told: Uuid = qmp.query("query-uuid").await?;
        let same =
            behind == Some(process.id()) && uuid.is_none_or(|uuid| uuid.eq_ignore_ascii_case(&told.uuid));
        let process = Some(process);
        Ok(same.then_some(Self { qmp, process }))
    }

    /// Its monitor.
    pub const fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Lets it listen for the stream at the unix socket `path` (at most 107 bytes).
    ///
    /// # Errors
    /// What QEMU refused; this QEMU cannot be used again then.
    pub async fn listen(&self, path: &Path) -> Result<(), IncomingError> {
        self.set_capabilities().await?;
        let uri = format!("unix:{}", path.display());
        let mut arguments = json!({ "uri": uri });
        if self.qmp.version().at_least(9, 1) {
            // It then stays and says why; older ones end, and their log has the reason.
            arguments["exit-on-error"] = json!(false);
        }
        self.qmp.execute("migrate-incoming", arguments).await?;
        Ok(())
    }

    async fn set_capabilities(&self) -> Result<(), QmpError> {
        // Late: the image must not be activated, and its lock not taken, before `cont`.
        const ON: [&str; 2] = ["events", "late-block-activate"];
        let known: Vec<crate::vm::outgoing::Capability> =
            self.qmp.query("query-migrate-capabilities").await?;
        let changes = known.iter().filter_map(|known| {
            let wanted = ON.contains(&known.capability.as_str());
            (known.state != wanted).then_some((known.capability.as_str(), wanted))
        });
        crate::vm::outgoing::set_capabilities(&self.qmp, changes).await
    }

    /// Waits until it has loaded everything, at most `limit`.
    ///
    /// # Errors
    /// [`IncomingError::LoadFailed`] or [`IncomingError::Died`], each with what QEMU said.
    pub async fn wait_loaded(&mut self, limit: Duration) -> Result<(), IncomingError> {
        let mut watch = Watch::start(&self.qmp, limit);
        loop {
            let stats = match stats(&self.qmp).await {
                Ok(stats) => stats,
                Err(error) => return Err(self.gone(error).await),
            };
            match stats.status {
                MigrationStatus::Completed => return Ok(()),
                MigrationStatus::Failed | MigrationStatus::Cancelled => {
                    return Err(IncomingError::LoadFailed {
                        desc: stats.error.unwrap_or_default(),
                        said: self.last_words(),
                    });
                }
                _ => watch.again("the target QEMU has loaded the VM").await?,
            }
        }
    }

    /// Lets the VM run: the point after which no other copy may. Only after [`Self::wait_loaded`].
    ///
    /// # Errors
    /// [`IncomingError::ExportLeft`] where an export is left, which could write under the guest; [`IncomingError::NotLoaded`]
    /// where loading has not ended: QEMU would then start the VM by itself later.
    pub async fn run(&self) -> Result<(), IncomingError> {
        let mut watch = Watch::start(&self.qmp, STATE_LIMIT);
        let loaded = stats(&self.qmp).await?.status;
        let now = self.status().await?;
        if now.running {
            return Ok(());
        }
        if loaded != MigrationStatus::Completed || now.status == "inmigrate" {
            return Err(IncomingError::NotLoaded(loaded));
        }
        if let Some(export) = rounds::exports(&self.qmp).await?.into_iter().next() {
            return Err(IncomingError::ExportLeft(export.id));
        }
        let cont = self
            .qmp
            .execute_within("cont", json!({}), Duration::from_secs(60));
        cont.await?;
        while !self.status().await?.running {
            watch.again("the VM runs").await?;
        }
        Ok(())
    }

    /// Whether its VM runs.
    pub async fn is_running(&self) -> Result<bool, QmpError> {
        Ok(self.status().await?.running)
    }

    /// Whether it was started here, so that [`Self::abort`] ends it.
    pub const fn is_ours(&self) -> bool {
        self.process.is_some()
    }

    /// Gives up: a QEMU of ours is asked to quit, then killed; an adopted one is left to its owner. Only while its VM must
    /// not run.
    pub async fn abort(mut self) {
        if let Some(process) = &mut self.process {
            let _ = self
                .qmp
                .execute_within("quit", json!({}), Duration::from_secs(1))
                .await; // Whatever it answers, it is killed next.
            process.kill().await;
        }
    }

    /// The end of its log, for reports; empty where it was adopted.
    pub fn last_words(&self) -> String {
        self.process.as_ref().map(Process::last_words).unwrap_or_default()
    }

    async fn check_waiting(&self) -> Result<(), IncomingError> {
        let status = self.status().await?.status;
        let migration = stats(&self.qmp).await?.status;
        if status == "inmigrate" && migration == MigrationStatus::None {
            return Ok(());
        }
        let state = format!("{status}, migration {migration}");
        Err(IncomingError::NotWaiting { state })
    }

    async fn status(&self) -> Result<Status, QmpError> {
        self.qmp.query("query-status").await
    }

    /// A connection that was lost most often means that QEMU ended; then its log says why.
    async fn gone(&mut self, error: QmpError) -> IncomingError {
        if !error.is_lost() {
            return error.into();
        }
        match &mut self.process {
            Some(process) => match process.wait(Duration::from_secs(2)).await {
                Some(how) => IncomingError::Died {
                    how,
                    said: process.last_words(),
                },
                None => error.into(),
            },
            None => error.into(),
        }
    }
}

/// Tries until the monitor answers or the process ends.
async fn connect(socket: &Path, process: &mut Process) -> Result<Qmp, IncomingError> {
    loop {
        match Qmp::connect(socket).await {
            Ok(qmp) => return Ok(qmp),
            Err(QmpError::Connect { .. }) => {}
            Err(error) if error.is_lost() => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(how) = process.wait(Duration::from_millis(20)).await {
            let said = process.last_words();
            return Err(IncomingError::Died { how, said });
        }
    }
}

/// Where a QEMU of ours keeps what it needs to be found again.
impl Files {
    /// The usual names for one attempt in `folder`.
    pub fn in_folder(folder: &Path, name: &str) -> Self {
        let file = |end: &str| -> PathBuf { folder.join(format!("{name}.{end}")) };
        Self {
            pid: file("pid"),
            log: file("log"),
        }
    }
}
