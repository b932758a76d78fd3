//! Workers that die, stop, wake up and come later: the weights at the end are those of one worker that nothing ever
//! happened to. Workers are real processes; when something happens to whom follows from a seed, which a failure names.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod parallel_support;

use std::collections::BTreeMap;
use std::time::Duration;

use consort_base::Philox;
use consort_collectives::TransportKind;
use consort_training::parallel::{Control, Event, Finished, Membership, Outer, Plan, Reason, Worker, seen};
use parallel_support::process::{self, Orders, Process};
use parallel_support::{PATTERNS, model, plan, store, trainer};

const SHM: TransportKind = TransportKind::SharedMemory;
const TCP: TransportKind = TransportKind::Tcp;

#[test]
fn worker_process() {
    process::live();
}

/// What one worker comes to that nothing happens to.
fn undisturbed(plan: &Plan) -> Finished {
    let plan = Plan { checkpoint_every: None, ..plan.clone() };
    let worker = Worker::new(trainer(&model(), 0.1, 1), &PATTERNS, plan, Membership::Alone, None).unwrap();
    worker.run(&mut |_| Control::Go).unwrap()
}

fn orders(store: &consort_collectives::Store, kind: TransportKind, steps: u64) -> Orders {
    Orders {
        store: store.address().to_string(),
        kind,
        plan: Plan { steps, ..plan() },
        pause_us: 2000,
        checkpoints: None,
        resume: false,
        namespace: None,
        place: None,
    }
}

fn is_step(event: &Event, at_least: u64) -> bool {
    matches!(event, Event::Step(step) if step.step >= at_least)
}

/// Adds up what committed steps saw, over all workers: each step once, however many report it.
fn count<'a>(workers: impl Iterator<Item = &'a Process>, name: &str) -> (u64, u64) {
    let mut steps: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for event in workers.flat_map(|worker| &worker.events) {
        if let Event::Step(step) = event {
            let before = steps.insert(step.step, (step.samples, step.seen));
            assert!(before.is_none_or(|before| before == (step.samples, step.seen)), "{name}");
        }
    }
    steps.values().fold((0, 0), |(samples, seen), step| (samples + step.0, seen.wrapping_add(step.1)))
}

/// What a job of that many samples sees.
fn expected(samples: u64) -> (u64, u64) {
    let data = consort_training::parallel::Samples::count(&PATTERNS);
    let all = (0..data).map(seen).fold(0u64, u64::wrapping_add);
    assert!(samples.is_multiple_of(data));
    (samples, all.wrapping_mul(samples / data))
}

/// One of several gets a signal at a moment that follows from the seed.
fn one_is_struck(seed: u64, signal: &str, kind: TransportKind) {
    let mut random = Philox::new(seed, 77);
    let mut pick = |n: u64| random.next_u64() % n;
    let (workers, steps) = (2 + pick(3) as usize, 37);
    let (victim, at, delay) = (pick(workers as u64) as usize, pick(30), pick(6000));
    let name = format!(
        "seed {seed}: {signal} for {victim} of {workers} {delay} µs behind step {at}, {}",
        kind.name()
    );
    println!("{name}");
    let store = store(workers);
    // 37 steps of 16 samples are 16 epochs.
    let orders = orders(&store, kind, steps);
    let mut all: Vec<Process> = (0..workers).map(|_| Process::start(&orders)).collect();
    assert!(all[victim].wait(|event| is_step(event, at)).is_some(), "{name}");
    std::thread::sleep(Duration::from_micros(delay));
    all[victim].signal(signal);
    let want = undisturbed(&orders.plan);
    for (index, worker) in all.iter_mut().enumerate() {
        if index != victim {
            assert_eq!(worker.end().as_ref(), Some(&want), "{name}: worker {index}: {:?}", worker.failed);
        }
    }
    let survivors = all.iter().enumerate().filter(|(index, _)| *index != victim).map(|(_, worker)| worker);
    assert_eq!(count(survivors, &name), expected(16 * steps), "{name}");
    for worker in &all {
        for event in &worker.events {
            if let Event::Started { took_us, epoch: 2.., .. } = event {
                println!("  {:.1} ms from losing the group to standing again", *took_us as f64 / 1e3);
            }
        }
    }
}

/// How many seeds: `CONSORT_TEST_SEEDS`, for whoever wants to look longer.
fn seeds(usual: u64) -> u64 {
    std::env::var("CONSORT_TEST_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(usual)
}

/// Several workers are struck at moments of their own, some of them while the others are just forming a group.
fn several_are_struck(seed: u64, kind: TransportKind) {
    let mut random = Philox::new(seed, 81);
    let mut pick = |n: u64| random.next_u64() % n;
    let workers = 3 + pick(3) as usize;
    let struck = 2 + pick(workers as u64 - 2) as usize;
    let name = format!("seed {seed}: {struck} of {workers}, {}", kind.name());
    println!("{name}");
    let store = store(workers);
    let orders = orders(&store, kind, 37);
    let mut all: Vec<Process> = (0..workers).map(|_| Process::start(&orders)).collect();
    let survivor = workers - 1;
    // The first epoch needs all of them.
    assert!(all[survivor].wait(|event| is_step(event, 0)).is_some(), "{name}");
    let mut at = 0;
    for victim in 0..struck {
        // Half of the time behind a step, half of the time into whatever is going on.
        if pick(2) == 0 {
            at = (at + pick(8)).min(30);
            assert!(all[survivor].wait(|event| is_step(event, at)).is_some(), "{name}");
        }
        std::thread::sleep(Duration::from_micros(pick(20_000)));
        all[victim].signal(if pick(3) == 0 { "-STOP" } else { "-KILL" });
    }
    let want = undisturbed(&orders.plan);
    for (index, worker) in all.iter_mut().enumerate().skip(struck) {
        assert_eq!(worker.end().as_ref(), Some(&want), "{name}: worker {index}: {:?}", worker.failed);
    }
    assert_eq!(count(all[struck..].iter(), &name), expected(16 * 37), "{name}");
}

#[test]
fn several_lost_workers_change_nothing() {
    for seed in 0..seeds(4) {
        several_are_struck(seed, if seed % 2 == 0 { SHM } else { TCP });
    }
}

#[test]
fn killed_workers_change_nothing() {
    for seed in 0..seeds(8) {
        one_is_struck(seed, "-KILL", if seed % 2 == 0 { SHM } else { TCP });
    }
}

#[test]
fn stopped_workers_change_nothing() {
    for seed in 0..seeds(4) {
        one_is_struck(100 + seed, "-STOP", if seed % 2 == 0 { SHM } else { TCP });
    }
}

/// Where sums depend on who computed them there is nothing to compare with, but survivors have the same weights and every
/// sample is seen once: with a step's exchange, and with rounds of local steps.
#[test]
fn inexact_survivors_agree_and_lose_no_sample() {
    for (seed, outer) in [(1, None), (2, Some(Outer { every: 4, ..Outer::default() })), (3, None)] {
        let name = format!("seed {seed}: {outer:?}");
        let mut random = Philox::new(seed, 80);
        let store = store(3);
        let mut orders = orders(&store, if seed == 3 { TCP } else { SHM }, 37);
        (orders.plan.exact, orders.plan.outer) = (false, outer);
        let mut all: Vec<Process> = (0..3).map(|_| Process::start(&orders)).collect();
        let (victim, at) = ((random.next_u64() % 3) as usize, random.next_u64() % 24);
        assert!(all[victim].wait(|event| is_step(event, at)).is_some(), "{name}");
        std::thread::sleep(Duration::from_micros(random.next_u64() % 9000));
        all.remove(victim).signal("-KILL");
        let ends: Vec<Option<Finished>> = all.iter_mut().map(Process::end).collect();
        assert!(ends[0].is_some() && ends[0] == ends[1], "{name}: {ends:?}");
        assert_eq!(count(all.iter(), &name), expected(16 * 37), "{name}");
    }
}

/// All but one are killed, one after the other, while another one comes now and then.
#[test]
fn down_to_one_worker_and_up_again() {
    for (seed, kind) in [(1, SHM), (2, TCP)] {
        let name = format!("seed {seed}");
        let mut random = Philox::new(seed, 78);
        let store = store(4);
        let orders = Orders { pause_us: 4000, ..orders(&store, kind, 111) };
        let mut all: Vec<Process> = (0..4).map(|_| Process::start(&orders)).collect();
        for victim in 0..3 {
            let at = 5 + 10 * victim as u64 + random.next_u64() % 5;
            assert!(all[3].wait(|event| is_step(event, at)).is_some(), "{name}");
            all[victim].signal("-KILL");
        }
        let alone = all[3].wait(|event| matches!(event, Event::Started { workers: 1, .. }));
        assert!(alone.is_some(), "{name}");
        all.push(Process::start(&orders));
        let grown = all[3].wait(|event| matches!(event, Event::Started { workers: 2, .. }));
        assert!(grown.is_some(), "{name}");
        let want = undisturbed(&orders.plan);
        for worker in &mut all[3..] {
            assert_eq!(worker.end().as_ref(), Some(&want), "{name}: {:?}", worker.failed);
        }
        let received = all[4].events.iter().find_map(|event| match event {
            Event::Started { received_bytes, .. } => Some(*received_bytes),
            _ => None,
        });
        assert!(received.unwrap() > 0, "a newcomer gets the state from a worker");
        assert_eq!(count(all[3..].iter(), &name), expected(16 * 111), "{name}");
    }
}

/// One sleeps until the others have gone on without it, wakes up, and joins again as new.
#[test]
fn a_paused_worker_is_fenced_and_comes_back_as_new() {
    for (seed, kind) in [(1, SHM), (2, TCP), (3, SHM)] {
        let name = format!("seed {seed}");
        let mut random = Philox::new(seed, 79);
        let victim = (random.next_u64() % 3) as usize;
        let other = (victim + 1) % 3;
        let store = store(3);
        let orders = Orders { pause_us: 4000, ..orders(&store, kind, 111) };
        let mut all: Vec<Process> = (0..3).map(|_| Process::start(&orders)).collect();
        let at = 5 + random.next_u64() % 10;
        assert!(all[victim].wait(|event| is_step(event, at)).is_some(), "{name}");
        std::thread::sleep(Duration::from_micros(random.next_u64() % 6000));
        all[victim].signal("-STOP");
        let without = all[other].wait(|event| matches!(event, Event::Started { workers: 2, .. }));
        assert!(without.is_some(), "{name}");
        all[victim].signal("-CONT");
        let with = all[other].wait(|event| matches!(event, Event::Started { workers: 3, .. }));
        assert!(with.is_some(), "{name}: it didn't come back");
        let want = undisturbed(&orders.plan);
        for worker in &mut all {
            assert_eq!(worker.end().as_ref(), Some(&want), "{name}: {:?}", worker.failed);
        }
        assert_eq!(count(all.iter(), &name), expected(16 * 111), "{name}");
        let fenced = all[victim].events.iter().any(|event| matches!(event, Event::Lost { .. }));
        assert!(fenced, "{name}");
    }
}

/// All are killed at once; others, of another number, go on from the last checkpoint.
#[test]
fn a_job_goes_on_from_its_checkpoint_on_another_number_of_workers() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("out").display().to_string();
    let want = undisturbed(&Plan { steps: 74, ..plan() });
    for (index, workers) in [4, 2, 3, 1].into_iter().enumerate() {
        let store = store(workers);
        let mut orders = orders(&store, SHM, 74);
        orders.plan.checkpoint_every = Some(3);
        (orders.checkpoints, orders.resume) = (Some(place.clone()), index > 0);
        let mut all: Vec<Process> = (0..workers).map(|_| Process::start(&orders)).collect();
        if index == 3 {
            assert_eq!(all[0].end().as_ref(), Some(&want), "{:?}", all[0].failed);
            let began = all[0].events.iter().find_map(|event| match event {
                Event::Started { step, .. } => Some(*step),
                _ => None,
            });
            assert!(began.unwrap() >= 3, "it went on from a checkpoint and not from the beginning");
        } else {
            let complete = |event: &Event| {
                use consort_training::checkpoint::Event::Complete;
                matches!(event, Event::Checkpoint(Complete { step, .. }) if *step >= 9 * (index as u64 + 1))
            };
            let leads = |worker: &mut Process| {
                let begun = worker.wait(|event| matches!(event, Event::Started { .. }));
                matches!(begun, Some(Event::Started { rank: 0, .. }))
            };
            let lead = all.iter_mut().map(|worker| leads(worker).then_some(worker)).find_map(|lead| lead);
            let lead = lead.unwrap();
            assert!(lead.wait(complete).is_some(), "{workers}: {:?} {:?}", lead.failed, lead.events.last());
        }
    }
}

/// The launcher dies: workers finish the step, write a checkpoint and say how to go on.
#[test]
fn without_a_store_workers_stop_with_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("out").display().to_string();
    let first = store(3);
    let mut orders = orders(&first, SHM, 37);
    orders.checkpoints = Some(place.clone());
    let mut all: Vec<Process> = (0..3).map(|_| Process::start(&orders)).collect();
    assert!(all[0].wait(|event| is_step(event, 7)).is_some());
    drop(first);
    let mut stopped = None;
    for worker in &mut all {
        let finished = worker.end().unwrap_or_else(|| panic!("{:?}", worker.failed));
        let Reason::StoreGone { message } = &finished.reason else { panic!("{finished:?}") };
        assert!(message.contains("--resume") && message.contains("store"), "{message}");
        assert!(*stopped.get_or_insert(finished.steps) == finished.steps);
    }
    assert!(stopped.unwrap() < 37);
    let second = store(2);
    orders.store = second.address().to_string();
    orders.resume = true;
    let mut all: Vec<Process> = (0..2).map(|_| Process::start(&orders)).collect();
    let want = undisturbed(&orders.plan);
    for worker in &mut all {
        assert_eq!(worker.end().as_ref(), Some(&want), "{:?}", worker.failed);
        assert!(matches!(worker.events[0], Event::Started { step, .. } if Some(step) == stopped));
    }
}
