//! From a transfer that came to its end to the report of its job.
//!
//! Owns which count goes where, for powered-off and running VMs. Leaves the report's keys to `report`, and times, attempts and the verdict
//! to `driver`. Pure.

use longhaul_common::digest::Digest;

use super::attempt::{Proof, Transfer};
use super::live::Moved;
use super::report::{DiskReport, LiveReport, Report, joint_digest};
use crate::store::JobRecord;

/// The report of a powered-off VM: its disks' digests are its proof.
pub(super) fn moved_cold(record: &JobRecord, transfer: &Transfer<'_>, proofs: &[Proof]) -> Report {
    let sums = transfer.outflow.ledger().disks().to_vec();
    let mut disks = Vec::new();
    for (((section, opened), proof), sums) in record
        .spec
        .disk
        .iter()
        .zip(&transfer.source.disks)
        .zip(proofs)
        .zip(sums)
    {
        let (source, target) = (
            section.source.display().to_string(),
            section.target.display().to_string(),
        );
        let mut disk = DiskReport::opened(&source, &target, opened);
        disk.read(proof.source, &proof.counts);
        disk.target_digest = proof.target.to_string();
        disk.wan_bytes = sums.wan;
        (disk.verify_ms, disk.flush_ms) = (proof.verify_ms, proof.flush_ms);
        disks.push(disk);
    }
    let total = transfer.outflow.sums();
    let sum = |of: fn(&DiskReport) -> u64| disks.iter().map(of).sum();
    let digests = |of: fn(&Proof) -> Digest| joint_digest(&proofs.iter().map(of).collect::<Vec<_>>());
    let notes = transfer
        .source
        .disks
        .iter()
        .flat_map(|disk| &disk.notes)
        .chain(&transfer.target.notes);
    Report {
        equal: proofs.iter().all(|proof| proof.source == proof.target),
        raw_bytes: sum(|disk| disk.raw_bytes),
        used_bytes: sum(|disk| disk.used_bytes),
        skipped_free_bytes: sum(|disk| disk.skipped_free_bytes),
        hole_bytes: sum(|disk| disk.hole_bytes),
        zero_bytes: sum(|disk| disk.zero_bytes),
        sent_raw_bytes: total.sent,
        wan_bytes: total.wan,
        resent_bytes: total.resent,
        source_digest: digests(|proof| proof.source),
        target_digest: digests(|proof| proof.target),
        notes: notes.cloned().collect(),
        disks,
        ..Report::default()
    }
}

/// The report of a VM that was moved while it ran. Its proof is end to end: every batch's digest was checked where it was written, and
/// both agents state one digest over the RAM stream.
pub(super) fn moved_live(record: &JobRecord, transfer: &Transfer<'_>, moved: Moved) -> Report {
    let sums = transfer.outflow.ledger().disks().to_vec();
    let opened = record.spec.disk.iter().zip(&transfer.source.disks);
    let mut disks = Vec::new();
    for ((index, (section, opened)), sums) in opened.enumerate().zip(sums) {
        let (source, target) = (
            section.source.display().to_string(),
            section.target.display().to_string(),
        );
        let mut disk = DiskReport::opened(&source, &target, opened);
        if let Some(Some((_, counts))) = transfer.done.get(index) {
            (disk.zero_bytes, disk.kept_bytes) = (counts.zero, counts.kept);
            (disk.read_ms, disk.hash_ms) = (counts.read_ms, counts.hash_ms);
        }
        (disk.sent_raw_bytes, disk.wan_bytes) = (sums.sent, sums.wan);
        if let Some(parts) = moved.outcome.parts.get(index) {
            disk.left_behind(parts);
        }
        disks.push(disk);
    }
    let mut live = LiveReport::new(&moved.outcome);
    let ledger = transfer.outflow.ledger();
    (live.ram_sent_bytes, live.ram_wan_bytes) = (ledger.ram().sent, ledger.ram().wan);
    live.dirty_wan_bytes = ledger.dirty().1;
    drop(ledger);
    let total = transfer.outflow.sums();
    let sum = |of: fn(&DiskReport) -> u64| disks.iter().map(of).sum();
    let digest = moved.outcome.stream_digest.to_string();
    let notes = transfer.source.disks.iter().flat_map(|disk| &disk.notes);
    let surveyed = transfer.source.survey.iter().flat_map(|survey| &survey.notes);
    let notes = notes.chain(surveyed).chain(&transfer.target.notes);
    let notes = notes.chain(&moved.outcome.notes);
    Report {
        equal: true,
        raw_bytes: sum(|disk| disk.raw_bytes),
        used_bytes: sum(|disk| disk.used_bytes),
        skipped_free_bytes: sum(|disk| disk.skipped_free_bytes),
        hole_bytes: sum(|disk| disk.hole_bytes),
        zero_bytes: sum(|disk| disk.zero_bytes),
        sent_raw_bytes: total.sent,
        wan_bytes: total.wan,
        resent_bytes: total.resent,
        source_digest: digest.clone(),
        target_digest: digest,
        notes: notes.cloned().collect(),
        hook: moved.hook,
        live: Some(live),
        disks,
        ..Report::default()
    }
}
