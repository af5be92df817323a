//! Which blocks of a running guest's disk are proven free: a block is skipped only then.
//!
//! Owns the looks at a disk in use ([`Look`]), the proofs they add up to ([`Proofs`]), and the second look before the pause
//! ([`second_look`]). Leaves alone the dirty bitmaps, the freezing and the order of sending: the session does those and says when.
//! Promises that a block is called proven only by one of DESIGN's proofs, as stated at [`Proofs`]; whatever is torn, unknown, or
//! contradictory proves nothing, and the report says why.
//!
//! The session's way: freeze (if there is an agent), dirty bitmaps on, [`Look::frozen`] of the frozen mounts, thaw; then a first
//! [`Look::running`], whose free blocks are deferred to the back of round 0; further looks every few seconds, each given to
//! [`Proofs::add`], until nothing deferred is unproven or round 0 is at its end; the last one goes to [`second_look`] too.
//!
//! A proof drops blocks from round 0 only. A block in any dirty bitmap is sent, proven or not: every proof here rests on that.

mod look;
mod mounts;
mod proofs;
mod second;

pub use look::{Freeze, Look};
pub use mounts::Mount;
pub use proofs::{Proofs, Rules};
pub use second::{SecondLook, second_look};
