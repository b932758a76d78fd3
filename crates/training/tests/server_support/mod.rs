//! A small model, its data, and jobs with parameter servers: as threads, and as processes of this test's own binary.
#![allow(clippy::unwrap_used, clippy::print_stdout, dead_code, missing_docs, unreachable_pub)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use consort_model::ModelConfig;
use consort_tensor::buffer::Buffer;
use consort_tensor::{Cpu, Pool};
use consort_training::parallel::{Control, Membership, Plan, Samples, Worker};
use consort_training::server::{
    Aggregate, Completed, Compute, Connect, Event, Holdings, HostOptions, Lead, Learner, Mode, Replication,
    Spec, Worked, host, work,
};
use consort_training::{
    Decay, Error, Loss, MicroBatch, Normal, OptimizerConfig, Options, Schedule, Trainer, TrainerConfig,
};

pub const TOKEN: &[u8] = b"a token for tests, long enough";

pub fn model() -> ModelConfig {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train/llama");
    consort_model::open(&folder).unwrap().config().clone()
}

pub fn config(steps: u64) -> TrainerConfig {
    let schedule = Schedule {
        learning_rate: 0.02,
        warmup_steps: steps.min(2),
        steps,
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

/// A trainer with the weights of the beginning.
pub fn trainer(steps: u64) -> Trainer {
    let mut trainer = Trainer::new(Pool::new(1, Cpu::detect()), &model(), config(steps)).unwrap();
    let layout = trainer.decoder().layout().clone();
    layout.initialize(&Pool::new(1, Cpu::detect()), Normal::new(1), trainer.weights_mut());
    trainer
}

/// Sequences that repeat a pattern of four tokens: to predict them, attention has to look back.
fn patterns(number: u64, batch: &mut MicroBatch) {
    // Of different lengths, so that a mean over groups is another thing than one over rows.
    for row in 0..2 + number as u32 % 3 {
        let seed = (number as u32).wrapping_mul(16) + row;
        let token = |i: u32| seed.wrapping_mul(7919 + i).wrapping_add(i * i * 104_729) % 48;
        let pattern: Vec<u32> = (0..4).map(token).collect();
        batch.push_weighted(&pattern.repeat(4), |i| if i < 4 { 0.0 } else { 1.0 });
    }
}

pub fn spec(trainer: &Trainer, steps: u64, shards: usize) -> Spec {
    let (buckets, shards) = Spec::buckets(trainer.decoder().layout(), shards);
    let TrainerConfig { optimizer, schedule, clip_norm, .. } = config(steps);
    Spec {
        buckets,
        shards,
        optimizer,
        schedule,
        clip_norm,
        mode: Mode::Synchronous,
        aggregate: Aggregate::Mean,
        replication: Replication::Sync,
        groups: 4,
        micro_batches: 2,
        steps,
        workers: 1,
        lease_ms: 2000,
        speculate_ms: 0,
    }
}

/// Every micro-batch has one of these.
pub struct Patterns;

impl Samples for Patterns {
    fn count(&self) -> u64 {
        1 << 20
    }

    fn id(&self) -> String {
        "patterns".into()
    }

    fn push(&self, index: u64, into: &mut MicroBatch) {
        patterns(index, into);
    }
}

/// The plan that a job of this file follows: five micro-batches of the last step have no samples.
pub fn plan(spec: &Spec) -> Plan {
    let micro_batches = (spec.groups * spec.micro_batches) as usize;
    let samples = spec.steps * micro_batches as u64;
    Plan { end: Some(samples - 5), ..Plan::new(3, spec.steps, micro_batches, 1) }
}

/// The job's weights without servers, on one process.
pub fn alone(spec: &Spec) -> String {
    let worker = Worker::new(trainer(spec.steps), &Patterns, plan(spec), Membership::Alone, None).unwrap();
    let finished = worker.run(&mut |_| Control::Go).unwrap();
    assert_eq!(finished.steps, spec.steps);
    finished.weights_hash
}

/// A learner of the job.
pub fn learner(spec: &Spec) -> Learner<'static> {
    Learner::of_plan(trainer(spec.steps), &Patterns, &plan(spec))
}

/// What goes wrong with a worker's gradients.
pub type Fault = fn(&mut [f32]);

/// A learner that is wrong.
pub struct Wrong<'d>(pub Learner<'d>, pub Fault);

impl Compute for Wrong<'_> {
    fn buckets(&self) -> Vec<usize> {
        self.0.buckets()
    }

    fn weights(&mut self) -> &mut [f32] {
        self.0.weights()
    }

    fn accumulate(&mut self, micro_batch: u64, completed: &mut Completed<'_>) -> Result<Loss, Error> {
        let fault = self.1;
        self.0.accumulate(micro_batch, &mut |pool, bucket, values| {
            fault(values);
            completed(pool, bucket, values);
        })
    }

    fn gradients(&mut self) -> (&Pool, &mut [Buffer<f32>]) {
        self.0.gradients()
    }
}

pub fn connect(lead: &Lead) -> Connect {
    Connect::new(lead.address().to_string(), TOKEN)
}

pub fn begin(trainer: &Trainer) -> Holdings {
    Holdings { weights: trainer.weights().to_vec(), ..Holdings::default() }
}

/// What a job came to.
pub struct Came {
    pub holdings: Holdings,
    pub events: Vec<Event>,
    pub workers: Vec<Worked>,
}

/// A whole job in this process: `servers` servers, and a worker for each fault.
pub fn run(spec: Spec, servers: usize, workers: &[Option<Fault>]) -> Result<Came, Error> {
    let first = trainer(spec.steps);
    let begin = begin(&first);
    let job = spec.clone();
    let lead = Lead::listen("127.0.0.1:0", TOKEN, spec, servers, &begin)?;
    let connect = connect(&lead);
    std::thread::scope(|scope| {
        for _ in 0..servers {
            let options = HostOptions::new(connect.clone(), 1);
            scope.spawn(move || host(&options));
        }
        lead.load(&begin)?;
        let workers: Vec<_> = workers
            .iter()
            .map(|fault| {
                let (connect, fault, spec) = (connect.clone(), *fault, &job);
                scope.spawn(move || {
                    let learner = learner(spec);
                    match fault {
                        None => work(&connect, &mut { learner }),
                        Some(fault) => work(&connect, &mut Wrong(learner, fault)),
                    }
                })
            })
            .collect();
        let mut events = Vec::new();
        let ran = lead.run(&mut |event| events.push(event.clone()));
        let workers: Result<Vec<Worked>, Error> = workers.into_iter().map(|w| w.join().unwrap()).collect();
        let came = ran.and_then(|()| Ok(Came { holdings: lead.fetch()?, events, workers: workers? }));
        drop(lead);
        came
    })
}

/// The mean loss of data that no step saw.
pub fn loss(weights: &[f32]) -> f64 {
    let mut judge = trainer(1);
    judge.weights_mut().copy_from_slice(weights);
    let mut all = Loss::default();
    for number in 0..4 {
        let mut batch = MicroBatch::new();
        patterns((1 << 20) + number, &mut batch);
        all += judge.evaluate(&batch).unwrap();
    }
    all.mean()
}

/// A server or worker as a real process: this test binary starts itself again.
pub struct Process {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

/// The life of such a process; returns at once in one that is none.
pub fn live() {
    let (Ok(role), Ok(address)) = (std::env::var("SERVER_ROLE"), std::env::var("SERVER_COORDINATOR")) else {
        return;
    };
    println!("\nstarted {role}");
    let connect = Connect::new(address, TOKEN);
    let ended = match role.as_str() {
        "server" => host(&HostOptions::new(connect, 1)),
        _ => {
            let steps = std::env::var("SERVER_STEPS").unwrap().parse().unwrap();
            work(&connect, &mut learner(&spec(&trainer(steps), steps, 1)))
                .map(|worked| println!("\nworked {worked:?}"))
        }
    };
    println!("\nended {ended:?}");
}

impl Process {
    pub fn start(role: &str, lead: &Lead, steps: u64) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process", "--nocapture"])
            .env("SERVER_ROLE", role)
            .env("SERVER_COORDINATOR", lead.address().to_string())
            .env("SERVER_STEPS", steps.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut process = Process { child, lines };
        process.says("started");
        process
    }

    /// The rest of the next line that begins with `word`.
    pub fn says(&mut self, word: &str) -> String {
        loop {
            let line = self.lines.next().unwrap_or_else(|| panic!("ended before it said {word}")).unwrap();
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until every shard has a backup that holds everything.
pub fn protected(lead: &Lead) {
    let until = Instant::now() + Duration::from_secs(60);
    while !lead.look(|c| c.cluster().placements().iter().all(|p| p.in_sync)) {
        assert!(Instant::now() < until, "no backup came");
        std::thread::sleep(Duration::from_millis(2));
    }
}
