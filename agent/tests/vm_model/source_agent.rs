//! What the source agent and its session may do next in the model.

use std::time::Duration;

use super::*;

impl World {
    pub(super) fn source_event(&mut self, event: SourceEvent) {
        let Some(machine) = &mut self.source.machine else {
            return;
        };
        let mut effects = machine.on(event);
        if self.fault == Some(Fault::CommitBeforeJournal) {
            move_first(&mut effects, |effect| {
                matches!(effect, Effect::Send(Word::Commit { .. }))
            });
        }
        self.source.pending = effects;
    }

    pub(super) fn source_steps(&self, steps: &mut Steps) {
        let Some(machine) = &self.source.machine else {
            if !self.source_lost && !self.source_off {
                self.step(
                    steps,
                    format_args!("the source agent restarts"),
                    Self::restart_source,
                );
            }
            return;
        };
        if let Some(effect) = self.source.pending.first().copied() {
            self.step(steps, format_args!("source does {effect:?}"), |world| {
                world.source_does(effect)
            });
            return;
        }
        let mut event = |event: SourceEvent| {
            self.step(steps, format_args!("source <- {event:?}"), |world| {
                world.source_event(event)
            });
        };
        event(SourceEvent::Qemu(self.source_qemu));
        event(SourceEvent::Remind);
        event(SourceEvent::Stop(Reason::Cancelled));
        for word in self.said.iter().filter(|word| is_for_source(word)) {
            event(SourceEvent::Heard(*word));
        }
        let ever = Duration::MAX;
        if let Some(overdue) = machine.overdue(ever, ever, &Limits::default()) {
            event(overdue.event);
        }
        if self.target_lost || self.is(Fault::SourceTimesOut) {
            self.step(steps, format_args!("the operator resolves source"), |world| {
                world.resolved = true;
                world.source_event(SourceEvent::Resolve(Resolve::Source));
            });
        }
        self.source_progress(steps, machine);
    }

    pub(super) fn source_progress(&self, steps: &mut Steps, machine: &SourceOwner) {
        let generation = machine.generation().0;
        let next = generation + 1;
        let prepared = self
            .target
            .idle()
            .is_some_and(|target| target.generation().0 == next && self.loads == next);
        if machine.is_quiet() && next <= self.generations && !self.target_ran {
            self.step(steps, format_args!("the source asks for preparation"), |world| {
                world.prepare = next
            });
            if prepared && self.source_qemu == SourceQemu::Idle {
                self.step(steps, format_args!("source <- Begin"), |world| {
                    world.resumed = false;
                    world.source_event(SourceEvent::Begin(Generation(next)));
                });
            }
        }
        if *machine.state() == SourceState::PreSwitchover {
            self.step(steps, format_args!("source <- LastRoundRead"), |world| {
                world.sent_batches = generation as u8;
                world.source_event(SourceEvent::LastRoundRead);
            });
        }
        // The stream also ends where QEMU fails.
        let over = !matches!(
            self.source_qemu,
            SourceQemu::Device | SourceQemu::Iterating | SourceQemu::PreSwitchover
        );
        let ended = over || self.is(Fault::HandoverUnobserved);
        if matches!(machine.state(), SourceState::Continuing { .. }) && self.socket && ended && !self.tail {
            self.step(steps, format_args!("source <- StreamEnded"), |world| {
                world.tail = true;
                world.source_event(SourceEvent::StreamEnded(facts(generation)));
                if world.is(Fault::HandoverUnobserved) {
                    world.source_event(SourceEvent::Qemu(SourceQemu::Completed));
                }
            });
        }
    }

    pub(super) fn restart_source(&mut self) {
        match SourceOwner::restore(&self.source.journal) {
            Ok((machine, effects)) => {
                self.source.machine = Some(machine);
                self.source.pending = effects;
            }
            Err(_) => self.break_if(true, "the source cannot read its own journal"),
        }
    }

    pub(super) fn source_does(&mut self, effect: Effect) {
        self.source.pending.remove(0);
        let done = match effect {
            Effect::Journal(record) => {
                let unsynced = self.is(Fault::SourceJournalNotSynced);
                self.source.append(record, unsynced);
                true
            }
            Effect::Send(word) => {
                self.say(word);
                true
            }
            Effect::Migrate => {
                let idle = self.source_qemu == SourceQemu::Idle;
                if idle {
                    self.source_qemu = SourceQemu::Iterating;
                    self.socket = true;
                    self.tail = false;
                }
                idle
            }
            Effect::MigrateContinue => {
                let stands = self.source_qemu == SourceQemu::PreSwitchover;
                if stands {
                    self.source_qemu = SourceQemu::Device;
                }
                stands
            }
            Effect::Cancel => {
                if in_migration(self.source_qemu) {
                    self.resume_source();
                }
                true
            }
            Effect::Cont => match self.source_qemu {
                SourceQemu::Completed if !self.barred => {
                    self.resume_source();
                    true
                }
                other => other == SourceQemu::Idle,
            },
            // Whoever runs from the images holds their locks.
            Effect::MakeUnrunnable if self.source_runs() => false,
            Effect::MakeUnrunnable => {
                self.barred = !self.is(Fault::OldCopyNotBarred);
                if self.is(Fault::BarringUnchecked) {
                    self.source_event(SourceEvent::Qemu(SourceQemu::Completed));
                }
                true
            }
            Effect::MakeRunnable => {
                self.barred = false;
                true
            }
            Effect::Quit => {
                self.break_if(self.source_runs(), "a running guest was ended at the source");
                self.source_qemu = SourceQemu::Gone;
                true
            }
            Effect::BootFromDisks => {
                if self.source_qemu == SourceQemu::Gone && !self.barred {
                    self.resume_source();
                }
                !self.barred
            }
            _ => true,
        };
        if !done {
            self.source_failed(effect);
        }
    }

    pub(super) fn source_failed(&mut self, effect: Effect) {
        self.source.pending.clear();
        self.source_event(SourceEvent::Failed(effect));
    }

    pub(super) fn resume_source(&mut self) {
        self.source_qemu = SourceQemu::Idle;
        self.socket = false;
        self.resumed = true;
    }
}
