//! What a server does when it has its turn.

use std::sync::Arc;

use consort_base::Philox;

use super::world::{Server, Weather, World};
use crate::server::op::Op;
use crate::server::replica::{Held, Replica, copy_hash};
use crate::server::wire::Report;

impl World {
    pub(super) fn server(&mut self, index: usize) {
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
            let id = self.coordinator.register(time, &index.to_string(), "");
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
}

fn entry_lost(rng: &mut Philox, weather: Weather) -> bool {
    weather.loses_one_in > 0 && rng.below(weather.loses_one_in) == 0
}
