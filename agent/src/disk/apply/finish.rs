//! Finishing a commit that a crash cut in the middle.
//!
//! Owns telling a copy that was promoted before from one that was not: by what the commit noted of it, never by there being some file
//! under the final name, which may be the old image that the copy was to replace. Promises that it reports success only where the very
//! file or device that was verified is under its name.

use super::place::{self, Dir, Place};
use super::progress_log::LockedLog;
use super::target::{Target, lock};
use super::{TargetError, TargetOptions, open};

impl Target {
    /// What tells this very file or device from every other, in a form that can be written down.
    pub fn identity(&self) -> String {
        lock(&self.log).header.bound.to_string()
    }
}

/// Promotes the copy of `size` bytes whose [`Target::identity`] is `known`, unless that was done before.
///
/// Errors: `Refused` where the copy is neither complete under its temporary name nor promoted; those of [`Target::open`] and
/// [`Target::promote`].
pub fn finish_promotion(options: &TargetOptions, size: u64, known: &str) -> Result<(), TargetError> {
    if is_promoted(options, known)? {
        return Ok(());
    }
    match Target::open(options, size) {
        Ok((target, have)) if have.bytes() >= size && target.identity() == known => {
            target.promote().map(|_| ())
        }
        Ok((target, have)) => {
            // One that was made just now is nobody's; anything else may help whoever looks for the cause.
            if have.bytes() == 0 && target.identity() != known {
                target.discard()?;
            }
            Err(TargetError::refused(
                &options.path,
                "its partial copy vanished or was changed while it was committed: run a new job",
            ))
        }
        Err(TargetError::AlreadyPromoted { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_promoted(options: &TargetOptions, known: &str) -> Result<bool, TargetError> {
    if open::is_device(&options.path) {
        // A device has its name from the start; without its log it is done.
        let dir = Dir::open(&options.state_dir)?;
        let log = LockedLog::open(&dir, &open::device_log(options), false)?;
        return Ok(log.is_none());
    }
    let place = Place::of(options)?;
    if place.is_linked()? {
        return Ok(false);
    }
    let Some(file) = place.final_file()? else {
        return Ok(false);
    };
    let found = place::file_identity(&file, options.format.word(), &place.path())?;
    if found.to_string() != known {
        return Ok(false);
    }
    // Where a rename had to be two steps, the first name may still be there.
    place.dir.remove(&place.partial_name)?;
    place.dir.remove(place.log_name.as_ref())?;
    place.dir.sync()?;
    Ok(true)
}
