//! The side-by-side benchmark over the emulated WAN: what is run, what came of it, and how it is shown.
//!
//! Owns the plan (pure), the calls of the lab, the file of results, and the page made of it. Leaves alone links, guests and
//! measuring, which are the lab's. Promises that every figure on the page is made from lines of the results file, each of
//! which is one finished run.

pub mod contestant;
pub mod figures;
pub mod machine;
pub mod notes;
pub mod page;
pub mod plan;
pub mod plot;
pub mod profile;
pub mod record;
pub mod runner;
pub mod table;
