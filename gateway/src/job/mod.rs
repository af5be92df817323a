//! Jobs: what is asked (`spec`), how it goes (`driver`, `attempt`, `live`, `ledger`, `board`, `progress`), what came of it (`report`),
//! and what an operator orders past all of that (`order`).
//!
//! Owns the table of jobs that this gateway runs. Promises that a job accepted here is in the journal before anybody is told so.

pub mod attempt;
pub mod board;
pub mod driver;
mod finish;
mod hearing;
mod kept;
pub mod ledger;
pub mod live;
pub mod order;
pub mod plan;
pub mod progress;
pub mod report;
pub mod spec;
pub mod table;
