//! `[live]` of a job file: how a running VM is moved.
//!
//! Owns its keys, defaults and bounds, and what the agents are told of them. Leaves the rest of the file to the parent.

use std::time::Duration;

use longhaul_common::units::{ByteSize, Span};
use longhaul_common::wire::session::{LivePolicy, MediaRule};
use serde::{Deserialize, Serialize};

use super::SpecError;

/// `[live]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LiveSection {
    /// Longest blackout that is aimed at.
    #[schema(value_type = String)]
    pub blackout: Span,
    /// Let QEMU slow the guest's CPUs down where it writes faster than the link carries.
    pub auto_converge: bool,
    /// Slow the guest's disk writes down where they outrun the link.
    pub io_throttle: bool,
    /// What becomes of read-only media (CD-ROMs, ISO images) that no `[[disk]]` names: the VM is refused, they are ejected, or the target's
    /// QEMU has them already.
    pub media: MediaSection,
    /// How long a VM that does not converge is kept in sync before the job gives up; for ever without it.
    #[schema(value_type = Option<String>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub give_up: Option<Span>,
    /// How long a broken link may hold the RAM stream, while the VM runs on, before that stream is given up and begun anew.
    #[schema(value_type = String)]
    pub hold: Span,
    /// What one bit of a dirty bitmap stands for: a power of two from 4 KiB to 64 KiB; without it, by the size of the largest disk.
    #[schema(value_type = Option<String>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity: Option<ByteSize>,
    /// A block that is free in the guest's journal and was not written for so long counts as free; "never" forbids it.
    #[schema(value_type = String)]
    pub free_proof_age: ProofAge,
    /// Have the guest trim its file systems before the disks are read, by its agent.
    pub fstrim: bool,
}

/// How long a dirty bitmap has to be on for the age proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ProofAgeWord", into = "String")]
pub enum ProofAge {
    After(Span),
    Never,
}

/// As it is written: a time, "never", or `false`, which is the same.
#[derive(Deserialize)]
#[serde(untagged)]
enum ProofAgeWord {
    Text(String),
    Plain(bool),
}

impl TryFrom<ProofAgeWord> for ProofAge {
    type Error = String;

    fn try_from(word: ProofAgeWord) -> Result<Self, String> {
        match word {
            ProofAgeWord::Plain(false) => Ok(Self::Never),
            ProofAgeWord::Text(text) if text.trim() == "never" => Ok(Self::Never),
            ProofAgeWord::Text(text) => text.parse().map(Self::After).map_err(|error| format!("{error}")),
            ProofAgeWord::Plain(true) => {
                Err("live.free_proof_age is a time, such as \"15 min\", or \"never\"".to_owned())
            }
        }
    }
}

impl From<ProofAge> for String {
    fn from(age: ProofAge) -> Self {
        match age {
            ProofAge::After(span) => span.to_string(),
            ProofAge::Never => "never".to_owned(),
        }
    }
}

/// Rules for read-only media.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MediaSection {
    Refuse,
    Eject,
    Map,
}

impl From<MediaSection> for MediaRule {
    fn from(section: MediaSection) -> Self {
        match section {
            MediaSection::Refuse => Self::Refuse,
            MediaSection::Eject => Self::Eject,
            MediaSection::Map => Self::Map,
        }
    }
}

impl Default for LiveSection {
    fn default() -> Self {
        Self {
            blackout: Span(Duration::from_millis(300)),
            auto_converge: false,
            io_throttle: false,
            media: MediaSection::Refuse,
            give_up: None,
            hold: Span(Duration::from_secs(60)),
            granularity: None,
            free_proof_age: ProofAge::After(Span(Duration::from_secs(900))),
            fstrim: false,
        }
    }
}

impl LiveSection {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn policy(&self) -> LivePolicy {
        let ms = |span: &Span| span.0.as_millis() as u64;
        LivePolicy {
            blackout_ms: ms(&self.blackout),
            auto_converge: self.auto_converge,
            io_throttle: self.io_throttle,
            give_up_ms: self.give_up.as_ref().map(ms),
            hold_ms: ms(&self.hold),
            granularity: self.granularity.map_or(0, |granularity| granularity.0 as u32),
            free_proof_age_ms: match &self.free_proof_age {
                ProofAge::After(span) => Some(ms(span)),
                ProofAge::Never => None,
            },
        }
    }

    pub(super) fn check(&self) -> Result<(), SpecError> {
        if self.blackout.0 < BLACKOUT_MIN || self.blackout.0 > BLACKOUT_MAX {
            return Err(SpecError::Blackout);
        }
        let fits = |granularity: ByteSize| {
            granularity.0.is_power_of_two() && (4096..=64 << 10).contains(&granularity.0)
        };
        if !self.granularity.is_none_or(fits) {
            return Err(SpecError::Granularity);
        }
        match &self.free_proof_age {
            ProofAge::After(span) if span.0 < PROOF_AGE_MIN => Err(SpecError::ProofAge),
            _ => Ok(()),
        }
    }
}

/// Shorter is not possible with any link.
const BLACKOUT_MIN: Duration = Duration::from_millis(10);
/// Longer is no live migration.
const BLACKOUT_MAX: Duration = Duration::from_secs(600);

/// No file system that the age proof is for holds metadata back for longer unless somebody told it to.
const PROOF_AGE_MIN: Duration = Duration::from_secs(30);
