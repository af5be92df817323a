//! What a VM has written since it came to this host: a dirty bitmap on each disk, switched on before the VM runs.
//!
//! Owns the names of these bitmaps, and finding them. Each name says which move it counts from, so that the QEMU itself is the record: it
//! survives the agent, and ends with the QEMU, from which moment on nobody knows what was written. No sweep of a job removes them. A
//! job that moves the VM back takes over what they hold ([`super::Rounds::inherit`]) and leaves them recording.

use longhaul_common::wire::session::ShadowId;

use super::bitmaps::{add_bitmaps, bitmaps, remove_bitmaps};
use super::error::RoundsError;
use crate::vm::PREFIX;
use crate::vm::qmp::Qmp;

/// Behind [`PREFIX`], where a job's own names have its number.
const SINCE: &str = "since-";

fn prefix() -> String {
    format!("{PREFIX}{SINCE}")
}

/// The name of the bitmap that counts from the moment in which `shadow` was left.
pub fn since_name(shadow: &ShadowId) -> String {
    format!("{}{shadow}", prefix())
}

/// Which shadow a bitmap counts from.
pub fn read_since(name: &str) -> Option<ShadowId> {
    let mut parts = name.strip_prefix(&prefix())?.split('-');
    let shadow = ShadowId {
        job: parts.next()?.parse().ok()?,
        generation: parts.next()?.parse().ok()?,
        disk: longhaul_common::ids::DiskIndex(parts.next()?.parse().ok()?),
    };
    (since_name(&shadow) == name).then_some(shadow)
}

/// Switches the bitmaps on: of each disk its node and the shadow it counts from. Only in a QEMU whose VM has not run yet. Those of an
/// earlier try in the same QEMU are removed.
///
/// # Errors
/// What QEMU refused; then none is left.
pub async fn start_since(
    qmp: &Qmp,
    disks: &[(String, ShadowId)],
    granularity: u32,
) -> Result<(), RoundsError> {
    remove_since(qmp).await?;
    for (node, shadow) in disks {
        let node = std::slice::from_ref(node);
        if let Err(error) = add_bitmaps(qmp, node, &since_name(shadow), granularity).await {
            let _ = remove_since(qmp).await; // The first error is the one to tell.
            return Err(error);
        }
    }
    Ok(())
}

/// Of each node the shadow since which all writes are known.
///
/// # Errors
/// What QEMU refused.
pub async fn find_since(qmp: &Qmp, nodes: &[String]) -> Result<Vec<Option<ShadowId>>, RoundsError> {
    let all = bitmaps(qmp).await?;
    let of = |node: &String| {
        let recording = all
            .iter()
            .filter(|bitmap| bitmap.node == *node && bitmap.recording);
        let mut found = recording.filter_map(|bitmap| read_since(&bitmap.name));
        // Two that contradict each other say nothing.
        found.next().filter(|_| found.next().is_none())
    };
    Ok(nodes.iter().map(of).collect())
}

async fn remove_since(qmp: &Qmp) -> Result<(), RoundsError> {
    for bitmap in bitmaps(qmp).await? {
        if bitmap.name.starts_with(&prefix()) {
            remove_bitmaps(qmp, std::slice::from_ref(&bitmap.node), &bitmap.name).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use longhaul_common::ids::{DiskIndex, JobId};

    use super::*;

    #[test]
    fn a_name_says_what_it_counts_from_and_is_no_jobs_own() {
        let shadow = ShadowId {
            job: JobId::random(),
            generation: 3,
            disk: DiskIndex(1),
        };
        let name = since_name(&shadow);
        assert_eq!(read_since(&name), Some(shadow));
        assert!(!name.starts_with(&format!("{PREFIX}{}-", shadow.job.short())));
        for other in [
            "",
            "longhaul-since-",
            "longhaul-since-1-2-3",
            &name.replace("-3-", "-03-"),
            &format!("{name}-1"),
            &name.to_uppercase(),
        ] {
            assert_eq!(read_since(other), None, "{other}");
        }
    }
}
