//! What the target agent and its session may do next in the model.

use std::time::Duration;

use super::*;

impl World {
    pub(super) fn target_event(&mut self, event: TargetEvent) {
        let Some(machine) = &mut self.target.machine else {
            return;
        };
        let mut effects = machine.on(event);
        match self.fault {
            Some(Fault::ContBeforeJournal) => move_first(&mut effects, |effect| *effect == Effect::Cont),
            Some(Fault::AckBeforeJournal) => {
                move_first(&mut effects, |effect| {
                    matches!(effect, Effect::Send(Word::Ack { .. }))
                });
            }
            Some(Fault::AbortedBeforeJournal) => {
                move_first(&mut effects, |effect| {
                    matches!(effect, Effect::Send(Word::Aborted { .. }))
                });
            }
            _ => {}
        }
        self.target.pending = effects;
    }

    pub(super) fn target_steps(&self, steps: &mut Steps) {
        let Some(machine) = &self.target.machine else {
            if !self.target_lost && !self.target_off {
                self.step(
                    steps,
                    format_args!("the target agent restarts"),
                    Self::restart_target,
                );
            }
            return;
        };
        if let Some(effect) = self.target.pending.first().copied() {
            self.step(steps, format_args!("target does {effect:?}"), |world| {
                world.target_does(effect)
            });
            return;
        }
        let mut event = |event: TargetEvent| {
            self.step(steps, format_args!("target <- {event:?}"), |world| {
                world.target_event(event)
            });
        };
        for generation in 1..=self.prepare {
            event(TargetEvent::Prepare(Generation(generation)));
        }
        event(TargetEvent::Qemu(self.target_qemu));
        event(TargetEvent::Remind);
        for word in self.said.iter().filter(|word| is_for_target(word)) {
            event(TargetEvent::Heard(*word));
        }
        if let Some(overdue) = machine.overdue(Duration::MAX, &Limits::default()) {
            event(overdue.event);
        }
        match self.arrived {
            _ if !self.incoming => {}
            Arrived::Part => {}
            Arrived::Corrupt if !self.is(Fault::HashNotChecked) => {
                let wrong = Stream {
                    len: 0,
                    hash: Digest([0; 32]),
                };
                event(TargetEvent::StreamWritten(wrong));
            }
            _ => event(TargetEvent::StreamWritten(stream(self.loads))),
        }
        self.target_disks_and_words(steps);
    }

    pub(super) fn target_disks_and_words(&self, steps: &mut Steps) {
        let flushed = if self.is(Fault::DisksNotFlushed) {
            self.sent_batches
        } else {
            self.durable
        };
        if self.told_batches != flushed {
            self.step(
                steps,
                format_args!("target <- DisksDurable({flushed})"),
                |world| {
                    world.told_batches = flushed;
                    world.target_event(TargetEvent::DisksDurable(flushed.into()));
                },
            );
        }
        if self.source_lost {
            self.step(
                steps,
                format_args!("the operator has the target give up"),
                |world| {
                    world.target_event(TargetEvent::Resolve(Resolve::Source));
                },
            );
        }
        let stale = self.is(Fault::TargetTimesOut) && self.target_qemu == TargetQemu::Loaded;
        if self.source_lost || stale {
            self.step(steps, format_args!("the operator resolves target"), |world| {
                world.resolved |= !stale;
                world.target_event(TargetEvent::Resolve(Resolve::Target));
            });
        }
    }

    pub(super) fn restart_target(&mut self) {
        match TargetOwner::restore(&self.target.journal) {
            Ok((machine, effects)) => {
                self.target.machine = Some(machine);
                self.target.pending = effects;
            }
            Err(_) => self.break_if(true, "the target cannot read its own journal"),
        }
    }

    pub(super) fn target_does(&mut self, effect: Effect) {
        self.target.pending.remove(0);
        let done = match effect {
            Effect::Journal(record) => {
                let unsynced = self.is(Fault::TargetJournalNotSynced);
                self.target.append(record, unsynced);
                true
            }
            Effect::Send(word) => {
                self.say(word);
                true
            }
            Effect::StartIncoming => {
                self.target_qemu = TargetQemu::Loading;
                self.arrived = Arrived::Part;
                self.incoming = true;
                self.loads = self
                    .target
                    .machine
                    .as_ref()
                    .map_or(0, |machine| machine.generation().0);
                true
            }
            Effect::KillIncoming => {
                self.target_qemu = TargetQemu::Gone;
                true
            }
            Effect::Cont => match self.target_qemu {
                TargetQemu::Loaded => {
                    self.run_target(self.arrived == Arrived::Whole);
                    true
                }
                other => {
                    self.break_if(
                        other == TargetQemu::Loading,
                        "`cont` while the target's QEMU was loading",
                    );
                    other == TargetQemu::Running
                }
            },
            Effect::BootFromDisks => {
                // An agent asks people to, and they know what was resolved; what they resolved in its favour they do.
                let ours = matches!(
                    self.target.machine.as_ref().map(|target| *target.state()),
                    Some(TargetState::Running { by: By::Operator, .. })
                );
                if !self.target_runs() && (ours || !self.resolved) {
                    self.run_target(true);
                }
                true
            }
            _ => true,
        };
        if !done {
            self.target.pending.clear();
            self.target_event(TargetEvent::Failed(effect));
        }
    }

    pub(super) fn run_target(&mut self, memory: bool) {
        self.target_qemu = TargetQemu::Running;
        self.target_ran = true;
        let disks = self.durable == self.loads as u8;
        let sound = memory && disks && !self.resumed;
        self.break_if(
            !sound && !self.source_lost && !self.resolved,
            "a write is lost: the target runs something old or incomplete",
        );
    }
}
