//! What working together costs: steps of a job on several workers of this machine, exact and not, in turns.
//!
//! ```text
//! cargo run --release -p consort-training --example parallel_bench -- --workers 2 --rounds 4 --steps 6
//! ```
//!
//! Options: `--shape small|tiny|smollm2`, `--micro-batches` of a step with so many `--samples` each of so many `--rows`,
//! `--transport shm|tcp|tls`, `--modes exact,f32,bf16,int8`, `--checkpoints FOLDER` (every second step then writes one).
//! Workers are threads with one computing thread each. Prints a line of JSON a mode: medians in milliseconds over the
//! steps of all rounds but each round's first.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::BTreeMap;

use consort_collectives::TransportKind;
use consort_training::bench::{Load, Setting, together};
use consort_training::parallel::{StepEvent, Wire};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str, default: &str| {
        let at = arguments.iter().position(|a| a == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(default.to_string(), String::clone)
    };
    let number = |name: &str, default: &str| option(name, default).parse::<usize>().unwrap();
    let mut load = Load::named(&option("--shape", "small")).expect("small, tiny or smollm2");
    let samples = number("--samples", "4");
    (load.job.train.micro_batch, load.job.train.batch) = (samples, samples * number("--micro-batches", "2"));
    load.job.data.context = number("--rows", "256");
    let transport = TransportKind::by_name(&option("--transport", "shm")).expect("shm, tcp or tls");
    let setting = Setting {
        workers: number("--workers", "2"),
        threads: 1,
        transport: Some(transport),
        token: b"a token of this benchmark".to_vec(),
        checkpoints: Some(option("--checkpoints", "")).filter(|place| !place.is_empty()),
    };
    let modes = option("--modes", "exact,f32");
    let mut steps: BTreeMap<String, Vec<StepEvent>> = BTreeMap::new();
    for _ in 0..number("--rounds", "3") {
        for mode in modes.split(',') {
            (load.job.train.exact, load.job.train.wire) = match mode {
                "exact" => (true, Wire::F32),
                "f32" => (false, Wire::F32),
                "bf16" => (false, Wire::Bf16),
                "int8" => (false, Wire::Int8),
                other => panic!("no mode is called {other}"),
            };
            let taken = together(&load, &setting, number("--steps", "6") as u64 - 1, &|| ()).unwrap();
            steps.entry(mode.to_owned()).or_default().extend(taken);
        }
    }
    for (mode, steps) in &steps {
        let median = |of: &dyn Fn(&StepEvent) -> u64| {
            // What didn't happen in a step (a checkpoint) is not part of its median.
            let mut all: Vec<u64> = steps.iter().map(of).filter(|us| *us > 0).collect();
            all.sort_unstable();
            all.get(all.len() / 2).map_or(0.0, |us| *us as f64 / 1e3)
        };
        let way = |step: &StepEvent| step.spans.iter().map(|span| span.end_us - span.start_us).sum::<u64>();
        println!(
            "{}",
            serde_json::json!({
                "mode": mode,
                "steps": steps.len(),
                "took_ms": median(&|s| s.took_us),
                "computed_ms": median(&|s| s.computed_us),
                "waited_ms": median(&|s| s.waited_us),
                "on_the_way_ms": median(&way),
                "overlapped_ms": median(&|s| s.overlapped_us),
                "saved_ms": median(&|s| s.saved_us),
                "lost_ms": median(&|s| s.took_us - s.computed_us),
            })
        );
    }
}
