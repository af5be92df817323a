//! Whether a directory's file system has room, asked before a byte moves.

use std::path::Path;

use super::TargetError;

/// Refuses unless `dir`'s file system has `needed` bytes free for an ordinary user. A forecast: the space is not reserved.
pub fn check_space(dir: &Path, needed: u64) -> Result<(), TargetError> {
    let free = rustix::fs::statvfs(dir).map_err(TargetError::during("ask for the free space of", dir))?;
    let free = free.f_bavail.saturating_mul(free.f_frsize);
    if free < needed {
        return Err(TargetError::TooLittleSpace {
            path: dir.to_owned(),
            needed,
            free,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_space_names_both_numbers() {
        let dir = tempfile::tempdir().unwrap();
        check_space(dir.path(), 1).unwrap();
        let error = check_space(dir.path(), u64::MAX).unwrap_err();
        assert!(
            matches!(error, TargetError::TooLittleSpace { needed: u64::MAX, .. }),
            "{error}"
        );
        assert!(check_space(&dir.path().join("absent"), 1).is_err());
    }
}
