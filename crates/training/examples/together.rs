//! Several processes train one model; one of them is killed, another one comes, and the weights at the end are those of a
//! single process.
//!
//! ```text
//! cargo run --release -p consort-training --example together
//! ```
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::process::{Child, Command};

use consort_collectives::{JoinOptions, Store, StoreOptions};
use consort_model::ModelConfig;
use consort_model::arch::RopeConfig;
use consort_tensor::activation::Activation;
use consort_tensor::{Cpu, Pool};
use consort_training::parallel::{
    Control, Event, Finished, HOST_SETTLE, HOST_SILENCE, Membership, Plan, Samples, Worker,
};
use consort_training::{
    Decay, MicroBatch, Normal, OptimizerConfig, Options, Schedule, Trainer, TrainerConfig,
};

const TOKEN: &[u8] = b"make it from random bytes where strangers can connect";
const STEPS: u64 = 60;

/// The data: anything that can be numbered. Here, counting in steps of one to seven.
struct Counting;

impl Samples for Counting {
    fn count(&self) -> u64 {
        448
    }

    fn id(&self) -> String {
        "counting in steps of one to seven, to 64".into()
    }

    fn push(&self, index: u64, batch: &mut MicroBatch) {
        let (step, start) = (1 + index as u32 % 7, index as u32 / 7);
        batch.push(&(0..33).map(|i| (start + i * step) % 64).collect::<Vec<u32>>());
    }
}

/// One worker: everything that makes the job the same on all of them, then the group.
fn work(membership: Membership, say: bool) -> Finished {
    let schedule = Schedule {
        learning_rate: 0.01,
        warmup_steps: 5,
        steps: STEPS,
        decay: Decay::Cosine,
        final_share: 0.1,
    };
    let config = TrainerConfig {
        options: Options::default(),
        optimizer: OptimizerConfig::default(),
        schedule,
        clip_norm: Some(1.0),
    };
    let mut trainer = Trainer::new(Pool::new(1, Cpu::detect()), &model(), config).unwrap();
    let layout = trainer.decoder().layout().clone();
    layout.initialize(&Pool::new(1, Cpu::detect()), Normal::new(1), trainer.weights_mut());
    // Eight micro-batches of four samples a step, whoever computes them.
    let plan = Plan::new(7, STEPS, 8, 4);
    let worker = Worker::new(trainer, &Counting, plan, membership, None).unwrap();
    let finished = worker.run(&mut |event| {
        match event {
            Event::Step(step) if say && step.step % 10 == 9 => {
                println!("step {:>3}  loss {:.3}  {} workers", step.step, step.loss, step.workers);
            }
            Event::Lost { step, ranks, .. } if say => println!("step {step:>3}  lost {ranks:?}: done again"),
            Event::Started { step, workers, epoch, took_us, .. } if say => {
                let ms = *took_us as f64 / 1e3;
                println!("step {step:>3}  {workers} workers, epoch {epoch}, {ms:.1} ms after the last one");
            }
            _ => {}
        }
        Control::Go
    });
    finished.unwrap()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [address, number] = &arguments[..] {
        let options = JoinOptions { silence: HOST_SILENCE, ..JoinOptions::new(address, TOKEN) };
        let finished = work(Membership::Group(options), number == "0");
        println!("worker {number}: weights {}", &finished.weights_hash[..16]);
        return;
    }
    let options = StoreOptions { settle: HOST_SETTLE, ..StoreOptions::new(3) };
    let store = Store::listen("127.0.0.1:0", TOKEN, options).unwrap();
    let start = |number: usize| -> Child {
        let itself = std::env::current_exe().unwrap();
        Command::new(itself).args([store.address().to_string(), number.to_string()]).spawn().unwrap()
    };
    let mut workers: Vec<Child> = (0..3).map(start).collect();
    std::thread::sleep(std::time::Duration::from_millis(400));
    println!("--- killing worker 2");
    workers[2].kill().unwrap();
    println!("--- starting worker 3");
    workers.push(start(3));
    for worker in &mut workers {
        worker.wait().unwrap();
    }
    println!("alone:    weights {}", &work(Membership::Alone, false).weights_hash[..16]);
}

fn model() -> ModelConfig {
    ModelConfig {
        family: "llama".into(),
        name: None,
        vocab: 64,
        max_context: 64,
        layers: 2,
        hidden: 64,
        heads: 4,
        kv_heads: 4,
        head_dim: 16,
        ffn: 128,
        activation: Activation::Silu,
        norm_eps: 1e-5,
        embedding_scale: None,
        attention_scale: 0.25,
        attention_softcap: None,
        logit_softcap: None,
        query_key_norm: false,
        post_norms: false,
        tied_head: true,
        rope: RopeConfig::plain(1e4),
        sliding: None,
    }
}
