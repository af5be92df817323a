//! How long the last steps of an arrival took.
//!
//! Owns their names and times, for the report. Leaves the steps to the parent. Promises nothing that anything relies on.

use std::time::Instant;

use crate::vm::handover::{Effect, Record, TargetEvent, TargetQemu, Word};

/// The steps of one generation, in milliseconds since the first.
#[derive(Default)]
pub(super) struct Steps {
    began: Option<Instant>,
    taken: Vec<(String, u64)>,
}

impl Steps {
    /// Something happened.
    pub(super) fn event(&mut self, event: &TargetEvent) {
        match event {
            TargetEvent::Prepare(_) => *self = Self::default(),
            TargetEvent::StreamWritten(_) => self.step("QEMU was given its stream"),
            TargetEvent::Qemu(TargetQemu::Loaded) => self.step("loaded"),
            TargetEvent::DisksDurable(_) => self.step("last round durable"),
            TargetEvent::Heard(Word::Commit { .. }) => self.step("COMMIT heard"),
            _ => {}
        }
    }

    /// Something was done.
    pub(super) fn done(&mut self, effect: &Effect) {
        match effect {
            Effect::Journal(Record::Running { .. }) => self.step("RUNNING journaled"),
            Effect::Cont => self.step("VM started"),
            _ => {}
        }
    }

    /// The first time counts, but for blocks of the last round, of which the last does.
    fn step(&mut self, name: &str) {
        let began = *self.began.get_or_insert_with(Instant::now);
        let at = began.elapsed().as_millis() as u64;
        match self.taken.iter().position(|(known, _)| known == name) {
            Some(known) if name == "last round durable" => {
                self.taken.remove(known);
            }
            Some(_) => return,
            None => {}
        }
        self.taken.push((name.to_owned(), at));
    }

    /// All of them, in order.
    pub(super) fn taken(&self) -> Vec<(String, u64)> {
        self.taken.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::handover::{DiskRound, Generation};

    #[test]
    fn each_step_is_told_once_and_a_new_try_begins_anew() {
        let mut steps = Steps::default();
        let names = |steps: &Steps| {
            steps
                .taken()
                .into_iter()
                .map(|(name, _)| name)
                .collect::<Vec<_>>()
        };
        steps.event(&TargetEvent::DisksDurable(DiskRound::default()));
        steps.event(&TargetEvent::Qemu(TargetQemu::Loaded));
        steps.event(&TargetEvent::Qemu(TargetQemu::Loaded));
        steps.event(&TargetEvent::DisksDurable(DiskRound::default()));
        steps.done(&Effect::Cont);
        assert_eq!(names(&steps), ["loaded", "last round durable", "VM started"]);
        steps.event(&TargetEvent::Prepare(Generation(2)));
        assert!(steps.taken().is_empty());
    }
}
