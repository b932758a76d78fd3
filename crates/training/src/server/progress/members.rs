//! Workers that come, live, fall silent and are fenced.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Progress, Worker, WorkerId};

impl Progress {
    pub(super) fn live(&self) -> impl Iterator<Item = (&WorkerId, &Worker)> {
        self.workers.iter().filter(|(_, worker)| worker.unfenced.is_empty())
    }

    pub(super) fn slowest(&self) -> u64 {
        self.workers.values().map(|worker| worker.clock).min().unwrap_or(0)
    }

    /// A worker comes.
    pub fn join(&mut self, now: Duration) -> WorkerId {
        let id = self.next_worker;
        self.next_worker += 1;
        let clock = self.slowest();
        self.workers.insert(id, Worker { heard: now, clock, waits: None, unfenced: BTreeSet::new() });
        id
    }

    /// A worker gave a sign of life; `false`: it was given up, and has to come back as new.
    pub fn heard(&mut self, now: Duration, id: WorkerId) -> bool {
        let worker = self.workers.get_mut(&id).filter(|worker| worker.unfenced.is_empty());
        worker.map(|worker| worker.heard = now).is_some()
    }

    /// Nobody could be heard for so long: that silence is not the workers'.
    pub fn excuse(&mut self, now: Duration, silence: Duration) {
        self.workers.values_mut().for_each(|worker| worker.heard = now.min(worker.heard + silence));
    }

    /// Time passed: who was silent for the lease is lost.
    pub fn tick(&mut self, now: Duration) -> Vec<WorkerId> {
        let lease = self.spec.lease();
        let late = |worker: &Worker| now.saturating_sub(worker.heard) > lease;
        let lost: Vec<WorkerId> = self.live().filter(|(_, w)| late(w)).map(|(id, _)| *id).collect();
        lost.iter().for_each(|&id| self.lose(id));
        lost
    }

    /// A worker is lost: others get its groups.
    pub fn lose(&mut self, id: WorkerId) {
        let shards = (0..self.spec.shards.len()).collect();
        let Some(worker) = self.workers.get_mut(&id).filter(|w| w.unfenced.is_empty()) else { return };
        worker.unfenced = shards;
        self.release(id);
    }

    /// A worker leaves, having nothing on its way to any server.
    pub fn leave(&mut self, id: WorkerId) {
        if self.heard(Duration::ZERO, id) {
            self.workers.remove(&id);
            self.release(id);
        }
    }

    fn release(&mut self, id: WorkerId) {
        self.claimed.retain(|&group, claims| {
            claims.retain(|(worker, _)| *worker != id);
            if claims.is_empty() {
                self.reopened.insert(group);
            }
            !claims.is_empty()
        });
    }

    /// Workers that this shard is to fence.
    pub fn fences(&self, shard: usize) -> Vec<WorkerId> {
        self.workers.iter().filter(|(_, w)| w.unfenced.contains(&shard)).map(|(id, _)| *id).collect()
    }

    /// A shard has fenced a worker.
    pub fn fenced(&mut self, shard: usize, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id)
            && worker.unfenced.remove(&shard)
            && worker.unfenced.is_empty()
        {
            self.workers.remove(&id);
        }
    }
}
