//! The world: who there is, what goes wrong, and what must hold whatever does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use consort_base::Philox;
use consort_tensor::{Cpu, Pool};

use crate::server::cluster::{Change, ServerId};
use crate::server::coordinator::{Coordinator, Event};
use crate::server::op::Op;
use crate::server::progress::{Claim, Happened};
use crate::server::replica::Replica;
use crate::server::spec::{Mode, Spec};

/// What goes wrong in a world.
#[derive(Clone, Copy, Default)]
pub(super) struct Weather {
    /// A message is lost, or repeated later: each one time in so many.
    pub(super) loses_one_in: u64,
    /// Servers die, sleep or are cut off about every so many ms.
    pub(super) servers_ms: u64,
    /// So do workers.
    pub(super) workers_ms: u64,
    /// A primary talks to its backup one time in so many that it could; 0: always.
    pub(super) lags: u64,
    /// Until the job begins, some server dies about every so many ms, whoever has what.
    pub(super) loading_ms: u64,
    /// It begins without backups.
    pub(super) bare: bool,
}

pub(super) const STORM: Weather =
    Weather { loses_one_in: 20, servers_ms: 150, workers_ms: 200, lags: 0, loading_ms: 0, bare: false };

#[derive(Default)]
pub(super) struct Server {
    pub(super) dead: bool,
    pub(super) asleep_until: u64,
    pub(super) cut_until: u64,
    pub(super) id: Option<ServerId>,
    pub(super) replicas: BTreeMap<usize, Replica>,
    pub(super) copied: BTreeMap<usize, u64>,
    pub(super) back_at: u64,
}

#[derive(Default)]
pub(super) struct Worker {
    pub(super) dead: bool,
    pub(super) asleep_until: u64,
    pub(super) back_at: u64,
    pub(super) id: Option<u64>,
    pub(super) slow: u64,
    pub(super) busy_until: u64,
    pub(super) claim: Option<Claim>,
    pub(super) weights: Vec<Vec<f32>>,
    /// Epoch in which each bucket was acknowledged.
    pub(super) acknowledged: BTreeMap<usize, u64>,
    /// A push that is not acknowledged: bucket, server, and the log that must be safe.
    pub(super) waiting: Option<(usize, usize, u64)>,
}

pub(super) struct World {
    pub(super) seed: u64,
    pub(super) rng: Philox,
    pub(super) pool: Pool,
    pub(super) spec: Arc<Spec>,
    pub(super) now: u64,
    pub(super) weather: Weather,
    pub(super) coordinator: Coordinator,
    pub(super) servers: Vec<Server>,
    pub(super) workers: Vec<Worker>,
    pub(super) loaded: bool,
    /// The epoch in which each bucket got its first weights.
    pub(super) load: Vec<u64>,
    pub(super) reloads: u64,
    /// Pushes that come again, or come late.
    pub(super) late: Vec<(usize, usize, Op, Arc<Vec<u8>>)>,
    pub(super) events: Vec<Event>,
    pub(super) largest_spread: u64,
}

impl World {
    pub(super) fn new(seed: u64, spec: Spec, servers: usize, workers: usize, weather: Weather) -> World {
        let spec = Arc::new(spec);
        let coordinator = Coordinator::new(Arc::clone(&spec), servers.min(2), 0, 0, None).unwrap();
        let worker = |i: usize| Worker { slow: 1 + 3 * u64::from(i == 0), ..Worker::default() };
        World {
            seed,
            rng: Philox::new(seed, 0),
            pool: Pool::new(1, Cpu::detect()),
            spec,
            now: 0,
            weather,
            coordinator,
            servers: (0..servers).map(|_| Server::default()).collect(),
            workers: (0..workers).map(worker).collect(),
            loaded: false,
            load: Vec::new(),
            reloads: 0,
            late: Vec::new(),
            events: Vec::new(),
            largest_spread: 0,
        }
    }

    pub(super) fn time(&self) -> Duration {
        Duration::from_millis(self.now)
    }

    pub(super) fn lost(&mut self) -> bool {
        self.weather.loses_one_in > 0 && self.rng.below(self.weather.loses_one_in) == 0
    }

    /// The server that has this address, which is its number, if it can hear anybody.
    pub(super) fn reach(&self, address: &str) -> Option<usize> {
        let index: usize = address.parse().ok()?;
        let server = &self.servers[index];
        (!server.dead && server.asleep_until <= self.now).then_some(index)
    }

    /// Runs to the end.
    pub(super) fn run(&mut self) {
        while !(self.coordinator.progress().finished()
            && self.coordinator.cluster().formed()
            && self.settled())
        {
            self.now += 1;
            assert!(self.now < 120_000, "seed {}: not done at {} ms\n{}", self.seed, self.now, self.dump());
            self.coordinator.tick(self.time());
            self.misfortune();
            let actors = self.servers.len() + self.workers.len();
            for _ in 0..actors {
                let actor = self.rng.below(actors as u64) as usize;
                match actor.checked_sub(self.servers.len()) {
                    None => self.server(actor),
                    Some(worker) => self.worker(worker),
                }
                self.deliver_late();
                self.check();
            }
        }
    }

    /// Who waits for whom.
    pub(super) fn dump(&self) -> String {
        let mut text =
            format!("{:?}\n{:?}\n", self.coordinator.cluster().placements(), self.coordinator.progress());
        for (index, server) in self.servers.iter().enumerate() {
            text +=
                &format!("server {index} {:?} dead {} copied {:?}\n", server.id, server.dead, server.copied);
            for (shard, replica) in &server.replicas {
                text += &format!("  shard {shard}: {replica:?}\n");
            }
        }
        for worker in &self.workers {
            text += &format!("worker {:?} {:?} {:?}\n", worker.id, worker.claim, worker.waiting);
        }
        text
    }

    /// Every live primary has taken the last decision.
    pub(super) fn settled(&self) -> bool {
        self.spec.shards.iter().enumerate().all(|(shard, _)| {
            let Some(route) = self.coordinator.cluster().routes().get(shard).cloned() else { return false };
            let Some(server) = self.reach(&route.address) else { return false };
            let Some(replica) = self.servers[server].replicas.get(&shard) else { return false };
            let end = if self.spec.mode == Mode::Synchronous { self.spec.steps } else { self.spec.total() };
            replica.is_primary()
                && self.spec.shards[shard]
                    .iter()
                    .all(|b| replica.shard().weights(*b).is_some_and(|(s, _)| s == end))
        })
    }

    pub(super) fn check(&mut self) {
        if let Mode::Bounded { staleness } = self.spec.mode {
            let clocks: Vec<u64> = self.coordinator.progress().clocks().map(|(_, clock)| clock).collect();
            let spread = clocks.iter().max().unwrap_or(&0) - clocks.iter().min().unwrap_or(&0);
            assert!(spread <= staleness, "seed {}: {spread} apart", self.seed);
            self.largest_spread = self.largest_spread.max(spread);
            assert!(self.coordinator.progress().spread() <= staleness, "seed {}", self.seed);
        }
        assert_eq!(self.coordinator.failed(), None, "seed {}", self.seed);
        let events = self.coordinator.events();
        self.events.extend(events);
    }

    pub(super) fn misfortune(&mut self) {
        let Weather { servers_ms, workers_ms, loading_ms, .. } = self.weather;
        if loading_ms > 0 && !self.loaded && self.rng.below(loading_ms) == 0 {
            let victim = self.rng.below(self.servers.len() as u64) as usize;
            let back_at = self.now + self.rng.below(30);
            let id = self.servers[victim].id;
            self.servers[victim] = Server { dead: true, back_at, ..Server::default() };
            if let Some(id) = id.filter(|_| self.rng.chance(0.8) || self.weather.bare) {
                self.coordinator.server_gone(id);
            }
        }
        // One server at a time: when every shard has a backup again.
        let protected = self.loaded && self.coordinator.cluster().placements().iter().all(|p| p.in_sync);
        let well = |s: &Server| !s.dead && s.asleep_until <= self.now && s.cut_until <= self.now;
        if servers_ms > 0 && protected && self.servers.iter().all(well) && self.rng.below(servers_ms) == 0 {
            let victim = self.rng.below(self.servers.len() as u64) as usize;
            let until = self.now + 50 + self.rng.below(300);
            let told = self.rng.chance(0.5);
            let kind = self.rng.below(3);
            let server = &mut self.servers[victim];
            match kind {
                0 => {
                    let id = server.id;
                    *server = Server { dead: true, back_at: until, ..Server::default() };
                    if let Some(id) = id.filter(|_| told) {
                        self.coordinator.server_gone(id);
                    }
                }
                1 => server.asleep_until = until,
                _ => server.cut_until = until,
            }
        }
        if workers_ms > 0 && self.rng.below(workers_ms) == 0 {
            let victim = self.rng.below(self.workers.len() as u64) as usize;
            let until = self.now + self.rng.below(400);
            let worker = &mut self.workers[victim];
            match self.rng.chance(0.5) {
                true => {
                    *worker = Worker { dead: true, back_at: until, slow: worker.slow, ..Worker::default() }
                }
                false => worker.asleep_until = until,
            }
        }
    }

    pub(super) fn route(&self, bucket: usize) -> Option<(usize, usize)> {
        let shard = self.spec.shards.iter().position(|buckets| buckets.contains(&bucket)).unwrap();
        let route = self.coordinator.cluster().routes().get(shard).cloned()?;
        // Workers follow old routes too, now and then.
        Some((shard, self.reach(&route.address)?))
    }

    /// The weights of all buckets, from their primaries.
    pub(super) fn weights(&self) -> Vec<Vec<u32>> {
        (0..self.spec.buckets.len())
            .map(|bucket| {
                let (shard, server) = self.route(bucket).unwrap();
                let (_, weights) = self.servers[server].replicas[&shard].shard().weights(bucket).unwrap();
                weights.iter().map(|w| w.to_bits()).collect()
            })
            .collect()
    }

    pub(super) fn count(&self, of: impl Fn(&Event) -> bool) -> usize {
        self.events.iter().filter(|event| of(event)).count()
    }

    pub(super) fn failovers(&self) -> usize {
        self.count(|event| matches!(event, Event::Servers(Change::FailedOver { .. })))
    }

    pub(super) fn lost_pushes(&self) -> u64 {
        let lost = |event: &Event| match event {
            Event::Work(Happened::LostPushes { pushes, .. }) => *pushes,
            _ => 0,
        };
        self.events.iter().map(lost).sum()
    }

    /// Every group counts once in every bucket.
    pub(super) fn each_once(&self) {
        for (shard, buckets) in self.spec.shards.iter().enumerate() {
            let (_, server) = self.route(buckets[0]).unwrap();
            let replica = &self.servers[server].replicas[&shard];
            for (bucket, _, seen) in replica.shard().seen() {
                assert_eq!(seen.count(), self.spec.total(), "seed {}, bucket {bucket}", self.seed);
                let (step, _) = replica.shard().weights(bucket).unwrap();
                let updates =
                    if self.spec.mode == Mode::Synchronous { self.spec.steps } else { self.spec.total() };
                assert_eq!(step, updates, "seed {}, bucket {bucket}: one update each", self.seed);
            }
        }
    }
}
