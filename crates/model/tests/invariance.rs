//! Rows are independent: however a prompt is cut, whatever else is in the batch, wherever its blocks are and on
//! however many threads, every logit has the same bits.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "support/gguf_writer.rs"]
#[allow(dead_code)]
mod gguf_writer;

use std::path::Path;

use consort_model::arch::Span;
use consort_model::formats::gguf::Gguf;
use consort_model::{Batch, Error, Model, Opened, Scratch, open};
use consort_tensor::kv::{BLOCK_TOKENS, BlockId, KvCache};
use consort_tensor::{Cpu, DType, Family, Pool};
use gguf_writer::{Random, Shape, llama};

/// One sequence of a schedule: its tokens, its blocks, and what has come out so far.
struct Sequence {
    tokens: Vec<u32>,
    blocks: Vec<BlockId>,
    done: usize,
    logits: Vec<f32>,
}

/// Sequences with shuffled blocks of one cache.
fn sequences(model: &Model, lengths: &[usize], random: &mut Random) -> (KvCache, Vec<Sequence>) {
    let needed: usize = lengths.iter().map(|n| n.div_ceil(BLOCK_TOKENS)).sum();
    let mut free: Vec<BlockId> = (0..needed as BlockId + 5).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, random.below(i + 1));
    }
    let sequences = lengths.iter().enumerate().map(|(index, &length)| {
        // A sequence's tokens hang on its length alone, so that it can be run again alone.
        let mut tokens = Random(length as u64 * 31 + index as u64);
        Sequence {
            tokens: (0..length).map(|_| tokens.below(model.config().vocab) as u32).collect(),
            blocks: free.split_off(free.len() - length.div_ceil(BLOCK_TOKENS)),
            done: 0,
            logits: Vec::new(),
        }
    });
    let sequences = sequences.collect();
    (KvCache::new(model.kv_shape(), needed + 5).unwrap(), sequences)
}

/// Runs all sequences to their ends; `chunk` says how many tokens a sequence gets in a step (0: it sits out).
fn run(
    model: &Model,
    pool: &Pool,
    cache: &mut KvCache,
    all: &mut [Sequence],
    mut chunk: impl FnMut() -> usize,
) {
    let (mut scratch, mut logits) = (Scratch::new(), Vec::new());
    let vocab = model.config().vocab;
    while all.iter().any(|s| s.done < s.tokens.len()) {
        let takes: Vec<usize> = all.iter().map(|s| chunk().min(s.tokens.len() - s.done)).collect();
        let (mut tokens, mut spans) = (Vec::new(), Vec::new());
        for (s, &rows) in all.iter().zip(&takes).filter(|(_, rows)| **rows > 0) {
            spans.push(Span { first_row: tokens.len(), rows, first_position: s.done, blocks: &s.blocks });
            tokens.extend_from_slice(&s.tokens[s.done..s.done + rows]);
        }
        let logit_rows: Vec<usize> = (0..tokens.len()).collect();
        let batch = Batch { tokens: &tokens, spans: &spans, logit_rows: &logit_rows };
        model.forward(pool, batch, cache, &mut scratch, &mut logits).unwrap();
        drop(spans);
        let mut from = 0;
        for (s, rows) in all.iter_mut().zip(takes) {
            s.logits.extend_from_slice(&logits[from * vocab..(from + rows) * vocab]);
            s.done += rows;
            from += rows;
        }
    }
}

fn check(name: &str, load: impl Fn(&Pool) -> Model) {
    const LENGTHS: [usize; 4] = [100, 33, 64, 1];
    for family in Cpu::available() {
        let pools = [1, 2].map(|threads| Pool::new(threads, Cpu::force(family).unwrap()));
        let model = load(&pools[0]);
        let mut random = Random(11);
        // Each alone and in one piece is what everything else must equal.
        let mut want = Vec::new();
        for index in 0..LENGTHS.len() {
            let (mut cache, mut all) = sequences(&model, &LENGTHS, &mut random);
            run(&model, &pools[0], &mut cache, &mut all[index..index + 1], || usize::MAX);
            want.push(std::mem::take(&mut all[index].logits));
        }
        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for pool in &pools {
            for fixed in [1, 7, 16, 64] {
                let (mut cache, mut all) = sequences(&model, &LENGTHS, &mut random);
                run(&model, pool, &mut cache, &mut all[..1], || fixed);
                assert!(bits(&all[0].logits) == bits(&want[0]), "{name} {family:?} in chunks of {fixed}");
            }
            for round in 0..3 {
                let (mut cache, mut all) = sequences(&model, &LENGTHS, &mut random);
                let mut sizes = Random(100 + round);
                run(&model, pool, &mut cache, &mut all, || [0, 1, 1, 7, 16, 40][sizes.below(6)]);
                for (index, s) in all.iter().enumerate() {
                    assert!(
                        bits(&s.logits) == bits(&want[index]),
                        "{name} {family:?}, sequence {index} of round {round} on {} threads",
                        pool.threads()
                    );
                }
            }
        }
    }
}

fn golden(name: &str) -> impl Fn(&Pool) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    move |pool| open(&folder).unwrap().load(pool).unwrap()
}

#[test]
fn f32_with_biases() {
    check("llama-untied", golden("llama-untied"));
}

#[test]
fn bf16_with_norms_per_head() {
    check("qwen3-bf16", golden("qwen3-bf16"));
}

#[test]
fn windows_of_two_kinds() {
    check("gemma3", golden("gemma3"));
}

#[test]
fn int8_products() {
    // Q8_0 blocks with a scale of 2⁻⁸ and random bytes.
    let mut random = Random(5);
    let shape = Shape { vocab: 96, hidden: 64, heads: 4, kv_heads: 2, ffn: 96, layers: 2 };
    let writer = llama(shape, |w, name, rows, cols| {
        let mut bytes = Vec::new();
        for _ in 0..rows * cols / 32 {
            bytes.extend(half::f16::from_f32(1.0 / 256.0).to_le_bytes());
            bytes.extend((0..32).map(|_| random.bits() as u8));
        }
        w.tensor(name, DType::Q8_0, &[rows, cols], bytes);
    });
    let bytes = writer.finish();
    check("q8_0", |pool| {
        let gguf = Gguf::from_bytes(Path::new("test.gguf"), bytes.clone()).unwrap();
        Opened::from_gguf(gguf).unwrap().load(pool).unwrap()
    });
}

/// A batch that doesn't fit is refused before anything is stored.
#[test]
fn batches_that_do_not_fit_are_refused() {
    let pool = Pool::new(1, Cpu::force(Family::Scalar).unwrap());
    let model = golden("llama")(&pool);
    let mut cache = KvCache::new(model.kv_shape(), 8).unwrap();
    let blocks: Vec<BlockId> = (0..8).collect();
    let span = |first_row, rows, first_position, blocks| Span { first_row, rows, first_position, blocks };
    let mut refusal = |tokens: &[u32], spans: &[Span<'_>], logit_rows: &[usize]| {
        let batch = Batch { tokens, spans, logit_rows };
        match model.forward(&pool, batch, &mut cache, &mut Scratch::new(), &mut Vec::new()) {
            Err(Error::Batch { reason }) => reason,
            other => panic!("{other:?}"),
        }
    };
    assert!(refusal(&[200], &[span(0, 1, 0, &blocks)], &[]).contains("token 200"));
    assert!(refusal(&[1, 2], &[span(0, 1, 0, &blocks)], &[]).contains("cover 1 of 2"));
    assert!(refusal(&[1], &[span(0, 2, 0, &blocks)], &[]).contains("covers 2 rows"));
    assert!(refusal(&[1], &[span(1, 1, 0, &blocks)], &[]).contains("from 1"));
    assert!(refusal(&[1], &[span(0, 0, 0, &blocks), span(0, 1, 0, &blocks)], &[]).contains("covers 0"));
    assert!(refusal(&[1], &[span(0, 1, 128, &blocks)], &[]).contains("128 positions"));
    assert!(refusal(&[1], &[span(0, 1, usize::MAX, &blocks)], &[]).contains("positions"));
    assert!(refusal(&[1], &[span(0, 1, 16, &blocks[..1])], &[]).contains("needs 2 blocks"));
    assert!(refusal(&[1], &[span(0, 1, 0, &[8])], &[]).contains("block 8"));
    let both = [span(0, 1, 0, &blocks[..1]), span(1, 1, 3, &blocks[..1])];
    assert!(refusal(&[1, 2], &both, &[]).contains("store into one block"));
    assert!(refusal(&[1], &[span(0, 1, 0, &blocks)], &[1]).contains("logit row 1"));
    assert!(refusal(&[1, 2], &[span(0, 2, 0, &blocks)], &[1, 0]).contains("logit row 0"));
    // What is only read may be shared.
    let shared = [span(0, 1, 16, &[0, 1][..]), span(1, 1, 16, &[0, 2][..])];
    let batch = Batch { tokens: &[1, 2], spans: &shared, logit_rows: &[] };
    model.forward(&pool, batch, &mut cache, &mut Scratch::new(), &mut Vec::new()).unwrap();
}
