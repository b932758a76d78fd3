//! Model files that lie: every number of a header set to what hurts, truncation at every byte, and the fuzzers'
//! corpus. The answer is an error or a model that runs, never a panic, and never more memory than the file has bytes
//! (plus a little).
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "support/gguf_writer.rs"]
#[allow(dead_code)]
mod gguf_writer;
mod support;

use std::path::Path;
use std::sync::Mutex;

use consort_model::formats::gguf::Gguf;
use consort_model::formats::safetensors::Safetensors;
use consort_model::{Error, Opened};
use consort_tensor::{Cpu, Family, Pool};
use gguf_writer::{GgufWriter, Random, Shape, fields, llama};
use peak_alloc::PeakAlloc;
use support::Session;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Beyond the file's own length: error messages, tables of a few entries, the parser's own state.
const READING_MAY_TAKE: usize = 64 << 10;
/// Packing pads rows to whole tiles, which is a multiple for tensors as tiny as these.
const LOADING_MAY_TAKE: usize = 1 << 20;

/// Memory is counted for the whole process, so one test runs at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The most memory that `work` held beyond what was held before.
fn peak_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let result = work();
    (result, MEMORY.peak_usage().saturating_sub(before))
}

fn small_gguf() -> GgufWriter {
    let mut random = Random(1);
    let shape = Shape { vocab: 8, hidden: 32, heads: 2, kv_heads: 1, ffn: 32, layers: 1 };
    llama(shape, |w, name, rows, cols| {
        let values: Vec<f32> = (0..rows * cols).map(|_| random.uniform()).collect();
        w.f32_tensor(name, &[rows, cols], &values);
    })
}

/// Reads, loads and runs; the outcome must be an error or finite work.
fn try_gguf(bytes: &[u8], pool: &Pool, what: &str) -> Result<(), Error> {
    let len = bytes.len();
    let copy = bytes.to_vec();
    let (gguf, peak) = peak_of(|| Gguf::from_bytes(Path::new("hostile.gguf"), copy));
    assert!(peak <= len + READING_MAY_TAKE, "{what}: reading {len} bytes took {peak}");
    let (opened, peak) = peak_of(|| gguf.and_then(Opened::from_gguf));
    assert!(peak <= len + READING_MAY_TAKE, "{what}: the config of {len} bytes took {peak}");
    let opened = opened?;
    let (model, peak) = peak_of(|| opened.load(pool));
    assert!(peak <= 2 * len + LOADING_MAY_TAKE, "{what}: loading {len} bytes took {peak}");
    let model = model?;
    if model.config().max_context >= 4 && model.config().vocab >= 4 {
        Session::new(&model).run(&model, pool, &[0, 1, 2, 3], &[3]);
    }
    Ok(())
}

/// What a field of so many bytes is set to.
fn hurtful(bytes: usize, now: u64) -> Vec<u64> {
    let max = u64::MAX >> (64 - 8 * bytes);
    let mut values =
        vec![0, 1, 2, 3, max, max - 1, max / 2, max / 2 + 1, max / 4 + 1, now + 1, now.wrapping_sub(1)];
    // A length such that position + length wraps to where it started; a dimension whose product wraps to zero or one.
    values.extend([max - now, max - 8, max / 32 + 1, 0xaaaa_aaaa_aaaa_aaab]);
    values.iter().map(|v| v & max).collect()
}

fn pool() -> Pool {
    Pool::new(1, Cpu::force(Family::Scalar).unwrap())
}

#[test]
fn the_small_file_itself_runs() {
    let _alone = ONE_AT_A_TIME.lock();
    let bytes = small_gguf().finish();
    let (fields, header) = fields(&bytes);
    try_gguf(&bytes, &pool(), "valid").unwrap();
    assert!(fields.len() > 80 && header < bytes.len());
}

#[test]
fn every_number_of_a_gguf_header_may_lie() {
    let _alone = ONE_AT_A_TIME.lock();
    let bytes = small_gguf().finish();
    let (fields, _) = fields(&bytes);
    let pool = pool();
    let mut refused = 0;
    for field in &fields {
        let mut now = [0; 8];
        now[..field.bytes].copy_from_slice(&bytes[field.at..field.at + field.bytes]);
        for value in hurtful(field.bytes, u64::from_le_bytes(now)) {
            let mut lie = bytes.clone();
            lie[field.at..field.at + field.bytes].copy_from_slice(&value.to_le_bytes()[..field.bytes]);
            let outcome = try_gguf(&lie, &pool, &format!("{} = {value}", field.what));
            refused += usize::from(outcome.is_err());
        }
    }
    // Some lies are harmless (another context length, say); most are not.
    assert!(refused > fields.len() * 8, "{refused} of {} lies were noticed", fields.len() * 15);
}

#[test]
fn a_gguf_may_end_anywhere() {
    let _alone = ONE_AT_A_TIME.lock();
    let bytes = small_gguf().finish();
    let (_, header) = fields(&bytes);
    let pool = pool();
    let data = (header..bytes.len()).step_by(997);
    for end in (0..=header).chain(data).chain([bytes.len() - 1]) {
        assert!(try_gguf(&bytes[..end], &pool, &format!("cut at {end}")).is_err(), "cut at {end}");
    }
}

#[test]
fn every_byte_of_a_gguf_header_may_be_wrong() {
    let _alone = ONE_AT_A_TIME.lock();
    let bytes = small_gguf().finish();
    let (_, header) = fields(&bytes);
    let pool = pool();
    for at in 0..header {
        for flip in [0xff, 0x01, 0x80] {
            let mut lie = bytes.clone();
            lie[at] ^= flip;
            let _ = try_gguf(&lie, &pool, &format!("byte {at} ^ {flip:#x}"));
        }
    }
}

#[test]
fn gguf_names_come_once_and_nesting_ends() {
    let _alone = ONE_AT_A_TIME.lock();
    let refusal = |bytes: Vec<u8>| Gguf::from_bytes(Path::new("x"), bytes).err().unwrap().to_string();
    let mut twice = small_gguf();
    twice.f32_tensor("output_norm.weight", &[1], &[1.0]);
    assert!(refusal(twice.finish()).contains("output_norm.weight comes twice"));
    let mut twice = small_gguf();
    twice.pair("general.name", gguf_writer::Value::U32(1));
    assert!(refusal(twice.finish()).contains("general.name comes twice"));
    // A type that llama.cpp has and this library hasn't.
    let mut foreign = small_gguf();
    let mut foreign = foreign.f32_tensor("blk.0.x.weight", &[256], &[0.0; 256]).finish();
    let (all, _) = fields(&foreign);
    let kind = all.iter().find(|field| field.what == "type of blk.0.x.weight").unwrap();
    foreign[kind.at..kind.at + 4].copy_from_slice(&23u32.to_le_bytes());
    assert!(refusal(foreign).contains("IQ4_XS"));

    // An array of arrays of arrays …, 10,000 deep: the reader must not follow it down its own stack.
    let mut nested = b"GGUF\x03\0\0\0".to_vec();
    nested.extend(0u64.to_le_bytes());
    nested.extend(1u64.to_le_bytes());
    nested.extend(1u64.to_le_bytes());
    nested.push(b'k');
    nested.extend(9u32.to_le_bytes());
    for _ in 0..10_000 {
        nested.extend(9u32.to_le_bytes());
        nested.extend(1u64.to_le_bytes());
    }
    assert!(refusal(nested).contains("nests"));
}

fn small_safetensors() -> (Vec<u8>, usize) {
    let header = r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    let end = bytes.len();
    bytes.extend(0..32);
    (bytes, end)
}

fn try_safetensors(bytes: &[u8], what: &str) -> Result<(), Error> {
    let copy = bytes.to_vec();
    let (outcome, peak) = peak_of(|| Safetensors::from_bytes(Path::new("hostile.safetensors"), copy));
    assert!(peak <= bytes.len() + READING_MAY_TAKE, "{what}: reading {} bytes took {peak}", bytes.len());
    outcome.map(drop)
}

#[test]
fn every_number_of_a_safetensors_header_may_lie() {
    let _alone = ONE_AT_A_TIME.lock();
    let (bytes, header) = small_safetensors();
    try_safetensors(&bytes, "valid").unwrap();
    for value in hurtful(8, header as u64 - 8) {
        let mut lie = bytes.clone();
        lie[..8].copy_from_slice(&value.to_le_bytes());
        assert!(try_safetensors(&lie, &format!("length {value}")).is_err(), "length {value}");
    }
    let json = String::from_utf8(bytes[8..header].to_vec()).unwrap();
    let numbers = ["[2,3]", "[0,24]", "[4]", "[24,32]"];
    for number in numbers {
        for lie in [
            "[0]",
            "[]",
            "[1]",
            "[-1]",
            "[1.5]",
            "[1e300]",
            "[18446744073709551615]",
            "[18446744073709551616]",
            "[9223372036854775808,2]",
            "[4611686018427387905,4]",
            "[24,0]",
            "[0,18446744073709551615]",
            "[33,34]",
            "null",
            "\"x\"",
            "{}",
            "[[[[]]]]",
            "[1,1,1,1,1,1,1,1,1,1]",
        ] {
            let json = json.replacen(number, lie, 1);
            let mut file = (json.len() as u64).to_le_bytes().to_vec();
            file.extend_from_slice(json.as_bytes());
            file.extend_from_slice(&bytes[header..]);
            assert!(try_safetensors(&file, &format!("{number} = {lie}")).is_err(), "{number} = {lie}");
        }
    }
}

#[test]
fn a_safetensors_file_may_end_or_be_wrong_anywhere() {
    let _alone = ONE_AT_A_TIME.lock();
    let (bytes, header) = small_safetensors();
    for end in 0..bytes.len() {
        assert!(try_safetensors(&bytes[..end], &format!("cut at {end}")).is_err(), "cut at {end}");
    }
    for at in 0..header {
        for flip in [0xff, 0x01, 0x80] {
            let mut lie = bytes.clone();
            lie[at] ^= flip;
            let _ = try_safetensors(&lie, &format!("byte {at} ^ {flip:#x}"));
        }
    }
}

/// What the fuzzers start from, and what they found.
#[test]
fn the_fuzzers_corpus_runs() {
    let _alone = ONE_AT_A_TIME.lock();
    let pool = pool();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let files = |kind: &str| {
        let folder = std::fs::read_dir(corpus.join(kind)).unwrap();
        folder.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    let (gguf, safetensors) = (files("gguf"), files("safetensors"));
    assert!(!gguf.is_empty() && !safetensors.is_empty());
    for path in gguf {
        let _ = try_gguf(&std::fs::read(&path).unwrap(), &pool, &path.display().to_string());
    }
    for path in safetensors {
        let _ = try_safetensors(&std::fs::read(&path).unwrap(), &path.display().to_string());
    }
}
