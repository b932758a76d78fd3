//! Steps a second of a decoder from scratch on random tokens,.
//!
//! ```text
//! cargo run --release -p consort-training --example train_bench -- --shape small --precision bf16 --steps 5
//! ```
//!
//! Shapes: `small` (6 layers, 384 wide, 6 heads, 1,024 in the feed-forward block, 4,096 tokens; 8 × 256 a step) and
//! `smollm2` (SmolLM2-135M; 4 × 256). Prints one line of JSON: seconds of each step after two that warm up, tokens a
//! second at the median, and floating-point operations a second by the count of `Decoder::operations`. With
//! `--lines yes` it prints `ready` instead, then takes a step for each line on its standard input and prints its
//! seconds: so two programs can take turns.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::io::BufRead;
use std::time::Instant;

use consort_model::ModelConfig;
use consort_model::arch::RopeConfig;
use consort_tensor::activation::Activation;
use consort_tensor::{Cpu, Pool};
use consort_training::{
    Decay, MicroBatch, Normal, OptimizerConfig, Options, Precision, Schedule, Trainer, TrainerConfig,
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str, default: &str| {
        let at = arguments.iter().position(|a| a == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(default.to_string(), String::clone)
    };
    let (config, sequences) = match option("--shape", "small").as_str() {
        "small" => (shape(4096, 6, 384, 6, 6, 1024, 1e4), 8),
        "smollm2" => (shape(49_152, 30, 576, 9, 3, 1536, 1e5), 4),
        other => panic!("no shape is called {other}; there are small and smollm2"),
    };
    let precision = match option("--precision", "f32").as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        other => panic!("no precision is called {other}; there are f32 and bf16"),
    };
    let threads = option("--threads", "2").parse().unwrap();
    let steps: usize = option("--steps", "5").parse().unwrap();
    let recompute = option("--recompute", "no") == "yes";
    let trainer = TrainerConfig {
        options: Options { precision, recompute, ..Options::default() },
        optimizer: OptimizerConfig::default(),
        schedule: Schedule {
            learning_rate: 3e-4,
            warmup_steps: 0,
            steps: 1000,
            decay: Decay::Constant,
            final_share: 1.0,
        },
        clip_norm: Some(1.0),
    };
    let mut trainer = Trainer::new(Pool::new(threads, Cpu::detect()), &config, trainer).unwrap();
    let layout = trainer.decoder().layout().clone();
    layout.initialize(&Pool::new(threads, Cpu::detect()), Normal::new(1), trainer.weights_mut());
    let batch = |seed: usize| {
        let mut batch = MicroBatch::new();
        for row in 0..sequences {
            let token = |i: usize| ((seed * 31 + row * 17 + i * i) * 7919 % config.vocab) as u32;
            batch.push(&(0..257).map(token).collect::<Vec<u32>>());
        }
        batch
    };
    let mut step = |number: usize| {
        let batch = batch(number);
        let begun = Instant::now();
        trainer.step(&[batch]).unwrap();
        begun.elapsed().as_secs_f64()
    };
    step(0);
    step(1);
    if option("--lines", "no") == "yes" {
        println!("ready");
        for (number, line) in std::io::stdin().lock().lines().enumerate() {
            line.unwrap();
            println!("{}", step(number + 2));
        }
        return;
    }
    let mut seconds: Vec<f64> = (2..steps + 2).map(step).collect();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let operations: usize = (0..256).map(|p| trainer.decoder().operations(p)).sum::<usize>() * sequences;
    println!(
        "{{\"parameters\": {}, \"seconds\": {seconds:.4?}, \"tokens_per_second\": {:.1}, \"gflops\": {:.1}}}",
        layout.parameter_count(),
        (sequences * 256) as f64 / median,
        operations as f64 / median / 1e9,
    );
}

/// A Llama with these numbers and a tied head.
fn shape(
    vocab: usize,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    theta: f64,
) -> ModelConfig {
    let head_dim = hidden / heads;
    ModelConfig {
        family: "llama".into(),
        name: None,
        vocab,
        max_context: 2048,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn,
        activation: Activation::Silu,
        norm_eps: 1e-5,
        embedding_scale: None,
        attention_scale: (head_dim as f32).powf(-0.5),
        attention_softcap: None,
        logit_softcap: None,
        query_key_norm: false,
        post_norms: false,
        tied_head: true,
        rope: RopeConfig::plain(theta),
        sliding: None,
    }
}
