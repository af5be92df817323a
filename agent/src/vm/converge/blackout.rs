//! How long a blackout would be.
//!
//! Owns the arithmetic: `T = (disks x c_b + (buffered + pages) x c_p + device state) / goodput + steps + one round trip`. What is
//! dirtied until QEMU obeys counts as well. Every number is made harmless first: not a number and negative are zero, no link is
//! for ever.

use std::time::Duration;

use super::{LinkView, View};

/// From raising QEMU's limit until the guest stands: QEMU looks every 100 ms, after a blocked write.
const LEAD: Duration = Duration::from_millis(150);
const LEAD_MIN: Duration = Duration::from_millis(100);
/// QEMU needs so long for a pass, however few pages it has.
const PASS_MIN: Duration = Duration::from_millis(150);
/// Longer than any blackout that somebody would want to know exactly.
pub(crate) const FOR_EVER: Duration = Duration::from_secs(1 << 30);

/// A predicted blackout and what it is made of; bytes are reduced ones.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Blackout {
    pub disk_bytes: f64,
    pub ram_bytes: f64,
    pub device_bytes: f64,
    /// Steps and the round trip.
    pub fixed: Duration,
    pub total: Duration,
}

pub(crate) fn sane(number: f64) -> f64 {
    if number.is_finite() { number.max(0.0) } else { 0.0 }
}

pub(crate) fn ratio(number: f64) -> f64 {
    if number.is_finite() {
        number.clamp(0.0, 1.0)
    } else {
        1.0
    }
}

pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).map_or(FOR_EVER, |time| time.min(FOR_EVER))
}

/// Time that reduced bytes need on the link.
pub(crate) fn transfer(bytes: f64, link: &LinkView) -> Duration {
    let goodput = sane(link.goodput);
    if bytes <= 0.0 {
        return Duration::ZERO;
    }
    if goodput <= 0.0 {
        FOR_EVER
    } else {
        seconds(bytes / goodput)
    }
}

/// Reduced bytes per second that the disks make.
pub(crate) fn disk_load(view: &View) -> f64 {
    let rate: f64 = view.disks.iter().map(|disk| sane(disk.dirty_rate)).sum();
    rate * ratio(view.link.block_ratio)
}

/// Reduced bytes per second that memory makes, at best.
pub(crate) fn ram_load(view: &View) -> f64 {
    let measured = view.ram.map(|ram| ram.dirty_rate).or(view.ram_dirty_rate);
    sane(measured.unwrap_or(0.0)) * ratio(view.link.best_page_ratio)
}

fn fixed(view: &View) -> Duration {
    view.steps.saturating_add(view.link.rtt)
}

fn whole(view: &View, disk_bytes: f64, ram_bytes: f64) -> Blackout {
    let device_bytes = view.device_state as f64;
    let fixed = fixed(view);
    let total = transfer(disk_bytes + ram_bytes + device_bytes, &view.link).saturating_add(fixed);
    Blackout {
        disk_bytes,
        ram_bytes,
        device_bytes,
        fixed,
        total: total.min(FOR_EVER),
    }
}

fn residue(view: &View, lead: Duration) -> Blackout {
    let disks: f64 = view
        .disks
        .iter()
        .map(|disk| disk.dirty as f64 + disk.unsent as f64)
        .sum();
    let disk_bytes = disks * ratio(view.link.block_ratio) + disk_load(view) * lead.as_secs_f64();
    let ram_bytes = view.ram.map_or(0.0, |ram| {
        // QEMU goes on sending until it obeys, at the least so long.
        let sent = sane(view.link.goodput) * (lead.min(LEAD_MIN)).as_secs_f64();
        let counted = ram.remaining as f64 + ram.buffered as f64;
        let uncounted = sane(ram.dirty_rate) * (ram.since_sync.saturating_add(lead)).as_secs_f64();
        let page_ratio = ratio(view.link.page_ratio);
        (counted * page_ratio - sent).max(0.0) + uncounted * page_ratio
    });
    whole(view, disk_bytes, ram_bytes)
}

/// The blackout, were QEMU told now to stop the guest.
pub fn predict(view: &View) -> Blackout {
    residue(view, LEAD)
}

/// The blackout where the guest stands already.
pub(crate) fn predict_stopped(view: &View) -> Blackout {
    residue(view, Duration::ZERO)
}

/// The shortest blackout that going on can lead to: passes and rounds cannot be shorter than QEMU's and the link's own times.
pub(crate) fn floor(view: &View) -> Blackout {
    // A QEMU that comes to its end by itself need not be told: without the lead.
    let pass = (PASS_MIN + view.link.rtt).as_secs_f64();
    whole(view, disk_load(view) * pass, ram_load(view) * pass)
}

/// Reduced bytes dirtied for each byte that the link carries.
pub(crate) fn utilisation(view: &View) -> f64 {
    let load = disk_load(view) + ram_load(view);
    match sane(view.link.goodput) {
        goodput if goodput > 0.0 => load / goodput,
        _ if load > 0.0 => f64::MAX,
        _ => 0.0,
    }
}
