//! A training step that is told when to begin: one side of `cargo xtask peers train`.
//!
//! ```text
//! cargo run --release -p consort-training --example train_bench -- --shape small --precision bf16 --threads 2
//! ```
//!
//! Takes two steps to warm up and prints `ready`; then takes a step for each line of its standard input and prints its
//! seconds. So two programs can take turns. Shapes: `tiny`, `small` (6 layers, 384 wide, 6 heads, 1,024 in the
//! feed-forward block, 4,096 tokens; 8 × 256 a step) and `smollm2` (SmolLM2-135M; 4 × 256). Whoever wants a table asks
//! `consort bench train`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::io::BufRead;

use consort_training::Precision;
use consort_training::bench::{Bare, Load};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str, default: &str| {
        let at = arguments.iter().position(|a| a == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(default.to_string(), String::clone)
    };
    let shape = option("--shape", "small");
    let Some(mut load) = Load::named(&shape) else {
        panic!("no shape is called {shape}; there are {}", Load::names().join(", "));
    };
    load.job.train.precision = match option("--precision", "f32").as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        other => panic!("no precision is called {other}; there are f32 and bf16"),
    };
    let mut bench = Bare::new(&load, option("--threads", "2").parse().unwrap()).unwrap();
    for _ in 0..2 {
        bench.step().unwrap();
    }
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        line.unwrap();
        println!("{}", bench.step().unwrap().as_secs_f64());
    }
}
