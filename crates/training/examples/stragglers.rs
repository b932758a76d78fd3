//! What one slow worker of four costs: the ring, and parameter servers in each mode, with a table and a plot.
//!
//! ```text
//! cargo run --release -p consort-training --example stragglers -- [FOLDER] [SECONDS]
//! ```
//!
//! Writes FOLDER/stragglers.md and FOLDER/images/stragglers.svg (`docs`, 10 s for each run). Workers, servers and
//! coordinator are threads of this process that talk over TLS on the loopback, and the gradients are real ones of a small
//! model; but how long a micro-batch takes is set, not measured: a worker sleeps so that it has the pace of a machine
//! of its own, 40 ms a micro-batch, or 160 ms if it is the slow one. So the figures show what waiting costs, on any
//! machine with a core or two, and nothing of how fast the gradients are computed or carried.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use consort_collectives::{JoinOptions, Store, StoreOptions};
use consort_model::ModelConfig;
use consort_tensor::{Cpu, Pool};
use consort_training::parallel::{Control, Event, Membership, Plan, Samples, Worker};
use consort_training::server::{
    self, Aggregate, Connect, Happened, Holdings, HostOptions, Lead, Learner, Mode, Replication, Spec, host,
    work,
};
use consort_training::{
    Decay, MicroBatch, Normal, OptimizerConfig, Options, Schedule, Trainer, TrainerConfig,
};

const TOKEN: &[u8] = b"a token of this example alone";
const WORKERS: usize = 4;
/// Micro-batches of a step.
const MICRO_BATCHES: usize = 8;
/// The pace of a worker, and of the slow one.
const PACE: Duration = Duration::from_millis(40);
const SLOW: Duration = Duration::from_millis(160);
/// How long a micro-batch may take before a worker with nothing to do computes it too.
const SPECULATE: Duration = Duration::from_millis(60);
/// More steps than any run takes.
const STEPS: u64 = 1 << 20;

/// Patterns that repeat, at the pace of one worker.
struct Paced(Duration);

impl Samples for Paced {
    fn count(&self) -> u64 {
        1 << 30
    }

    fn id(&self) -> String {
        "patterns".into()
    }

    fn push(&self, index: u64, batch: &mut MicroBatch) {
        // The time that this micro-batch takes on this worker's machine.
        std::thread::sleep(self.0);
        for row in 0..4 {
            let seed = (index as u32).wrapping_mul(16) + row;
            let token = |i: u32| seed.wrapping_mul(7919 + i).wrapping_add(i * i * 104_729) % 48;
            let pattern: Vec<u32> = (0..4).map(token).collect();
            batch.push_weighted(&pattern.repeat(5), |i| if i < 4 { 0.0 } else { 1.0 });
        }
    }
}

fn model() -> ModelConfig {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train/llama");
    consort_model::open(&folder).unwrap().config().clone()
}

fn config() -> TrainerConfig {
    let schedule = Schedule {
        learning_rate: 0.005,
        warmup_steps: 5,
        steps: STEPS,
        decay: Decay::Constant,
        final_share: 1.0,
    };
    TrainerConfig {
        options: Options::default(),
        optimizer: OptimizerConfig::default(),
        schedule,
        clip_norm: Some(1.0),
    }
}

fn trainer() -> Trainer {
    let mut trainer = Trainer::new(Pool::new(1, Cpu::detect()), &model(), config()).unwrap();
    let layout = trainer.decoder().layout().clone();
    layout.initialize(&Pool::new(1, Cpu::detect()), Normal::new(1), trainer.weights_mut());
    trainer
}

fn plan() -> Plan {
    Plan::new(1, STEPS, MICRO_BATCHES, 1)
}

fn pace(worker: usize, slow: bool) -> Paced {
    Paced(if slow && worker == 0 { SLOW } else { PACE })
}

/// When each step's loss was known, in seconds since the first worker began.
type Curve = Vec<(f64, f64)>;

fn ring(slow: bool, length: Duration) -> Curve {
    let store = Store::listen("127.0.0.1:0", TOKEN, StoreOptions::new(WORKERS)).unwrap();
    let address = store.address().to_string();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|number| {
                let address = &address;
                scope.spawn(move || {
                    let data = pace(number, slow);
                    let group = Membership::Group(JoinOptions::new(address.clone(), TOKEN));
                    let worker = Worker::new(trainer(), &data, plan(), group, None).unwrap();
                    let mut curve = Curve::new();
                    worker
                        .run(&mut |event| {
                            if let Event::Step(step) = event {
                                curve.push((begun.elapsed().as_secs_f64(), step.loss));
                            }
                            if begun.elapsed() < length { Control::Go } else { Control::Stop }
                        })
                        .unwrap();
                    curve
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).max_by_key(Vec::len).unwrap()
    })
}

fn servers(mode: Mode, speculate: Duration, slow: bool, length: Duration) -> Curve {
    let first = trainer();
    let (buckets, shards) = Spec::buckets(first.decoder().layout(), 2);
    let TrainerConfig { optimizer, schedule, clip_norm, .. } = config();
    let spec = Spec {
        buckets,
        shards,
        optimizer,
        schedule,
        clip_norm,
        mode,
        aggregate: Aggregate::Mean,
        replication: Replication::Sync,
        groups: MICRO_BATCHES as u64,
        micro_batches: 1,
        steps: STEPS,
        workers: WORKERS as u64,
        lease_ms: 2000,
        speculate_ms: speculate.as_millis() as u64,
    };
    let begin = Holdings { weights: first.weights().to_vec(), ..Holdings::default() };
    let lead = Lead::listen("127.0.0.1:0", TOKEN, spec, 2, &begin).unwrap();
    let connect = Connect::new(lead.address().to_string(), TOKEN);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let options = HostOptions::new(connect.clone(), 1);
            scope.spawn(move || host(&options).unwrap());
        }
        lead.load(&begin).unwrap();
        let begun = Instant::now();
        for number in 0..WORKERS {
            let connect = connect.clone();
            scope.spawn(move || {
                let data = pace(number, slow);
                work(&connect, &mut Learner::of_plan(trainer(), &data, &plan())).unwrap();
            });
        }
        let mut curve = Curve::new();
        while begun.elapsed() < length {
            for event in lead.events(Duration::from_millis(20)) {
                if let server::Event::Work(Happened::Step { loss, .. } | Happened::Round { loss, .. }) = event
                {
                    curve.push((begun.elapsed().as_secs_f64(), loss.mean()));
                }
            }
        }
        drop(lead);
        curve
    })
}

/// Steps a second between a tenth of the time and its end.
fn rate(curve: &Curve, seconds: f64) -> f64 {
    let from = seconds / 10.0;
    curve.iter().filter(|(at, _)| (from..seconds).contains(at)).count() as f64 / (seconds - from)
}

/// The mean loss of the last tenth of the time: of data that no step had seen.
fn last(curve: &Curve, seconds: f64) -> f64 {
    let late: Vec<f64> = curve.iter().filter(|(at, _)| *at >= 0.9 * seconds).map(|(_, loss)| *loss).collect();
    late.iter().sum::<f64>() / late.len().max(1) as f64
}

const COLOURS: [&str; 5] = ["#6b7280", "#2563eb", "#0891b2", "#d97706", "#16a34a"];

/// Loss over time, a line a mode.
fn plot(runs: &[(&str, Curve)], seconds: f64) -> String {
    let (width, height, left, top, right, bottom) = (760.0, 340.0, 50.0, 20.0, 200.0, 40.0);
    let most = runs.iter().flat_map(|(_, curve)| curve).map(|(_, loss)| *loss).fold(0.0, f64::max) * 1.05;
    let x = |at: f64| left + at / seconds * (width - left - right);
    let y = |loss: f64| height - bottom - loss / most * (height - top - bottom);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\" role=\"img\"><title>Loss over time with one of four workers at a quarter of its speed</title>\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>"
    );
    for tick in 0..=(most as usize) {
        let (at, loss) = (y(tick as f64), tick);
        let _ = write!(
            svg,
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#e5e7eb\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#374151\">{loss}</text>",
            width - right,
            left - 8.0,
            at + 4.0
        );
    }
    for tick in 0..=5 {
        let at = seconds * f64::from(tick) / 5.0;
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"#374151\">{at:.0} s</text>",
            x(at),
            height - bottom + 18.0
        );
    }
    for (i, (name, curve)) in runs.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        // Means of a fiftieth of the time.
        let mut points = String::new();
        for bin in 0..50 {
            let (from, to) = (seconds * f64::from(bin) / 50.0, seconds * f64::from(bin + 1) / 50.0);
            let inside: Vec<f64> =
                curve.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, loss)| *loss).collect();
            if !inside.is_empty() {
                let mean = inside.iter().sum::<f64>() / inside.len() as f64;
                let _ = write!(points, "{:.1},{:.1} ", x((from + to) / 2.0), y(mean));
            }
        }
        let row = top + 16.0 + 18.0 * i as f64;
        let _ = write!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{}\" y=\"{row}\" fill=\"{colour}\">{name}</text>",
            points.trim_end(),
            width - right + 12.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = Path::new(arguments.first().map_or("docs", String::as_str));
    let length = Duration::from_secs(arguments.get(1).map_or(10, |seconds| seconds.parse().unwrap()));
    let seconds = length.as_secs_f64();
    let none = Duration::ZERO;
    let modes: [(&str, Option<(Mode, Duration)>); 5] = [
        ("ring", None),
        ("server, synchronous", Some((Mode::Synchronous, none))),
        ("… with backup workers", Some((Mode::Synchronous, SPECULATE))),
        ("server, bounded by 2", Some((Mode::bounded(2), none))),
        ("server, asynchronous", Some((Mode::Asynchronous, none))),
    ];
    let mut table = String::from(
        "| how | steps/s, four alike | steps/s, one at a quarter | kept | loss after the same time, one at a quarter |\n\
         |---|---:|---:|---:|---:|\n",
    );
    let mut curves = Vec::new();
    for (name, mode) in modes {
        let run = |slow| match mode {
            None => ring(slow, length),
            Some((mode, speculate)) => servers(mode, speculate, slow, length),
        };
        let (alike, slowed) = (run(false), run(true));
        let (before, after) = (rate(&alike, seconds), rate(&slowed, seconds));
        let row = format!(
            "| {name} | {before:.1} | {after:.1} | {:.0} % | {:.2} |\n",
            100.0 * after / before,
            last(&slowed, seconds)
        );
        print!("{row}");
        table.push_str(&row);
        curves.push((name, slowed));
    }
    std::fs::create_dir_all(folder.join("images")).unwrap();
    std::fs::write(folder.join("images/stragglers.svg"), plot(&curves, seconds)).unwrap();
    let page = format!(
        "# One slow worker of four\n\n\
         Written by `cargo run --release -p consort-training --example stragglers`; edit that, not this.\n\n\
         Four workers train a small model, {MICRO_BATCHES} micro-batches a step, for {seconds:.0} s. A micro-batch takes a \
         worker {} ms; in the second and third column one of them needs {} ms. (Those times are set: workers sleep to keep \
         their pace. The gradients, the servers and the connections are real.) The parameter servers are two shards with a \
         backup each, replication `sync`.\n\n{table}\n\
         ![Loss over time with one of four workers at a quarter of its speed](images/stragglers.svg)\n\n\
         Why it comes out so:\n\n\
         - **Ring.** Every worker has two micro-batches of each step, and all wait for the one that needs four times as \
         long.\n\
         - **Server, synchronous.** The same weights, to the bit, as the ring's. But micro-batches are claimed one by one, \
         so the fast workers take most of them, and wait only for the last one that the slow one has.\n\
         - **With backup workers.** A worker that has nothing left computes a micro-batch that has taken {} ms elsewhere. \
         Whoever pushes first counts; the bits are the same. That helps against a worker that is slow now and then. One \
         that is always slow comes out of a micro-batch that nobody needs any more in the middle of the next step, and \
         claims one there.\n\
         - **Bounded by 2.** Nobody is more than two micro-batches ahead of the slowest. Against a worker that is slow now \
         and then that is enough; behind one that is always slow, all are slow in the end.\n\
         - **Asynchronous.** Nobody waits. Every push moves the weights, so these are {MICRO_BATCHES} updates a step, on \
         gradients of weights that others have moved meanwhile. What the others lose is the slow one's own share.\n\n\
         One run each, losses of data that was not seen before (the mean of the last tenth of the time). What the modes \
         promise stands in [parameter-server.md](parameter-server.md).\n",
        PACE.as_millis(),
        SLOW.as_millis(),
        SPECULATE.as_millis(),
    );
    std::fs::write(folder.join("stragglers.md"), page).unwrap();
}
