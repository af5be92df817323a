//! The source's machine: it owns the VM until HANDED OVER is durable, and again only after TAKEN BACK is.
//!
//! Owns the state and its duties (what has to be done in a state, again after every crash). Leaves words for people to `effect`,
//! limits to `watch`. Promises: COMMIT is sent only when HANDED OVER is durable; `cont` after that only when TAKEN BACK is.

mod events;

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
        // A record that was written again after a failed sync.
        if self.record() == Some(*record) {
            return Ok(());
        }
        let Some((generation, state)) = self.follow(*record) else {
            return Err(Contradiction {
                record: *record,
                state: self.words(),
            });
        };
        self.generation = generation;
        self.state = state;
        self.closed = match *record {
            Record::Kept { gone, .. } => !gone,
            record => matches!(record, Record::Closed { .. }),
        };
        // What was called back before any COMMIT is not known to have been given up at the target.
        self.told = match state {
            SourceState::TakenBack { by, reason, .. } => {
                by == By::Protocol && reason != Reason::JournalFailed
            }
            _ => false,
        };
        Ok(())
    }

    /// The state behind a record, if it can stand here.
    fn follow(&self, record: Record) -> Option<(Generation, SourceState)> {
        use SourceState as S;
        let (generation, state, sound) = match (record, self.state) {
            (Record::Began { generation }, S::Fresh | S::Kept { .. } | S::TakenBack { .. }) => {
                (generation, S::Iterating, generation > self.generation)
            }
            (
                Record::Kept {
                    generation,
                    reason,
                    gone,
                },
                state,
            ) => (
                generation,
                S::Kept { reason, gone },
                self.may_keep(state, generation),
            ),
            (Record::HandedOver { generation, facts }, S::Iterating | S::Fresh) => {
                let (recalled, fresh) = (None, false);
                (
                    generation,
                    S::HandedOver {
                        facts,
                        recalled,
                        fresh,
                    },
                    self.fits(generation),
                )
            }
            (
                Record::TakenBack {
                    generation,
                    by,
                    reason,
                },
                S::Iterating | S::HandedOver { .. } | S::Fresh | S::Released { .. },
            ) => {
                let gone = false;
                (
                    generation,
                    S::TakenBack { by, reason, gone },
                    self.fits(generation),
                )
            }
            (Record::Released { generation, by }, S::HandedOver { .. } | S::Fresh) => {
                (generation, S::Released { by }, self.fits(generation))
            }
            (
                Record::Closed { generation },
                state @ (S::Kept { .. } | S::TakenBack { .. } | S::Released { .. }),
            ) => (generation, state, generation == self.generation),
            _ => return None,
        };
        sound.then_some((generation, state))
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
