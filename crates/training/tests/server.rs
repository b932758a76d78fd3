//! Jobs with parameter servers: the bits of one process, whoever dies; and wrong workers.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod server_support;

use std::time::{Duration, Instant};

use consort_training::parallel::Control;
use consort_training::server::{
    Aggregate, Change, Connect, Event, Happened, Holdings, HostOptions, Lead, Loading, Mode, Replication,
    Spec, host, work,
};
use server_support::{
    Came, Fault, Process, TOKEN, alone, begin, learner, live, loss, protected, run, spec, trainer,
};

#[test]
fn process() {
    live();
}

fn steps(events: &[Event]) -> usize {
    events.iter().filter(|event| matches!(event, Event::Work(Happened::Step { .. }))).count()
}

#[test]
fn synchronous_jobs_have_the_bits_of_one_process() {
    let job = |shards| spec(&trainer(8), 8, shards);
    let reference = alone(&job(1));
    for (workers, shards, servers) in [(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2), (3, 2, 3)] {
        let Came { holdings, events, workers: worked } =
            run(job(shards), servers, &vec![None; workers]).unwrap();
        assert!(holdings.weights_hash() == reference, "{workers} workers, {shards} shards");
        assert_eq!((steps(&events), holdings.steps, holdings.updates), (8, 8, 8));
        let redone = events.iter().filter(|e| matches!(e, Event::Work(Happened::Redone { .. }))).count();
        let groups: u64 = worked.iter().map(|w| w.groups).sum();
        assert!(groups >= 32 && redone <= 2, "{groups} groups, {redone} steps done again");
    }
}

#[test]
fn a_job_goes_on_where_another_stopped() {
    let job = spec(&trainer(8), 8, 2);
    let reference = alone(&job);
    let first = trainer(8);
    let begins = begin(&first);
    let half = {
        let lead = Lead::listen("127.0.0.1:0", TOKEN, job.clone(), 1, &begins).unwrap();
        lead.hold(Some(3));
        std::thread::scope(|scope| {
            let connect = server_support::connect(&lead);
            let options = HostOptions::new(connect.clone(), 1);
            scope.spawn(move || host(&options));
            lead.load(&begins).unwrap();
            let job = &job;
            scope.spawn(move || work(&connect, &mut learner(job)));
            while lead.look(|c| c.progress().step().0) < 3 {
                lead.events(Duration::from_millis(20));
            }
            let half = lead.fetch().unwrap();
            drop(lead);
            half
        })
    };
    assert_eq!((half.steps, half.updates), (3, 3));
    let lead = Lead::listen("127.0.0.1:0", TOKEN, job, 2, &half).unwrap();
    let mut processes: Vec<Process> = (0..2).map(|_| Process::start("server", &lead, 8)).collect();
    lead.load(&half).unwrap();
    processes.extend((0..2).map(|_| Process::start("worker", &lead, 8)));
    lead.run(&mut |_| ()).unwrap();
    assert_eq!(lead.fetch().unwrap().weights_hash(), reference);
}

/// A server that was killed while the first weights were loaded was the end of the job. Here one is, before each bucket that
/// is loaded and while backups get their copies, and a second one at the next opportunity.
#[test]
fn servers_that_are_killed_while_the_first_weights_are_loaded_cost_nothing() {
    let job = Spec { lease_ms: 1000, workers: 2, ..spec(&trainer(2), 2, 2) };
    let (reference, first) = (alone(&job), trainer(2));
    let begins = begin(&first);
    let pieces = job.buckets.len();
    for (round, point) in (0..=pieces).enumerate() {
        let lead = Lead::listen("127.0.0.1:0", TOKEN, job.clone(), 2, &begins).unwrap();
        let mut servers: Vec<Process> = (0..2).map(|_| Process::start("server", &lead, 2)).collect();
        let (mut killed, mut seen) = (0, 0);
        let mut watch = |loading: Loading| {
            let here = match loading {
                Loading::Piece { piece, of } => piece == point && of == pieces,
                Loading::Backups => point == pieces,
            };
            seen += usize::from(here);
            // The second one dies when the same point is reached again.
            if killed < 1 + round % 2 && here && seen > killed {
                let victim = servers.remove(round / 2 % servers.len());
                println!("{loading:?}: kills server {}", victim.id());
                victim.signal("-KILL");
                killed += 1;
                servers.push(Process::start("server", &lead, 2));
            }
            Control::Go
        };
        lead.load_watched(&begins, &mut watch).unwrap();
        // Backups may be faster than anybody could kill them.
        assert!(killed > 0 || point == pieces, "nobody was killed before piece {point}");
        let workers: Vec<Process> = (0..2).map(|_| Process::start("worker", &lead, 2)).collect();
        let mut events = Vec::new();
        lead.run(&mut |event| events.push(event.clone())).unwrap();
        assert_eq!(lead.fetch().unwrap().weights_hash(), reference, "killed before piece {point}");
        assert!(!events.iter().any(|e| matches!(e, Event::Servers(Change::Lost { .. }))));
        drop(workers);
    }
}

/// Kills a process in the middle, and starts another one in its place.
fn with_deaths(job: Spec, deaths: &[(&str, &str)]) -> (Holdings, Vec<Event>) {
    let first = trainer(job.steps);
    let begins = begin(&first);
    let steps = job.steps;
    let lead = Lead::listen("127.0.0.1:0", TOKEN, job, 2, &begins).unwrap();
    let mut servers: Vec<Process> = (0..3).map(|_| Process::start("server", &lead, steps)).collect();
    lead.load(&begins).unwrap();
    let mut workers: Vec<Process> = (0..3).map(|_| Process::start("worker", &lead, steps)).collect();
    let mut events = Vec::new();
    for (round, (who, signal)) in deaths.iter().enumerate() {
        // At any moment of these steps; the job doesn't get past them meanwhile.
        let part = steps / (deaths.len() as u64 + 2);
        let from = part * (round as u64 + 1);
        lead.hold(Some(from + part));
        while lead.look(|c| c.progress().step().0.max(c.progress().done() / 4)) < from {
            events.extend(lead.events(Duration::from_millis(5)));
            lead.finished().unwrap();
        }
        let of = if *who == "server" { &mut servers } else { &mut workers };
        if *who == "server" {
            protected(&lead);
        }
        let victim = of.remove(round % of.len());
        println!("round {round}: {signal} for {who} {}", victim.id());
        victim.signal(signal);
        of.push(Process::start(who, &lead, steps));
        if *signal == "-STOP" {
            // Wakes up when its place is taken, with old ideas.
            let until = Instant::now() + Duration::from_secs(6);
            while Instant::now() < until && !lead.finished().unwrap() {
                events.extend(lead.events(Duration::from_millis(50)));
            }
            victim.signal("-CONT");
            of.push(victim);
        }
    }
    lead.hold(None);
    lead.run(&mut |event| events.push(event.clone())).unwrap();
    (lead.fetch().unwrap(), events)
}

fn failovers(events: &[Event]) -> usize {
    events.iter().filter(|event| matches!(event, Event::Servers(Change::FailedOver { .. }))).count()
}

#[test]
fn killed_servers_and_workers_change_no_bit() {
    let job = Spec { lease_ms: 1000, ..spec(&trainer(40), 40, 2) };
    let reference = alone(&job);
    let deaths = [
        ("server", "-KILL"),
        ("worker", "-KILL"),
        ("server", "-KILL"),
        ("server", "-KILL"),
        ("worker", "-KILL"),
    ];
    let (end, events) = with_deaths(job, &deaths);
    assert_eq!(end.weights_hash(), reference);
    assert!(failovers(&events) >= 1, "no primary was among those killed");
    assert!(!events.iter().any(|e| matches!(e, Event::Work(Happened::LostPushes { .. }))));
}

#[test]
fn processes_that_wake_up_too_late_are_refused() {
    let job = Spec { lease_ms: 1000, ..spec(&trainer(60), 60, 2) };
    let reference = alone(&job);
    let (end, _) = with_deaths(job, &[("server", "-STOP"), ("worker", "-STOP")]);
    assert_eq!(end.weights_hash(), reference);
}

#[test]
fn without_waiting_every_group_counts_once_though_servers_die() {
    for (mode, replication) in [
        (Mode::Asynchronous, Replication::Async { max_lag: 4 }),
        (Mode::Asynchronous, Replication::Sync),
        (Mode::bounded(2), Replication::Sync),
    ] {
        let job = Spec { mode, replication, lease_ms: 1000, ..spec(&trainer(40), 40, 2) };
        let before = loss(trainer(1).weights());
        let (end, events) = with_deaths(job, &[("server", "-KILL"), ("worker", "-KILL")]);
        let after = loss(&end.weights);
        assert!(after < before - 0.3, "{mode:?}: {before} to {after}");
        for event in &events {
            if let Event::Work(Happened::LostPushes { pushes, groups }) = event {
                assert!(matches!(replication, Replication::Async { .. }), "{pushes} of {groups} groups");
                println!("{pushes} pushes of {groups} groups were lost, and computed again");
            }
        }
    }
}

#[test]
fn one_wrong_worker_of_five_spoils_the_mean_and_nothing_else() {
    let before = loss(trainer(1).weights());
    let garbage: Fault = |values| values.iter_mut().for_each(|x| *x = -100.0 * *x + 0.1);
    let nothing: Fault = |values| values.fill(f32::NAN);
    let job =
        |aggregate| Spec { aggregate, groups: 5, micro_batches: 2, workers: 5, ..spec(&trainer(60), 60, 2) };
    let honest = [None; 5];
    let learned = |aggregate, wrong: Option<Fault>| {
        let mut workers = honest;
        workers[3] = wrong;
        run(job(aggregate), 1, &workers).map(|came| loss(&came.holdings.weights))
    };
    let good = learned(Aggregate::Mean, None).unwrap();
    assert!(good < before - 0.5, "{before} to {good}");
    for aggregate in [Aggregate::Median, Aggregate::TrimmedMean { wrong: 1 }, Aggregate::Krum { wrong: 1 }] {
        for fault in [garbage, nothing] {
            let loss = learned(aggregate, Some(fault)).unwrap();
            println!("{aggregate:?}: {before:.2} to {loss:.2} with one wrong worker of five");
            assert!(loss < before - 0.35, "{aggregate:?}: {before} to {loss}");
        }
    }
    let spoiled = learned(Aggregate::Mean, Some(garbage)).unwrap();
    println!("mean: {before:.2} to {spoiled:.2} with one wrong worker of five, {good:.2} without");
    assert!(spoiled > before - 0.2, "{spoiled}");
    // What is no number is known to be wrong, so that it takes no comparison to leave it out.
    let reference = run(job(Aggregate::Mean), 1, &honest).unwrap().holdings.weights_hash();
    let mut workers = honest;
    workers[3] = Some(nothing);
    let came = run(job(Aggregate::Mean), 1, &workers).unwrap();
    assert_eq!(came.holdings.weights_hash(), reference);
    let told = |e: &Event| matches!(e, Event::Refused { reason, .. } if reason.contains("is no number"));
    assert!(came.events.iter().any(told), "{:?}", came.events);
    // Where another one's sums were there first, nobody looks at its own: it is told that the group is done, which it is.
    let wrong = &came.workers[3];
    assert!(wrong.vain > 0 && wrong.groups < wrong.vain, "{wrong:?}");
    let stopped = run(job(Aggregate::Mean), 1, &[Some(nothing); 5]).map(|_| ()).unwrap_err().to_string();
    assert!(stopped.contains("is no number"), "{stopped}");
    let alone = Spec { workers: 1, ..job(Aggregate::Mean) };
    let stopped = run(alone, 1, &[Some(nothing)]).map(|_| ()).unwrap_err().to_string();
    assert!(stopped.contains("is no number"), "{stopped}");
}

#[test]
fn strangers_are_refused_and_a_job_without_servers_says_so() {
    let first = trainer(2);
    let begins = begin(&first);
    let lead = Lead::listen("127.0.0.1:0", TOKEN, spec(&first, 2, 1), 1, &begins).unwrap();
    let stranger =
        Connect { patience: Duration::from_secs(5), ..Connect::new(lead.address().to_string(), b"guess") };
    let options = HostOptions::new(stranger.clone(), 1);
    let refused = host(&options).unwrap_err().to_string();
    assert!(refused.contains("token"), "{refused}");
    let gone = Connect { patience: Duration::from_millis(200), ..Connect::new("127.0.0.1:1", TOKEN) };
    let error = work(&gone, &mut learner(&spec(&first, 2, 1))).unwrap_err().to_string();
    assert!(error.contains("127.0.0.1:1"), "{error}");
}
