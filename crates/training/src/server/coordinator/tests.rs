use super::super::op::Ready;
use super::super::spec::tests::spec;
use super::super::spec::{Mode, Spec};
use super::*;

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A job of 2 groups a step with two servers that are there.
fn begun(spec: Spec) -> Coordinator {
    let mut coordinator = Coordinator::new(Arc::new(spec), 2, 0, 0, None).unwrap();
    coordinator.tick(at(0));
    for server in ["server 0", "server 1"] {
        coordinator.register(at(0), "a", server);
    }
    let epochs = epochs(&coordinator);
    assert_eq!(coordinator.begin(&epochs, true), Start::Begun);
    coordinator
}

fn epochs(coordinator: &Coordinator) -> Vec<u64> {
    coordinator.cluster().placements().iter().map(|p| p.epoch).collect()
}

/// One that was resumed: the report of a server that took over a shard before it was loaded would have every step before
/// computed again.
#[test]
fn a_job_begins_when_its_servers_have_all_and_not_before() {
    let mut coordinator = Coordinator::new(Arc::new(job(Mode::Synchronous)), 2, 3, 3, None).unwrap();
    coordinator.tick(at(0));
    for name in ["server 0", "server 1"] {
        coordinator.register(at(0), "a", name);
    }
    let worker = coordinator.join(at(0), "");
    assert_eq!(works(&mut coordinator, worker), None, "there are no weights");
    assert_eq!(coordinator.view(at(2)).workers[0].waits.as_ref().unwrap().0, Waits::Weights);
    let first = epochs(&coordinator);
    assert_eq!(coordinator.begin(&first, false), Start::Wait);
    coordinator.report(at(1), 1, 0, first[0], Report::InSync);
    coordinator.report(at(1), 2, 1, first[1], Report::InSync);
    coordinator.server_gone(1);
    assert_eq!((coordinator.begin(&first, true), coordinator.failed()), (Start::Reload, None));
    let second = epochs(&coordinator);
    let nothing = vec![(0, 0, Seen::default()), (1, 0, Seen::default())];
    coordinator.report(at(1), 2, 0, second[0], Report::Promoted(nothing.clone()));
    assert_eq!(coordinator.begin(&second, true), Start::Begun);
    coordinator.report(at(1), 2, 0, second[0], Report::Promoted(nothing));
    assert!(!coordinator.events().iter().any(|e| matches!(e, Event::Work(Happened::LostPushes { .. }))));
    assert_eq!(works(&mut coordinator, worker), Some(6));
}

fn job(mode: Mode) -> Spec {
    Spec { groups: 2, mode, lease_ms: 100, ..spec(&[4, 6], 2) }
}

fn finish(coordinator: &mut Coordinator, worker: WorkerId, group: u64) {
    let epochs: Vec<u64> = coordinator.cluster().placements().iter().map(|p| p.epoch).collect();
    let loss = Loss { sum: 1.0, weight: 2.0, rows: 2 };
    let verdict = coordinator.finish(at(1), worker, (group, 0), &epochs, vec![loss], Effort::default());
    assert_eq!(verdict, Some(Verdict::Accepted));
}

fn works(coordinator: &mut Coordinator, worker: WorkerId) -> Option<u64> {
    match coordinator.claim(at(1), worker) {
        Some(Grant::Work(claim)) => Some(claim.group),
        _ => None,
    }
}

/// A launcher that is stopped for a while, or starved, hears from nobody. When it went on, it took everybody for lost, and the
/// job with them.
#[test]
fn a_coordinator_that_slept_gives_nobody_up_for_it() {
    let mut coordinator = begun(job(Mode::Asynchronous));
    let worker = coordinator.join(at(0), "worker 0");
    coordinator.tick(at(40));
    coordinator.tick(at(5000));
    assert!(coordinator.heard(at(5001), worker) && coordinator.duties(at(5001), 1).is_some());
    assert_eq!(coordinator.failed(), None);
    // Whose silence lasts is given up all the same.
    for ms in (5010..5200).step_by(10) {
        coordinator.tick(at(ms));
    }
    assert!(!coordinator.heard(at(5200), worker));
}

#[test]
fn a_pause_ends_what_has_begun_and_nothing_more() {
    for mode in [Mode::Asynchronous, Mode::bounded(16)] {
        let mut coordinator = begun(job(mode));
        let (a, b) = (coordinator.join(at(0), ""), coordinator.join(at(0), ""));
        assert_eq!((works(&mut coordinator, a), works(&mut coordinator, b)), (Some(0), Some(1)));
        finish(&mut coordinator, a, 0);
        assert_eq!(works(&mut coordinator, a), Some(2));
        // Group 3 is of a step that has begun.
        assert_eq!(coordinator.pause(), 2);
        finish(&mut coordinator, a, 2);
        assert_eq!(works(&mut coordinator, a), Some(3));
        finish(&mut coordinator, a, 3);
        assert_eq!(works(&mut coordinator, a), None);
        assert!(!coordinator.held(), "group 1 is under way");
        // Who has it is lost: it is handed out again, pause or not.
        coordinator.worker_gone(b);
        assert!(!coordinator.held());
        assert_eq!(works(&mut coordinator, a), Some(1));
        finish(&mut coordinator, a, 1);
        assert!(coordinator.held() && coordinator.progress().steps() == 2);
        coordinator.hold(None);
        assert!(!coordinator.held());
        assert_eq!(works(&mut coordinator, a), Some(4));
        let rounds = |event: &Event| matches!(event, Event::Work(Happened::Round { .. }));
        assert_eq!(coordinator.events().iter().filter(|event| rounds(event)).count(), 2);
    }
}

#[test]
fn a_pause_of_a_synchronous_job_ends_its_step() {
    let mut coordinator = begun(job(Mode::Synchronous));
    assert_eq!(coordinator.pause(), 0, "nothing has begun");
    assert!(coordinator.held());
    coordinator.hold(None);
    let worker = coordinator.join(at(0), "");
    assert_eq!(works(&mut coordinator, worker), Some(0));
    assert_eq!(coordinator.pause(), 1);
    finish(&mut coordinator, worker, 0);
    assert_eq!(works(&mut coordinator, worker), Some(1));
    finish(&mut coordinator, worker, 1);
    assert!(!coordinator.held(), "its buckets are not complete");
    for bucket in 0..2 {
        let shard = coordinator.spec().shards.iter().position(|own| own.contains(&bucket)).unwrap();
        let (server, epoch) = {
            let placement = &coordinator.cluster().placements()[shard];
            (placement.primary.unwrap(), placement.epoch)
        };
        let largest = 1f32.to_bits();
        let ready = Ready { bucket, step: 0, attempt: 0, largest, squares: vec![1.0.into()] };
        coordinator.report(at(2), server, shard, epoch, Report::Ready(vec![ready]));
    }
    assert!(coordinator.held() && coordinator.progress().steps() == 1);
    assert_eq!(works(&mut coordinator, worker), None);
}

#[test]
fn the_picture_says_who_waits_for_whom() {
    let mut coordinator = begun(job(Mode::bounded(1)));
    let (a, b) = (coordinator.join(at(0), "worker 0"), coordinator.join(at(0), "worker 1\n"));
    assert_eq!(works(&mut coordinator, a), Some(0));
    finish(&mut coordinator, a, 0);
    assert_eq!(works(&mut coordinator, b), Some(1));
    assert_eq!(works(&mut coordinator, a), None);
    let view = coordinator.view(at(61));
    assert_eq!(view.workers[0].waits, Some((Waits::Slowest { by: vec![b], behind: 1 }, 60)));
    assert_eq!((view.workers[1].name.as_str(), view.workers[1].computes), ("worker 1", Some((1, 60))));
    assert_eq!(view.shards[0].primary.as_deref(), Some("server 0"));
    assert_eq!((view.shards[0].silent_ms, view.shards[0].in_sync), (61, false));
    let epoch = coordinator.cluster().placements()[0].epoch;
    coordinator.report(at(62), 1, 0, epoch, Report::InSync);
    let epoch = coordinator.cluster().placements()[1].epoch;
    coordinator.report(at(62), 2, 1, epoch, Report::InSync);
    coordinator.server_gone(1);
    let view = coordinator.view(at(63));
    assert!(view.shards[0].promoting && view.shards[0].primary.as_deref() == Some("server 1"));
    assert_eq!(view.workers[0].waits.as_ref().unwrap().0, Waits::Servers);
    let text = serde_json::to_string(&view).unwrap();
    assert_eq!(serde_json::from_str::<View>(&text).unwrap(), view, "{text}");
}
