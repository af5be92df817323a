//! Two agents, two QEMUs, two journals and everything that was ever said: one state of the model, and what may happen next.
//!
//! Owns the session as the machines expect it (effects in order, journal first), QEMU as it was measured, and the invariants.
//! Leaves the search to `explore`. The machines are the ones that run.

mod source_agent;
mod target_agent;

use std::fmt;

use longhaul_agent::vm::handover::*;
use longhaul_common::digest::Digest;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) mishaps: u8,
    pub(crate) generations: u8,
}

/// Ways to run the machines wrongly, each of which has to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    CommitBeforeJournal,
    BarringUnchecked,
    OldCopyNotBarred,
    ContBeforeJournal,
    AckBeforeJournal,
    AbortedBeforeJournal,
    TargetJournalNotSynced,
    SourceJournalNotSynced,
    SourceTimesOut,
    TargetTimesOut,
    HashNotChecked,
    DisksNotFlushed,
    HandoverUnobserved,
}

impl Fault {
    pub(crate) const ALL: [Self; 13] = [
        Self::CommitBeforeJournal,
        Self::BarringUnchecked,
        Self::OldCopyNotBarred,
        Self::ContBeforeJournal,
        Self::AckBeforeJournal,
        Self::AbortedBeforeJournal,
        Self::TargetJournalNotSynced,
        Self::SourceJournalNotSynced,
        Self::SourceTimesOut,
        Self::TargetTimesOut,
        Self::HashNotChecked,
        Self::DisksNotFlushed,
        Self::HandoverUnobserved,
    ];
}

impl Fault {
    /// How many mishaps it takes to show; the sound machine withstands as many.
    pub(crate) fn mishaps(self) -> u8 {
        if self == Self::BarringUnchecked { 2 } else { 1 }
    }
}

/// One agent: its machine while it lives, what it still has to do, and its journal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Agent<Machine> {
    machine: Option<Machine>,
    pending: Vec<Effect>,
    journal: Vec<Record>,
    /// The last record's sync failed: it may be there, and the next append writes the file without it.
    doubtful: bool,
    /// The last record was written and not synced (only by a fault).
    unsynced: bool,
}

impl<Machine> Agent<Machine> {
    fn new(machine: Machine) -> Self {
        Self {
            machine: Some(machine),
            pending: Vec::new(),
            journal: Vec::new(),
            doubtful: false,
            unsynced: false,
        }
    }

    fn append(&mut self, record: Record, unsynced: bool) {
        if std::mem::take(&mut self.doubtful) {
            self.journal.pop();
        }
        self.journal.push(record);
        self.unsynced = unsynced;
    }

    fn crash(&mut self) {
        self.machine = None;
        self.pending.clear();
        self.doubtful = false;
        if std::mem::take(&mut self.unsynced) {
            self.journal.pop();
        }
    }

    /// The machine, where it waits for an event.
    fn idle(&self) -> Option<&Machine> {
        self.machine.as_ref().filter(|_| self.pending.is_empty())
    }
}

/// What of the stream is in the target's QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Arrived {
    Part,
    Whole,
    Corrupt,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    fault: Option<Fault>,
    mishaps: u8,
    generations: u32,
    source: Agent<SourceOwner>,
    target: Agent<TargetOwner>,
    source_qemu: SourceQemu,
    target_qemu: TargetQemu,
    /// The source agent holds its end of QEMU's stream.
    socket: bool,
    /// The stream's end was taken by this life of the source agent, which still has its tail.
    tail: bool,
    /// The target agent holds its end of the incoming stream.
    incoming: bool,
    arrived: Arrived,
    /// The generation that the target's QEMU was started for.
    loads: u32,
    prepare: u32,
    sent_batches: u8,
    durable: u8,
    told_batches: u8,
    barred: bool,
    /// The source's guest ran after it stood for this generation.
    resumed: bool,
    /// The target's guest has run.
    target_ran: bool,
    source_lost: bool,
    target_lost: bool,
    /// Its host is off, and may be switched on again.
    source_off: bool,
    target_off: bool,
    resolved: bool,
    said: Vec<Word>,
    broken: Option<&'static str>,
}

pub(crate) struct Step {
    pub(crate) what: String,
    pub(crate) world: World,
    pub(crate) mishap: bool,
}

/// Steps; their names are made only for a way that is shown.
struct Steps {
    named: bool,
    list: Vec<Step>,
}

fn stream(generation: u32) -> Stream {
    Stream {
        len: u64::from(generation),
        hash: Digest([1; 32]),
    }
}

fn facts(generation: u32) -> Facts {
    Facts {
        disk_batches: u64::from(generation),
        stream: stream(generation),
    }
}

impl World {
    pub(crate) fn new(bounds: Bounds, fault: Option<Fault>) -> Self {
        Self {
            fault,
            mishaps: bounds.mishaps,
            generations: bounds.generations.into(),
            source: Agent::new(SourceOwner::new()),
            target: Agent::new(TargetOwner::new()),
            source_qemu: SourceQemu::Idle,
            target_qemu: TargetQemu::Gone,
            socket: false,
            tail: false,
            incoming: false,
            arrived: Arrived::Part,
            loads: 0,
            prepare: 0,
            sent_batches: 0,
            durable: 0,
            told_batches: 0,
            barred: false,
            resumed: false,
            target_ran: false,
            source_lost: false,
            target_lost: false,
            source_off: false,
            target_off: false,
            resolved: false,
            said: Vec::new(),
            broken: None,
        }
    }

    /// A first try was handed over, called back and taken back; all that was ever said of it may still arrive.
    pub(crate) fn second_try(bounds: Bounds) -> Self {
        let (generation, reason) = (Generation(1), Reason::NoAnswer);
        let mut world = Self::new(
            Bounds {
                generations: 2,
                ..bounds
            },
            None,
        );
        world.source.journal = vec![
            Record::Began { generation },
            Record::HandedOver {
                generation,
                facts: facts(1),
            },
            Record::TakenBack {
                generation,
                by: By::Protocol,
                reason,
            },
            Record::Closed { generation },
        ];
        world.target.journal = vec![
            Record::Prepared { generation },
            Record::Loaded {
                generation,
                stream: stream(1),
                disk_batches: 1,
            },
            Record::Aborted { generation, reason },
        ];
        world.restart_source();
        world.restart_target();
        (world.sent_batches, world.durable) = (1, 1);
        (world.loads, world.prepare) = (1, 1);
        world.say(Word::Commit {
            generation,
            facts: facts(1),
        });
        world.say(Word::Abort { generation, reason });
        world.say(Word::Aborted { generation, reason });
        world.say(Word::Ask { generation });
        world
    }

    pub(crate) fn source_runs(&self) -> bool {
        matches!(self.source_qemu, SourceQemu::Idle | SourceQemu::Iterating)
    }

    pub(crate) fn target_runs(&self) -> bool {
        self.target_qemu == TargetQemu::Running
    }

    /// Somebody runs the VM, and their machine agrees.
    pub(crate) fn is_good(&self) -> bool {
        let source = self.source.idle().is_some_and(SourceOwner::is_quiet);
        let target = self.target.idle().is_some_and(TargetOwner::owns);
        self.source_runs() && source || self.target_runs() && target || self.burnt()
    }

    /// The only side that ever had a right to it burnt down: no protocol brings that VM back.
    fn burnt(&self) -> bool {
        let target = self.target.idle().map(|target| *target.state());
        let none = matches!(target, Some(TargetState::Fresh | TargetState::Aborted { .. }));
        let source = self.source.idle().map(|source| *source.state());
        let given = matches!(source, Some(SourceState::Released { .. }));
        self.source_lost && none || self.target_lost && given
    }

    pub(crate) fn broken(&self) -> Option<&'static str> {
        if self.broken.is_some() {
            return self.broken;
        }
        if self.source_runs() && self.target_runs() {
            return Some("two owners: both guests run");
        }
        if self.source_runs() && self.target_ran {
            return Some("a write is lost: the source runs after the target has run");
        }
        if self.target_runs() && !self.barred && !self.source_lost {
            return Some("two owners: the old copy can be started while the target runs");
        }
        None
    }

    fn break_if(&mut self, condition: bool, why: &'static str) {
        if condition {
            self.broken.get_or_insert(why);
        }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// Everything that may happen now.
    pub(crate) fn steps(&self, named: bool) -> Vec<Step> {
        let mut steps = Steps {
            named,
            list: Vec::new(),
        };
        self.source_steps(&mut steps);
        self.target_steps(&mut steps);
        self.qemu_steps(&mut steps);
        self.transport_steps(&mut steps);
        self.host_steps(&mut steps);
        if self.mishaps > 0 {
            self.mishap_steps(&mut steps);
        }
        steps.list
    }

    fn step(&self, steps: &mut Steps, what: fmt::Arguments<'_>, change: impl FnOnce(&mut Self)) {
        let mut world = self.clone();
        change(&mut world);
        world.settle_quiet_effects();
        if world != *self {
            steps.list.push(Step {
                what: if steps.named {
                    what.to_string()
                } else {
                    String::new()
                },
                world,
                mishap: false,
            });
        }
    }

    fn mishap(&self, steps: &mut Steps, what: fmt::Arguments<'_>, change: impl FnOnce(&mut Self)) {
        let first = steps.list.len();
        self.step(steps, what, |world| {
            world.mishaps -= 1;
            change(world);
        });
        steps.list[first..].iter_mut().for_each(|step| step.mishap = true);
    }

    /// Effects that neither a crash nor anybody else can tell from not having been done yet.
    fn settle_quiet_effects(&mut self) {
        while let Some(effect) = self.source.pending.first().copied().filter(is_quiet) {
            self.source.pending.remove(0);
            if effect == Effect::CloseStream {
                self.socket = false;
            }
            self.hear_note(effect);
        }
        while let Some(effect) = self.target.pending.first().copied().filter(is_quiet) {
            self.target.pending.remove(0);
            self.hear_note(effect);
        }
    }

    fn hear_note(&mut self, effect: Effect) {
        // After an operator's word a late word of a lost site is rightly noticed.
        let noticed = effect == Effect::Report(Note::TwoOwners) && !self.resolved;
        self.break_if(noticed, "a machine noticed two owners");
        self.break_if(
            effect == Effect::Report(Note::Forgotten),
            "a journal was forgotten",
        );
    }

    fn say(&mut self, word: Word) {
        let deaf = matches!(word, Word::Undecided { .. });
        if let (false, Err(at)) = (deaf, self.said.binary_search_by_key(&place(&word), place)) {
            self.said.insert(at, word);
        }
    }

    fn qemu_steps(&self, steps: &mut Steps) {
        match self.source_qemu {
            SourceQemu::Gone if !self.barred && !self.source_lost && !self.source_off => {
                self.step(
                    steps,
                    format_args!("somebody boots the VM at the source"),
                    Self::resume_source,
                );
            }
            SourceQemu::Iterating => {
                self.step(
                    steps,
                    format_args!("the source's QEMU stops the guest"),
                    |world| {
                        world.source_qemu = SourceQemu::PreSwitchover;
                        world.resumed = false;
                    },
                );
            }
            SourceQemu::Device => self.step(steps, format_args!("the source's QEMU completes"), |world| {
                world.source_qemu = SourceQemu::Completed;
            }),
            _ => {}
        }
        if !self.socket && matches!(self.source_qemu, SourceQemu::Iterating | SourceQemu::Device) {
            self.step(
                steps,
                format_args!("the source's QEMU fails on its closed stream"),
                Self::resume_source,
            );
        }
        let target = self.target.machine.as_ref().map(|target| *target.state());
        let started = matches!(target, Some(TargetState::Running { started: true, .. }));
        // Who has resolved it knows that this side must not.
        if self.target_qemu == TargetQemu::Gone && started && !self.resolved && !self.target_off {
            self.step(
                steps,
                format_args!("somebody boots the VM at the target"),
                |world| world.run_target(true),
            );
        }
        if self.target_qemu == TargetQemu::Loading {
            if self.arrived != Arrived::Part {
                self.step(steps, format_args!("the target's QEMU has loaded"), |world| {
                    world.target_qemu = TargetQemu::Loaded
                });
            } else if !self.incoming {
                self.step(
                    steps,
                    format_args!("the target's QEMU fails on its closed stream"),
                    |world| {
                        world.target_qemu = TargetQemu::Gone;
                    },
                );
            }
        }
    }

    /// Hosts that are off, and what an operator may say while they are: where nothing is known without them.
    fn host_steps(&self, steps: &mut Steps) {
        if self.source_off {
            self.step(steps, format_args!("the source's host is on again"), |world| {
                world.source_off = false;
            });
        }
        if self.target_off {
            self.step(steps, format_args!("the target's host is on again"), |world| {
                world.target_off = false;
            });
        }
        let source = self.source.idle().map(|source| *source.state());
        if self.target_off && matches!(source, Some(SourceState::HandedOver { .. })) {
            self.step(
                steps,
                format_args!("the operator, who knows that the target is off, resolves source"),
                |world| {
                    world.resolved = true;
                    // What it may have written is given up.
                    world.target_ran = false;
                    world.source_event(SourceEvent::Resolve(Resolve::Source));
                },
            );
        }
        let given = matches!(self.source.journal.last(), Some(Record::HandedOver { .. }));
        let whole = self.target.idle().is_some_and(TargetOwner::may_be_run);
        if self.source_off && given && whole {
            self.step(
                steps,
                format_args!("the operator, who knows that the source is off, resolves target"),
                |world| {
                    world.resolved = true;
                    world.target_event(TargetEvent::Resolve(Resolve::Target));
                },
            );
        }
    }

    fn transport_steps(&self, steps: &mut Steps) {
        let loading =
            self.target_qemu == TargetQemu::Loading && self.incoming && self.arrived == Arrived::Part;
        let same = self
            .source
            .machine
            .as_ref()
            .is_some_and(|source| source.generation().0 == self.loads);
        if loading && same && self.tail && self.target.machine.is_some() {
            self.step(steps, format_args!("the stream's end arrives"), |world| {
                world.arrived = Arrived::Whole
            });
            if self.mishaps > 0 {
                self.mishap(steps, format_args!("the stream arrives corrupt"), |world| {
                    world.arrived = Arrived::Corrupt
                });
            }
        }
        if self.durable < self.sent_batches && self.source.machine.is_some() && self.target.machine.is_some()
        {
            self.step(steps, format_args!("the disk batches are durable"), |world| {
                world.durable = world.sent_batches
            });
        }
    }

    fn mishap_steps(&self, steps: &mut Steps) {
        if self.source.machine.is_some() {
            self.mishap(
                steps,
                format_args!("the source agent is killed"),
                Self::kill_source,
            );
            if let Some(Effect::Journal(record)) = self.source.pending.first().copied() {
                self.mishap(steps, format_args!("the source's journal fails"), |world| {
                    world.source_failed(Effect::Journal(record))
                });
                self.mishap(
                    steps,
                    format_args!("the source's journal fails, but the record is there"),
                    |world| {
                        world.source.append(record, false);
                        world.source.doubtful = true;
                        world.source_failed(Effect::Journal(record));
                    },
                );
            }
            if self.source.pending.first() == Some(&Effect::MakeUnrunnable) {
                self.mishap(steps, format_args!("the old copy cannot be barred"), |world| {
                    world.source_failed(Effect::MakeUnrunnable)
                });
            }
        }
        if self.target.machine.is_some() {
            self.mishap(
                steps,
                format_args!("the target agent is killed"),
                Self::kill_target,
            );
            if let Some(Effect::Journal(record)) = self.target.pending.first().copied() {
                self.mishap(steps, format_args!("the target's journal fails"), |world| {
                    world.target_failed(record)
                });
                self.mishap(
                    steps,
                    format_args!("the target's journal fails, but the record is there"),
                    |world| {
                        world.target.append(record, false);
                        world.target.doubtful = true;
                        world.target_failed(record);
                    },
                );
            }
            if self.target.pending.is_empty() {
                self.mishap(steps, format_args!("a target disk fails"), |world| {
                    world.target_event(TargetEvent::Stop(Reason::DiskFailed));
                });
            }
        }
        self.mishap_qemus(steps);
        self.mishap_sites(steps);
    }

    fn mishap_qemus(&self, steps: &mut Steps) {
        if self.source_qemu != SourceQemu::Gone {
            self.mishap(steps, format_args!("the source's QEMU dies"), |world| {
                world.source_qemu = SourceQemu::Gone;
            });
        }
        if in_migration(self.source_qemu) {
            self.mishap(
                steps,
                format_args!("the source's QEMU fails, or somebody cancels it"),
                Self::resume_source,
            );
        }
        if self.source_qemu == SourceQemu::PreSwitchover {
            self.mishap(
                steps,
                format_args!("somebody continues the source's QEMU"),
                |world| world.source_qemu = SourceQemu::Device,
            );
        }
        if self.target_qemu != TargetQemu::Gone {
            self.mishap(steps, format_args!("the target's QEMU dies"), |world| {
                world.target_qemu = TargetQemu::Gone
            });
        }
    }

    fn mishap_sites(&self, steps: &mut Steps) {
        if !self.target_lost && !self.source_lost && !self.source_off && !self.target_off {
            self.mishap(steps, format_args!("the source's host goes off"), |world| {
                world.kill_source();
                world.source_qemu = SourceQemu::Gone;
                world.source_off = true;
            });
            self.mishap(steps, format_args!("the target's host goes off"), |world| {
                world.kill_target();
                world.target_qemu = TargetQemu::Gone;
                world.target_off = true;
            });
        }
        if !self.target_lost && !self.source_lost {
            self.mishap(steps, format_args!("the source's site burns down"), |world| {
                world.kill_source();
                world.source_qemu = SourceQemu::Gone;
                world.source_lost = true;
            });
            // What the target wrote burns with it: the source's copy is all that is left.
            self.mishap(steps, format_args!("the target's site burns down"), |world| {
                world.kill_target();
                world.target_qemu = TargetQemu::Gone;
                world.target_lost = true;
                world.target_ran = false;
            });
        }
    }

    fn kill_source(&mut self) {
        self.source.crash();
        self.socket = false;
        self.tail = false;
    }

    fn kill_target(&mut self) {
        self.target.crash();
        self.incoming = false;
        self.told_batches = 0;
    }

    fn target_failed(&mut self, record: Record) {
        self.target.pending.clear();
        self.target_event(TargetEvent::Failed(Effect::Journal(record)));
    }
}

fn is_quiet(effect: &Effect) -> bool {
    matches!(effect, Effect::Report(_) | Effect::Look | Effect::CloseStream)
}

fn in_migration(qemu: SourceQemu) -> bool {
    matches!(
        qemu,
        SourceQemu::Iterating | SourceQemu::PreSwitchover | SourceQemu::Device
    )
}

fn move_first(effects: &mut Vec<Effect>, is: impl Fn(&Effect) -> bool) {
    let (first, rest): (Vec<_>, Vec<_>) = effects.drain(..).partition(is);
    effects.extend(first.into_iter().chain(rest));
}

fn is_for_source(word: &Word) -> bool {
    !matches!(word, Word::Commit { .. } | Word::Abort { .. })
}

/// `Ask` and `Unknown` go both ways; each side hears what either said, which is only worse.
fn is_for_target(word: &Word) -> bool {
    !matches!(word, Word::Ack { .. } | Word::Aborted { .. })
}

/// A word without its reason: which reason it gives decides nothing.
fn place(word: &Word) -> (u32, u8) {
    let kind = match word {
        Word::Commit { .. } => 0,
        Word::Abort { .. } => 1,
        Word::Ack { .. } => 2,
        Word::Aborted { .. } => 3,
        Word::Ask { .. } => 4,
        Word::Undecided { .. } => 5,
        Word::Unknown { .. } => 6,
    };
    (word.generation().0, kind)
}
