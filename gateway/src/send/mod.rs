//! The sending side.
pub mod outbox;
