//! What sampling costs beside the forward pass, with a model's own logits: one decode step of 16 sequences, then 16
//! picks for each kind of request, on one thread. (The engine spreads the picks over the pool.)
//!
//! ```text
//! cargo run --release -p consort-inference --example sampler_cost -- MODEL.gguf
//! ```

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use consort_inference::Sampling;
use consort_inference::runner::{ModelRunner, Runner};
use consort_inference::sampler::{Sampler, Scratch, logprob};
use consort_model::Batch;
use consort_model::tokenizer::Specials;
use consort_tensor::attention::Span;
use consort_tensor::kv::BLOCK_TOKENS;
use consort_tensor::{Cpu, Pool};

const ROWS: usize = 16;
const PROMPT: usize = 64;
const REPEATS: usize = 20;

const TEXT: &str = "The lighthouse keeper wrote a letter every evening, though no ship had passed for years. He \
    described the weather, the birds, and the slow work of the sea on the stones below. On the last night of the \
    year he found, pushed under the door, a letter in an unknown hand.";

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: sampler_cost MODEL")?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(threads, Cpu::detect());
    let opened = consort_model::open(Path::new(&path))?;
    let model = Arc::new(opened.load(&pool)?);
    let vocab = model.config().vocab;
    let each = (PROMPT + REPEATS + 1).div_ceil(BLOCK_TOKENS);
    let mut runner = ModelRunner::new(model, pool, ROWS * each)?;

    // Sixteen stretches of one text, then greedy tokens.
    let text = opened.tokenizer()?.encode(TEXT, Specials::AsText);
    let mut next: Vec<Vec<u32>> =
        (0..ROWS).map(|s| text.iter().copied().cycle().skip(s * 3).take(PROMPT).collect()).collect();
    let tables: Vec<Vec<u32>> =
        (0..ROWS).map(|s| (0..each).map(|b| (s * each + b) as u32).collect()).collect();
    let (mut logits, mut step, mut position) = (Vec::new(), Duration::MAX, 0);
    for _ in 0..=REPEATS {
        let rows = next[0].len();
        let tokens: Vec<u32> = next.concat();
        let spans: Vec<Span<'_>> = (tables.iter().enumerate())
            .map(|(s, blocks)| Span { first_row: s * rows, rows, first_position: position, blocks })
            .collect();
        let wanted: Vec<usize> = (1..=ROWS).map(|s| s * rows - 1).collect();
        let start = Instant::now();
        runner.forward(Batch { tokens: &tokens, spans: &spans, logit_rows: &wanted }, &mut logits)?;
        if rows == 1 {
            step = step.min(start.elapsed());
        }
        position += rows;
        next = (logits.chunks(vocab))
            .map(|row| vec![consort_tensor::reduce::argmax(runner.cpu(), row) as u32])
            .collect();
    }
    let step_us = step.as_secs_f64() * 1e6;
    let mut lines = vec![format!("forward, {ROWS} rows: {step_us:.0} µs on {threads} threads")];

    let base = Sampling { temperature: 1.0, ..Sampling::default() };
    let kinds = [
        ("greedy", Sampling::default()),
        ("temperature 1", base.clone()),
        ("temperature 0.7, top-p 0.9", Sampling { temperature: 0.7, top_p: 0.9, ..base.clone() }),
        ("temperature 1, top-p 0.95", Sampling { top_p: 0.95, ..base.clone() }),
        ("top-k 40", Sampling { top_k: 40, ..base.clone() }),
        ("min-p 0.05", Sampling { min_p: 0.05, ..base.clone() }),
        (
            "penalties, top-k 40, top-p 0.9",
            Sampling { presence_penalty: 0.5, repetition_penalty: 1.1, top_k: 40, top_p: 0.9, ..base },
        ),
    ];
    let mut scratch = Scratch::default();
    let answer: Vec<u32> = (0..200).collect();
    let mut measure = |name: &str, work: &mut dyn FnMut(&mut Scratch, usize, &[f32])| {
        let mut best = Duration::MAX;
        for repeat in 0..REPEATS {
            let start = Instant::now();
            for row in logits.chunks(vocab) {
                work(&mut scratch, repeat, row);
            }
            best = best.min(start.elapsed());
        }
        let us = best.as_secs_f64() * 1e6;
        let share = us / threads as f64 / step_us * 100.0;
        lines.push(format!("{name}: {:.1} µs a row, {share:.1} % of the step", us / ROWS as f64));
    };
    for (name, sampling) in kinds {
        let sampler = Sampler::new(sampling, &answer, &answer);
        measure(name, &mut |scratch, position, row| {
            std::hint::black_box(sampler.pick(Cpu::detect(), scratch, row, position, None));
        });
    }
    measure("log-probabilities, 5 likeliest", &mut |scratch, _, row| {
        std::hint::black_box(logprob::token_event(Cpu::detect(), scratch, row, 0, 5));
    });
    for line in lines {
        use std::io::Write;
        writeln!(std::io::stdout(), "{line}")?;
    }
    Ok(())
}
