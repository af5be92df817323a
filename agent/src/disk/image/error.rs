//! Why an image cannot be a source: one sentence each, with the remedy.

use std::io;
use std::path::PathBuf;

use super::format::Format;
use super::nbd::NbdError;

/// Why an image was not opened, or is no longer trusted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{} is {what}, neither a regular file nor a block device", path.display())]
    Kind { path: PathBuf, what: &'static str },
    #[error(
        "{}{} is outside the directories that this agent may read; add its directory to the agent's config",
        path.display(), referrer(by.as_deref())
    )]
    NotAllowed { path: PathBuf, by: Option<PathBuf> },
    #[error("{} is in use by {holder}: {what}; stop it first", path.display())]
    InUse {
        path: PathBuf,
        holder: String,
        what: String,
    },
    #[error(
        "{} is an encrypted {format} image, whose key this agent does not have; decrypt it first \
         with qemu-img convert",
        path.display()
    )]
    Encrypted { path: PathBuf, format: Format },
    #[error("{0} is marked {what}; repair it first with: qemu-img check -r all {0}", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    #[error("{} cannot be trusted as {format}: {what}", path.display())]
    Malformed {
        path: PathBuf,
        format: Format,
        what: String,
    },
    #[error(
        "{} was only recognised as {format} by its content, which its guest may have forged, and it \
         refers to {refers_to:?}; if it really is a {format} image, state its format in the config",
        path.display()
    )]
    ProbedReference {
        path: PathBuf,
        format: Format,
        refers_to: String,
    },
    #[error(
        "{} refers to {refers_to:?}, which is no plain file name; only local files are followed",
        path.display()
    )]
    NotLocal { path: PathBuf, refers_to: String },
    #[error(
        "{0} does not record the format of its backing file {backing:?}; record it first with: \
         qemu-img rebase -u -b {backing:?} -F FORMAT {0}",
        path.display()
    )]
    BackingFormat { path: PathBuf, backing: String },
    #[error(
        "{} has {what}, and the config refuses to flatten; allow flattening, or flatten it first with \
         qemu-img convert",
        path.display()
    )]
    NotFlat { path: PathBuf, what: String },
    #[error("the chain of {} {what}", path.display())]
    Chain { path: PathBuf, what: String },
    #[error(
        "{} changed since it was opened: {what}; make sure that nothing writes to it, and start again",
        path.display()
    )]
    Changed { path: PathBuf, what: String },
    #[error("{program} is not installed; it comes with the package qemu-utils")]
    ProgramMissing { program: String },
    #[error("{program} {what}{}", and_said(": ", said))]
    Program {
        program: String,
        what: String,
        /// The end of what it wrote to its standard error.
        said: String,
    },
    #[error(
        "{program} does not serve the image: {source}{}",
        and_said("; it said: ", said)
    )]
    Served {
        program: String,
        #[source]
        source: Box<NbdError>,
        /// The end of what it wrote to its standard error.
        said: String,
    },
}

impl ImageError {
    pub(super) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

fn referrer(by: Option<&std::path::Path>) -> String {
    by.map(|by| format!(", which {} refers to,", by.display()))
        .unwrap_or_default()
}

fn and_said(lead: &str, said: &str) -> String {
    if said.is_empty() {
        String::new()
    } else {
        format!("{lead}{said}")
    }
}
