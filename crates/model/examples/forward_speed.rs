//! How fast a model's forward pass is, and in which part the time goes.
//!
//! `cargo run --release -p consort-model --example forward_speed -- MODEL [THREADS [FAMILY [SECONDS]]]`
//!
//! Decodes 1, 8 and 16 sequences that have about 200 tokens each, and computes a prompt of 512. Figures are medians of
//! steps; the parts are sums over one more run with the clock read between them.

#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::{Duration, Instant};

use consort_model::arch::{Part, Span};
use consort_model::{Batch, Model, Scratch};
use consort_tensor::kv::{BLOCK_TOKENS, BlockId, KvCache};
use consort_tensor::{Cpu, Family, Pool};

type Failure = Box<dyn std::error::Error>;

/// Tokens that a decoding sequence has at first.
const CONTEXT: usize = 180;

/// The prompt's length.
const PROMPT: usize = 512;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("usage: forward_speed MODEL [THREADS [FAMILY [SECONDS]]]")?;
    let threads: usize = arguments.get(1).map_or(Ok(2), |n| n.parse())?;
    let cpu = match arguments.get(2).and_then(|name| Family::from_name(name)) {
        Some(family) => Cpu::force(family)?,
        None => Cpu::detect(),
    };
    let seconds: f64 = arguments.get(3).map_or(Ok(2.0), |n| n.parse())?;

    let pool = Pool::new(threads, cpu);
    let started = Instant::now();
    let model = consort_model::open(Path::new(path))?.load(&pool)?;
    println!(
        "{path}: loaded in {:.0?}, {:.1} MB of weights, {} threads, {}",
        started.elapsed(),
        model.weight_bytes() as f64 / 1e6,
        pool.threads(),
        cpu.family().name()
    );
    for sequences in [1, 8, 16] {
        let mut bench = Bench::new(&model, &pool, sequences, CONTEXT + 64)?;
        bench.step(CONTEXT, 0)?;
        let (step, parts) = bench.measure(seconds, |bench, round| bench.step(1, CONTEXT + round % 64))?;
        report(&format!("decode {sequences:2} × ~200"), sequences, step, &parts);
    }
    let mut bench = Bench::new(&model, &pool, 1, PROMPT)?;
    let (step, parts) = bench.measure(seconds, |bench, _| bench.step(PROMPT, 0))?;
    report(&format!("prefill {PROMPT}"), PROMPT, step, &parts);
    Ok(())
}

fn report(what: &str, tokens: usize, step: f64, parts: &[(Part, f64)]) {
    println!("\n{what}: {:.3} ms a step, {:.0} tok/s", step * 1e3, tokens as f64 / step);
    for (part, seconds) in parts {
        println!("  {:14} {:9.3} ms  {:4.1} %", format!("{part:?}"), seconds * 1e3, seconds / step * 100.0);
    }
}

/// Sequences of one length, side by side.
struct Bench<'a> {
    model: &'a Model,
    pool: &'a Pool,
    tables: Vec<Vec<BlockId>>,
    cache: KvCache,
    scratch: Scratch,
    logits: Vec<f32>,
}

impl<'a> Bench<'a> {
    fn new(model: &'a Model, pool: &'a Pool, sequences: usize, tokens: usize) -> Result<Bench<'a>, Failure> {
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let table = |s: usize| (s * blocks..(s + 1) * blocks).map(|block| block as BlockId).collect();
        let cache = KvCache::new(model.kv_shape(), blocks * sequences)?;
        let tables = (0..sequences).map(table).collect();
        Ok(Bench { model, pool, tables, cache, scratch: Scratch::new(), logits: Vec::new() })
    }

    /// `rows` tokens of every sequence, from `position` on; logits of each one's last.
    fn step(&mut self, rows: usize, position: usize) -> Result<(), Failure> {
        let vocab = self.model.config().vocab;
        let tokens: Vec<u32> =
            (0..rows * self.tables.len()).map(|i| ((i * 7919 + position * 31) % vocab) as u32).collect();
        let span = |(i, blocks)| Span { first_row: i * rows, rows, first_position: position, blocks };
        let spans: Vec<Span<'_>> = self.tables.iter().map(Vec::as_slice).enumerate().map(span).collect();
        let logit_rows: Vec<usize> = (1..=spans.len()).map(|i| i * rows - 1).collect();
        let batch = Batch { tokens: &tokens, spans: &spans, logit_rows: &logit_rows };
        self.model.forward(self.pool, batch, &mut self.cache, &mut self.scratch, &mut self.logits)?;
        Ok(())
    }

    /// The median seconds of a step, and each part's share of a step.
    fn measure(
        &mut self,
        seconds: f64,
        mut step: impl FnMut(&mut Self, usize) -> Result<(), Failure>,
    ) -> Result<(f64, Vec<(Part, f64)>), Failure> {
        let mut times = Vec::new();
        let started = Instant::now();
        while times.len() < 3 || started.elapsed().as_secs_f64() < seconds {
            let before = Instant::now();
            step(self, times.len())?;
            times.push(before.elapsed());
        }
        times.sort_unstable();
        let median = times[times.len() / 2].as_secs_f64();
        self.scratch.time_parts();
        let rounds = (times.len() / 4).max(3);
        for round in 0..rounds {
            step(self, round)?;
        }
        let mut spent = |part| self.scratch.part_times().map_or(Duration::ZERO, |times| times.of(part));
        let parts = Part::ALL.map(|part| (part, spent(part).as_secs_f64() / rounds as f64));
        Ok((median, parts.to_vec()))
    }
}
