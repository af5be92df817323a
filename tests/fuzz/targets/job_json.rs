//! Feeds hostile bytes to the entry `job_json` of `longhaul_lab::hostile`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| longhaul_lab::hostile::run("job_json", bytes));
