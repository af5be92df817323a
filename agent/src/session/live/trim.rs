//! Having the guest give its free blocks back before its disks are read.
//!
//! Owns asking its agent, and the words for what came of it. Leaves when to `drive` and `prepared`: before a dirty bitmap is on, or
//! emptied, because what is discarded counts as written.

use std::path::Path;
use std::time::Duration;

use longhaul_common::units::ByteSize;

use crate::vm::guest_agent::GuestAgent;

/// How long all file systems together may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Trims; says what came of it, and whether anything may have been discarded.
pub(super) async fn trim(guest_agent: Option<&Path>) -> (String, bool) {
    let Some(socket) = guest_agent else {
        let text = "live.fstrim is set and source.guest_agent is not: nothing was trimmed";
        return (text.to_owned(), false);
    };
    let mut guest = match GuestAgent::connect(socket).await {
        Ok(guest) => guest,
        Err(error) => return (format!("nothing was trimmed: {error}"), false),
    };
    let text = match guest.trim(LIMIT).await {
        Ok(bytes) => format!("the guest trimmed {} of its file systems", ByteSize(bytes)),
        Err(error) => format!("the guest may not have trimmed its file systems: {error}"),
    };
    (text, true)
}
