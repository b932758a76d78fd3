//! Whole jobs in virtual time: coordinator, servers and workers that die, sleep, are cut off and come back, over a network
//! that loses and repeats messages. What a seed does, it does again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use consort_base::Philox;
use consort_collectives::link;
use consort_model::train::Loss;
use consort_tensor::train::exact::Grid;
use consort_tensor::{Cpu, Pool};

use super::cluster::{Change, ServerId};
use super::coordinator::{Coordinator, Event};
use super::op::{Op, Outcome, Push, Terms};
use super::progress::{Claim, Grant, Happened, Verdict};
use super::replica::{Held, Replica, copy_hash};
use super::spec::tests::spec;
use super::spec::{Aggregate, Mode, Replication, Spec};
use super::wire::Report;

/// What goes wrong in a world.
#[derive(Clone, Copy, Default)]
struct Weather {
    /// A message is lost, or repeated later: each one time in so many.
    loses_one_in: u64,
    /// Servers die, sleep or are cut off about every so many ms.
    servers_ms: u64,
    /// So do workers.
    workers_ms: u64,
    /// A primary talks to its backup one time in so many that it could; 0: always.
    lags: u64,
}

const STORM: Weather = Weather { loses_one_in: 20, servers_ms: 150, workers_ms: 200, lags: 0 };

#[derive(Default)]
struct Server {
    dead: bool,
    asleep_until: u64,
    cut_until: u64,
    id: Option<ServerId>,
    replicas: BTreeMap<usize, Replica>,
    copied: BTreeMap<usize, u64>,
    back_at: u64,
}

#[derive(Default)]
struct Worker {
    dead: bool,
    asleep_until: u64,
    back_at: u64,
    id: Option<u64>,
    slow: u64,
    busy_until: u64,
    claim: Option<Claim>,
    weights: Vec<Vec<f32>>,
    /// Epoch in which each bucket was acknowledged.
    acknowledged: BTreeMap<usize, u64>,
    /// A push that is not acknowledged: bucket, server, and the log that must be safe.
    waiting: Option<(usize, usize, u64)>,
}

struct World {
    seed: u64,
    rng: Philox,
    pool: Pool,
    spec: Arc<Spec>,
    now: u64,
    weather: Weather,
    coordinator: Coordinator,
    servers: Vec<Server>,
    workers: Vec<Worker>,
    loaded: bool,
    /// Pushes that come again, or come late.
    late: Vec<(usize, usize, Op, Arc<Vec<u8>>)>,
    events: Vec<Event>,
    largest_spread: u64,
}

/// A gradient that depends on the weights, the group and the place; step 3's are far larger than those before.
fn gradient(weights: &[f32], group: u64, bucket: usize) -> Vec<f32> {
    let mut rng = Philox::new(group, bucket as u64);
    let size = 10f32.powi((group % 3) as i32 + if group / 4 == 3 { 4 } else { 0 });
    weights.iter().map(|w| (rng.unit() as f32 - 0.45) * size + 0.1 * w).collect()
}

impl World {
    fn new(seed: u64, spec: Spec, servers: usize, workers: usize, weather: Weather) -> World {
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
            late: Vec::new(),
            events: Vec::new(),
            largest_spread: 0,
        }
    }

    fn time(&self) -> Duration {
        Duration::from_millis(self.now)
    }

    fn lost(&mut self) -> bool {
        self.weather.loses_one_in > 0 && self.rng.below(self.weather.loses_one_in) == 0
    }

    /// The server that has this address, which is its number, if it can hear anybody.
    fn reach(&self, address: &str) -> Option<usize> {
        let index: usize = address.parse().ok()?;
        let server = &self.servers[index];
        (!server.dead && server.asleep_until <= self.now).then_some(index)
    }

    /// Runs to the end.
    fn run(&mut self) {
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
    fn dump(&self) -> String {
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
    fn settled(&self) -> bool {
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

    fn check(&mut self) {
        if let Mode::Bounded { staleness } = self.spec.mode {
            let clocks: Vec<u64> = self.coordinator.progress().clocks().map(|(_, clock)| clock).collect();
            let spread = clocks.iter().max().unwrap_or(&0) - clocks.iter().min().unwrap_or(&0);
            assert!(spread <= staleness, "seed {}: {spread} apart", self.seed);
            self.largest_spread = self.largest_spread.max(spread);
        }
        assert_eq!(self.coordinator.failed(), None, "seed {}", self.seed);
        let events = self.coordinator.events();
        self.events.extend(events);
    }

    fn misfortune(&mut self) {
        let Weather { servers_ms, workers_ms, .. } = self.weather;
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

    fn server(&mut self, index: usize) {
        let now = self.now;
        if self.servers[index].dead {
            if self.servers[index].back_at > now {
                return;
            }
            self.servers[index] = Server::default();
        }
        if self.servers[index].asleep_until > now {
            return;
        }
        let connected = self.servers[index].cut_until <= now;
        if connected && !self.lost() {
            self.ask_duties(index);
        }
        for shard in 0..self.spec.shards.len() {
            self.replicate(index, shard);
            if connected && !self.lost() {
                self.report(index, shard);
            }
        }
    }

    fn ask_duties(&mut self, index: usize) {
        let time = self.time();
        let Some(id) = self.servers[index].id else {
            let id = self.coordinator.register(time, &index.to_string());
            self.servers[index].id = Some(id);
            return;
        };
        let Some(duties) = self.coordinator.duties(time, id) else {
            // Given up: it begins anew, with nothing.
            self.servers[index] = Server::default();
            return;
        };
        let server = &mut self.servers[index];
        server.replicas.retain(|shard, _| duties.duties.iter().any(|duty| duty.shard == *shard));
        for duty in &duties.duties {
            match server.replicas.get_mut(&duty.shard) {
                Some(replica) => {
                    replica.duty(duty);
                }
                None => {
                    let replica = Replica::new(Arc::clone(&self.spec), duty).unwrap();
                    server.replicas.insert(duty.shard, replica);
                }
            }
        }
        for replica in server.replicas.values_mut() {
            if let Some(decision) = duties.decision.filter(|_| replica.is_primary() && replica.room()) {
                replica.decide(&self.pool, decision);
            }
        }
        for (shard, workers) in duties.fences {
            let Some(replica) = server.replicas.get_mut(&shard).filter(|r| r.is_primary()) else { continue };
            for worker in &workers {
                if replica.room() {
                    replica.change(&self.pool, &Op::Fence { worker: *worker }, &Arc::default());
                }
            }
            let epoch = replica.epoch();
            let fenced: Vec<u64> = workers.into_iter().filter(|w| replica.shard().fences(*w)).collect();
            if replica.safe(replica.shard().log(), true) == Some(true) {
                self.coordinator.report(time, id, shard, epoch, Report::Fenced(fenced));
            }
        }
    }

    fn report(&mut self, index: usize, shard: usize) {
        let time = self.time();
        let server = &mut self.servers[index];
        let (Some(id), Some(replica)) = (server.id, server.replicas.get_mut(&shard)) else { return };
        if !replica.is_primary() {
            return;
        }
        let epoch = replica.epoch();
        if let Some(seen) = replica.untold() {
            self.coordinator.report(time, id, shard, epoch, Report::Promoted(seen));
            replica.told(epoch);
        }
        if replica.in_sync() {
            self.coordinator.report(time, id, shard, epoch, Report::InSync);
        }
        self.coordinator.report(time, id, shard, epoch, Report::Lag(replica.lag()));
        self.coordinator.report(time, id, shard, epoch, Report::Ready(replica.ready()));
    }

    /// One message from a primary to its backup.
    fn replicate(&mut self, index: usize, shard: usize) {
        let Some(replica) = self.servers[index].replicas.get_mut(&shard) else { return };
        let (epoch, Some(address)) = (replica.epoch(), replica.backup().map(str::to_owned)) else { return };
        let copied = self.servers[index].copied.get(&shard) == Some(&epoch);
        if self.lost() || (copied && self.weather.lags > 0 && self.rng.below(self.weather.lags) > 0) {
            return;
        }
        let Some(other) = self.reach(&address).filter(|other| *other != index) else { return };
        let entry = {
            let replica = self.servers[index].replicas.get_mut(&shard).unwrap();
            if copied { replica.next() } else { None }
        };
        let parts = match copied {
            true => None,
            false => self.servers[index].replicas.get_mut(&shard).unwrap().copy(),
        };
        let Some(backup) = self.servers[other].replicas.get_mut(&shard) else { return };
        let held = match (entry, parts) {
            (_, Some(parts)) => {
                let (hash, last) = (copy_hash(&parts), parts.len() - 1);
                let mut held = Held::Gap;
                for (part, message) in parts.into_iter().enumerate() {
                    held = backup.receive(&self.pool, epoch, part, message, (part == last).then_some(&hash));
                }
                held
            }
            (Some(entry), None) => backup.follow(&self.pool, epoch, &entry),
            (None, None) => backup.stands(epoch),
        };
        if entry_lost(&mut self.rng, self.weather) {
            return;
        }
        let server = &mut self.servers[index];
        match held {
            Held::Log(log) => {
                server.copied.insert(shard, epoch);
                server.replicas.get_mut(&shard).unwrap().held(epoch, log);
            }
            Held::Gap => {
                server.copied.remove(&shard);
            }
            Held::Elsewhere(_) => {}
        }
    }

    fn route(&self, bucket: usize) -> Option<(usize, usize)> {
        let shard = self.spec.shards.iter().position(|buckets| buckets.contains(&bucket)).unwrap();
        let route = self.coordinator.cluster().routes().get(shard).cloned()?;
        // Workers follow old routes too, now and then.
        Some((shard, self.reach(&route.address)?))
    }

    fn worker(&mut self, index: usize) {
        let (now, time) = (self.now, self.time());
        let slow = self.workers[index].slow;
        if self.workers[index].dead {
            if self.workers[index].back_at > now {
                return;
            }
            self.workers[index] = Worker { slow, ..Worker::default() };
        }
        if self.workers[index].asleep_until > now {
            return;
        }
        if !self.loaded {
            self.load();
            return;
        }
        let Some(id) = self.workers[index].id else {
            self.workers[index].id = Some(self.coordinator.join(time));
            return;
        };
        if !self.lost() && !self.coordinator.heard(time, id) {
            self.workers[index] = Worker { slow, ..Worker::default() };
            return;
        }
        if self.workers[index].busy_until > now {
            return;
        }
        let Some(claim) = self.workers[index].claim.clone() else {
            if self.lost() {
                return;
            }
            if let Some(Grant::Work(claim)) = self.coordinator.claim(time, id) {
                let worker = &mut self.workers[index];
                (worker.claim, worker.weights) = (Some(claim), Vec::new());
                (worker.acknowledged, worker.waiting) = (BTreeMap::new(), None);
            }
            return;
        };
        let buckets = self.spec.buckets.len();
        if self.workers[index].weights.len() < buckets {
            self.pull(index, &claim);
            return;
        }
        match (0..buckets).find(|bucket| !self.workers[index].acknowledged.contains_key(bucket)) {
            Some(bucket) => self.push(index, id, &claim, bucket),
            None => self.finish(index, id, &claim),
        }
    }

    fn load(&mut self) {
        for bucket in 0..self.spec.buckets.len() {
            let Some((shard, server)) = self.route(bucket) else { return };
            let Some(replica) = self.servers[server].replicas.get_mut(&shard) else { return };
            if !replica.room() {
                return;
            }
            let len = self.spec.buckets[bucket].len;
            let mut values: Vec<f32> = (0..len).map(|i| (i + bucket) as f32 * 0.01 - 0.1).collect();
            values.resize(len * (1 + self.spec.buffers()), 0.0);
            let body = Arc::new(link::bytes(&values).to_vec());
            replica.change(&self.pool, &Op::Load { bucket, step: 0, updates: 0 }, &body);
        }
        let safe = |shard: usize| {
            let server = self.reach(&self.coordinator.cluster().routes().get(shard)?.address)?;
            let replica = self.servers[server].replicas.get(&shard)?;
            Some(replica.shard().loaded() && replica.safe(replica.shard().log(), true)?)
        };
        self.loaded = (0..self.spec.shards.len()).all(|shard| safe(shard) == Some(true));
    }

    fn pull(&mut self, index: usize, claim: &Claim) {
        let bucket = self.workers[index].weights.len();
        if self.lost() {
            return;
        }
        let Some((shard, server)) = self.route(bucket) else { return };
        let Some(replica) = self.servers[server].replicas.get(&shard) else { return };
        let Some((step, weights)) = replica.shard().weights(bucket) else { return };
        let synchronous = self.spec.mode == Mode::Synchronous;
        if (synchronous && step < claim.step)
            || replica.safe(replica.shard().log(), synchronous) != Some(true)
        {
            return;
        }
        if synchronous && step > claim.step {
            // Its step is over: somebody else did it.
            self.workers[index].claim = None;
            return;
        }
        let weights = weights.to_vec();
        let worker = &mut self.workers[index];
        worker.weights.push(weights);
        if worker.weights.len() == self.spec.buckets.len() {
            worker.busy_until = self.now + 5 * worker.slow;
        }
    }

    fn push(&mut self, index: usize, id: u64, claim: &Claim, bucket: usize) {
        if let Some((waiting, server, log)) = self.workers[index].waiting {
            let shard = self.spec.shards.iter().position(|buckets| buckets.contains(&bucket)).unwrap();
            let replica = self.servers[server].replicas.get(&shard).filter(|_| waiting == bucket);
            match replica.and_then(|replica| Some((replica.safe(log, false)?, replica.epoch()))) {
                Some((true, epoch)) => {
                    self.workers[index].waiting = None;
                    if !self.lost() {
                        self.workers[index].acknowledged.insert(bucket, epoch);
                    }
                }
                Some((false, _)) => {
                    // It gives up waiting now and then, and sends again.
                    if self.rng.below(40) == 0 {
                        self.workers[index].waiting = None;
                    }
                }
                None => self.workers[index].waiting = None,
            }
            return;
        }
        let values = gradient(&self.workers[index].weights[bucket], claim.group, bucket);
        let (terms, body) = match (self.spec.mode, self.spec.aggregate) {
            (Mode::Synchronous, Aggregate::Mean) => {
                let mut sums = vec![0i64; values.len()];
                let exponent = claim.exponents[bucket];
                let largest = Grid::from_exponent(exponent).add(&self.pool, &values, &mut sums).to_bits();
                (Terms::Sums { exponent, largest }, link::bytes(&sums).to_vec())
            }
            _ => (Terms::Gradient { scale: 0.1.into() }, link::bytes(&values).to_vec()),
        };
        let op = Op::Push(Push { worker: id, group: claim.group, attempt: claim.attempt, bucket, terms });
        let body = Arc::new(body);
        let Some((shard, server)) = self.route(bucket) else { return };
        if self.lost() {
            self.late.push((shard, server, op, body));
            return;
        }
        let Some(replica) = self.servers[server].replicas.get_mut(&shard) else { return };
        if !replica.room() {
            return;
        }
        match replica.change(&self.pool, &op, &body) {
            Some((Outcome::Refused(_), _)) => {
                // Given up, or it will be now: it comes back as new.
                let slow = self.workers[index].slow;
                self.workers[index] = Worker { slow, ..Worker::default() };
                self.coordinator.worker_gone(id);
            }
            Some((_, log)) => self.workers[index].waiting = Some((bucket, server, log)),
            None => {}
        }
        if self.lost() {
            self.late.push((shard, server, op, body));
        }
    }

    /// What the network kept arrives after all.
    fn deliver_late(&mut self) {
        if self.late.is_empty() || self.rng.below(30) != 0 {
            return;
        }
        let place = self.rng.below(self.late.len() as u64) as usize;
        let (shard, server, op, body) = self.late.swap_remove(place);
        if self.servers[server].dead || self.servers[server].asleep_until > self.now {
            return;
        }
        if let Some(replica) = self.servers[server].replicas.get_mut(&shard).filter(|replica| replica.room())
        {
            replica.change(&self.pool, &op, &body);
        }
    }

    fn finish(&mut self, index: usize, id: u64, claim: &Claim) {
        if self.lost() {
            return;
        }
        let time = self.time();
        let epoch =
            |shard: &Vec<usize>| shard.iter().map(|b| self.workers[index].acknowledged[b]).min().unwrap();
        let epochs: Vec<u64> = self.spec.shards.iter().map(epoch).collect();
        let losses = vec![Loss { sum: claim.group as f64, weight: 10.0, rows: 10 }];
        let verdict = self.coordinator.finish(time, id, (claim.group, claim.attempt), &epochs, losses);
        let worker = &mut self.workers[index];
        match verdict {
            Some(Verdict::Again) => worker.acknowledged.clear(),
            _ => worker.claim = None,
        }
    }

    /// The weights of all buckets, from their primaries.
    fn weights(&self) -> Vec<Vec<u32>> {
        (0..self.spec.buckets.len())
            .map(|bucket| {
                let (shard, server) = self.route(bucket).unwrap();
                let (_, weights) = self.servers[server].replicas[&shard].shard().weights(bucket).unwrap();
                weights.iter().map(|w| w.to_bits()).collect()
            })
            .collect()
    }

    fn count(&self, of: impl Fn(&Event) -> bool) -> usize {
        self.events.iter().filter(|event| of(event)).count()
    }

    fn failovers(&self) -> usize {
        self.count(|event| matches!(event, Event::Servers(Change::FailedOver { .. })))
    }

    fn lost_pushes(&self) -> u64 {
        let lost = |event: &Event| match event {
            Event::Work(Happened::LostPushes { pushes, .. }) => *pushes,
            _ => 0,
        };
        self.events.iter().map(lost).sum()
    }

    /// Every group counts once in every bucket.
    fn each_once(&self) {
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

fn entry_lost(rng: &mut Philox, weather: Weather) -> bool {
    weather.loses_one_in > 0 && rng.below(weather.loses_one_in) == 0
}

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
