//! What each event does to the source's machine.
//!
//! Owns the transitions. Leaves the states, their records and their duties to the parent.

use super::{
    By, Effect, Facts, Generation, Note, Reason, Record, Resolve, SourceEvent, SourceOwner, SourceQemu,
    SourceState, Word,
};

impl SourceOwner {
    /// Takes an event; the effects are to be done in order.
    pub fn on(&mut self, event: SourceEvent) -> Vec<Effect> {
        if self.unwritten {
            return self.on_unwritten(event);
        }
        match event {
            SourceEvent::Begin(generation) => self.begin(generation),
            SourceEvent::Qemu(qemu) => self.qemu(qemu),
            SourceEvent::LastRoundRead => self.last_round_read(),
            SourceEvent::StreamEnded(facts) => self.stream_ended(facts),
            SourceEvent::Heard(word) => self.heard(word),
            SourceEvent::Stop(reason) => self.stop(reason),
            SourceEvent::Resolve(resolve) => self.resolve(resolve),
            SourceEvent::Remind => self.remind(),
            SourceEvent::Failed(effect) => self.failed(effect),
        }
    }

    /// An agent whose journal fails is as good as dead: it says nothing and tries again.
    fn on_unwritten(&mut self, event: SourceEvent) -> Vec<Effect> {
        match event {
            SourceEvent::Remind => {
                self.unwritten = false;
                self.enter_again()
            }
            SourceEvent::Failed(Effect::Journal(_)) => Vec::new(),
            _ => Vec::new(),
        }
    }

    fn enter_again(&self) -> Vec<Effect> {
        let mut effects: Vec<_> = self.record().map(Effect::Journal).into_iter().collect();
        effects.extend(self.duties());
        effects
    }

    /// Into a state with a record of its own.
    fn enter(&mut self, state: SourceState, note: Note) -> Vec<Effect> {
        self.state = state;
        self.closed = matches!(state, SourceState::Kept { gone: false, .. });
        let mut effects = self.enter_again();
        effects.push(Effect::Report(note));
        effects
    }

    fn begin(&mut self, generation: Generation) -> Vec<Effect> {
        if !self.is_quiet() || generation <= self.generation {
            return vec![Effect::Report(Note::Refused(
                "the last handover of this job is not settled",
            ))];
        }
        *self = Self {
            generation,
            closed: false,
            told: false,
            state: SourceState::Iterating,
            ..Self::new()
        };
        vec![Effect::Journal(Record::Began { generation }), Effect::Migrate]
    }

    fn qemu(&mut self, qemu: SourceQemu) -> Vec<Effect> {
        use SourceQemu as Q;
        use SourceState as S;
        match (self.state, qemu) {
            (S::Iterating | S::PreSwitchover | S::Continuing { .. }, Q::Idle) => {
                self.keep(Reason::MigrationFailed, false)
            }
            (S::Iterating | S::PreSwitchover | S::Continuing { .. }, Q::Gone) => {
                self.keep(Reason::SourceQemuDied, true)
            }
            (S::Iterating, Q::PreSwitchover) => {
                self.state = S::PreSwitchover;
                Vec::new()
            }
            (S::Iterating | S::PreSwitchover, Q::Device | Q::Completed) => self.stop(Reason::Meddled),
            (S::Continuing { ended, .. }, Q::Completed) => self.hand_over_if(ended, true),
            (S::Barring { facts }, Q::Completed) => self.hand_over(facts),
            (S::Barring { .. }, Q::Gone) => self.stop(Reason::SourceQemuDied),
            (S::Barring { .. }, _) => self.stop(Reason::Meddled),
            (S::Settling { reason }, Q::Idle) => self.keep(reason, false),
            (S::Settling { reason }, Q::Gone) => self.keep(reason, true),
            (S::Settling { .. }, Q::Completed) => vec![Effect::Cont, Effect::Look],
            (S::Kept { gone: true, .. } | S::TakenBack { .. }, Q::Idle) => self.close(),
            (
                S::TakenBack {
                    by,
                    reason,
                    gone: false,
                },
                Q::Gone,
            ) if !self.closed => {
                self.state = S::TakenBack {
                    by,
                    reason,
                    gone: true,
                };
                vec![Effect::Report(Note::Boot), Effect::BootFromDisks, Effect::Look]
            }
            (S::Released { .. }, Q::Gone) => self.close(),
            _ => Vec::new(),
        }
    }

    fn keep(&mut self, reason: Reason, gone: bool) -> Vec<Effect> {
        self.enter(SourceState::Kept { reason, gone }, Note::Kept(reason))
    }

    fn close(&mut self) -> Vec<Effect> {
        if self.closed {
            return Vec::new();
        }
        self.closed = true;
        vec![Effect::Journal(Record::Closed {
            generation: self.generation,
        })]
    }

    fn last_round_read(&mut self) -> Vec<Effect> {
        if self.state != SourceState::PreSwitchover {
            return Vec::new();
        }
        self.state = SourceState::Continuing {
            ended: None,
            completed: false,
        };
        vec![Effect::MigrateContinue]
    }

    fn stream_ended(&mut self, facts: Facts) -> Vec<Effect> {
        match self.state {
            SourceState::Continuing { completed, .. } => {
                let mut effects = self.hand_over_if(Some(facts), completed);
                if !completed {
                    effects.push(Effect::Look);
                }
                effects
            }
            _ => Vec::new(),
        }
    }

    /// QEMU says completed and every byte of its stream was taken: nobody may start it from here on.
    fn hand_over_if(&mut self, ended: Option<Facts>, completed: bool) -> Vec<Effect> {
        let (Some(facts), true) = (ended, completed) else {
            self.state = SourceState::Continuing { ended, completed };
            return Vec::new();
        };
        self.state = SourceState::Barring { facts };
        self.duties()
    }

    /// The copy cannot be started any more, and the very QEMU that completed still stands: nobody ran it in between.
    fn hand_over(&mut self, facts: Facts) -> Vec<Effect> {
        let state = SourceState::HandedOver {
            facts,
            recalled: None,
            fresh: true,
        };
        self.state = state;
        let journal = self.record().map(Effect::Journal);
        let commit = self.word_due().map(Effect::Send);
        let note = Some(Effect::Report(Note::HandedOver));
        [journal, commit, note].into_iter().flatten().collect()
    }

    fn stop(&mut self, reason: Reason) -> Vec<Effect> {
        use SourceState as S;
        match self.state {
            S::Iterating | S::PreSwitchover | S::Continuing { .. } | S::Barring { .. } => {}
            S::HandedOver {
                facts,
                recalled,
                fresh,
            } => {
                self.state = S::HandedOver {
                    facts,
                    recalled: recalled.or(Some(reason)),
                    fresh,
                };
                return self.word_due().map(Effect::Send).into_iter().collect();
            }
            _ => return Vec::new(),
        }
        self.state = S::Settling { reason };
        // After `migrate-continue` QMP may be deaf until QEMU is freed from its stream: so that comes first.
        let mut effects = vec![Effect::CloseStream];
        effects.extend(self.duties());
        effects
    }

    fn heard(&mut self, word: Word) -> Vec<Effect> {
        let generation = word.generation();
        if generation != self.generation {
            return self.heard_of_another(word);
        }
        match word {
            Word::Ack { .. } => self.acked(),
            Word::Aborted { reason, .. } => self.aborted(reason),
            Word::Ask { .. } => {
                let undecided = Word::Undecided { generation };
                match self.state {
                    SourceState::Kept { reason, .. } | SourceState::TakenBack { reason, .. } => {
                        vec![Effect::Send(Word::Abort { generation, reason })]
                    }
                    _ => vec![Effect::Send(self.word_due().unwrap_or(undecided))],
                }
            }
            Word::Unknown { .. } => match self.state {
                SourceState::HandedOver { .. } => vec![Effect::Report(Note::Forgotten)],
                SourceState::Kept { .. } => {
                    self.told = true;
                    Vec::new()
                }
                _ => Vec::new(),
            },
            Word::Commit { .. } | Word::Abort { .. } | Word::Undecided { .. } => Vec::new(),
        }
    }

    /// A lower generation was given up, or this one would not exist.
    fn heard_of_another(&self, word: Word) -> Vec<Effect> {
        let generation = word.generation();
        match word {
            Word::Ask { .. } if generation < self.generation => {
                vec![Effect::Send(Word::Abort {
                    generation,
                    reason: Reason::Replaced,
                })]
            }
            Word::Ask { .. } => vec![Effect::Send(Word::Unknown { generation })],
            _ => Vec::new(),
        }
    }

    fn acked(&mut self) -> Vec<Effect> {
        match self.state {
            SourceState::HandedOver { .. } => {
                self.enter(SourceState::Released { by: By::Protocol }, Note::Released)
            }
            SourceState::Released { .. } => Vec::new(),
            _ => vec![Effect::Report(Note::TwoOwners)],
        }
    }

    fn aborted(&mut self, reason: Reason) -> Vec<Effect> {
        self.told = true;
        match self.state {
            SourceState::HandedOver { .. } => self.take_back(By::Protocol, reason),
            SourceState::Iterating
            | SourceState::PreSwitchover
            | SourceState::Continuing { .. }
            | SourceState::Barring { .. } => self.stop(reason),
            SourceState::Released { by: By::Operator } => vec![Effect::Report(Note::NoOwner)],
            _ => Vec::new(),
        }
    }

    fn take_back(&mut self, by: By, reason: Reason) -> Vec<Effect> {
        self.enter(
            SourceState::TakenBack {
                by,
                reason,
                gone: false,
            },
            Note::TakenBack(reason),
        )
    }

    fn resolve(&mut self, resolve: Resolve) -> Vec<Effect> {
        use SourceState as S;
        match (resolve, self.state) {
            (Resolve::Source, S::HandedOver { .. } | S::Released { by: By::Operator }) => {
                self.take_back(By::Operator, Reason::Operator)
            }
            (Resolve::Source, S::Iterating | S::PreSwitchover | S::Continuing { .. } | S::Barring { .. }) => {
                self.stop(Reason::Operator)
            }
            (Resolve::Target, S::HandedOver { .. }) => {
                self.enter(S::Released { by: By::Operator }, Note::Released)
            }
            (Resolve::Source, S::Released { .. }) => {
                refused("the target has run the VM: move it back instead")
            }
            (Resolve::Target, S::Released { .. }) | (Resolve::Source, _) => Vec::new(),
            (Resolve::Target, _) => refused("the source owns the VM: cancel the job or let it finish"),
        }
    }

    fn remind(&mut self) -> Vec<Effect> {
        match self.state {
            SourceState::Iterating | SourceState::PreSwitchover | SourceState::Continuing { .. } => {
                vec![Effect::Look]
            }
            SourceState::HandedOver {
                facts,
                recalled,
                fresh,
            } => {
                self.state = SourceState::HandedOver {
                    facts,
                    recalled,
                    fresh: false,
                };
                let mut effects = self.duties();
                effects.extend(fresh.then_some(Effect::Report(Note::InDoubt)));
                effects
            }
            _ => self.duties(),
        }
    }

    fn failed(&mut self, effect: Effect) -> Vec<Effect> {
        use SourceState as S;
        match (effect, self.state) {
            // No COMMIT left this host, so nobody else can run it: a record behind the doubtful one settles it.
            (Effect::Journal(Record::HandedOver { .. }), S::HandedOver { fresh: true, .. }) => {
                self.take_back(By::Protocol, Reason::JournalFailed)
            }
            (Effect::MakeUnrunnable, _) => self.stop(Reason::NotBarred),
            // A guest that runs from images which nobody finds is not kept: silence until that is undone.
            (Effect::MakeRunnable, S::Settling { .. }) => {
                self.unwritten = true;
                Vec::new()
            }
            (Effect::Journal(Record::Began { .. }), S::Iterating) => {
                // Nothing was started, whether or not the record is there.
                self.state = S::Settling {
                    reason: Reason::JournalFailed,
                };
                self.duties()
            }
            (Effect::Journal(Record::Closed { .. }), _) => {
                self.closed = false;
                Vec::new()
            }
            (Effect::Journal(_), _) => {
                self.unwritten = true;
                Vec::new()
            }
            (Effect::Migrate | Effect::MigrateContinue, _) => self.stop(Reason::MigrationFailed),
            (Effect::Cont, S::TakenBack { .. }) => vec![Effect::Look],
            _ => Vec::new(),
        }
    }
}

fn refused(why: &'static str) -> Vec<Effect> {
    vec![Effect::Report(Note::Refused(why))]
}
