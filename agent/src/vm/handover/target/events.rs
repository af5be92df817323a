//! What each event does to the target's machine, and the one decision.
//!
//! Owns the transitions. Leaves the states, their records and their duties to the parent.

use super::{
    By, Effect, Generation, Note, Reason, Record, Resolve, TargetEvent, TargetOwner, TargetQemu, TargetState,
    Word,
};

impl TargetOwner {
    /// Takes an event; the effects are to be done in order.
    pub fn on(&mut self, event: TargetEvent) -> Vec<Effect> {
        if self.unwritten {
            return self.on_unwritten(event);
        }
        match event {
            TargetEvent::Prepare(generation) => self.prepare(generation),
            TargetEvent::Qemu(qemu) => self.qemu(qemu),
            TargetEvent::StreamWritten(stream) => {
                if self.state == TargetState::Waiting && !self.lost && self.stream.is_none() {
                    self.stream = Some(stream);
                }
                self.decide()
            }
            TargetEvent::DisksDurable(batches) => {
                self.disk_batches = self.disk_batches.max(batches);
                self.decide()
            }
            TargetEvent::Heard(word) => self.heard(word),
            TargetEvent::Stop(reason) => match self.state {
                TargetState::Waiting => self.abort(reason),
                _ => Vec::new(),
            },
            TargetEvent::Resolve(resolve) => self.resolve(resolve),
            TargetEvent::Remind => self.duties(),
            TargetEvent::Failed(effect) => self.failed(effect),
        }
    }

    /// An agent whose journal fails is as good as dead: it says nothing and tries again.
    fn on_unwritten(&mut self, event: TargetEvent) -> Vec<Effect> {
        match event {
            TargetEvent::DisksDurable(batches) => self.disk_batches = self.disk_batches.max(batches),
            TargetEvent::Remind => {
                self.unwritten = false;
                return self.enter();
            }
            _ => {}
        }
        Vec::new()
    }

    fn enter(&self) -> Vec<Effect> {
        let generation = self.generation;
        let mut effects: Vec<_> = self.record().map(Effect::Journal).into_iter().collect();
        match self.state {
            TargetState::Fresh => {}
            TargetState::Waiting => effects.extend([Effect::KillIncoming, Effect::StartIncoming]),
            TargetState::Running { boot: false, .. } => {
                let ack = Effect::Send(Word::Ack { generation });
                effects.extend([Effect::Cont, ack, Effect::Report(Note::Running), Effect::Look]);
            }
            TargetState::Running { boot: true, .. } => {
                effects.extend(self.duties());
                effects.push(Effect::Report(Note::Boot));
            }
            TargetState::Aborted { reason } => {
                effects.extend(self.duties());
                effects.push(Effect::Report(Note::Aborted(reason)));
            }
        }
        effects
    }

    fn prepare(&mut self, generation: Generation) -> Vec<Effect> {
        if generation <= self.generation {
            return Vec::new();
        }
        if let TargetState::Running { .. } = self.state {
            return refused("the VM belongs to this host already");
        }
        let disk_batches = self.disk_batches;
        *self = Self {
            generation,
            disk_batches,
            state: TargetState::Waiting,
            ..Self::new()
        };
        self.enter()
    }

    fn qemu(&mut self, qemu: TargetQemu) -> Vec<Effect> {
        use TargetQemu as Q;
        use TargetState as T;
        match (self.state, qemu) {
            (T::Waiting, Q::Loaded) => {
                self.loaded = true;
                self.decide()
            }
            (T::Waiting, Q::Gone) => self.abort(Reason::LoadFailed),
            (T::Waiting, Q::Running) => self.abort(Reason::RanUnasked),
            // The rest of its stream died with the agent that wrote it.
            (T::Waiting, Q::Loading) if self.lost || self.noted => self.abort(Reason::ProofLost),
            (T::Running { started: false, .. }, Q::Loaded) => vec![Effect::Cont, Effect::Look],
            (
                T::Running {
                    started: false,
                    by,
                    boot,
                },
                Q::Running,
            ) => {
                self.state = T::Running {
                    by,
                    boot,
                    started: true,
                };
                vec![Effect::Journal(Record::Started {
                    generation: self.generation,
                })]
            }
            // What QEMU held is lost, but all disks are whole: it boots as after a power failure.
            (
                T::Running {
                    started: false,
                    boot: false,
                    by,
                },
                Q::Gone | Q::Loading,
            ) => {
                self.state = T::Running {
                    by,
                    boot: true,
                    started: false,
                };
                let mut effects = self.duties();
                effects.push(Effect::Report(Note::Boot));
                effects
            }
            _ => Vec::new(),
        }
    }

    /// RUNNING or ABORTED, as soon as it is clear which.
    fn decide(&mut self) -> Vec<Effect> {
        if self.state != TargetState::Waiting {
            return Vec::new();
        }
        let Some(commit) = self.commit else {
            return self.note();
        };
        let Some(stream) = self.stream else {
            return if self.lost {
                self.abort(Reason::ProofLost)
            } else {
                Vec::new()
            };
        };
        if stream != commit.stream {
            return self.abort(Reason::StreamDiffers);
        }
        if self.disk_batches > commit.disk_batches {
            return self.abort(Reason::DisksDiffer);
        }
        if !self.loaded || self.disk_batches < commit.disk_batches {
            return Vec::new();
        }
        self.run(By::Protocol, false)
    }

    /// Writes the proof down while there is nothing to do but wait for COMMIT.
    fn note(&mut self) -> Vec<Effect> {
        match self.stream {
            Some(stream) if self.loaded && !self.noted => {
                self.noted = true;
                let (generation, disk_batches) = (self.generation, self.disk_batches);
                vec![Effect::Journal(Record::Loaded {
                    generation,
                    stream,
                    disk_batches,
                })]
            }
            _ => Vec::new(),
        }
    }

    fn run(&mut self, by: By, boot: bool) -> Vec<Effect> {
        self.state = TargetState::Running {
            by,
            boot,
            started: false,
        };
        self.enter()
    }

    fn abort(&mut self, reason: Reason) -> Vec<Effect> {
        self.state = TargetState::Aborted { reason };
        self.enter()
    }

    fn heard(&mut self, word: Word) -> Vec<Effect> {
        let generation = word.generation();
        let asks = matches!(word, Word::Commit { .. } | Word::Abort { .. } | Word::Ask { .. });
        if generation > self.generation || self.state == TargetState::Fresh {
            return if asks {
                vec![Effect::Send(Word::Unknown { generation })]
            } else {
                Vec::new()
            };
        }
        if generation < self.generation {
            // PREPARED of a higher one is durable, and bars it.
            let aborted = Word::Aborted {
                generation,
                reason: Reason::Replaced,
            };
            return if asks {
                vec![Effect::Send(aborted)]
            } else {
                Vec::new()
            };
        }
        match (word, self.state) {
            (Word::Unknown { .. }, TargetState::Waiting) if self.loaded || self.noted => {
                vec![Effect::Report(Note::Forgotten)]
            }
            (Word::Ack { .. } | Word::Aborted { .. } | Word::Undecided { .. } | Word::Unknown { .. }, _) => {
                Vec::new()
            }
            (_, TargetState::Running { .. }) => vec![Effect::Send(Word::Ack { generation })],
            (_, TargetState::Aborted { reason }) => vec![Effect::Send(Word::Aborted { generation, reason })],
            (Word::Abort { reason, .. }, _) => self.abort(reason),
            (Word::Ask { .. }, _) => vec![Effect::Send(Word::Undecided { generation })],
            (Word::Commit { facts, .. }, _) if self.commit.is_some_and(|known| known != facts) => {
                self.abort(Reason::Contradicted)
            }
            (Word::Commit { facts, .. }, _) => {
                self.commit = Some(facts);
                self.decide()
            }
        }
    }

    fn resolve(&mut self, resolve: Resolve) -> Vec<Effect> {
        use TargetState as T;
        match (resolve, self.state) {
            (Resolve::Source, T::Waiting) => self.abort(Reason::Operator),
            (Resolve::Target, T::Waiting) if !self.may_be_run() => {
                refused("its memory never was here whole, so its disks are not either")
            }
            (Resolve::Target, T::Waiting) => self.run(By::Operator, !self.loaded),
            (Resolve::Source, T::Running { .. }) => refused("the VM runs on this host: move it back instead"),
            (Resolve::Target, T::Aborted { .. }) => {
                refused("this host has given the VM up for good: resolve it in favour of the source")
            }
            _ => Vec::new(),
        }
    }

    fn failed(&mut self, effect: Effect) -> Vec<Effect> {
        match (effect, self.state) {
            (Effect::Journal(Record::Loaded { .. }), _) => {
                self.noted = false;
                Vec::new()
            }
            (Effect::Journal(Record::Started { .. }), TargetState::Running { by, boot, .. }) => {
                self.state = TargetState::Running {
                    by,
                    boot,
                    started: false,
                };
                Vec::new()
            }
            (Effect::Journal(_), _) => {
                self.unwritten = true;
                Vec::new()
            }
            (Effect::StartIncoming | Effect::KillIncoming, TargetState::Waiting) => {
                self.abort(Reason::LoadFailed)
            }
            (Effect::Cont, TargetState::Running { .. }) => vec![Effect::Look],
            _ => Vec::new(),
        }
    }
}

fn refused(why: &'static str) -> Vec<Effect> {
    vec![Effect::Report(Note::Refused(why))]
}
