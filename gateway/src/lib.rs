//! A site's gateway: what the programs `longhaul-gateway` and `longhaul` are made of.

pub mod pki;
