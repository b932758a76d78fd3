//! What a worker does when it has its turn; what the network kept of it arrives late.

use std::collections::BTreeMap;
use std::sync::Arc;

use consort_base::Philox;
use consort_collectives::link;
use consort_model::train::Loss;
use consort_tensor::train::exact::Grid;

use super::world::{Worker, World};
use crate::server::coordinator::Start;
use crate::server::op::{Op, Outcome, Push, Terms};
use crate::server::progress::{Claim, Grant, Verdict};
use crate::server::spec::{Aggregate, Mode};
use crate::server::wire::Effort;

/// A gradient that depends on the weights, the group and the place; step 3's are far larger than those before.
fn gradient(weights: &[f32], group: u64, bucket: usize) -> Vec<f32> {
    let mut rng = Philox::new(group, bucket as u64);
    let size = 10f32.powi((group % 3) as i32 + if group / 4 == 3 { 4 } else { 0 });
    weights.iter().map(|w| (rng.unit() as f32 - 0.45) * size + 0.1 * w).collect()
}

impl World {
    pub(super) fn worker(&mut self, index: usize) {
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
            self.workers[index].id = Some(self.coordinator.join(time, ""));
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

    /// The launcher's part: one bucket at a time, and all again where a server died with its part.
    fn load(&mut self) {
        let bucket = self.load.len();
        let Some(len) = self.spec.buckets.get(bucket).map(|bucket| bucket.len) else {
            let of = |shard: &Vec<usize>| shard.iter().map(|bucket| self.load[*bucket]).min().unwrap();
            let epochs: Vec<u64> = self.spec.shards.iter().map(of).collect();
            match self.coordinator.begin(&epochs, self.weather.bare) {
                Start::Begun => self.loaded = true,
                Start::Wait => {}
                Start::Reload => {
                    self.reloads += 1;
                    self.load.clear();
                }
            }
            return;
        };
        let Some((shard, server)) = self.route(bucket) else { return };
        let Some(replica) = self.servers[server].replicas.get_mut(&shard) else { return };
        if !replica.room() {
            return;
        }
        let mut values: Vec<f32> = (0..len).map(|i| (i + bucket) as f32 * 0.01 - 0.1).collect();
        values.resize(len * (1 + self.spec.buffers()), 0.0);
        let body = Arc::new(link::bytes(&values).to_vec());
        let op = Op::Load { bucket, step: 0, updates: 0 };
        let Some((_, log)) = replica.change(&self.pool, &op, &body) else { return };
        if replica.safe(log, true) == Some(true) {
            self.load.push(replica.epoch());
        }
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
    pub(super) fn deliver_late(&mut self) {
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
        let (group, effort) = ((claim.group, claim.attempt), Effort::default());
        let verdict = self.coordinator.finish(time, id, group, &epochs, losses, effort);
        let worker = &mut self.workers[index];
        match verdict {
            Some(Verdict::Again) => worker.acknowledged.clear(),
            _ => worker.claim = None,
        }
    }
}
