//! QEMU has stopped the VM by itself: it had nothing left to send, perhaps in the midst of a round of the disks.
//!
//! Owns what follows: what is left is finished while the VM stands, or the stop is undone. Leaves the judgement to `vm::converge`, and the
//! handover to `switch`. Promises that the VM stands no longer than the blackout allows for what was known to be left when it stopped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::wire::session::LiveStage;

use super::{Drive, Stop};
use crate::session::live::uplink::Uplink;
use crate::vm::converge::{Decision, Verdict};
use crate::vm::handover::Reason;
use crate::vm::qmp::{Event, Heard, MigrationStatus};

/// A VM that stands for the rest of a round is let go after so many times the blackout that is allowed: the link is slower than it was, or
/// gone.
const TOO_LONG: u32 = 2;

impl Drive {
    /// QEMU has stopped an idle VM: finished where what is left fits, undone otherwise. `true`: the VM runs at the target.
    pub(super) async fn unasked(&mut self, uplink: &Arc<Uplink>) -> Result<bool, Stop> {
        let stood = self.stands.map_or(Duration::ZERO, |since| since.elapsed());
        let verdict = self.judge(uplink, 0, stood).await?;
        match verdict.decision {
            Decision::HandOver { predicted } => {
                self.outcome.predicted_blackout_ms = predicted.as_millis() as u64;
                self.hand_over(uplink).await.map(|()| true)
            }
            _ => self.undo().await.map(|()| false),
        }
    }

    /// Waits until QEMU says that the VM stands, or may have said so; where it stands for a round, until that lasts too long. Cancel-safe.
    pub(super) async fn stopped(&mut self) {
        let late = self.stands.map(|since| since + self.policy.blackout * TOO_LONG);
        let too_long = async {
            match late {
                Some(late) => tokio::time::sleep_until(late.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(too_long);
        loop {
            let heard = tokio::select! {
                heard = self.events.next() => heard,
                () = &mut too_long => return,
            };
            match heard {
                Heard::Event(Event::Stop | Event::Migration(MigrationStatus::PreSwitchover))
                | Heard::Missed => {
                    return;
                }
                Heard::Event(_) => {}
                // Whoever asks QEMU next finds that out.
                Heard::Lost => return too_long.await,
            }
        }
    }

    /// QEMU may have stopped the VM in the midst of a round of which `unsent` bytes are not on their way yet. `false`: the round is of no use
    /// any more, for what is left takes too long, and the VM runs on.
    pub(super) async fn goes_on(&mut self, uplink: &Uplink, unsent: u64) -> Result<bool, Stop> {
        if let Some(since) = self.stands {
            if since.elapsed() < self.policy.blackout * TOO_LONG {
                return Ok(true);
            }
            self.note("the rest of the round takes longer than could be foreseen, so QEMU's stop is undone");
            return self.undo().await.map(|()| false);
        }
        if !self.vm.stopped_unasked().await? {
            return Ok(true);
        }
        let since = Instant::now();
        // The last round follows when this one is durable.
        let rtt = self.s.heard.borrow().rtt().unwrap_or_default();
        let verdict = self.judge(uplink, unsent + uplink.unsettled(), rtt).await?;
        if matches!(verdict.decision, Decision::HandOver { .. }) {
            self.stands = Some(since);
            return Ok(true);
        }
        self.undo().await.map(|()| false)
    }

    /// Whether what is left fits, with `more` bytes of the disks and as much more time.
    async fn judge(&mut self, uplink: &Uplink, more: u64, time: Duration) -> Result<Verdict, Stop> {
        let dirty = self.rounds.dirty_bytes().await?;
        let (now, rtt) = (self.began.elapsed(), self.s.heard.borrow().rtt());
        let ram = self.vm.ram_view();
        let mut view = self.pace.view(now, &dirty, None, ram.as_ref(), uplink, rtt);
        if let Some(disk) = view.disks.first_mut() {
            disk.unsent += more;
        }
        let verdict = self.converge.unasked(now, &view, time, &self.policy);
        self.note(&verdict.why);
        self.state(LiveStage::Ram, 0, 0, verdict.why.clone()).await;
        Ok(verdict)
    }

    /// The VM runs on, its memory is begun anew.
    async fn undo(&mut self) -> Result<(), Stop> {
        self.stands = None;
        self.vm.give_up(Reason::TooEarly).await
    }
}
