//! What a moved VM leaves at its source: its images under other names, the record of them, and their end.
//!
//! Owns noting them when the VM is the target's, holding their locks, and removing them on the operator's word. Their record is `shadows` in
//! the job's `leaving/JOB.json`. Leaves names and locks to `old_copy`. Promises that only files are removed that the record names, under a
//! name that only `old_copy` gives, with the inode that was noted; and that a removal which was cut is taken up again.

use std::path::Path;
use std::sync::Arc;

use longhaul_common::ids::JobId;
use longhaul_common::units::ByteSize;
use longhaul_common::wire::session::{LiveOutcome, Refusal};

use super::old_copy::shadow_of;
use super::record::{Leaving, Shadow};
use super::source::LiveSource;
use crate::session::threads::on_thread;
use crate::vm::handover::{SourceOwner, SourceState};
use crate::vm::journal::{Journal, Role};

impl LiveSource {
    /// The target runs the VM: notes what is left here, and runs the hook.
    pub(super) async fn moved(&self, mut outcome: Box<LiveOutcome>) -> Box<LiveOutcome> {
        self.remove_socket();
        let shadows = self.old_copy.lock().await.shadows().await;
        let shadows = shadows.unwrap_or_else(|why| {
            tracing::warn!(job = %self.job, "what is left of the VM here is not noted: {why}");
            Vec::new()
        });
        let noted = (*outcome).clone();
        let saved = self.remember(|record| {
            record.outcome = Some(noted);
            record.shadows = shadows;
        });
        if let Err(refusal) = saved.await {
            tracing::warn!(job = %self.job, "{refusal}");
        }
        outcome.notes.extend(self.hook_after().await);
        let noted = (*outcome).clone();
        let saved = self.remember(|record| (record.outcome, record.told) = (Some(noted), true));
        if let Err(refusal) = saved.await {
            tracing::warn!(job = %self.job, "the hook may run again: {refusal}");
        }
        outcome
    }

    /// QEMU has ended, and left its NBD server's socket where this agent did not stop that before, as after a crash.
    fn remove_socket(&self) {
        let _ = std::fs::remove_file(&self.record().nbd);
    }

    /// The VM is not moved: runs the hook, where any has run before. Gives the refusal with what came of that.
    pub(super) async fn stayed(&self, mut refusal: Refusal) -> Refusal {
        if self.is_hooked()
            && let Some(problem) = self.hook_failure(&refusal.text).await
        {
            refusal.text = format!("{}; {problem}", refusal.text);
        }
        refusal
    }

    /// A former life of this agent saw the VM move: the locks are held again, and a hook that was cut runs once more.
    pub(super) async fn settle_moved(self: &Arc<Self>) {
        let (shadows, told) = {
            let record = self.record();
            (record.shadows.clone(), record.told)
        };
        self.remove_socket();
        self.old_copy.lock().await.hold(&shadows).await;
        if !told {
            let session = Arc::clone(self);
            tokio::spawn(async move {
                session.hook_after().await;
                if let Err(refusal) = session.remember(|record| record.told = true).await {
                    tracing::warn!(job = %session.job, "the hook may run again: {refusal}");
                }
            });
        }
    }

    /// Removes the shadows of a VM that the target runs, then all that is known of the job here.
    ///
    /// # Errors
    /// A sentence, where it was not moved or a file is not the one that was noted; the others are removed all the same.
    pub(super) async fn remove_shadows(&self) -> Result<Vec<String>, String> {
        let record = self.record().clone();
        if record.outcome.is_none() {
            return Err(
                "the source has not seen this VM run at the target: only what a completed move left can be forgotten"
                    .to_owned(),
            );
        }
        let mut old_copy = self.old_copy.lock().await;
        old_copy.let_go();
        let (state, job) = (self.agent.settings.paths.state.clone(), self.job);
        let shadows = record.shadows.clone();
        let removed = on_thread("forget", move || forget(&state, job, &record)).await;
        let removed = removed.unwrap_or_else(|error| Err(error.to_string()));
        if removed.is_err() {
            old_copy.hold(&shadows).await;
        }
        removed
    }
}

/// Blocks.
fn forget(state: &Path, job: JobId, record: &Leaving) -> Result<Vec<String>, String> {
    let journal = released(state, job)?;
    let mut said = Vec::new();
    let mut freed = 0;
    let mut problems = Vec::new();
    for shadow in &record.shadows {
        match remove(shadow, job) {
            Ok((words, bytes)) => {
                said.push(words);
                freed += bytes;
            }
            Err(why) => problems.push(why),
        }
    }
    if !problems.is_empty() {
        return Err(problems.join("; "));
    }
    super::way_back::forget(state, job);
    // The record first: with a journal alone, a restarted agent has nothing to settle.
    Leaving::remove(state, job);
    journal.remove().map_err(|error| error.to_string())?;
    said.push(format!(
        "{} freed; this host has forgotten the job",
        ByteSize(freed)
    ));
    Ok(said)
}

/// The journal has the last word on whose the VM is.
fn released(state: &Path, job: JobId) -> Result<Journal, String> {
    let journal = Journal::open(state, job, Role::Source).map_err(|error| error.to_string())?;
    let (owner, _) = SourceOwner::restore(journal.records()).map_err(|error| error.to_string())?;
    match owner.state() {
        SourceState::Released { .. } if owner.is_closed() => Ok(journal),
        SourceState::Released { .. } => Err(
            "the VM's old QEMU at the source has not ended yet: end it (`quit` in its monitor), then restart the agent".to_owned(),
        ),
        _ => Err(format!("the source's journal says: {}", owner.words())),
    }
}

/// Gives what was done, and the bytes that it freed.
fn remove(shadow: &Shadow, job: JobId) -> Result<(String, u64), String> {
    use std::os::unix::fs::MetadataExt;
    let Some(path) = &shadow.shadow else {
        let words = format!(
            "{} is a device and keeps its content and name: wipe it yourself",
            shadow.file.display()
        );
        return Ok((words, 0));
    };
    if *path != shadow_of(&shadow.file, job) {
        return Err(format!("{} is no name of a shadow of this job", path.display()));
    }
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok((format!("{} is gone already", path.display()), 0));
        }
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    if !meta.is_file() || meta.ino() != shadow.inode {
        return Err(format!(
            "{} is not the file that the VM left (its inode differs): look at it, and remove it by hand",
            path.display()
        ));
    }
    let said = |error: std::io::Error| format!("{} cannot be removed: {error}", path.display());
    std::fs::remove_file(path).map_err(said)?;
    if let Some(folder) = path.parent() {
        std::fs::File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(said)?;
    }
    let bytes = meta.blocks().saturating_mul(512);
    Ok((format!("{} is removed", path.display()), bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn only_the_file_that_was_noted_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let job = JobId::random();
        let file = dir.path().join("web.img");
        let path = shadow_of(&file, job);
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let shadow = Shadow {
            inode: std::fs::metadata(&path).unwrap().ino(),
            shadow: Some(path.clone()),
            file,
        };

        let other = Shadow {
            inode: shadow.inode + 1,
            ..shadow.clone()
        };
        assert!(remove(&other, job).unwrap_err().contains("by hand"));
        let elsewhere = Shadow {
            shadow: Some(dir.path().join("other.img")),
            ..shadow.clone()
        };
        assert!(
            remove(&elsewhere, job)
                .unwrap_err()
                .contains("no name of a shadow")
        );
        assert!(remove(&shadow, JobId::random()).is_err());
        assert!(path.exists());

        let (words, bytes) = remove(&shadow, job).unwrap();
        assert!(words.contains("is removed") && bytes >= 8192, "{words}: {bytes}");
        assert!(!path.exists());
        assert!(remove(&shadow, job).unwrap().0.contains("gone already"));
        let device = Shadow {
            shadow: None,
            ..shadow
        };
        assert!(remove(&device, job).unwrap().0.contains("wipe it yourself"));
    }
}
