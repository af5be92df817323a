//! Writing copies.
