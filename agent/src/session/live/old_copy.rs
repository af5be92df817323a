//! The source's images once the VM is handed over: nobody may start them by mistake.
//!
//! Owns their names and locks. Each file gets a name that no definition knows, and an image lock for as long as this agent lives.
//! Promises that both directions can be repeated, after a crash in the middle, too. A block device keeps its name: for it only the lock
//! stands in the way.

use std::fs::File;
use std::path::{Path, PathBuf};

use longhaul_common::ids::JobId;

use super::disks::VmDisk;
use super::record::Shadow;
use crate::disk::apply::{Seal, image_lock};
use crate::session::threads::on_thread;

/// The images of one VM.
pub(super) struct OldCopy {
    files: Vec<PathBuf>,
    job: JobId,
    held: Vec<File>,
    /// Of each image its seal, taken when it was barred; none of a block device.
    seals: Vec<Option<Seal>>,
}

impl OldCopy {
    pub(super) fn of(disks: &[VmDisk], job: JobId) -> tokio::sync::Mutex<Self> {
        // A medium that was copied may be in other VMs' drives, too.
        let owned = disks.iter().filter(|disk| !disk.read_only);
        tokio::sync::Mutex::new(Self {
            files: owned.map(|disk| disk.file.clone()).collect(),
            job,
            held: Vec::new(),
            seals: Vec::new(),
        })
    }

    /// By which to know later whether anybody touched the images since they were barred.
    pub(super) fn seals(&self) -> &[Option<Seal>] {
        &self.seals
    }

    /// Renames and locks the images.
    pub(super) async fn bar(&mut self) -> Result<(), String> {
        if self.held.len() == self.files.len() {
            // Our own locks would stand in the way.
            return Ok(());
        }
        let (files, job) = (self.files.clone(), self.job);
        let held = on_thread("bar", move || {
            files
                .iter()
                .map(|file| bar(file, job))
                .collect::<Result<Vec<_>, _>>()
        });
        let held = held.await.map_err(|error| error.to_string())??;
        (self.held, self.seals) = held.into_iter().unzip();
        Ok(())
    }

    /// What is left of the VM here, once it was moved.
    pub(super) async fn shadows(&self) -> Result<Vec<Shadow>, String> {
        let (files, job) = (self.files.clone(), self.job);
        let found = on_thread("shadows", move || {
            files.iter().map(|file| look(file, job)).collect::<Result<_, _>>()
        });
        found.await.map_err(|error| error.to_string())?
    }

    /// Locks shadows again that a former life of this agent left; never touches a name.
    pub(super) async fn hold(&mut self, shadows: &[Shadow]) {
        let shadows = shadows.to_vec();
        let held = on_thread("hold", move || shadows.iter().filter_map(hold).collect());
        self.held = held.await.unwrap_or_default();
    }

    /// Lets go of the locks.
    pub(super) fn let_go(&mut self) {
        self.held.clear();
    }

    /// Gives them their names back.
    pub(super) async fn free(&mut self) -> Result<(), String> {
        self.held.clear();
        self.seals.clear();
        let (files, job) = (self.files.clone(), self.job);
        let freed = on_thread("free", move || files.iter().try_for_each(|file| free(file, job)));
        freed.await.map_err(|error| error.to_string())?
    }
}

/// The name under which a moved VM's image stays as a shadow.
pub(super) fn shadow_of(file: &Path, job: JobId) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".longhaul-{}.moved", job.short()));
    file.with_file_name(name)
}

fn bar(file: &Path, job: JobId) -> Result<(File, Option<Seal>), String> {
    let shadow = shadow_of(file, job);
    let said = |error: std::io::Error| format!("{}: {error}", file.display());
    let regular = std::fs::symlink_metadata(file).is_ok_and(|meta| meta.is_file());
    let place = if regular && shadow.exists() {
        return Err(both(file, &shadow));
    } else if regular {
        std::fs::rename(file, &shadow).map_err(said)?;
        shadow
    } else if shadow.exists() {
        // A former life came this far.
        shadow
    } else {
        file.to_owned()
    };
    let image = File::options()
        .read(true)
        .write(true)
        .open(&place)
        .map_err(said)?;
    let seal = image.metadata().is_ok_and(|meta| meta.is_file());
    let seal = seal.then(|| Seal::of(&image)).transpose().map_err(said)?;
    if image_lock::hold_beside_readers(&image).map_err(said)? {
        Ok((image, seal))
    } else {
        Err(format!("{} is in use by somebody else", place.display()))
    }
}

fn both(file: &Path, shadow: &Path) -> String {
    format!(
        "{} and {} both exist: move the one away that is not the VM's disk",
        file.display(),
        shadow.display()
    )
}

fn look(file: &Path, job: JobId) -> Result<Shadow, String> {
    let shadow = Some(shadow_of(file, job)).filter(|shadow| shadow.exists());
    let place = shadow.as_deref().unwrap_or(file);
    let meta = std::fs::metadata(place).map_err(|error| format!("{}: {error}", place.display()))?;
    Ok(Shadow {
        file: file.to_owned(),
        inode: std::os::unix::fs::MetadataExt::ino(&meta),
        shadow,
    })
}

fn hold(shadow: &Shadow) -> Option<File> {
    let place = shadow.shadow.as_ref()?;
    let image = File::options().read(true).write(true).open(place).ok()?;
    image_lock::hold_beside_readers(&image)
        .is_ok_and(|held| held)
        .then_some(image)
}

fn free(file: &Path, job: JobId) -> Result<(), String> {
    let shadow = shadow_of(file, job);
    if !shadow.exists() {
        return Ok(());
    }
    if file.exists() {
        return Err(both(file, &shadow));
    }
    std::fs::rename(&shadow, file).map_err(|error| format!("{}: {error}", shadow.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barred_image_has_another_name_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (file, job) = (dir.path().join("web.img"), JobId::random());
        std::fs::write(&file, "disk").unwrap();
        let held = bar(&file, job).unwrap();
        assert_eq!(held.1, Some(Seal::of(&held.0).unwrap()));
        assert!(!file.exists() && shadow_of(&file, job).exists());
        drop(bar(&file, job).err());
        drop(held);
        let held = bar(&file, job).unwrap();
        free(&file, job).unwrap();
        free(&file, job).unwrap();
        drop(held);
        assert_eq!(std::fs::read(&file).unwrap(), b"disk");
        std::fs::write(shadow_of(&file, job), "another").unwrap();
        assert!(free(&file, job).unwrap_err().contains("both exist"));
    }
}
