//! What both agents of a running VM's move say to each other; the gateways carry it unread.
//!
//! Owns the words; they are encoded as control frames are. Leaves what they do to `source` and `target`. Any word may be lost with a link; each
//! is said again when a link comes back, or asked for.

use longhaul_common::wire::frame;
use longhaul_common::wire::session::AgentWord;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::vm::facts::{DiskFacts, VmFacts};
use crate::vm::handover::{Generation, Reason, Stream, Word};
use crate::vm::media::Medium;

/// From the source agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum ToTarget {
    /// Have a QEMU ready that waits for this generation; what runs for an earlier one is ended. Said again until answered.
    Prepare {
        generation: Generation,
        vm: Box<VmWords>,
    },
    /// QEMU's stream of this generation ends here.
    StreamEnd {
        generation: Generation,
        stream: Stream,
    },
    Handover(Word),
    /// Say `Echo` at once: measures the way there and back.
    Probe(u64),
}

/// What the target needs to know of the VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct VmWords {
    pub name: String,
    pub uuid: Option<String>,
    /// The source's facts (JSON), for the comparison before a byte of RAM moves.
    pub facts: Option<String>,
}

impl VmWords {
    /// `ejected`: media that are out of their drives by the time that counts.
    pub(super) fn of(mut facts: VmFacts, ejected: &[Medium]) -> Self {
        let is_out = |disk: &DiskFacts| ejected.iter().any(|medium| *medium == Medium::of(disk));
        facts.disks.retain(|disk| !is_out(disk));
        // All zeros: the VM was started without one.
        let has_uuid = facts.uuid.chars().any(|c| c != '0' && c != '-');
        let text = serde_json::to_string(&facts);
        Self {
            name: facts.name,
            uuid: has_uuid.then_some(facts.uuid),
            facts: text.ok(),
        }
    }
}

/// From the target agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum ToSource {
    /// Which life of the target's session this is: one that the source does not know has lost everything that is not durable.
    Session(u64),
    Prepared {
        generation: Generation,
        notes: Vec<String>,
    },
    /// The target's QEMU does not start or does not fit.
    Unfit {
        generation: Generation,
        why: String,
    },
    /// This one was given up before RAM flowed, as by a crash; one above `upto` may be asked for.
    GivenUp {
        generation: Generation,
        upto: Generation,
        reason: Reason,
    },
    /// QEMU has been given the stream up to here.
    Written {
        generation: Generation,
        position: u64,
    },
    Handover(Word),
    Echo(u64),
    /// How long the last steps took, in milliseconds since the first; said with the answer to COMMIT, and only once.
    Steps(Vec<(String, u64)>),
    /// Why the target cannot keep this one, in words; said before the handover's word, whose reason is one of a few.
    Why {
        generation: Generation,
        why: String,
    },
}

/// A word as it crosses the wire.
pub(super) fn encode(word: &impl Serialize) -> AgentWord {
    // Fails only for a word beyond the frame limit, which no word comes near: facts are bounded.
    AgentWord(frame::encode(word).unwrap_or_default())
}

/// A word of the other agent; `None` for one that this version does not know.
pub(super) fn decode<T: DeserializeOwned>(word: &AgentWord) -> Option<T> {
    let decoded = frame::decode(word.0.get(4..).unwrap_or_default());
    if let Err(error) = &decoded {
        tracing::warn!(
            "a word of the other agent is not understood: {error}; both agents should run the same version"
        );
    }
    decoded.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_wire_and_nonsense_is_nothing() {
        let word = ToTarget::Probe(7);
        assert_eq!(decode::<ToTarget>(&encode(&word)), Some(word));
        assert_eq!(decode::<ToSource>(&AgentWord(vec![99, 1, 2])), None);
        assert_eq!(decode::<ToSource>(&AgentWord(Vec::new())), None);
    }
}
