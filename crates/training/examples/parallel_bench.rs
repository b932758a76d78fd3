//! What working together costs: steps of a job on several workers of this machine, exact and not, in turns.
//!
//! ```text
//! cargo run --release -p consort-training --example parallel_bench -- --workers 2 --rounds 4 --steps 6
//! ```
//!
//! Options: `--shape small|tiny` (small: 6 layers, 384 wide, 4,096 tokens; 11 million parameters), `--micro-batches`
//! of a step, `--rows` of each of its `--samples`, `--transport shm|tcp|tls`, `--modes exact,f32,bf16,int8`,
//! `--checkpoints FOLDER` (every second step then writes one). Workers are threads with one computing thread each.
//! Prints a line of JSON a mode: medians in milliseconds over the steps of all rounds but each round's first.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::time::Duration;

use consort_collectives::{JoinOptions, Store, StoreOptions, TransportKind};
use consort_model::ModelConfig;
use consort_model::arch::RopeConfig;
use consort_tensor::activation::Activation;
use consort_tensor::{Cpu, Pool};
use consort_training::checkpoint::CheckpointConfig;
use consort_training::parallel::{Control, Event, Membership, Plan, Samples, StepEvent, Wire, Worker};
use consort_training::{
    Decay, MicroBatch, Normal, OptimizerConfig, Options, Schedule, Trainer, TrainerConfig,
};

const TOKEN: &[u8] = b"a token of this benchmark";

struct Numbers {
    vocab: u32,
    rows: u32,
}

impl Samples for Numbers {
    fn count(&self) -> u64 {
        1 << 20
    }

    fn id(&self) -> String {
        "numbers".into()
    }

    fn push(&self, index: u64, batch: &mut MicroBatch) {
        let token = |i: u32| (index as u32 * 17 + i * i).wrapping_mul(7919) % self.vocab;
        batch.push(&(0..=self.rows).map(token).collect::<Vec<u32>>());
    }
}

#[derive(Clone)]
struct Setting {
    workers: usize,
    model: ModelConfig,
    rows: u32,
    kind: TransportKind,
    plan: Plan,
    checkpoints: Option<String>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str, default: &str| {
        let at = arguments.iter().position(|a| a == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(default.to_string(), String::clone)
    };
    let number = |name: &str, default: &str| option(name, default).parse::<usize>().unwrap();
    let model = match option("--shape", "small").as_str() {
        "small" => shape(4096, 6, 384, 6, 1024),
        "tiny" => shape(512, 2, 64, 4, 192),
        other => panic!("no shape is called {other}; there are small and tiny"),
    };
    let plan =
        Plan::new(1, number("--steps", "6") as u64, number("--micro-batches", "2"), number("--samples", "4"));
    let setting = Setting {
        workers: number("--workers", "2"),
        model,
        rows: number("--rows", "256") as u32,
        kind: TransportKind::by_name(&option("--transport", "shm")).expect("shm, tcp or tls"),
        plan,
        checkpoints: Some(option("--checkpoints", "")).filter(|place| !place.is_empty()),
    };
    let modes = option("--modes", "exact,f32");
    let mut steps: BTreeMap<String, Vec<StepEvent>> = BTreeMap::new();
    for _ in 0..number("--rounds", "3") {
        for mode in modes.split(',') {
            let (exact, wire) = match mode {
                "exact" => (true, Wire::F32),
                "f32" => (false, Wire::F32),
                "bf16" => (false, Wire::Bf16),
                "int8" => (false, Wire::Int8),
                other => panic!("no mode is called {other}"),
            };
            let plan = Plan { exact, wire, ..setting.plan.clone() };
            let run = run(&Setting { plan, ..setting.clone() });
            steps.entry(mode.to_owned()).or_default().extend(run);
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

/// The steps of one job, but the first, as worker 0 saw them.
fn run(setting: &Setting) -> Vec<StepEvent> {
    let store = Store::listen("127.0.0.1:0", TOKEN, StoreOptions::new(setting.workers)).unwrap();
    let address = store.address().to_string();
    let worker = || {
        let options =
            JoinOptions { transport: Some(setting.kind), ..JoinOptions::new(address.clone(), TOKEN) };
        let data = Numbers { vocab: setting.model.vocab as u32, rows: setting.rows };
        let mut plan = setting.plan.clone();
        plan.checkpoint_every = setting.checkpoints.is_some().then_some(2);
        let place = setting.checkpoints.as_ref().map(|location| CheckpointConfig {
            location: location.clone(),
            options: Vec::new(),
            keep: 1,
            worker: 0,
            workers: 1,
            patience: Duration::from_secs(30),
            files: BTreeMap::new(),
        });
        let worker =
            Worker::new(trainer(&setting.model), &data, plan, Membership::Group(options), place).unwrap();
        let (mut rank, mut steps) = (0, Vec::new());
        worker
            .run(&mut |event| {
                match event {
                    Event::Started { rank: own, .. } => rank = *own,
                    Event::Step(step) if step.step > 0 => steps.push(step.clone()),
                    _ => {}
                }
                Control::Go
            })
            .unwrap();
        (rank, steps)
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..setting.workers).map(|_| scope.spawn(worker)).collect();
        let all: Vec<_> = all.into_iter().map(|worker| worker.join().unwrap()).collect();
        all.into_iter().find(|(rank, _)| *rank == 0).unwrap().1
    })
}

fn trainer(model: &ModelConfig) -> Trainer {
    let config = TrainerConfig {
        options: Options::default(),
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
    let mut trainer = Trainer::new(Pool::new(1, Cpu::detect()), model, config).unwrap();
    let layout = trainer.decoder().layout().clone();
    layout.initialize(&Pool::new(1, Cpu::detect()), Normal::new(1), trainer.weights_mut());
    trainer
}

/// A Llama with these numbers and a tied head.
fn shape(vocab: usize, layers: usize, hidden: usize, heads: usize, ffn: usize) -> ModelConfig {
    let head_dim = hidden / heads;
    ModelConfig {
        family: "llama".into(),
        name: None,
        vocab,
        max_context: 2048,
        layers,
        hidden,
        heads,
        kv_heads: heads,
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
        rope: RopeConfig::plain(1e4),
        sliding: None,
    }
}
