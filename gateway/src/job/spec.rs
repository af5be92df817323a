//! What a run is to do: the job file.
//!
//! Owns its keys, defaults and the checks that need no agent; `configs/move.toml` shows them all. Leaves paths to the agents, which
//! alone know what they may touch.

mod live;

use std::path::{Path, PathBuf};

use longhaul_common::ids::Attempt;
use longhaul_common::ids::JobId;
use longhaul_common::units::Rate;
use longhaul_common::wire::prepare::PrepareOpen;
use longhaul_common::wire::session::{
    AgentWord, DISKS_MAX, LinkForecast, Place, SourceDisk, SourceOpen, SourceVm, TargetVm,
};
use longhaul_common::wire::words::{cleaned, is_plain};
use serde::{Deserialize, Serialize};

pub use self::live::{LiveSection, MediaSection, ProofAge};

/// A job file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    pub kind: Kind,
    /// The VM's name, for people and hooks.
    pub name: String,
    /// The VM's definition file on the source host; carried along and given to the target's hook.
    #[schema(value_type = Option<String>)]
    pub definition: Option<PathBuf>,
    /// Leave blocks behind that are proven free.
    #[serde(default = "yes")]
    pub filter: bool,
    /// Most that this job's payloads may take of the link between the sites; what a VM waits for that stands is not held up by it.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// One of the gateway's `reduction.tenants`: only what was sent for it makes this job's bytes fewer, and the other way round.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tenant: String,
    pub source: SourceSection,
    pub target: TargetSection,
    /// How a running VM is moved; for kind "live" only.
    #[serde(default, skip_serializing_if = "LiveSection::is_default")]
    pub live: LiveSection,
    /// The VM's disks, one `[[disk]]` each.
    pub disk: Vec<DiskSection>,
}

/// The kinds of run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One powered-off VM to another site.
    Move,
    /// One running VM to another site: disks, RAM and devices.
    Live,
}

/// `[source]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceSection {
    /// The agent's name, as in its certificate.
    pub agent: String,
    /// Kind "live": socket of a QMP monitor of the VM's QEMU, below the agent's `paths.qmp`.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
    /// Kind "live": socket of the VM's guest agent channel, to freeze its file systems for an instant.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_agent: Option<PathBuf>,
}

/// `[target]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TargetSection {
    /// A site that this gateway has a `[[peer]]` for.
    pub site: String,
    /// The agent's name there.
    pub agent: String,
    /// Replace images that exist already.
    #[serde(default)]
    pub overwrite: bool,
    /// Reserve the full size instead of making sparse files.
    #[serde(default)]
    pub preallocate: bool,
    /// Kind "live": where the VM comes from here, let its disks begin with the shadows that its move left behind, and send only what
    /// changed since. They are used up then.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub shadow: bool,
    /// Kind "live": QMP socket of a QEMU that waits for the VM already (`-S -incoming defer`). Without it the agent starts one by its
    /// template.
    #[schema(value_type = Option<String>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
}

/// `[[disk]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSection {
    /// Image or block device on the source host; with kind "live" the disk's device id or node name in QEMU.
    #[schema(value_type = String)]
    pub source: PathBuf,
    /// "raw", "qcow2", "vmdk" ...; recognised without it. State it where a guest may have written the image's first bytes.
    pub format: Option<String>,
    /// Flatten a backing chain, leave internal snapshots behind; refused otherwise.
    #[serde(default)]
    pub flatten: bool,
    /// Image or block device on the target host.
    #[schema(value_type = String)]
    pub target: PathBuf,
    /// "raw" or "qcow2".
    #[serde(default = "raw")]
    pub target_format: String,
}

/// One batch may be a MiB: below this it would block a job for minutes, in bit/s.
const RATE_MIN: u64 = 100_000;
/// Most characters of a name or path.
const SHOWN_MAX: usize = 1024;

/// Whether a name can be shown in logs and on terminals as it is.
fn is_shown(text: &str) -> bool {
    text.len() <= SHOWN_MAX && text.chars().all(is_plain)
}

fn yes() -> bool {
    true
}

/// Left out of a job where it is as by default.
fn is_yes(value: &bool) -> bool {
    *value
}

fn raw() -> String {
    "raw".to_owned()
}

/// A job file that cannot work, whatever the agents say.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("{key} is empty; give it a value")]
    Empty { key: &'static str },
    #[error("a job has 1 to {DISKS_MAX} [[disk]] sections, this one has {0}")]
    Disks(usize),
    #[error("disk {index}: {key} '{path}' is not absolute; write the whole path")]
    Relative {
        index: usize,
        key: &'static str,
        path: String,
    },
    #[error("{key} holds a control character or is too long ({SHOWN_MAX} characters at most); write it anew")]
    NotPlain { key: String },
    #[error("disk {index}: target_format '{format}' is not \"raw\" or \"qcow2\"")]
    TargetFormat { index: usize, format: String },
    #[error("kind \"live\" needs source.qmp, the absolute path of the VM's QMP socket on the source host")]
    NoQmp,
    #[error("{key} is for kind \"live\" only; remove it, or write kind = \"live\"")]
    NotLive { key: &'static str },
    #[error("only a running VM is prepared; this job is not of kind \"live\"")]
    NotRunning,
    #[error("rate must be at least 100 kbit/s; leave it out for no cap")]
    Rate,
    #[error("live.blackout must lie between 10 ms and 10 min")]
    Blackout,
    #[error("live.granularity must be a power of two from 4 KiB to 64 KiB")]
    Granularity,
    #[error("live.free_proof_age must be at least 30 s, or \"never\"")]
    ProofAge,
    #[error("live.fstrim needs source.guest_agent: the guest's agent does it")]
    NoGuestAgent,
    #[error("disks {first} and {second} have the same {key}")]
    Twice {
        first: usize,
        second: usize,
        key: &'static str,
    },
}

impl JobSpec {
    /// Everything that can be checked without an agent.
    pub fn check(&self) -> Result<(), SpecError> {
        let named = [
            ("name", &self.name),
            ("source.agent", &self.source.agent),
            ("target.site", &self.target.site),
            ("target.agent", &self.target.agent),
        ];
        if self.rate.is_some_and(|rate| rate.0 < RATE_MIN) {
            return Err(SpecError::Rate);
        }
        if let Some((key, _)) = named.iter().find(|(_, value)| value.trim().is_empty()) {
            return Err(SpecError::Empty { key });
        }
        if let Some((key, _)) = named.iter().find(|(_, value)| !is_shown(value)) {
            return Err(SpecError::NotPlain {
                key: (*key).to_owned(),
            });
        }
        if self
            .definition
            .as_ref()
            .is_some_and(|path| !is_shown(&path.to_string_lossy()))
        {
            return Err(SpecError::NotPlain {
                key: "definition".to_owned(),
            });
        }
        if self.disk.is_empty() || self.disk.len() > DISKS_MAX {
            return Err(SpecError::Disks(self.disk.len()));
        }
        self.check_live()?;
        (0..self.disk.len()).try_for_each(|index| self.check_disk(index))
    }

    fn check_live(&self) -> Result<(), SpecError> {
        let sockets = [
            ("source.qmp", &self.source.qmp),
            ("source.guest_agent", &self.source.guest_agent),
            ("target.qmp", &self.target.qmp),
        ];
        for (key, path) in sockets
            .iter()
            .filter_map(|(key, path)| Some((*key, path.as_ref()?)))
        {
            if self.kind != Kind::Live {
                return Err(SpecError::NotLive { key });
            }
            if !is_shown(&path.to_string_lossy()) {
                let key = key.to_owned();
                return Err(SpecError::NotPlain { key });
            }
        }
        match self.kind {
            Kind::Move if !self.live.is_default() => Err(SpecError::NotLive { key: "[live]" }),
            Kind::Move => Ok(()),
            Kind::Live if self.source.qmp.as_deref().is_none_or(Path::is_relative) => Err(SpecError::NoQmp),
            Kind::Live if self.live.fstrim && self.source.guest_agent.is_none() => {
                Err(SpecError::NoGuestAgent)
            }
            Kind::Live => self.live.check(),
        }
    }

    /// The running VM at the source, for kind "live".
    fn source_vm(&self) -> Option<SourceVm> {
        let qmp = self.source.qmp.clone().filter(|_| self.kind == Kind::Live)?;
        Some(SourceVm {
            qmp,
            guest_agent: self.source.guest_agent.clone(),
            fstrim: self.live.fstrim,
            policy: self.live.policy(),
            name: self.name.clone(),
            target: Place {
                site: self.target.site.clone(),
                agent: self.target.agent.clone(),
            },
            media: self.live.media.into(),
            plan: None,
        })
    }

    /// What is to arrive running, for kind "live".
    pub fn target_vm(&self, vm: Option<AgentWord>) -> Option<TargetVm> {
        let (qmp, agent) = (self.target.qmp.clone(), self.source.agent.clone());
        // The site is filled in where it is proven: at the target's gateway.
        let site = String::new();
        let source = Place { site, agent };
        (self.kind == Kind::Live).then_some(TargetVm { qmp, vm, source })
    }

    fn check_disk(&self, index: usize) -> Result<(), SpecError> {
        let disk = &self.disk[index];
        for (key, path) in [("source", &disk.source), ("target", &disk.target)] {
            // A running VM's disks are named as its QEMU does.
            let in_qemu = key == "source" && self.kind == Kind::Live;
            if !path.is_absolute() && !in_qemu {
                return Err(SpecError::Relative {
                    index,
                    key,
                    path: cleaned(&path.to_string_lossy()),
                });
            }
            if !is_shown(&path.to_string_lossy()) {
                return Err(SpecError::NotPlain {
                    key: format!("disk {index}: {key}"),
                });
            }
        }
        if !matches!(disk.target_format.as_str(), "raw" | "qcow2") {
            return Err(SpecError::TargetFormat {
                index,
                format: cleaned(&disk.target_format),
            });
        }
        let before = &self.disk[..index];
        let twice = |key, first: Option<usize>| match first {
            Some(first) => Err(SpecError::Twice {
                first,
                second: index,
                key,
            }),
            None => Ok(()),
        };
        twice(
            "source",
            before.iter().position(|other| other.source == disk.source),
        )?;
        twice(
            "target",
            before.iter().position(|other| other.target == disk.target),
        )
    }

    fn source_disks(&self) -> Vec<SourceDisk> {
        let disk = |disk: &DiskSection| SourceDisk {
            path: disk.source.clone(),
            format: disk.format.clone(),
            flatten: disk.flatten,
        };
        self.disk.iter().map(disk).collect()
    }

    /// The running VM that is to be prepared.
    pub fn prepare_open(&self) -> Result<PrepareOpen, SpecError> {
        Ok(PrepareOpen {
            name: self.name.clone(),
            disks: self.source_disks(),
            vm: self.source_vm().ok_or(SpecError::NotRunning)?,
        })
    }

    /// What the source agent is asked for.
    pub fn source_open(&self, job: JobId, attempt: Attempt) -> SourceOpen {
        SourceOpen {
            job,
            attempt,
            disks: self.source_disks(),
            definition: self.definition.clone(),
            filter: self.filter,
            live: self.source_vm(),
        }
    }

    /// The same, only to look: with what the way to the target is held to give.
    pub fn source_plan(&self, job: JobId, link: LinkForecast) -> SourceOpen {
        let mut open = self.source_open(job, Attempt(1));
        if let Some(vm) = &mut open.live {
            vm.plan = Some(link);
        }
        open
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;

    const GOOD: &str = "kind = 'move'\nname = 'web'\nsource.agent = 'hv1'\n[target]\nsite = 'b'\nagent = 'hv2'\n\
        [[disk]]\nsource = '/a.img'\ntarget = '/b.img'\n";

    fn parsed(text: &str) -> JobSpec {
        longhaul_common::settings::parse(Path::new("job.toml"), text).unwrap()
    }

    /// The shortest good job.
    pub(crate) fn parsed_good() -> JobSpec {
        parsed(GOOD)
    }

    #[test]
    fn a_short_file_is_enough() {
        let spec = parsed(GOOD);
        spec.check().unwrap();
        assert!(spec.filter && spec.disk[0].target_format == "raw");
        assert!(spec.rate.is_none() && spec.tenant.is_empty());
        let more = parsed(&format!("rate = '20 Mbit/s'\ntenant = 'acme'\n{GOOD}"));
        more.check().unwrap();
        assert_eq!(
            (more.rate, more.tenant.as_str()),
            (Some(Rate(20_000_000)), "acme")
        );
    }

    #[test]
    fn a_running_vm_needs_a_few_lines_more() {
        let live = GOOD.replace("'move'", "'live'").replace("'/a.img'", "'disk0'");
        assert_eq!(parsed(&live).check(), Err(SpecError::NoQmp));
        let live = live.replace("[target]", "source.qmp = '/run/web.qmp'\n[target]");
        let spec = parsed(&live);
        spec.check().unwrap();
        let vm = spec.source_open(JobId::random(), Attempt(1)).live.unwrap();
        assert_eq!((vm.policy.blackout_ms, vm.policy.granularity), (300, 0));
        let cold = parsed(&live.replace("'live'", "'move'"));
        assert_eq!(cold.check(), Err(SpecError::NotLive { key: "source.qmp" }));
        let with = |words: &str| parsed(&live.replace("[[disk]]", &format!("[live]\n{words}\n[[disk]]")));
        assert_eq!(with("granularity = '5 KiB'").check(), Err(SpecError::Granularity));
        assert_eq!(with("fstrim = true").check(), Err(SpecError::NoGuestAgent));
    }

    #[test]
    fn the_age_proof_can_be_forbidden_in_a_file_and_survives_a_journal() {
        let live = GOOD.replace("'move'", "'live'");
        let live = live.replace("[target]", "source.qmp = '/run/web.qmp'\n[target]");
        let with = |age: &str| {
            let text = live.replace("[[disk]]", &format!("[live]\nfree_proof_age = {age}\n[[disk]]"));
            longhaul_common::settings::parse::<JobSpec>(Path::new("job.toml"), &text)
        };
        let age = |spec: &JobSpec| {
            let open = spec.source_open(JobId::random(), Attempt(1));
            open.live.unwrap().policy.free_proof_age_ms
        };
        for (text, ms) in [("'never'", None), ("false", None), ("'20 min'", Some(1_200_000))] {
            let spec = with(text).unwrap();
            spec.check().unwrap();
            assert_eq!(age(&spec), ms, "{text}");
            let kept: JobSpec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
            assert_eq!(kept, spec, "{text}");
        }
        assert_eq!(age(&parsed(&live)), Some(900_000));
        assert_eq!(with("'5 s'").unwrap().check(), Err(SpecError::ProofAge));
        assert!(with("true").is_err() && with("'soon'").is_err());
    }

    #[test]
    fn what_cannot_work_is_refused_in_words() {
        let wrong = |change: fn(&mut JobSpec), words: &str| {
            let mut spec = parsed(GOOD);
            change(&mut spec);
            let said = spec.check().unwrap_err().to_string();
            assert!(said.contains(words), "{said}");
        };
        wrong(|spec| spec.name = " ".to_owned(), "name is empty");
        wrong(|spec| spec.disk.clear(), "this one has 0");
        wrong(|spec| spec.rate = Some(Rate(9_600)), "at least 100 kbit/s");
        wrong(|spec| spec.disk[0].target = "b.img".into(), "not absolute");
        wrong(|spec| spec.disk[0].target_format = "vmdk".to_owned(), "vmdk");
        wrong(
            |spec| spec.disk.push(spec.disk[0].clone()),
            "disks 0 and 1 have the same source",
        );
    }
}
