//! Whole jobs in virtual time: coordinator, servers and workers that die, sleep, are cut off and come back, over a network
//! that loses and repeats messages. What a seed does, it does again.

mod server;
mod worker;
mod world;

use self::world::{STORM, Weather, World};
use super::cluster::Change;
use super::coordinator::Event;
use super::progress::Happened;
use super::spec::tests::spec;
use super::spec::{Aggregate, Mode, Replication, Spec};

fn job(shards: usize) -> Spec {
    Spec { lease_ms: 60, ..spec(&[5, 17, 9, 4], shards) }
}

/// Which seeds; `CONSORT_TEST_SEEDS` asks for more, `CONSORT_TEST_SEED` for one.
fn seeds() -> std::ops::Range<u64> {
    if let Some(seed) = std::env::var("CONSORT_TEST_SEED").ok().and_then(|n| n.parse().ok()) {
        return seed..seed + 1;
    }
    0..std::env::var("CONSORT_TEST_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(150)
}

#[test]
fn synchronous_steps_have_the_same_bits_whoever_dies() {
    let quiet = |spec: Spec, workers| {
        let mut world = World::new(0, spec, 2, workers, Weather::default());
        world.run();
        world.weights()
    };
    for aggregate in [Aggregate::Mean, Aggregate::Median, Aggregate::Krum { wrong: 0 }] {
        let spec = |shards| Spec { aggregate, ..job(shards) };
        let reference = quiet(spec(1), 1);
        assert_eq!(reference, quiet(spec(2), 3));
        let (mut failovers, mut lost, mut redone) = (0, 0, 0);
        for seed in seeds() {
            let replication = match seed % 2 {
                0 => Replication::Sync,
                _ => Replication::Async { max_lag: 6 },
            };
            let spec = Spec { replication, speculate_ms: 15 * (seed % 3), ..spec(1 + (seed % 3) as usize) };
            let mut world = World::new(
                seed,
                spec,
                3,
                1 + (seed % 4) as usize,
                Weather { lags: 12 * (seed % 2), ..STORM },
            );
            world.run();
            assert_eq!(world.weights(), reference, "seed {seed} {aggregate:?}");
            world.each_once();
            failovers += world.failovers();
            redone += world.count(|e| matches!(e, Event::Work(Happened::Redone { .. })));
            if replication == Replication::Sync {
                assert_eq!(world.lost_pushes(), 0, "seed {seed}");
            } else {
                lost += world.lost_pushes();
            }
        }
        assert!(failovers > seeds().count() / 4, "{failovers} failovers");
        assert!(lost > 0, "a lagging backup never took over");
        assert_eq!(redone > 0, aggregate == Aggregate::Mean);
    }
}

/// Servers die while they get their first weights, one after the other and all at once.
#[test]
fn the_first_weights_arrive_whoever_dies_meanwhile() {
    let mut quiet = World::new(0, job(2), 2, 2, Weather::default());
    quiet.run();
    let (reference, mut reloads, mut emptied) = (quiet.weights(), 0, 0);
    for seed in seeds() {
        let weather = Weather {
            loading_ms: 4 + seed % 12,
            bare: seed % 3 == 0,
            loses_one_in: 20,
            lags: 3 * (seed % 2),
            ..Weather::default()
        };
        let mut world = World::new(seed, job(1 + (seed % 3) as usize), 2 + (seed % 2) as usize, 2, weather);
        world.run();
        assert_eq!(world.weights(), reference, "seed {seed}");
        world.each_once();
        reloads += world.reloads;
        emptied += world.count(|e| matches!(e, Event::Servers(Change::Emptied { .. })));
    }
    assert!(reloads > 0 && emptied > 0, "{reloads} reloads, {emptied} shards were emptied");
}

#[test]
fn asynchronous_pushes_count_once_whoever_dies() {
    let (mut lost, mut failovers) = (0, 0);
    for seed in seeds() {
        let replication = match seed % 2 {
            0 => Replication::Sync,
            _ => Replication::Async { max_lag: 1 + seed % 7 },
        };
        let spec = Spec { mode: Mode::Asynchronous, replication, ..job(1 + (seed % 3) as usize) };
        let mut world =
            World::new(seed, spec, 3, 1 + (seed % 5) as usize, Weather { lags: 12 * (seed % 2), ..STORM });
        world.run();
        world.each_once();
        failovers += world.failovers();
        match replication {
            Replication::Sync => assert_eq!(world.lost_pushes(), 0, "seed {seed}"),
            Replication::Async { max_lag } => {
                lost += world.lost_pushes();
                assert!(world.coordinator.largest_lag() <= max_lag, "seed {seed}");
            }
        }
    }
    assert!(lost > 0 && failovers > 0, "{lost} pushes lost in {failovers} failovers");
}

#[test]
fn staleness_stays_within_its_bound_whoever_dies() {
    let mut reached = 0;
    for seed in seeds() {
        let staleness = 1 + seed % 4;
        let spec = Spec { mode: Mode::bounded(staleness), ..job(2) };
        let mut world = World::new(seed, spec, 3, 2 + (seed % 4) as usize, STORM);
        world.run();
        world.each_once();
        reached += u64::from(world.largest_spread == staleness);
    }
    assert!(reached > 0, "nobody was ever as far ahead as allowed");
}

/// A worker that is slow or gone costs the others nothing where nobody waits.
#[test]
fn a_slow_worker_slows_nobody_where_updates_are_asynchronous() {
    let time = |mode, slow: u64, workers| {
        let spec = Spec { mode, steps: 30, ..job(2) };
        let mut world = World::new(1, spec, 2, workers, Weather::default());
        world.workers[0].slow = slow;
        world.run();
        world.now
    };
    let three = time(Mode::Asynchronous, 1, 3);
    let and_a_slow_one = time(Mode::Asynchronous, 200, 4);
    // The end waits for the group that the slow one has: once, not in each step.
    assert!(and_a_slow_one < three + 1000 + 100, "{three} ms, with a slow one {and_a_slow_one} ms");
    let bounded = time(Mode::bounded(2), 200, 4);
    assert!(bounded > 4 * and_a_slow_one, "who waits for the slowest is slow: {bounded} ms");
}

/// A worker with nothing to do computes what is slow elsewhere, and the bits are the same.
#[test]
fn backup_workers_shorten_a_step() {
    let run = |speculate_ms| {
        let spec = Spec { speculate_ms, groups: 8, ..job(2) };
        let mut world = World::new(1, spec, 2, 4, Weather::default());
        world.workers[0].slow = 40;
        world.run();
        (world.now, world.weights())
    };
    let ((plain, weights), (helped, same)) = (run(0), run(20));
    assert!(weights == same && helped < plain * 3 / 4, "{plain} ms, with help {helped} ms");
}
