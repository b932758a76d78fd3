//! Trains a small model with parameter servers in processes of their own, kills the primary of a shard in the middle, and
//! compares the weights with those of one process.
//!
//! ```text
//! cargo run --release -p consort-training --example parameter_server
//! ```
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use consort_tensor::{Cpu, Pool};
use consort_training::parallel::{Control, Membership, Plan, Samples, Worker};
use consort_training::server::{
    Aggregate, Change, Connect, Event, Happened, Holdings, HostOptions, Lead, Learner, Mode, Replication,
    Spec, host, work,
};
use consort_training::{
    Decay, MicroBatch, Normal, OptimizerConfig, Options, Schedule, Trainer, TrainerConfig,
};

const TOKEN: &[u8] = b"a token of this example alone";
const STEPS: u64 = 60;
const MICRO_BATCHES: usize = 8;

/// Sequences that repeat a pattern of four tokens.
struct Patterns;

impl Samples for Patterns {
    fn count(&self) -> u64 {
        1 << 20
    }

    fn id(&self) -> String {
        "patterns".into()
    }

    fn push(&self, index: u64, batch: &mut MicroBatch) {
        let seed = index as u32;
        let token = |i: u32| seed.wrapping_mul(7919 + i).wrapping_add(i * i * 104_729) % 48;
        let pattern: Vec<u32> = (0..4).map(token).collect();
        batch.push_weighted(&pattern.repeat(6), |i| if i < 4 { 0.0 } else { 1.0 });
    }
}

fn config() -> TrainerConfig {
    let schedule = Schedule {
        learning_rate: 0.02,
        warmup_steps: 5,
        steps: STEPS,
        decay: Decay::Cosine,
        final_share: 0.1,
    };
    TrainerConfig {
        options: Options::default(),
        optimizer: OptimizerConfig::default(),
        schedule,
        clip_norm: Some(1.0),
    }
}

fn trainer() -> Trainer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train/llama");
    let model = consort_model::open(&folder).unwrap().config().clone();
    let mut trainer = Trainer::new(Pool::new(1, Cpu::detect()), &model, config()).unwrap();
    let layout = trainer.decoder().layout().clone();
    layout.initialize(&Pool::new(1, Cpu::detect()), Normal::new(1), trainer.weights_mut());
    trainer
}

fn plan() -> Plan {
    Plan::new(1, STEPS, MICRO_BATCHES, 4)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [] => launch(),
        [role, address] => {
            let connect = Connect::new(address.clone(), TOKEN);
            match role.as_str() {
                "server" => host(&HostOptions::new(connect, 1)).unwrap(),
                _ => {
                    let worked =
                        work(&connect, &mut Learner::of_plan(trainer(), &Patterns, &plan())).unwrap();
                    println!("worker {} computed {} groups", std::process::id(), worked.groups);
                }
            }
        }
        _ => panic!("run it without arguments"),
    }
}

fn start(role: &str, lead: &Lead) -> Child {
    let itself = std::env::current_exe().unwrap();
    let child = Command::new(itself).args([role, &lead.address().to_string()]).spawn().unwrap();
    println!("{role} is process {}", child.id());
    child
}

fn launch() {
    let first = trainer();
    let (buckets, shards) = Spec::buckets(first.decoder().layout(), 2);
    let TrainerConfig { optimizer, schedule, clip_norm, .. } = config();
    let spec = Spec {
        buckets,
        shards,
        optimizer,
        schedule,
        clip_norm,
        mode: Mode::Synchronous,
        aggregate: Aggregate::Mean,
        replication: Replication::Sync,
        groups: MICRO_BATCHES as u64,
        micro_batches: 1,
        steps: STEPS,
        workers: 2,
        lease_ms: 2000,
        speculate_ms: 0,
    };
    let begin = Holdings { weights: first.weights().to_vec(), ..Holdings::default() };
    let lead = Lead::listen("127.0.0.1:0", TOKEN, spec, 2, &begin).unwrap();
    let mut servers: Vec<Child> = (0..2).map(|_| start("server", &lead)).collect();
    lead.load(&begin).unwrap();
    let mut workers: Vec<Child> = (0..2).map(|_| start("worker", &lead)).collect();
    let mut killed = false;
    while !lead.finished().unwrap() {
        for event in lead.events(Duration::from_millis(100)) {
            match event {
                Event::Work(Happened::Step { step, loss, .. }) if step % 10 == 9 => {
                    println!("step {}: loss {:.3}", step + 1, loss.mean());
                }
                Event::Servers(change @ (Change::FailedOver { .. } | Change::Protected { .. })) => {
                    println!("{change:?}");
                }
                _ => {}
            }
        }
        let (step, _) = lead.look(|c| (c.progress().step().0, ()));
        let protected = lead.look(|c| c.cluster().placements().iter().all(|p| p.in_sync));
        if step >= STEPS / 3 && protected && !killed {
            println!("killing server {}", servers[0].id());
            servers[0].kill().unwrap();
            servers[0].wait().unwrap();
            servers[0] = start("server", &lead);
            killed = true;
        }
    }
    let end = lead.fetch().unwrap();
    drop(lead);
    for process in servers.iter_mut().chain(&mut workers) {
        process.wait().unwrap();
    }
    let alone = Worker::new(trainer(), &Patterns, plan(), Membership::Alone, None).unwrap();
    let alone = alone.run(&mut |_| Control::Go).unwrap();
    println!("weights with servers:   {}", end.weights_hash());
    println!("weights on one process: {}", alone.weights_hash);
    assert_eq!(end.weights_hash(), alone.weights_hash);
}
