//! The operator's word to an agent, outside of any attempt: it must be heard where no attempt can be.
//!
//! Owns the question and the answer: one frame each way on a stream of its own. Leaves what is done to the agent, which alone knows the
//! handover's journal. Promises that text within it is cleaned and bounded as all text of a peer is.

use serde::{Deserialize, Serialize};

use super::session::Refusal;
use super::words;

/// What the operator wants of a job at this agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorTask {
    /// The job's number, or the start of it: a site's gateway may not know the jobs that arrive there.
    #[serde(deserialize_with = "words::text")]
    pub job: String,
    pub word: OperatorWord,
}

/// The words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperatorWord {
    /// Decides a handover in doubt. Without `other_is_off` what it risks is the answer, and nothing is done.
    Resolve { run_at: RunAt, other_is_off: bool },
    /// Removes the images that a completed move left at its source.
    Forget,
}

/// The side that is to run a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunAt {
    Source,
    Target,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperatorAnswer {
    Done {
        /// What people should know, a sentence each.
        #[serde(deserialize_with = "words::list")]
        lines: Vec<String>,
        /// Not so where it was done before.
        changed: bool,
    },
    Refused(Refusal),
}
