//! A live copy between its last write here and its final name.
//!
//! Owns that gap: every store and lock of ours is closed, so that the target's QEMU may open and lock the image, and only its name is still
//! to be given. Promises that a copy gets here only when every leaf of it is whole and flushed.

use std::path::PathBuf;

use super::place::Place;
use super::target::{Outcome, Target};
use super::{TargetError, TargetOptions};

/// A complete copy that nobody here writes any more.
pub struct Placed {
    pub(super) options: TargetOptions,
    pub(super) outcome: Outcome,
    pub(super) log: Option<(std::sync::Arc<super::place::Dir>, String)>,
}

impl Target {
    /// Lets the final name lead to the partial copy, so that a QEMU can open it already; gives the name.
    ///
    /// Errors: `Exists` where the name is taken.
    pub fn link(&self) -> Result<PathBuf, TargetError> {
        if let Outcome::File(place) = &self.outcome {
            place.link()?;
        }
        Ok(self.options.path.clone())
    }

    /// Takes that link away again, if it is there.
    pub fn unlink(&self) -> Result<(), TargetError> {
        match &self.outcome {
            Outcome::File(place) => place.unlink(),
            Outcome::Device(_) => Ok(()),
        }
    }

    /// Flushes, requires every leaf to be whole, and closes everything. Errors: `Incomplete`, `NoSpace`, `Failed`, `Io`.
    pub fn place(self) -> Result<Placed, TargetError> {
        self.flush()?;
        self.require_whole()?;
        let closed = self.store.close();
        closed.map_err(TargetError::during("close", &self.options.path))?;
        let log = super::target::lock(&self.log);
        let named = (std::sync::Arc::clone(&log.dir), log.name.clone());
        drop(log);
        Ok(Placed {
            options: self.options,
            outcome: self.outcome,
            log: Some(named),
        })
    }
}

impl Placed {
    /// Where the copy is, or will be.
    pub fn path(&self) -> &std::path::Path {
        &self.options.path
    }

    /// Gives the copy its owner, mode, label and final name; its log is removed. Repeating it after an error is fine.
    pub fn promote(&mut self) -> Result<PathBuf, TargetError> {
        let path = match &self.outcome {
            Outcome::Device(path) => path.clone(),
            Outcome::File(place) => promote_file(place, &self.options)?,
        };
        self.remove_log()?;
        Ok(path)
    }

    /// Gives the copy up.
    pub fn discard(&mut self) -> Result<(), TargetError> {
        if let Outcome::File(place) = &self.outcome {
            place.unlink()?;
            place.dir.remove(&place.partial_name)?;
        }
        self.remove_log()
    }

    fn remove_log(&mut self) -> Result<(), TargetError> {
        if let Some((dir, name)) = &self.log {
            dir.remove(name.as_ref())?;
            dir.sync()?;
        }
        self.log = None;
        Ok(())
    }
}

fn promote_file(place: &Place, options: &TargetOptions) -> Result<PathBuf, TargetError> {
    match place.partial_file()? {
        Some(file) => place.promote(&file, options),
        // Promoted before: an error came after the rename.
        None => Ok(place.path()),
    }
}

/// Finishes after a crash what `promote` would have done: the partial copy of this job takes its final name.
///
/// # Errors
/// `Io` where the names cannot be changed.
pub fn promote_after_crash(options: &TargetOptions) -> Result<PathBuf, TargetError> {
    let place = Place::of(options)?;
    let path = promote_file(&place, options)?;
    place.dir.remove(place.log_name.as_ref())?;
    place.dir.sync()?;
    Ok(path)
}

/// Lets the final name lead to the partial copy, whoever has it open; see [`Target::link`].
///
/// # Errors
/// `Exists` where the name is taken.
pub fn link_early(options: &TargetOptions) -> Result<(), TargetError> {
    Place::of(options)?.link()
}

/// Takes the link to the partial copy away after a crash; the copy stays for the next attempt.
///
/// # Errors
/// `Io` where the name cannot be removed.
pub fn unlink_after_crash(options: &TargetOptions) -> Result<(), TargetError> {
    Place::of(options)?.unlink()
}
