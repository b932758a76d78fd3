//! A safetensors file of arbitrary bytes.
//!
//! `cargo +nightly fuzz run safetensors` in this folder's parent. What it finds belongs into `corpus/safetensors`,
//! which the test suite runs as well.
#![no_main]

use std::path::Path;

use consort_model::formats::safetensors::Safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = Safetensors::from_bytes(Path::new("fuzz.safetensors"), bytes.to_vec()) {
        assert!(file.names().all(|name| file.has(name)));
    }
});
