//! Which paths an agent may touch: those inside the directories its config names.
//!
//! Owns the one check that both sides use before they open an image. Leaves to the opener that nothing is followed afterwards: the
//! answer holds no symbolic link in its directory, and openers refuse links. Promises: a path is allowed only where its real place is
//! inside a real root.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use longhaul_common::wire::words::is_plain;

/// Why a path is not allowed.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("{} must be an absolute path to a file, without '..' and control characters", .path.display().to_string().escape_debug())]
    NotAFile { path: PathBuf },
    #[error("the directory of {} cannot be examined: create it or correct the path", .path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} lies outside the allowed directories ({roots}): move it, or add its directory to the agent's config", .path.display())]
    Outside { path: PathBuf, roots: String },
}

/// The real place of `path`, if it lies inside one of `roots`; its last part need not exist yet.
///
/// Symbolic links in its directory are resolved first. A last part that is a link must lead into a root as well, or be a link
/// in `/dev` to a block device there (`/dev/mapper/...`).
pub fn resolve_inside(roots: &[PathBuf], path: &Path) -> Result<PathBuf, RootError> {
    let not_a_file = || RootError::NotAFile {
        path: path.to_owned(),
    };
    // A line end in a name would be two names to a hook, and a control character speaks to the terminal that shows it.
    let shown = path.to_str().is_none_or(|path| path.chars().all(is_plain));
    let plain = shown && path.is_absolute() && !path.components().any(|part| part == Component::ParentDir);
    let (Some(parent), Some(name), true) = (path.parent(), path.file_name(), plain) else {
        return Err(not_a_file());
    };
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(not_a_file());
    }
    let directory = |source| RootError::Directory {
        path: path.to_owned(),
        source,
    };
    let real = parent.canonicalize().map_err(directory)?.join(name);
    let inside = |path: &Path| {
        roots
            .iter()
            .filter_map(|root| root.canonicalize().ok())
            .any(|root| path.starts_with(root))
    };
    let outside = || {
        let roots: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
        RootError::Outside {
            path: path.to_owned(),
            roots: roots.join(", "),
        }
    };
    if !inside(&real) {
        return Err(outside());
    }
    if !real
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.is_symlink())
    {
        return Ok(real);
    }
    let target = real.canonicalize().map_err(directory)?;
    let is_device = || {
        let device = target
            .metadata()
            .is_ok_and(|metadata| metadata.file_type().is_block_device());
        device && real.starts_with("/dev") && target.starts_with("/dev")
    };
    if inside(&target) || is_device() {
        Ok(target)
    } else {
        Err(outside())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_real_places_inside_a_root_are_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (inside, outside) = (dir.join("inside"), dir.join("outside"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("secret"), b"x").unwrap();
        std::fs::write(inside.join("plain"), b"x").unwrap();
        symlink(&outside, inside.join("way-out")).unwrap();
        symlink(outside.join("secret"), inside.join("link-out")).unwrap();
        symlink(inside.join("plain"), inside.join("link-in")).unwrap();
        symlink(&inside, dir.join("way-in")).unwrap();
        let roots = [inside.clone(), dir.join("absent")];
        let resolve = |path: &Path| resolve_inside(&roots, path);
        assert_eq!(resolve(&inside.join("new")).unwrap(), inside.join("new"));
        assert_eq!(resolve(&dir.join("way-in/new")).unwrap(), inside.join("new"));
        assert_eq!(resolve(&inside.join("link-in")).unwrap(), inside.join("plain"));
        assert_eq!(resolve(&inside.join("./new")).unwrap(), inside.join("new"));
        for refused in ["way-out/secret", "link-out", "../outside/secret", "way-out/new"] {
            assert!(resolve(&inside.join(refused)).is_err(), "{refused}");
        }
        assert!(resolve(Path::new("plain")).is_err());
        assert!(resolve(Path::new("/")).is_err());
        assert!(resolve(&inside.join("absent/new")).is_err());
        assert!(resolve(Path::new(&format!("{}/new/", inside.display()))).is_err());
        let error = resolve(&outside.join("secret")).unwrap_err().to_string();
        assert!(error.contains(&inside.display().to_string()), "{error}");
        assert!(resolve(&dir.join("inside-not")).is_err());
    }
}
