//! NTFS.

use super::{FileSystem, Unproven};
use crate::disk::ReadAt;

/// Recognises the file system: `None` where the volume does not carry its signature, an error where it does but cannot be used.
pub fn probe(_volume: &dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven> {
    Ok(None)
}
