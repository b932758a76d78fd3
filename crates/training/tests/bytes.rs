//! A worker dies, or a connection does, behind the n-th byte of what workers say to each other: in the middle of a
//! handshake, of a heartbeat, of a bucket, of the state that a newcomer gets. Everybody who is left ends with the weights of
//! one worker that nothing ever happened to.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod parallel_support;

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use consort_base::Philox;
use consort_collectives::TransportKind;
use consort_training::parallel::{Control, Finished, Membership, Worker};
use parallel_support::process::{self, Orders, Process};
use parallel_support::relay::{Strike, Wires};
use parallel_support::{PATTERNS, model, plan, store, trainer};

const WORKERS: usize = 3;
/// Far longer than a job takes.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn worker_process() {
    process::live();
}

/// What one worker comes to that nothing happens to.
fn undisturbed() -> &'static Finished {
    static FINISHED: OnceLock<Finished> = OnceLock::new();
    FINISHED.get_or_init(|| {
        let worker =
            Worker::new(trainer(&model(), 0.1, 1), &PATTERNS, plan(), Membership::Alone, None).unwrap();
        worker.run(&mut |_| Control::Go).unwrap()
    })
}

/// Three workers on these wires; `strike` is told whom they are.
fn run(kind: TransportKind, wires: &Wires, strike: impl FnOnce(&[Process]) -> Strike) -> Vec<Process> {
    let store = store(WORKERS);
    let orders = Orders {
        store: store.address().to_string(),
        kind,
        plan: plan(),
        pause_us: 2000,
        checkpoints: None,
        resume: false,
        namespace: None,
        place: None,
    };
    // The last one is held back until it is settled what happens: no byte goes over before all three are there.
    let place = |orders: &Orders| Orders { place: Some(wires.place()), ..orders.clone() };
    let mut all: Vec<Process> = (1..WORKERS).map(|_| Process::start(&place(&orders))).collect();
    wires.plan(strike(&all));
    all.push(Process::start(&place(&orders)));
    let until = Instant::now() + PATIENCE;
    for worker in &mut all {
        worker.end_within(until.saturating_duration_since(Instant::now()));
    }
    all
}

/// Everyone who is left has finished, with the right weights.
fn judge<'a>(name: &str, all: impl Iterator<Item = &'a Process>) {
    for worker in all {
        assert!(worker.failed.is_none(), "{name}: {:?}", worker.failed);
        let last = worker.events.last();
        assert_eq!(worker.finished.as_ref(), Some(undisturbed()), "{name}: the last event is {last:?}");
    }
}

/// Bytes of a whole job; heartbeats make it a little more or less each time.
fn traffic(kind: TransportKind) -> u64 {
    static TCP: OnceLock<u64> = OnceLock::new();
    static TLS: OnceLock<u64> = OnceLock::new();
    let cell = if kind == TransportKind::Tls { &TLS } else { &TCP };
    *cell.get_or_init(|| {
        let wires = Wires::new();
        for worker in run(kind, &wires, |_| Strike::Never) {
            assert_eq!(worker.finished.as_ref(), Some(undisturbed()), "{:?}", worker.failed);
        }
        wires.bytes()
    })
}

/// How many seeds: `CONSORT_TEST_SEEDS`, for whoever wants to look longer.
fn seeds(usual: u64) -> u64 {
    std::env::var("CONSORT_TEST_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(usual)
}

/// Where it strikes: anywhere in the job's traffic, and each fourth time in its first hundredth, which is handshakes.
fn byte(random: &mut Philox, seed: u64, kind: TransportKind) -> u64 {
    let all = traffic(kind);
    random.next_u64() % if seed % 4 == 3 { all / 100 } else { all * 19 / 20 }
}

fn kind(seed: u64) -> TransportKind {
    if seed.is_multiple_of(2) { TransportKind::Tcp } else { TransportKind::Tls }
}

#[test]
fn a_worker_killed_behind_any_byte_changes_nothing() {
    let mut struck = 0;
    for seed in 0..seeds(10) {
        let mut random = Philox::new(seed, 91);
        let (kind, victim) = (kind(seed), (random.next_u64() % 2) as usize);
        let behind = byte(&mut random, seed, kind);
        let name = format!("seed {seed}: worker {victim} killed behind byte {behind}, {}", kind.name());
        let wires = Wires::new();
        let all = run(kind, &wires, |all| {
            let id = all[victim].id().to_string();
            let kill = move || {
                let mut command = Command::new("kill");
                command.args(["-KILL", &id]).stderr(Stdio::null()).status().unwrap();
            };
            Strike::Call { behind, call: Box::new(kill) }
        });
        println!("{name}: {}", if wires.struck() { "struck" } else { "too late" });
        struck += u64::from(wires.struck());
        let others = all.iter().enumerate().filter(|(index, _)| *index != victim).map(|(_, worker)| worker);
        judge(&name, others);
    }
    assert!(struck * 4 >= seeds(10) * 3, "only {struck} were struck");
}

#[test]
fn a_connection_cut_behind_any_byte_changes_nothing() {
    let mut struck = 0;
    for seed in 0..seeds(10) {
        let mut random = Philox::new(seed, 92);
        let kind = kind(seed);
        let behind = byte(&mut random, seed, kind);
        let name = format!("seed {seed}: cut behind byte {behind}, {}", kind.name());
        let wires = Wires::new();
        let all = run(kind, &wires, |_| Strike::Cut { behind });
        println!("{name}: {}", if wires.struck() { "struck" } else { "too late" });
        struck += u64::from(wires.struck());
        judge(&name, all.iter());
    }
    assert!(struck * 4 >= seeds(10) * 3, "only {struck} were struck");
}
