//! The same weights for any number of workers. Workers are threads here; `elastic.rs` has processes that die.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod parallel_support;

use consort_collectives::{Algorithm, JoinOptions, TransportKind};
use consort_training::parallel::{
    Control, Event, Finished, Membership, Outer, Plan, Reason, Samples, Wire, Worker, seen,
};
use parallel_support::{PATTERNS, model, options, plan, store, trainer};

fn run(plan: &Plan, dropout: f32, membership: Membership) -> (Finished, Vec<Event>) {
    let worker =
        Worker::new(trainer(&model(), dropout, 1), &PATTERNS, plan.clone(), membership, None).unwrap();
    let mut events = Vec::new();
    let finished = worker.run(&mut |event| {
        events.push(event.clone());
        Control::Go
    });
    (finished.unwrap(), events)
}

fn together(plan: &Plan, dropout: f32, workers: usize, kind: TransportKind) -> Vec<(Finished, Vec<Event>)> {
    let store = store(workers);
    let address = store.address().to_string();
    std::thread::scope(|scope| {
        let start = |worker: usize| {
            // Where it makes a difference, on two hosts by turns.
            let host = (kind == TransportKind::Mixed).then(|| (worker % 2).to_string());
            let options = JoinOptions { host, ..options(&address, kind) };
            scope.spawn(move || run(plan, dropout, Membership::Group(options)))
        };
        let all: Vec<_> = (0..workers).map(start).collect();
        all.into_iter().map(|worker| worker.join().unwrap()).collect()
    })
}

fn losses(events: &[Event]) -> Vec<u64> {
    let loss = |event: &Event| match event {
        Event::Step(step) => Some(step.loss.to_bits()),
        _ => None,
    };
    events.iter().filter_map(loss).collect()
}

#[test]
fn any_number_of_workers_and_any_algorithm_come_to_the_same_weights() {
    let plan = plan();
    let (alone, events) = run(&plan, 0.0, Membership::Alone);
    assert_eq!((alone.steps, alone.reason.clone()), (12, Reason::Done));
    let expected = losses(&events);
    let (first, last) = (f64::from_bits(expected[0]), f64::from_bits(expected[11]));
    assert!(last < first - 0.3, "it learns: {first} to {last}");
    let shm = TransportKind::SharedMemory;
    let mut runs = vec![(1, None, shm), (2, None, shm), (3, None, shm), (4, None, shm), (7, None, shm)];
    for algorithm in Algorithm::ALL {
        runs.extend([
            (2, Some(algorithm), shm),
            (4, Some(algorithm), TransportKind::Tcp),
            (3, Some(algorithm), shm),
        ]);
    }
    runs.extend([(7, Some(Algorithm::Tree), TransportKind::Tcp), (9, None, shm)]);
    runs.extend([None, Some(Algorithm::Hierarchical)].map(|any| (5, any, TransportKind::Mixed)));
    for (workers, algorithm, kind) in runs {
        let plan = Plan { algorithm, ..plan.clone() };
        for (finished, events) in together(&plan, 0.0, workers, kind) {
            let name = algorithm.map_or("any", Algorithm::name);
            assert_eq!(finished, alone, "{workers} workers, {name} over {}", kind.name());
            assert_eq!(losses(&events), expected, "{workers} workers, {name} over {}", kind.name());
        }
    }
}

#[test]
fn dropout_follows_the_micro_batch_and_not_the_worker() {
    let plan = Plan { steps: 4, ..plan() };
    let (alone, _) = run(&plan, 0.2, Membership::Alone);
    let (plain, _) = run(&plan, 0.0, Membership::Alone);
    assert_ne!(alone.weights_hash, plain.weights_hash);
    for workers in [2, 3] {
        let all = together(&plan, 0.2, workers, TransportKind::SharedMemory);
        assert!(all.iter().all(|(finished, _)| *finished == alone), "{workers}");
    }
}

#[test]
fn every_sample_of_every_epoch_is_seen_once_and_the_last_step_may_be_short() {
    // Three epochs of 37 samples in steps of 16: 111 samples, 7 steps, the last of 15.
    let plan = Plan { steps: 100, end: Some(3 * 37), ..plan() };
    let (alone, _) = run(&plan, 0.0, Membership::Alone);
    assert_eq!((alone.steps, alone.samples), (7, 111));
    let expected = (0..37).map(seen).fold(0u64, u64::wrapping_add).wrapping_mul(3);
    for workers in [2, 5] {
        for (finished, events) in together(&plan, 0.0, workers, TransportKind::SharedMemory) {
            assert_eq!(finished, alone);
            let mut counted = (0, 0u64);
            for event in &events {
                if let Event::Step(step) = event {
                    counted = (counted.0 + step.samples, counted.1.wrapping_add(step.seen));
                }
            }
            assert_eq!(counted, (111, expected));
        }
    }
}

/// Wants to stop when asked for it; all workers stop at the same step.
#[test]
fn one_worker_asks_for_a_stop_and_all_stop_there() {
    let plan = Plan { steps: 500, ..plan() };
    let store = store(3);
    let address = store.address().to_string();
    let ends: Vec<Finished> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..3)
            .map(|index| {
                let (plan, address) = (plan.clone(), address.clone());
                scope.spawn(move || {
                    let membership = Membership::Group(options(&address, TransportKind::SharedMemory));
                    let trainer = trainer(&model(), 0.0, 1);
                    let worker = Worker::new(trainer, &PATTERNS, plan, membership, None).unwrap();
                    let board = worker.board();
                    let finished = worker.run(&mut |event| match event {
                        Event::Step(step) if index == 1 && step.step == 5 => Control::Stop,
                        _ => Control::Go,
                    });
                    assert_eq!(board.status().step, finished.as_ref().unwrap().steps);
                    finished.unwrap()
                })
            })
            .collect();
        all.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert!(ends.iter().all(|end| *end == ends[0] && end.reason == Reason::Asked), "{ends:?}");
    assert_eq!(ends[0].steps, 7);
}

#[test]
fn a_worker_of_another_job_is_told_where_it_differs() {
    let store = store(2);
    let address = store.address().to_string();
    let (good, bad) = std::thread::scope(|scope| {
        let start = |seed| {
            let address = address.clone();
            scope.spawn(move || {
                let membership = Membership::Group(options(&address, TransportKind::SharedMemory));
                let plan = Plan { seed, ..plan() };
                Worker::new(trainer(&model(), 0.0, 1), &PATTERNS, plan, membership, None)
                    .unwrap()
                    .run(&mut |_| Control::Go)
            })
        };
        let (one, other) = (start(11), start(12));
        let (one, other) = (one.join().unwrap(), other.join().unwrap());
        if one.is_ok() { (one, other) } else { (other, one) }
    });
    let error = bad.unwrap_err().to_string();
    assert!(error.contains("worker 0 has seed = 1"), "{error}");
    assert_eq!(good.unwrap().steps, 12);
    assert!(PATTERNS.count() == 37);
}

/// The mean loss of the last steps, on every worker the same.
fn end_loss(all: &[(Finished, Vec<Event>)]) -> f64 {
    assert!(all.iter().all(|(finished, _)| *finished == all[0].0), "all workers end with the same weights");
    let losses: Vec<f64> = losses(&all[0].1).into_iter().map(f64::from_bits).collect();
    losses[losses.len() - 4..].iter().sum::<f64>() / 4.0
}

#[test]
fn rounded_gradients_learn_as_well_and_workers_agree() {
    let plan = Plan { exact: false, steps: 40, ..plan() };
    let plain = end_loss(&together(&plan, 0.0, 3, TransportKind::SharedMemory));
    let (_, alone) = run(&Plan { exact: true, ..plan.clone() }, 0.0, Membership::Alone);
    let first = f64::from_bits(losses(&alone)[0]);
    assert!(plain < 0.8 * first, "{first} to {plain}");
    for (wire, kind, tolerance) in [
        (Wire::Bf16, TransportKind::SharedMemory, 0.02),
        (Wire::Int8, TransportKind::Tcp, 0.05),
        (Wire::Int8, TransportKind::SharedMemory, 0.05),
    ] {
        for workers in [2, 3, 4] {
            let loss = end_loss(&together(&Plan { wire, ..plan.clone() }, 0.0, workers, kind));
            assert!((loss - plain).abs() < tolerance * first, "{wire:?}: {loss}, f32 {plain}");
        }
    }
}

#[test]
fn local_steps_with_an_outer_optimizer_learn_and_see_every_sample_once() {
    let outer = Outer { every: 5, learning_rate: 0.7, momentum: 0.6 };
    let plan = Plan { exact: false, outer: Some(outer), steps: 37, ..plan() };
    let (alone, events) = run(&plan, 0.0, Membership::Alone);
    assert_eq!((alone.steps, losses(&events).len()), (37, 37));
    let expected = (0..37).map(seen).fold(0u64, u64::wrapping_add).wrapping_mul(16);
    for workers in [2, 3] {
        let all = together(&plan, 0.0, workers, TransportKind::SharedMemory);
        let (first, last) = (f64::from_bits(losses(&events)[0]), end_loss(&all));
        assert!(last < 0.8 * first, "{workers} workers: {first} to {last}");
        let sum = all[0].1.iter().fold((0, 0u64), |(samples, sum), event| match event {
            Event::Step(step) => (samples + step.samples, sum.wrapping_add(step.seen)),
            _ => (samples, sum),
        });
        assert_eq!(sum, (16 * 37, expected));
    }
}
