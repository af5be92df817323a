//! The programs that the operator wants run at the moments of a move: networks, names, load balancers.
//!
//! Owns their environment, their time limits and the sentence about a failure. Which programs they are is said by the agent's config, never
//! by the wire. Leaves the moments and what a failure means to the roles. Promises that a hook which takes too long is ended with all
//! that it started; that it ran exactly once it does not: an agent that dies runs it again, so a hook can be repeated. Its output goes
//! where the agent's log goes.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use longhaul_common::ids::JobId;
use longhaul_common::units::Span;
use longhaul_common::wire::session::Place;

use crate::settings::HooksSection;

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Before,
    AtHandover,
    After,
    OnFailure,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Before => "before",
            Self::AtHandover => "at_handover",
            Self::After => "after",
            Self::OnFailure => "on_failure",
        })
    }
}

/// Which end of the move this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Target,
}

/// What the hooks of one job are told.
#[derive(Clone, Debug)]
pub(super) struct Hooks {
    pub job: JobId,
    pub name: String,
    pub end: End,
    /// This agent's site.
    pub site: String,
    pub other: Place,
    /// On this host.
    pub disks: Vec<PathBuf>,
    /// The VM's definition on this host.
    pub definition: Option<PathBuf>,
}

fn program(hooks: &HooksSection, moment: Moment) -> (Option<&Path>, &Span) {
    let (program, limit) = match moment {
        Moment::Before => (&hooks.before, &hooks.timeout),
        Moment::AtHandover => (&hooks.at_handover, &hooks.handover_timeout),
        Moment::After => (&hooks.after, &hooks.timeout),
        Moment::OnFailure => (&hooks.on_failure, &hooks.timeout),
    };
    (program.as_deref(), limit)
}

/// Whether there is a program for this moment.
pub(super) fn is_set(hooks: &HooksSection, moment: Moment) -> bool {
    program(hooks, moment).0.is_some()
}

/// Ends a hook and all that it started, unless it has ended by itself.
struct Group(Option<rustix::process::Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended just now.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

impl Hooks {
    /// Runs the program of this moment, if there is one; `cause` is why the VM was not moved.
    ///
    /// # Errors
    /// A sentence where it failed.
    pub(super) async fn run(
        &self,
        hooks: &HooksSection,
        moment: Moment,
        cause: Option<&str>,
    ) -> Result<(), String> {
        let (Some(program), limit) = program(hooks, moment) else {
            return Ok(());
        };
        let began = Instant::now();
        let mut command = tokio::process::Command::new(program);
        self.tell(&mut command, moment, cause);
        command.stdin(std::process::Stdio::null()).process_group(0);
        let name = format!("{moment} hook {} at the {}", program.display(), self.role());
        let mut child = command
            .spawn()
            .map_err(|error| format!("the {name} cannot be started: {error}"))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let mut group = Group(pid.and_then(rustix::process::Pid::from_raw));
        let ended = tokio::time::timeout(limit.0, child.wait()).await;
        let ran_ms = began.elapsed().as_millis() as u64;
        tracing::info!(job = %self.job, %moment, ran_ms, "a hook has run");
        match ended {
            Ok(Ok(status)) => {
                // What it left running on purpose stays.
                group.0 = None;
                if status.success() {
                    return Ok(());
                }
                Err(format!("the {name} ended with {status}"))
            }
            Ok(Err(error)) => Err(format!("the {name} cannot be waited for: {error}")),
            Err(_) => Err(format!("the {name} took longer than {limit} and was ended")),
        }
    }

    /// The same where a failure changes nothing: it is logged, and given as a sentence for the report.
    pub(super) async fn run_anyway(
        &self,
        hooks: &HooksSection,
        moment: Moment,
        cause: Option<&str>,
    ) -> Option<String> {
        let problem = self.run(hooks, moment, cause).await.err();
        if let Some(problem) = &problem {
            tracing::error!(job = %self.job, "{problem}");
        }
        problem
    }

    fn role(&self) -> &'static str {
        match self.end {
            End::Source => "source",
            End::Target => "target",
        }
    }

    fn tell(&self, command: &mut tokio::process::Command, moment: Moment, cause: Option<&str>) {
        let disks: Vec<_> = self.disks.iter().map(|path| path.to_string_lossy()).collect();
        command.env("LONGHAUL_JOB", self.job.to_string());
        command.env("LONGHAUL_NAME", &self.name);
        command.env("LONGHAUL_MOMENT", moment.to_string());
        command.env("LONGHAUL_ROLE", self.role());
        command.env("LONGHAUL_SITE", &self.site);
        command.env("LONGHAUL_OTHER_SITE", &self.other.site);
        command.env("LONGHAUL_OTHER_AGENT", &self.other.agent);
        command.env("LONGHAUL_DISKS", disks.join("\n"));
        let definition = self.definition.as_deref().unwrap_or(Path::new(""));
        command.env("LONGHAUL_DEFINITION", definition);
        command.env("LONGHAUL_CAUSE", cause.unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    fn hooks() -> Hooks {
        Hooks {
            job: JobId::random(),
            name: "web".to_owned(),
            end: End::Source,
            site: "a".to_owned(),
            other: Place {
                site: "b".to_owned(),
                agent: "hv-b1".to_owned(),
            },
            disks: vec!["/d/0".into(), "/d/1".into()],
            definition: None,
        }
    }

    fn script(folder: &Path, text: &str) -> PathBuf {
        let path = folder.join("hook");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_hook_is_told_everything_and_its_failure_is_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let said = dir.path().join("said");
        let text = format!(
            "env | grep ^LONGHAUL_ | sort > {}\n[ $LONGHAUL_MOMENT = after ]",
            said.display()
        );
        let program = script(dir.path(), &text);
        let section = HooksSection {
            after: Some(program.clone()),
            on_failure: Some(program),
            ..HooksSection::default()
        };
        let hooks = hooks();
        assert_eq!(hooks.run(&section, Moment::Before, None).await, Ok(()));
        assert!(!said.exists());
        assert_eq!(hooks.run(&section, Moment::After, None).await, Ok(()));
        let env = std::fs::read_to_string(&said).unwrap();
        for line in [
            "LONGHAUL_MOMENT=after",
            "LONGHAUL_ROLE=source",
            "LONGHAUL_SITE=a",
            "LONGHAUL_OTHER_SITE=b",
            "LONGHAUL_OTHER_AGENT=hv-b1",
            "LONGHAUL_NAME=web",
            "LONGHAUL_DISKS=/d/0\n/d/1\n",
        ] {
            assert!(
                env.contains(line) || line.contains('\n') && env.contains("/d/0"),
                "{line}: {env}"
            );
        }
        let why = hooks
            .run(&section, Moment::OnFailure, Some("no link"))
            .await
            .unwrap_err();
        assert!(
            why.contains("on_failure hook") && why.contains("exit status: 1"),
            "{why}"
        );
        assert!(
            std::fs::read_to_string(&said)
                .unwrap()
                .contains("LONGHAUL_CAUSE=no link")
        );
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_ended_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let program = script(
            dir.path(),
            &format!("sleep 60 &\necho $! > {}\nwait", pid.display()),
        );
        let section = HooksSection {
            at_handover: Some(program),
            handover_timeout: Span(Duration::from_millis(700)),
            ..HooksSection::default()
        };
        let began = Instant::now();
        let why = hooks().run(&section, Moment::AtHandover, None).await.unwrap_err();
        assert!(why.contains("took longer than 700 ms"), "{why}");
        assert!(began.elapsed() < Duration::from_secs(20));
        let pid: i32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        while !(state().is_empty() || state().contains(") Z ")) {
            assert!(began.elapsed() < Duration::from_secs(20), "{}", state());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
