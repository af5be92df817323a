//! What a run is to do: the job file.
//!
//! Owns its keys, defaults and the checks that need no agent; `configs/move.toml` shows them all. Leaves paths to the agents, which
//! alone know what they may touch.

use std::path::PathBuf;

use longhaul_common::ids::Attempt;
use longhaul_common::ids::JobId;
use longhaul_common::wire::session::{DISKS_MAX, SourceDisk, SourceOpen};
use longhaul_common::wire::words::{cleaned, is_plain};
use serde::{Deserialize, Serialize};

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
    pub source: SourceSection,
    pub target: TargetSection,
    /// The VM's disks, one `[[disk]]` each.
    pub disk: Vec<DiskSection>,
}

/// The kinds of run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One powered-off VM to another site.
    Move,
}

/// `[source]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceSection {
    /// The agent's name, as in its certificate.
    pub agent: String,
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
}

/// `[[disk]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSection {
    /// Image or block device on the source host.
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

/// Most characters of a name or path.
const SHOWN_MAX: usize = 1024;

/// Whether a name can be shown in logs and on terminals as it is.
fn is_shown(text: &str) -> bool {
    text.len() <= SHOWN_MAX && text.chars().all(is_plain)
}

fn yes() -> bool {
    true
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
        (0..self.disk.len()).try_for_each(|index| self.check_disk(index))
    }

    fn check_disk(&self, index: usize) -> Result<(), SpecError> {
        let disk = &self.disk[index];
        for (key, path) in [("source", &disk.source), ("target", &disk.target)] {
            if !path.is_absolute() {
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

    /// What the source agent is asked for.
    pub fn source_open(&self, job: JobId, attempt: Attempt) -> SourceOpen {
        let disk = |disk: &DiskSection| SourceDisk {
            path: disk.source.clone(),
            format: disk.format.clone(),
            flatten: disk.flatten,
        };
        let disks = self.disk.iter().map(disk).collect();
        SourceOpen {
            job,
            attempt,
            disks,
            definition: self.definition.clone(),
            filter: self.filter,
            live: None,
        }
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
        wrong(|spec| spec.disk[0].target = "b.img".into(), "not absolute");
        wrong(|spec| spec.disk[0].target_format = "vmdk".to_owned(), "vmdk");
        wrong(
            |spec| spec.disk.push(spec.disk[0].clone()),
            "disks 0 and 1 have the same source",
        );
    }
}
