//! A GGUF file of arbitrary bytes: read, and if it is a model, loaded and run for one token.
//!
//! `cargo +nightly fuzz run gguf` in this folder's parent. What it finds belongs into `corpus/gguf`, which the test
//! suite runs as well.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use consort_model::arch::Span;
use consort_model::formats::gguf::Gguf;
use consort_model::{Batch, Opened, Scratch};
use consort_tensor::kv::KvCache;
use consort_tensor::{Cpu, Pool};
use libfuzzer_sys::fuzz_target;

static POOL: LazyLock<Pool> = LazyLock::new(|| Pool::new(1, Cpu::detect()));

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::from_bytes(Path::new("fuzz.gguf"), bytes.to_vec()) else { return };
    let Ok(opened) = Opened::from_gguf(gguf) else { return };
    let _ = opened.tokenizer();
    let _ = opened.chat_template();
    let Ok(model) = opened.load(&POOL) else { return };
    let Ok(mut cache) = KvCache::new(model.kv_shape(), 1) else { return };
    let span = Span { first_row: 0, rows: 1, first_position: 0, blocks: &[0] };
    let batch = Batch { tokens: &[0], spans: &[span], logit_rows: &[0] };
    let _ = model.forward(&POOL, batch, &mut cache, &mut Scratch::new(), &mut Vec::new());
});
