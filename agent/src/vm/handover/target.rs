//! The target's machine: it owns the VM from the moment RUNNING is durable, and never if ABORTED is.
//!
//! Owns the decision between the two, made once for a generation. Leaves words for people to `effect`, limits to `watch`.
//! Promises: RUNNING is written only with the source's COMMIT, an equal stream that QEMU loaded, and all disk batches durable
//! (or on the operator's word); a loaded QEMU without COMMIT is kept until ABORT or `resolve`, however long that takes.

mod events;

use super::{By, Contradiction, Effect, Facts, Generation, Note, Reason, Record, Resolve, Stream, Word};

/// What the target's QEMU answers to `query-migrate` and `query-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetQemu {
    /// Waits for its stream or reads it (inmigrate).
    Loading,
    /// completed, and the guest stands.
    Loaded,
    Running,
    /// The load failed, or there is no such process.
    Gone,
}

/// What happened at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetEvent {
    /// Start a QEMU for this generation.
    Prepare(Generation),
    Qemu(TargetQemu),
    /// The source's stream ended, and all of it was written to QEMU.
    StreamWritten(Stream),
    /// So many distinct disk batches and extents of the job are applied and flushed by now; counts as `Facts::disk_batches`.
    DisksDurable(u64),
    Heard(Word),
    /// Give it up if that can still be: the operator's cancel, a failed disk, a watchdog.
    Stop(Reason),
    Resolve(Resolve),
    Remind,
    /// This effect failed, and those behind it were dropped.
    Failed(Effect),
}

/// Where the target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetState {
    /// Nothing was prepared.
    Fresh,
    /// Neither RUNNING nor ABORTED.
    Waiting,
    /// The target owns the VM. `boot`: from its disks. `started`: it was seen running.
    Running {
        by: By,
        boot: bool,
        started: bool,
    },
    Aborted {
        reason: Reason,
    },
}

/// The target's side of one job's handover.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TargetOwner {
    generation: Generation,
    state: TargetState,
    /// The state's record is not known to be durable: silence until it is.
    unwritten: bool,
    /// QEMU was seen loaded by this process.
    loaded: bool,
    stream: Option<Stream>,
    disk_batches: u64,
    commit: Option<Facts>,
    /// The agent restarted before the stream's hash was noted: this generation cannot be proven any more.
    lost: bool,
    /// The proof is in the journal.
    noted: bool,
}

impl Default for TargetOwner {
    fn default() -> Self {
        Self::new()
    }
}

impl TargetOwner {
    pub fn new() -> Self {
        Self {
            generation: Generation(0),
            state: TargetState::Fresh,
            unwritten: false,
            loaded: false,
            stream: None,
            disk_batches: 0,
            commit: None,
            lost: false,
            noted: false,
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
        owner.lost = owner.state == TargetState::Waiting && owner.stream.is_none();
        let effects = owner.duties();
        Ok((owner, effects))
    }

    fn replay(&mut self, record: &Record) -> Result<(), Contradiction> {
        use TargetState as T;
        match (*record, self.state) {
            (Record::Prepared { generation }, T::Fresh | T::Waiting | T::Aborted { .. })
                if generation > self.generation =>
            {
                *self = Self {
                    generation,
                    state: T::Waiting,
                    ..Self::new()
                };
            }
            (
                Record::Loaded {
                    generation,
                    stream,
                    disk_batches,
                },
                T::Waiting,
            ) if generation == self.generation => {
                self.stream = Some(stream);
                self.disk_batches = disk_batches;
                self.noted = true;
            }
            (Record::Running { generation, by, boot }, T::Waiting | T::Fresh) if self.fits(generation) => {
                self.generation = generation;
                self.state = T::Running {
                    by,
                    boot,
                    started: false,
                };
            }
            (Record::Started { generation }, T::Running { by, boot, .. })
                if generation == self.generation =>
            {
                self.state = T::Running {
                    by,
                    boot,
                    started: true,
                };
            }
            (Record::Aborted { generation, reason }, T::Waiting | T::Fresh) if self.fits(generation) => {
                self.generation = generation;
                self.state = T::Aborted { reason };
            }
            // A record that was written again after a failed sync.
            (record, _) if self.record() == Some(record) => {}
            (record, _) => {
                return Err(Contradiction {
                    record,
                    state: self.words(),
                });
            }
        }
        Ok(())
    }

    fn fits(&self, generation: Generation) -> bool {
        match self.state {
            TargetState::Fresh => generation > self.generation,
            _ => generation == self.generation,
        }
    }

    pub fn generation(&self) -> Generation {
        self.generation
    }

    pub fn state(&self) -> &TargetState {
        &self.state
    }

    /// Whether nothing is left to do or to wait for, so that a restarted agent may forget it.
    pub fn is_settled(&self) -> bool {
        let over = matches!(
            self.state,
            TargetState::Fresh | TargetState::Aborted { .. } | TargetState::Running { started: true, .. }
        );
        over && !self.unwritten
    }

    /// Whether the target may run the VM.
    pub fn owns(&self) -> bool {
        matches!(self.state, TargetState::Running { .. }) && !self.unwritten
    }

    /// Whether QEMU holds the whole VM and nobody has decided yet.
    pub fn is_loaded(&self) -> bool {
        self.state == TargetState::Waiting && self.loaded
    }

    /// Whether the operator may have it run without the source's word: QEMU holds the whole VM, or did when this was noted.
    pub fn may_be_run(&self) -> bool {
        self.state == TargetState::Waiting && (self.loaded || self.noted)
    }

    /// Whether all of the source's stream was written to QEMU.
    pub fn has_stream(&self) -> bool {
        self.stream.is_some()
    }

    /// The source's COMMIT, once it was heard.
    pub fn commit(&self) -> Option<&Facts> {
        self.commit.as_ref()
    }

    /// The fewest records that restore this state: for a compacted journal.
    pub fn snapshot(&self) -> Vec<Record> {
        let generation = self.generation;
        let mut records: Vec<_> = self.record().into_iter().collect();
        match (self.state, self.stream) {
            (TargetState::Waiting, Some(stream)) if self.noted => {
                records.push(Record::Loaded {
                    generation,
                    stream,
                    disk_batches: self.disk_batches,
                });
            }
            (TargetState::Running { started: true, .. }, _) => records.push(Record::Started { generation }),
            _ => {}
        }
        records
    }

    /// The record that stands for the state.
    fn record(&self) -> Option<Record> {
        let generation = self.generation;
        match self.state {
            TargetState::Fresh => None,
            TargetState::Waiting => Some(Record::Prepared { generation }),
            TargetState::Running { by, boot, .. } => Some(Record::Running { generation, by, boot }),
            TargetState::Aborted { reason } => Some(Record::Aborted { generation, reason }),
        }
    }

    /// What the state asks for, as often as anyone likes.
    fn duties(&self) -> Vec<Effect> {
        let generation = self.generation;
        match self.state {
            TargetState::Fresh | TargetState::Running { started: true, .. } => Vec::new(),
            TargetState::Waiting if self.commit.is_none() && (self.loaded || self.noted) => {
                vec![Effect::Look, Effect::Send(Word::Ask { generation })]
            }
            TargetState::Waiting => vec![Effect::Look],
            // QEMU may be gone or running already: what it says decides between `cont` and a boot.
            TargetState::Running { boot: false, .. } => vec![Effect::Look],
            TargetState::Running { boot: true, .. } => {
                vec![
                    Effect::KillIncoming,
                    Effect::BootFromDisks,
                    Effect::Send(Word::Ack { generation }),
                    Effect::Look,
                ]
            }
            TargetState::Aborted { reason } => {
                vec![
                    Effect::KillIncoming,
                    Effect::Send(Word::Aborted { generation, reason }),
                ]
            }
        }
    }

    /// The state in words for people.
    pub fn words(&self) -> &'static str {
        match self.state {
            TargetState::Fresh => "nothing was prepared",
            TargetState::Waiting if self.lost => {
                "the VM is loaded but cannot be proven whole: waits for the source or `resolve`"
            }
            TargetState::Waiting if self.commit.is_some() => {
                "the source has handed over, the rest is arriving"
            }
            TargetState::Waiting if self.loaded => {
                "the VM is loaded and stands: waits for the source's commit"
            }
            TargetState::Waiting => "the VM's memory is arriving",
            TargetState::Running { started: true, .. } => "the VM runs here",
            TargetState::Running { boot: false, .. } => "the VM belongs here and is being started",
            TargetState::Running { .. } => "the VM belongs here and has to boot from its disks",
            TargetState::Aborted { .. } => "the VM was given up here and stays at the source",
        }
    }
}
