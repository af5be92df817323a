//! The small CA.
