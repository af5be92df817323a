//! What an error of this agent means for the job.
//!
//! Owns the translation of errors into refusals, so that the peer and the operator learn the cause in words.

use std::error::Error;

use longhaul_common::wire::session::{Refusal, RefusalKind};

use crate::disk::apply::TargetError;
use crate::disk::image::ImageError;
use crate::disk::reader::ReadError;

/// An error that somebody has to mend.
pub(super) fn refused<T, E: Error>(result: Result<T, E>) -> Result<T, Refusal> {
    result.map_err(|error| Refusal::because(RefusalKind::Refused, &error))
}

/// Errors of a source image.
pub(super) fn image(error: &ImageError) -> Refusal {
    let kind = match error {
        ImageError::Changed { .. } => RefusalKind::SourceChanged,
        _ => RefusalKind::Refused,
    };
    Refusal::because(kind, error)
}

/// Errors of reading a source image to its end.
pub(super) fn reading(error: &ReadError) -> Refusal {
    let kind = match error {
        ReadError::Io(_) => RefusalKind::Refused,
        ReadError::Stopped => RefusalKind::Lost,
        ReadError::Digest(_) | ReadError::Batch(_) | ReadError::Died => RefusalKind::Protocol,
    };
    Refusal::because(kind, error)
}

/// Errors of a target image.
pub(super) fn target(error: &TargetError) -> Refusal {
    let kind = match error {
        TargetError::NoSpace { .. } => RefusalKind::NoSpace,
        // An earlier error has said why; opening the copy again takes up what is durable.
        TargetError::Failed { .. } => RefusalKind::Lost,
        _ => RefusalKind::Refused,
    };
    Refusal::because(kind, error)
}
