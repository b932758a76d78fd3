//! GGUF files of every tensor type against the same weights stored as F32, and rows stored in GGUF's order against
//! the same model in safetensors.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "support/gguf_writer.rs"]
#[allow(dead_code)]
mod gguf_writer;
mod support;

use std::path::Path;

use consort_model::formats::gguf::Gguf;
use consort_model::{Model, Opened, open};
use consort_tensor::quant::dequantize;
use consort_tensor::{Cpu, DType, Family, Pool};
use gguf_writer::{GgufWriter, Random, Shape, Value, llama};
use half::f16;
use support::Session;

const SHAPE: Shape = Shape { vocab: 96, hidden: 256, heads: 4, kv_heads: 2, ffn: 512, layers: 2 };
const PROMPT: [u32; 24] =
    [5, 17, 3, 90, 42, 8, 8, 61, 33, 2, 71, 54, 95, 0, 19, 28, 37, 46, 55, 64, 73, 82, 91, 12];

/// The largest difference of logits over the largest logit. Weights are equal on both sides, so what differs is how
/// inputs of products are rounded: to nothing beyond F32, to 8 bits of mantissa, or to 255 steps a block.
const FLOAT_TOLERANCE: f32 = 1e-5;
const BF16_TOLERANCE: f32 = 2e-3;
const INT8_TOLERANCE: f32 = 1.5e-2;

/// Valid blocks of a type with random contents whose values are about ±`spread`.
fn random_blocks(dtype: DType, values: usize, spread: f32, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    match dtype {
        DType::F32 => (0..values).for_each(|_| bytes.extend((spread * random.uniform()).to_le_bytes())),
        DType::F16 => {
            (0..values).for_each(|_| bytes.extend(f16::from_f32(spread * random.uniform()).to_le_bytes()));
        }
        DType::BF16 => {
            let rounded = |x| half::bf16::from_f32(x).to_le_bytes();
            (0..values).for_each(|_| bytes.extend(rounded(spread * random.uniform())));
        }
        _ => {
            for _ in 0..values / dtype.block_len() {
                let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| random.bits() as u8).collect();
                for (at, factor) in scales(dtype) {
                    let jitter = 1.0 + 0.2 * random.uniform();
                    block[at..at + 2].copy_from_slice(&f16::from_f32(spread * factor * jitter).to_le_bytes());
                }
                bytes.extend(block);
            }
        }
    }
    assert_eq!(bytes.len(), dtype.bytes(values).unwrap());
    bytes
}

/// Where a block has its half-precision scales, and what makes its values about ±1 around zero.
fn scales(dtype: DType) -> Vec<(usize, f32)> {
    match dtype {
        DType::Q4_0 => vec![(0, 1.0 / 8.0)],
        DType::Q4_1 => vec![(0, 1.0 / 7.5), (2, -1.0)],
        DType::Q5_0 => vec![(0, 1.0 / 16.0)],
        DType::Q5_1 => vec![(0, 1.0 / 15.5), (2, -1.0)],
        DType::Q8_0 => vec![(0, 1.0 / 128.0)],
        // Random 4-bit scales of about 7.5 multiply 0..3 here and one offset there.
        DType::Q2_K => vec![(80, 1.0 / 11.0), (82, 1.0 / 7.5)],
        DType::Q3_K => vec![(108, 1.0 / 64.0)],
        DType::Q4_K => vec![(0, 1.0 / 240.0), (2, 1.0 / 32.0)],
        DType::Q5_K => vec![(0, 1.0 / 480.0), (2, 1.0 / 32.0)],
        DType::Q6_K => vec![(208, 1.0 / 2048.0)],
        DType::F32 | DType::F16 | DType::BF16 => vec![],
    }
}

fn load(writer: &GgufWriter, pool: &Pool) -> Model {
    let gguf = Gguf::from_bytes(Path::new("test.gguf"), writer.finish()).unwrap();
    Opened::from_gguf(gguf).unwrap().load(pool).unwrap()
}

/// All logits of the prompt.
fn logits(model: &Model, pool: &Pool) -> Vec<f32> {
    let rows: Vec<usize> = (0..PROMPT.len()).collect();
    Session::new(model).run(model, pool, &PROMPT, &rows)
}

fn relative_difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().all(|x| x.is_finite()));
    let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    assert!(largest > 1.0, "these logits say nothing: {largest}");
    got.iter().zip(want).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

#[test]
fn every_tensor_type_runs_as_its_values_would() {
    for (number, dtype) in DType::ALL.into_iter().enumerate() {
        let mut random = Random(number as u64 + 1);
        let mut matrices = Vec::new();
        let stored = llama(SHAPE, |w, name, rows, cols| {
            let spread = if name.starts_with("token_embd") { 0.5 } else { 0.7 / (cols as f32).sqrt() };
            let bytes = random_blocks(dtype, rows * cols, spread, &mut random);
            let mut values = vec![0.0; rows * cols];
            dequantize(dtype, &bytes, &mut values);
            matrices.push((name.to_string(), values));
            w.tensor(name, dtype, &[rows, cols], bytes);
        });
        let mut matrices = matrices.into_iter();
        let exact = llama(SHAPE, |w, name, rows, cols| {
            let (stored_name, values) = matrices.next().unwrap();
            assert_eq!(stored_name, name);
            w.f32_tensor(name, &[rows, cols], &values);
        });
        let scalar = Pool::new(1, Cpu::force(Family::Scalar).unwrap());
        let want = logits(&load(&exact, &scalar), &scalar);
        let tolerance = match dtype {
            DType::F32 | DType::F16 => FLOAT_TOLERANCE,
            DType::BF16 => BF16_TOLERANCE,
            _ => INT8_TOLERANCE,
        };
        for family in Cpu::available() {
            let pool = Pool::new(2, Cpu::force(family).unwrap());
            let difference = relative_difference(&logits(&load(&stored, &pool), &pool), &want);
            println!("{} on {family:?}: {difference:e}", dtype.name());
            assert!(difference <= tolerance, "{} on {family:?}: {difference}", dtype.name());
        }
    }
}

/// GGUF stores a Llama's queries and keys, and their biases, as neighbouring pairs. The same model from a
/// safetensors folder must give the same bits.
#[test]
fn interleaved_rows_are_put_back() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama-untied");
    let file = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let config = open(&folder).unwrap().config().clone();
    let mut w = GgufWriter::default();
    w.pair("general.architecture", Value::Text("llama".into()))
        .pair("llama.block_count", Value::U32(config.layers as u32))
        .pair("llama.context_length", Value::U32(config.max_context as u32))
        .pair("llama.embedding_length", Value::U32(config.hidden as u32))
        .pair("llama.feed_forward_length", Value::U32(config.ffn as u32))
        .pair("llama.attention.head_count", Value::U32(config.heads as u32))
        .pair("llama.attention.head_count_kv", Value::U32(config.kv_heads as u32))
        .pair("llama.attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps));
    let renamed = [
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    for (name, view) in tensors.tensors() {
        let mut bytes = view.data().to_vec();
        if name.contains("q_proj") || name.contains("k_proj") {
            bytes = halves_to_pairs(&bytes, view.shape()[0], config.head_dim);
        }
        let name = renamed.iter().fold(name, |name, (from, to)| name.replace(from, to));
        w.tensor(&name, DType::F32, view.shape(), bytes);
    }
    let pool = Pool::new(1, Cpu::detect());
    let ours = open(&folder).unwrap().load(&pool).unwrap();
    assert_eq!(logits(&load(&w, &pool), &pool), logits(&ours, &pool));
}

/// What a converter does: value *i* of a head's first half and of its second become neighbours.
fn halves_to_pairs(bytes: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let row = bytes.len() / rows;
    let source = |r: usize| (r / head_dim) * head_dim + (r % head_dim) / 2 + (r % 2) * (head_dim / 2);
    (0..rows).flat_map(|r| bytes[source(r) * row..(source(r) + 1) * row].to_vec()).collect()
}

/// Llama 3's stretched rotation comes as divisors in a tensor; they must matter, and must be sane.
#[test]
fn rope_divisors_are_used_and_checked() {
    let pool = Pool::new(1, Cpu::detect());
    let with = |divisors: Option<[f32; 32]>| {
        let mut random = Random(3);
        let mut w = llama(SHAPE, |w, name, rows, cols| {
            let values = random_blocks(DType::F32, rows * cols, 0.1, &mut random);
            w.tensor(name, DType::F32, &[rows, cols], values);
        });
        if let Some(divisors) = divisors {
            w.f32_tensor("rope_freqs.weight", &[32], &divisors);
        }
        w
    };
    let plain = logits(&load(&with(None), &pool), &pool);
    assert_eq!(logits(&load(&with(Some([1.0; 32])), &pool), &pool), plain);
    assert_ne!(logits(&load(&with(Some([8.0; 32])), &pool), &pool), plain);
    let zero = Gguf::from_bytes(Path::new("x"), with(Some([0.0; 32])).finish()).unwrap();
    let error = Opened::from_gguf(zero).unwrap().load(&pool).err().unwrap();
    assert!(error.to_string().contains("rope_freqs.weight"), "{error}");
}
