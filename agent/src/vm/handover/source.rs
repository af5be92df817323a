//! The source's machine: it owns the VM until HANDED OVER is durable, and again only after TAKEN BACK is.
//!
//! Owns the state and its duties (what has to be done in a state, again after every crash). Leaves words for people to `effect`,
//! limits to `watch`. Promises: COMMIT is sent only when HANDED OVER is durable; `cont` after that only when TAKEN BACK is.

use super::{By, Contradiction, Effect, Facts, Generation, Note, Reason, Record, Resolve, Word};

/// What the source's QEMU answers to `query-migrate` and `query-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceQemu {
    /// No migration in flight (none, cancelled, failed): the guest is as it was before.
    Idle,
    /// setup, active, cancelling: the guest runs.
    Iterating,
    /// The guest stands, disks are active.
    PreSwitchover,
    /// After `migrate-continue`, before the end.
    Device,
    /// completed, and the guest stands (postmigrate).
    Completed,
    /// There is no such process any more.
    Gone,
}

/// What happened at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// Start the migration; the target has said that this generation is prepared.
    Begin(Generation),
    Qemu(SourceQemu),
    /// In pre-switchover: the last round of every disk was read and is on its way; bitmaps and exports of ours are gone.
    LastRoundRead,
    /// QEMU closed its stream after all of it was taken; what the target must hold is known.
    StreamEnded(Facts),
    Heard(Word),
    /// Get it back: the operator's cancel, a watchdog, a lost link, no convergence.
    Stop(Reason),
    Resolve(Resolve),
    Remind,
    /// This effect failed, and those behind it were dropped.
    Failed(Effect),
}

/// Where the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Nothing was begun.
    Fresh,
    /// The guest runs, QEMU sends memory.
    Iterating,
    /// The guest stands, the last disk round is being read.
    PreSwitchover,
    /// The memory's tail is being taken.
    Continuing { ended: Option<Facts>, completed: bool },
    /// The old copy is being made unrunnable.
    Barring { facts: Facts },
    /// Given up; waits for QEMU to be out of the migration.
    Settling { reason: Reason },
    /// The source runs on.
    Kept { reason: Reason, gone: bool },
    /// In doubt until the target answers. `recalled`: the target was asked to give it up. `fresh`: no COMMIT left this host.
    HandedOver {
        facts: Facts,
        recalled: Option<Reason>,
        fresh: bool,
    },
    /// The source runs again. `gone`: there is no QEMU, it has to boot.
    TakenBack { by: By, reason: Reason, gone: bool },
    /// The target owns it.
    Released { by: By },
}

/// The source's side of one job's handover.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceOwner {
    generation: Generation,
    state: SourceState,
    /// The state's record is not known to be durable: silence until it is.
    unwritten: bool,
    /// Nothing is left to do at QEMU.
    closed: bool,
    /// The target is known to have given this generation up.
    told: bool,
}

impl Default for SourceOwner {
    fn default() -> Self {
        Self::new()
    }
}

impl SourceOwner {
    pub fn new() -> Self {
        Self {
            generation: Generation(0),
            state: SourceState::Fresh,
            unwritten: false,
            closed: true,
            told: true,
        }
    }

    /// The machine after a crash, and what has to be done first.
    ///
    /// # Errors
    /// Records that no run of this machine could have written in this order.
    pub fn restore(records: &[Record]) -> Result<(Self, Vec<Effect>), Contradiction> {
        let mut owner = Self::new();
        for record in records {
            owner.replay(record)?;
        }
        if let SourceState::Iterating = owner.state {
            owner.state = SourceState::Settling {
                reason: Reason::Restarted,
            };
        }
        let mut effects = owner.duties();
        if let SourceState::HandedOver { .. } = owner.state {
            effects.push(Effect::Report(Note::InDoubt));
        }
        Ok((owner, effects))
    }

    fn replay(&mut self, record: &Record) -> Result<(), Contradiction> {
        use SourceState as S;
        let same = |generation: Generation| generation == self.generation;
        let next = match (*record, self.state) {
            (Record::Began { generation }, S::Fresh | S::Kept { .. } | S::TakenBack { .. })
                if generation > self.generation =>
            {
                self.generation = generation;
                self.closed = false;
                self.told = false;
                S::Iterating
            }
            (
                Record::Kept {
                    generation,
                    reason,
                    gone,
                },
                state,
            ) if self.may_keep(state, generation) => {
                self.generation = generation;
                self.closed = !gone;
                self.told = false;
                S::Kept { reason, gone }
            }
            (Record::HandedOver { generation, facts }, S::Iterating | S::Fresh) if self.fits(generation) => {
                self.generation = generation;
                self.closed = false;
                self.told = false;
                S::HandedOver {
                    facts,
                    recalled: None,
                    fresh: false,
                }
            }
            (
                Record::TakenBack {
                    generation,
                    by,
                    reason,
                },
                S::Iterating | S::HandedOver { .. } | S::Fresh | S::Released { .. },
            ) if self.fits(generation) => {
                self.generation = generation;
                self.closed = false;
                self.told =
                    by == By::Protocol && reason != Reason::NotBarred && reason != Reason::JournalFailed;
                S::TakenBack {
                    by,
                    reason,
                    gone: false,
                }
            }
            (Record::Released { generation, by }, S::HandedOver { .. } | S::Fresh)
                if self.fits(generation) =>
            {
                self.generation = generation;
                self.closed = false;
                S::Released { by }
            }
            (
                Record::Closed { generation },
                state @ (S::Kept { .. } | S::TakenBack { .. } | S::Released { .. }),
            ) if same(generation) => {
                self.closed = true;
                state
            }
            // A record that was written again after a failed sync.
            (record, state) if self.record() == Some(record) => state,
            (record, _) => {
                return Err(Contradiction {
                    record,
                    state: self.words(),
                });
            }
        };
        self.state = next;
        Ok(())
    }

    /// A generation goes on, or is the first that a compacted journal speaks of.
    fn fits(&self, generation: Generation) -> bool {
        match self.state {
            SourceState::Fresh => generation > self.generation,
            _ => generation == self.generation,
        }
    }

    /// A generation whose `Began` could not be written was given up at once.
    fn may_keep(&self, state: SourceState, generation: Generation) -> bool {
        match state {
            SourceState::Iterating => generation == self.generation,
            SourceState::Fresh | SourceState::Kept { .. } | SourceState::TakenBack { .. } => {
                generation > self.generation
            }
            _ => false,
        }
    }

    pub fn generation(&self) -> Generation {
        self.generation
    }

    pub fn state(&self) -> &SourceState {
        &self.state
    }

    /// Whether nothing is left to do or to wait for, so that a restarted agent may forget it.
    pub fn is_settled(&self) -> bool {
        let told = self.told || matches!(self.state, SourceState::Released { .. });
        !self.unwritten && self.closed && told
    }

    /// Whether nothing is left to do at QEMU.
    pub fn is_closed(&self) -> bool {
        self.closed && !self.unwritten
    }

    /// Whether the source may run the VM.
    pub fn owns(&self) -> bool {
        !matches!(
            self.state,
            SourceState::HandedOver { .. } | SourceState::Released { .. }
        )
    }

    /// Whether a next generation may begin.
    pub fn is_quiet(&self) -> bool {
        let over = matches!(
            self.state,
            SourceState::Fresh | SourceState::Kept { .. } | SourceState::TakenBack { .. }
        );
        over && self.closed && !self.unwritten
    }

    /// The fewest records that restore this state: for a compacted journal.
    pub fn snapshot(&self) -> Vec<Record> {
        let closed = Record::Closed {
            generation: self.generation,
        };
        let mut records: Vec<_> = self.record().into_iter().collect();
        if self.closed && !records.is_empty() {
            records.push(closed);
        }
        records
    }

    /// The record that stands for the state.
    fn record(&self) -> Option<Record> {
        let generation = self.generation;
        match self.state {
            SourceState::Fresh => None,
            SourceState::Iterating
            | SourceState::PreSwitchover
            | SourceState::Continuing { .. }
            | SourceState::Barring { .. }
            | SourceState::Settling { .. } => Some(Record::Began { generation }),
            SourceState::Kept { reason, gone } => Some(Record::Kept {
                generation,
                reason,
                gone,
            }),
            SourceState::HandedOver { facts, .. } => Some(Record::HandedOver { generation, facts }),
            SourceState::TakenBack { by, reason, .. } => Some(Record::TakenBack {
                generation,
                by,
                reason,
            }),
            SourceState::Released { by } => Some(Record::Released { generation, by }),
        }
    }

    /// What the state asks for, as often as anyone likes.
    fn duties(&self) -> Vec<Effect> {
        let mut effects = self.qemu_duties();
        let word = self.word_due().map(Effect::Send);
        match self.state {
            // What is called back may be so because it cannot be barred.
            SourceState::HandedOver {
                recalled: Some(_), ..
            } => effects.splice(0..0, word).for_each(drop),
            _ => effects.extend(word),
        }
        effects
    }

    fn qemu_duties(&self) -> Vec<Effect> {
        if self.closed {
            return Vec::new();
        }
        match self.state {
            SourceState::Settling { .. } => vec![Effect::MakeRunnable, Effect::Cancel, Effect::Look],
            SourceState::Kept { gone: true, .. } => {
                vec![Effect::MakeRunnable, Effect::BootFromDisks, Effect::Look]
            }
            SourceState::Barring { .. } => vec![Effect::MakeUnrunnable, Effect::Look],
            SourceState::HandedOver { .. } => vec![Effect::MakeUnrunnable],
            SourceState::TakenBack { gone: false, .. } => {
                vec![Effect::MakeRunnable, Effect::Cont, Effect::Look]
            }
            SourceState::TakenBack { gone: true, .. } => {
                vec![Effect::MakeRunnable, Effect::BootFromDisks, Effect::Look]
            }
            SourceState::Released { .. } => vec![Effect::Quit, Effect::Look],
            _ => Vec::new(),
        }
    }

    fn word_due(&self) -> Option<Word> {
        let generation = self.generation;
        match self.state {
            SourceState::HandedOver {
                facts,
                recalled: None,
                ..
            } => Some(Word::Commit { generation, facts }),
            SourceState::HandedOver {
                recalled: Some(reason),
                ..
            } => Some(Word::Abort { generation, reason }),
            SourceState::Settling { reason }
            | SourceState::Kept { reason, .. }
            | SourceState::TakenBack { reason, .. }
                if !self.told =>
            {
                Some(Word::Abort { generation, reason })
            }
            _ => None,
        }
    }

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

    /// The state in words for people.
    pub fn words(&self) -> &'static str {
        match self.state {
            SourceState::Fresh => "nothing was begun",
            SourceState::Iterating => "the VM runs here while its memory is copied",
            SourceState::PreSwitchover => "the VM stands while the last disk blocks are read",
            SourceState::Continuing { .. } => "the VM stands while the rest of its memory is read",
            SourceState::Barring { .. } => "the VM stands while its old copy is made unrunnable",
            SourceState::Settling { .. } => "the migration is being cancelled, the VM stays here",
            SourceState::Kept { .. } => "the VM stays here",
            SourceState::HandedOver { recalled: None, .. } => {
                "in doubt: handed over, no answer from the target yet"
            }
            SourceState::HandedOver { .. } => {
                "in doubt: handed over and called back, no answer from the target yet"
            }
            SourceState::TakenBack { .. } => "the VM was taken back and stays here",
            SourceState::Released { .. } => "the VM belongs to the target",
        }
    }
}

fn refused(why: &'static str) -> Vec<Effect> {
    vec![Effect::Report(Note::Refused(why))]
}
