//! Why one end refuses or gives up, as it crosses the wire.
//!
//! Owns the kinds of refusal and how an error with its causes becomes one sentence. Leaves what follows from one to whoever hears it.
//! Promises that the other end's reason is kept word for word, within bounds.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::words;

/// Why one end refuses or gives up, with enough to tell a person and to decide what comes next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub kind: RefusalKind,
    /// A sentence with cause and remedy.
    #[serde(deserialize_with = "words::text")]
    pub text: String,
}

/// What a refusal means for the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The request cannot succeed until somebody changes something: a path, a setting, a permission.
    Refused,
    /// The target has no room left; the job goes on by itself when there is.
    NoSpace,
    /// The source image changed while it was copied, or is in use.
    SourceChanged,
    /// Both ends hold different content.
    Mismatch,
    /// A link or a program is gone; trying again is right.
    Lost,
    /// A newer attempt of the same job has taken over.
    Superseded,
    /// Somebody asked for it.
    Cancelled,
    /// A bug: an end did what the protocol forbids.
    Protocol,
}

impl RefusalKind {
    /// Whether another attempt may succeed without anybody's help.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Lost | Self::NoSpace)
    }
}

impl Refusal {
    pub fn new(kind: RefusalKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }

    /// A refusal that says the whole chain of causes of `error`.
    pub fn because(kind: RefusalKind, error: &dyn std::error::Error) -> Self {
        Self {
            kind,
            text: chain(error),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Refusal {}

/// An error and its causes as one sentence. A cause that its outer text already repeats is left out.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let said = inner.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the disk cannot be read")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_reads_as_one_sentence() {
        let error = Outer(std::io::Error::other("bad sector"));
        assert_eq!(chain(&error), "the disk cannot be read: bad sector");
    }
}
