//! Whole lives under a virtual clock: processes that start slowly, crash, hang and refuse to end, while what is wanted
//! changes. A failure prints its seed.

use std::collections::BTreeMap;

use super::tests::{launch, want};
use super::*;

/// A process as the world sees it.
struct Process {
    ready_at: Instant,
    ready: bool,
    hung: bool,
    dies_at: Option<Instant>,
    /// The wanted revision when it was started.
    revision: u64,
}

struct World {
    seed: u64,
    now: Instant,
    random: Philox,
    supervisor: Supervisor,
    processes: BTreeMap<ReplicaId, Process>,
    /// Chance of a crash or hang in each tick of 100 ms.
    trouble: f64,
    spawns: usize,
    stopped: bool,
}

const TICK: Duration = Duration::from_millis(100);

impl World {
    fn new(seed: u64, trouble: f64) -> World {
        World {
            seed,
            now: Instant::now(),
            random: Philox::new(seed, 1),
            supervisor: Supervisor::new(Options::default(), seed),
            processes: BTreeMap::new(),
            trouble,
            spawns: 0,
            stopped: false,
        }
    }

    fn give(&mut self, event: Event) {
        let commands = self.supervisor.step(self.now, event);
        for command in commands {
            match command {
                Command::Spawn(id, launch) => {
                    self.spawns += 1;
                    assert!(!self.processes.contains_key(&id), "seed {}: {id} was started twice", self.seed);
                    let ready_at = self.now + TICK * (1 + self.random.below(20) as u32);
                    let process = Process {
                        ready_at,
                        ready: false,
                        hung: false,
                        dies_at: None,
                        revision: launch.revision,
                    };
                    self.processes.insert(id.clone(), process);
                    self.give(Event::Spawned(id.clone(), 1));
                    self.give(Event::Listening(id, ([127, 0, 0, 1], 1).into()));
                }
                Command::Kill(id) => {
                    let dies_at = Some(self.now + TICK * self.random.below(5) as u32);
                    self.processes
                        .get_mut(&id)
                        .unwrap_or_else(|| panic!("kill of {id}, which is gone"))
                        .dies_at = dies_at;
                }
                Command::Drain(id) => {
                    assert!(
                        !self.supervisor.routes().iter().any(|r| r.id == id && !r.draining),
                        "seed {}: {id} drains while it gets requests",
                        self.seed
                    );
                    let dies_at = Some(self.now + TICK * self.random.below(30) as u32);
                    let process =
                        self.processes.get_mut(&id).unwrap_or_else(|| panic!("drain of {id}, which is gone"));
                    if !process.hung {
                        process.dies_at = dies_at;
                    }
                }
                Command::Publish | Command::Say(_) => {}
                Command::Stopped => self.stopped = true,
            }
        }
    }

    fn tick(&mut self) {
        self.now += TICK;
        let ids: Vec<_> = self.processes.keys().cloned().collect();
        for id in ids {
            let trouble = self.random.chance(self.trouble);
            let hangs = self.random.chance(0.5);
            let now = self.now;
            let Some(process) = self.processes.get_mut(&id) else { continue };
            if trouble && hangs {
                process.hung = true;
            } else if trouble || process.dies_at.is_some_and(|at| at <= now) {
                self.processes.remove(&id);
                self.give(Event::Exited(id, "gone".into()));
                continue;
            }
            if process.hung {
                continue;
            }
            if !process.ready && process.ready_at <= now {
                process.ready = true;
                self.give(Event::Ready(id.clone()));
            }
            self.give(Event::Alive(id, 0));
        }
        self.give(Event::Tick);
        self.check();
    }

    fn check(&self) {
        let seed = self.seed;
        for view in self.supervisor.view(self.now) {
            let live = view.replicas.iter().filter(|r| r.phase == "ready" || r.phase == "starting").count();
            assert!(live <= 2, "seed {seed}: {view:?}");
        }
        for route in self.supervisor.routes() {
            let process = self.processes.get(&route.id);
            assert!(process.is_some_and(|p| p.ready), "seed {seed}: requests would go to {}", route.id);
        }
        assert!(
            self.supervisor.places.values().filter(|p| p.next.is_some()).count() <= 1,
            "seed {seed}: two slots roll at once"
        );
    }

    fn ready(&self) -> usize {
        self.supervisor.routes().iter().filter(|r| !r.draining).count()
    }

    fn converged(&self, replicas: usize, revision: u64) -> bool {
        let right =
            |id: &ReplicaId| self.processes.get(id).is_some_and(|p| p.revision == revision && !p.hung);
        let routes = self.supervisor.routes();
        routes.len() == replicas && routes.iter().all(|r| right(&r.id)) && self.processes.len() == replicas
    }
}

#[test]
fn whatever_happens_the_fleet_ends_as_it_is_wanted() {
    for seed in 0..60 {
        let mut world = World::new(seed, 0.01);
        let mut wanted = (0, 0);
        for _ in 0..400 {
            if world.random.chance(0.02) {
                wanted = (world.random.below(6) as u32, world.random.below(3));
                world.give(want(wanted.0, wanted.1));
            }
            world.tick();
        }
        world.trouble = 0.0;
        let mut ticks = 0;
        while !world.converged(wanted.0 as usize, wanted.1) {
            world.tick();
            ticks += 1;
            // Half a minute of backoff, hung starts (300 s) and drains (15 s), one slot after the other.
            assert!(ticks < 12_000, "seed {seed}: {:?}", world.supervisor.view(world.now));
        }
        world.give(Event::Stop);
        for _ in 0..300 {
            world.tick();
        }
        assert!(world.stopped && world.processes.is_empty(), "seed {seed}");
    }
}

#[test]
fn a_roll_never_takes_a_replica_away() {
    for seed in 0..60 {
        let mut world = World::new(seed, 0.0);
        let replicas = 1 + world.random.below(5) as u32;
        world.give(want(replicas, 0));
        while world.ready() < replicas as usize {
            world.tick();
        }
        for revision in 1..4 {
            world.give(want(replicas, revision));
            let mut ticks = 0;
            while !world.converged(replicas as usize, revision) {
                world.tick();
                assert_eq!(world.ready(), replicas as usize, "seed {seed}");
                ticks += 1;
                assert!(ticks < 1000, "seed {seed}");
            }
        }
        assert_eq!(world.spawns, 4 * replicas as usize, "seed {seed}");
    }
}

#[test]
fn a_machine_that_lost_everything_does_not_thrash() {
    let mut world = World::new(1, 0.0);
    world.give(want(40, 0));
    let starting = |w: &World| w.processes.values().filter(|p| !p.ready).count();
    for _ in 0..2000 {
        assert!(starting(&world) <= Options::default().starting_at_once);
        world.tick();
    }
    assert_eq!(world.ready(), 40);
    assert_eq!(launch(0), launch(0));
}
