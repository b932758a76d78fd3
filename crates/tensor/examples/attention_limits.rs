//! How far attention, the cache, the norms and the pool are from what the machine can do.
//!
//! `cargo run --release -p consort-tensor --example attention_limits [-- THREADS [FAMILY]]`
//!
//! Every figure is the median of many short rounds. Attention counts two multiply-adds a visible key, query, head
//! and dimension, the masked half of the triangle not included.

#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::time::Instant;

use consort_tensor::attention::{AttentionParams, Span, attention};
use consort_tensor::kv::{BLOCK_TOKENS, BlockId, KvCache, KvShape};
use consort_tensor::rope::Rope;
use consort_tensor::{Cpu, Error, Family, Pool, norm, reduce};

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|a| a.parse().ok()).unwrap_or(2);
    let cpu = match args.next().and_then(|name| Family::from_name(&name)) {
        Some(family) => Cpu::force(family)?,
        None => Cpu::detect(),
    };
    let pool = Pool::new(threads, cpu);
    println!("{} threads, {}", pool.threads(), cpu.family().name());
    println!("empty run                       {:9.2} µs", median_us(|| pool.run(|_| {})));

    prefill(&pool, 64, 9, 3, 512)?;
    prefill(&pool, 64, 9, 3, 2048)?;
    prefill(&pool, 128, 16, 8, 512)?;
    prefill(&pool, 80, 8, 8, 512)?;
    prefill(&pool, 256, 4, 1, 512)?;
    for context in [200, 1000, 4000] {
        decode(&pool, &[context])?;
    }
    decode(&pool, &[200; 8])?;
    decode(
        &pool,
        &[200, 300, 450, 600, 800, 1000, 1300, 1600, 1900, 2200, 2500, 2800, 3100, 3400, 3700, 4000],
    )?;

    let weight = vec![1.0; 576];
    for rows in [1, 16, 512] {
        let x = vec![0.5; rows * 576];
        let mut out = x.clone();
        let us = median_us(|| norm::rms_norm(&pool, &x, &weight, 1e-5, &mut out));
        println!("rms_norm {rows:4} × 576              {us:9.2} µs");
        let rope = Rope::new((0..32).map(|i| 10_000f64.powf(-f64::from(i) / 32.0)).collect(), 1.0);
        let positions: Vec<u32> = (0..rows as u32).collect();
        let us = median_us(|| rope.apply(&pool, &mut out, 9, 64, &positions));
        println!("rope {rows:4} × 9 × 64               {us:9.2} µs");
    }
    let logits: Vec<f32> = (0..49152).map(|i| (i * 7919 % 49152) as f32 * 1e-3).collect();
    println!(
        "argmax of 49152                 {:9.2} µs",
        median_us(|| {
            black_box(reduce::argmax(cpu, &logits));
        })
    );
    let us = median_us(|| {
        black_box(reduce::log_sum_exp(cpu, &logits));
    });
    println!("log_sum_exp of 49152            {us:9.2} µs");
    Ok(())
}

/// Attention of a whole prompt.
fn prefill(pool: &Pool, head_dim: usize, heads: usize, kv_heads: usize, tokens: usize) -> Result<(), Error> {
    let blocks: Vec<BlockId> = (0..tokens.div_ceil(BLOCK_TOKENS) as BlockId).collect();
    let mut cache = KvCache::new(KvShape { layers: 1, kv_heads, head_dim }, blocks.len())?;
    let span = Span { first_row: 0, rows: tokens, first_position: 0, blocks: &blocks };
    let kv = noise(tokens * kv_heads * head_dim);
    let store_us = median_us(|| cache.store(pool, 0, &[span], &kv, &kv));
    let q = noise(tokens * heads * head_dim);
    let mut out = vec![0.0; q.len()];
    let params = AttentionParams { heads, scale: 0.125, window: None, softcap: None };
    let us = median_us(|| attention(pool, params, 0, &cache, &[span], &q, &mut out));
    let flop = 4 * heads * head_dim * (tokens * (tokens + 1) / 2);
    let gflops = flop as f64 / us / 1e3 / pool.threads() as f64;
    println!(
        "prefill {tokens:4}, {heads:2}/{kv_heads} × {head_dim:3}       {us:9.1} µs  {gflops:6.1} Gflop/s a thread; store {store_us:.1} µs"
    );
    Ok(())
}

/// One row each of several sequences with the given lengths (9 heads of 64 over 3).
fn decode(pool: &Pool, contexts: &[usize]) -> Result<(), Error> {
    let (heads, kv_heads, head_dim) = (9, 3, 64);
    let mut next = 0;
    let tables: Vec<Vec<BlockId>> = contexts
        .iter()
        .map(|tokens| {
            let first = next;
            next += tokens.div_ceil(BLOCK_TOKENS) as BlockId;
            (first..next).collect()
        })
        .collect();
    let mut cache = KvCache::new(KvShape { layers: 1, kv_heads, head_dim }, next as usize)?;
    for (tokens, blocks) in contexts.iter().zip(&tables) {
        let kv = noise(tokens * kv_heads * head_dim);
        cache.store(pool, 0, &[Span { first_row: 0, rows: *tokens, first_position: 0, blocks }], &kv, &kv);
    }
    let spans: Vec<Span<'_>> = contexts
        .iter()
        .zip(&tables)
        .enumerate()
        .map(|(row, (tokens, blocks))| Span { first_row: row, rows: 1, first_position: tokens - 1, blocks })
        .collect();
    let kv = noise(contexts.len() * kv_heads * head_dim);
    let store_us = median_us(|| cache.store(pool, 0, &spans, &kv, &kv));
    let q = noise(contexts.len() * heads * head_dim);
    let mut out = vec![0.0; q.len()];
    let params = AttentionParams { heads, scale: 0.125, window: None, softcap: None };
    let us = median_us(|| attention(pool, params, 0, &cache, &spans, &q, &mut out));
    let tokens: usize = contexts.iter().sum();
    let bytes = tokens * kv_heads * head_dim * 4;
    let (rows, gb) = (contexts.len(), bytes as f64 / us / 1e3);
    println!(
        "decode {rows:2} rows, {tokens:5} positions  {us:9.2} µs  {gb:6.1} GB/s of cache; store {store_us:.2} µs"
    );
    Ok(())
}

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1000) as f32 * 1e-3 - 0.5).collect()
}

/// The median duration of a call, over rounds of at least 20 µs each, for a fifth of a second.
fn median_us(mut call: impl FnMut()) -> f64 {
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < 5 || start.elapsed().as_millis() < 200 {
        let (round, mut calls) = (Instant::now(), 0);
        while calls == 0 || round.elapsed().as_micros() < 20 {
            call();
            calls += 1;
        }
        times.push(round.elapsed().as_secs_f64() * 1e6 / f64::from(calls));
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
