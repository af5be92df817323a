//! Feeds hostile bytes to the entry `ram_parts` of `longhaul_lab::hostile`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| longhaul_lab::hostile::run("ram_parts", bytes));
