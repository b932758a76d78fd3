//! Which server holds which shard: a pure state machine.
//!
//! A shard has a primary and a backup, and an *epoch* that grows with every change of either. Who has an old epoch is
//! refused by whoever has a new one: a primary that slept through its own replacement can't get a backup to agree, and so
//! can't acknowledge anything. The rules, which are those of primary and backup with a master beside them (vertical
//! Paxos II without the reconfiguration of logs; Lamport, Malkhi and Zhou 2009):
//!
//! - A backup counts as one when its primary says that it holds everything (`in_sync`). Until then it is never promoted.
//! - From then on the primary acknowledges nothing that the backup lacks, and can't decide otherwise by itself: it says
//!   that it suspects its backup, and goes on alone only in the epoch that follows.
//! - A server that is silent for a lease, or whose connection closes, is lost. A lost primary's backup takes its place; a
//!   shard without a copy in sync is lost, and the job with it: there is a checkpoint for that. So silence alone doesn't
//!   lose the only holder of a shard: nobody could take its place, and it may only be slow.
//! - A server that has room becomes the backup of a shard without one.
//! - Until the job begins ([`Cluster::begin`]) the launcher has the first weights, so nothing is lost with any server: a shard
//!   without a copy goes to whoever is there, and is loaded anew.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A server's number. Never used twice: one that was given up comes back as new.
pub type ServerId = u64;

/// Where a shard is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Grows with every change.
    pub epoch: u64,
    /// The epoch in which its primary became that.
    pub since: u64,
    /// Who answers for it.
    pub primary: Option<ServerId>,
    /// Who could take over, or is about to be able to.
    pub backup: Option<ServerId>,
    /// The backup holds all that was acknowledged.
    pub in_sync: bool,
}

/// What a server is to do for a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Duty {
    /// The shard.
    pub shard: usize,
    /// Its epoch.
    pub epoch: u64,
    /// Primary, or else backup.
    pub primary: bool,
    /// A primary's backup.
    pub backup: Option<String>,
}

/// Where workers find a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Its epoch.
    pub epoch: u64,
    /// Its primary.
    pub address: String,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A backup took over.
    FailedOver {
        /// The shard.
        shard: usize,
        /// Its new epoch.
        epoch: u64,
        /// Who was lost.
        from: ServerId,
        /// Who took over.
        to: ServerId,
    },
    /// A shard has no backup that holds everything.
    Unprotected {
        /// The shard.
        shard: usize,
        /// Its epoch.
        epoch: u64,
    },
    /// A shard's backup holds everything.
    Protected {
        /// The shard.
        shard: usize,
        /// Its epoch.
        epoch: u64,
        /// The backup.
        backup: ServerId,
    },
    /// A shard's copies are gone before the job began: another server gets its first weights.
    Emptied {
        /// The shard.
        shard: usize,
        /// Its new epoch.
        epoch: u64,
        /// Who was lost.
        from: ServerId,
    },
    /// The last copy of a shard is gone.
    Lost {
        /// The shard.
        shard: usize,
    },
}

struct Server {
    address: String,
    heard: Duration,
}

/// The servers and their shards. Times are since any fixed beginning.
pub struct Cluster {
    lease: Duration,
    /// Servers that the beginning waits for.
    expected: usize,
    next: ServerId,
    servers: BTreeMap<ServerId, Server>,
    shards: Vec<Placement>,
    formed: bool,
    begun: bool,
}

impl Cluster {
    /// `shards` shards that begin when `expected` servers are there.
    pub fn new(shards: usize, expected: usize, lease: Duration) -> Cluster {
        Cluster {
            lease,
            expected: expected.max(1),
            next: 1,
            servers: BTreeMap::new(),
            shards: vec![Placement::default(); shards],
            formed: false,
            begun: false,
        }
    }

    /// The shards have their first weights, and change from now on: what is lost can't be loaded again.
    pub fn begin(&mut self) {
        self.begun = true;
    }

    /// Whether they have.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// Whether every shard has a backup that holds everything; where one server is all there ever are, there is none to wait
    /// for.
    pub fn protected(&self) -> bool {
        self.formed && (self.expected == 1 || self.shards.iter().all(|p| p.primary.is_some() && p.in_sync))
    }

    /// Where the shards are.
    pub fn placements(&self) -> &[Placement] {
        &self.shards
    }

    /// Whether every shard was given to somebody.
    pub fn formed(&self) -> bool {
        self.formed
    }

    /// Servers that live.
    pub fn servers(&self) -> usize {
        self.servers.len()
    }

    /// When a server last gave a sign of life; `None`: it was given up.
    pub fn last_heard(&self, id: ServerId) -> Option<Duration> {
        self.servers.get(&id).map(|server| server.heard)
    }

    /// Nobody could be heard for so long: that silence is not the servers'.
    pub fn excuse(&mut self, now: Duration, silence: Duration) {
        self.servers.values_mut().for_each(|server| server.heard = now.min(server.heard + silence));
    }

    /// A server that listens at `address` came.
    pub fn register(&mut self, now: Duration, address: &str) -> ServerId {
        let id = self.next;
        self.next += 1;
        self.servers.insert(id, Server { address: address.to_owned(), heard: now });
        if !self.formed && self.servers.len() >= self.expected {
            let all: Vec<ServerId> = self.servers.keys().copied().collect();
            for (shard, placement) in self.shards.iter_mut().enumerate() {
                (placement.epoch, placement.since) = (1, 1);
                placement.primary = Some(all[shard % all.len()]);
            }
            self.formed = true;
        }
        self.fill();
        id
    }

    /// A server gave a sign of life; `false`: it was given up, and has to come back as new.
    pub fn heard(&mut self, now: Duration, id: ServerId) -> bool {
        self.servers.get_mut(&id).map(|server| server.heard = now).is_some()
    }

    /// Time passed: who was silent for the lease is lost, unless nobody else has what it holds.
    pub fn tick(&mut self, now: Duration) -> Vec<Change> {
        let late = |server: &Server| now.saturating_sub(server.heard) > self.lease;
        let late: Vec<ServerId> = self.servers.iter().filter(|(_, s)| late(s)).map(|(id, _)| *id).collect();
        let mut changes = Vec::new();
        for id in late {
            // One after the other: a loss may make the next one the only holder.
            if !self.only_holder(id) {
                changes.extend(self.gone(id));
            }
        }
        changes
    }

    /// Whether a shard would be lost with this server.
    fn only_holder(&self, id: ServerId) -> bool {
        self.begun && self.shards.iter().any(|p| p.primary == Some(id) && !(p.in_sync && p.backup.is_some()))
    }

    /// A server is lost.
    pub fn gone(&mut self, id: ServerId) -> Vec<Change> {
        if self.servers.remove(&id).is_none() {
            return Vec::new();
        }
        let mut changes = Vec::new();
        for (shard, placement) in self.shards.iter_mut().enumerate() {
            if placement.backup == Some(id) {
                (placement.backup, placement.in_sync) = (None, false);
                placement.epoch += 1;
                changes.push(Change::Unprotected { shard, epoch: placement.epoch });
            } else if placement.primary == Some(id) {
                placement.epoch += 1;
                let complete = placement.in_sync;
                placement.primary = placement.backup.take().filter(|_| complete || !self.begun);
                (placement.in_sync, placement.since) = (false, placement.epoch);
                let epoch = placement.epoch;
                changes.push(match placement.primary {
                    Some(to) if complete => Change::FailedOver { shard, epoch, from: id, to },
                    _ if !self.begun => Change::Emptied { shard, epoch, from: id },
                    _ => Change::Lost { shard },
                });
            }
        }
        self.fill();
        changes
    }

    /// A primary says that its backup holds everything.
    pub fn in_sync(&mut self, id: ServerId, shard: usize, epoch: u64) -> Vec<Change> {
        match self.current(id, shard, epoch) {
            Some(Placement { backup: Some(backup), in_sync, .. }) if !*in_sync => {
                *in_sync = true;
                vec![Change::Protected { shard, epoch, backup: *backup }]
            }
            _ => Vec::new(),
        }
    }

    /// A primary can't reach its backup. Another one is named, or the same again if there is no other: it then gets a
    /// new copy.
    pub fn suspect(&mut self, id: ServerId, shard: usize, epoch: u64) -> Vec<Change> {
        let Some(placement) = self.current(id, shard, epoch) else { return Vec::new() };
        let Some(suspected) = placement.backup.take() else { return Vec::new() };
        placement.in_sync = false;
        placement.epoch += 1;
        let changes = vec![Change::Unprotected { shard, epoch: placement.epoch }];
        let other = self.candidate(shard, Some(suspected)).or_else(|| self.candidate(shard, None));
        self.shards[shard].backup = other;
        self.fill();
        changes
    }

    /// Whether this server is the shard's primary, and was in this epoch: its backup may have changed since.
    pub fn is_primary(&self, id: ServerId, shard: usize, epoch: u64) -> bool {
        let held = |p: &Placement| p.primary == Some(id) && (p.since..=p.epoch).contains(&epoch);
        self.shards.get(shard).is_some_and(held)
    }

    fn current(&mut self, id: ServerId, shard: usize, epoch: u64) -> Option<&mut Placement> {
        self.shards.get_mut(shard).filter(|p| p.epoch == epoch && p.primary == Some(id))
    }

    /// Gives shards without a backup one, where there is somebody; before the beginning, those without anybody a primary.
    fn fill(&mut self) {
        for shard in 0..self.shards.len() {
            if self.formed
                && !self.begun
                && self.shards[shard].primary.is_none()
                && let Some(primary) = self.candidate(shard, None)
            {
                let placement = &mut self.shards[shard];
                placement.epoch += 1;
                (placement.primary, placement.since) = (Some(primary), placement.epoch);
            }
        }
        let bare: Vec<usize> = (0..self.shards.len())
            .filter(|&s| self.shards[s].primary.is_some() && self.shards[s].backup.is_none())
            .collect();
        for shard in bare {
            if let Some(backup) = self.candidate(shard, None) {
                let placement = &mut self.shards[shard];
                (placement.backup, placement.in_sync) = (Some(backup), false);
                placement.epoch += 1;
            }
        }
    }

    /// The server with the fewest duties that is not this shard's primary, nor `but`.
    fn candidate(&self, shard: usize, but: Option<ServerId>) -> Option<ServerId> {
        let primary = self.shards[shard].primary;
        let duties = |id: ServerId| {
            self.shards.iter().filter(|p| p.primary == Some(id) || p.backup == Some(id)).count()
        };
        self.servers
            .keys()
            .copied()
            .filter(|&id| Some(id) != primary && Some(id) != but)
            .min_by_key(|&id| duties(id))
    }

    /// What a server is to do.
    pub fn duties(&self, id: ServerId) -> Vec<Duty> {
        let own = |(shard, placement): (usize, &Placement)| {
            let primary = placement.primary == Some(id);
            let backup = placement.backup.and_then(|b| self.servers.get(&b)).map(|s| s.address.clone());
            (primary || placement.backup == Some(id)).then_some(Duty {
                shard,
                epoch: placement.epoch,
                primary,
                backup: backup.filter(|_| primary),
            })
        };
        self.shards.iter().enumerate().filter_map(own).collect()
    }

    /// Where workers find the shards; empty until all have a primary.
    pub fn routes(&self) -> Vec<Route> {
        let route = |placement: &Placement| {
            let address = self.servers.get(&placement.primary?)?.address.clone();
            Some(Route { epoch: placement.epoch, address })
        };
        self.shards.iter().map(route).collect::<Option<_>>().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn pair() -> Cluster {
        let mut cluster = Cluster::new(2, 2, at(100));
        assert_eq!(cluster.register(at(0), "a"), 1);
        assert!(!cluster.formed() && cluster.routes().is_empty());
        assert_eq!(cluster.register(at(0), "b"), 2);
        cluster
    }

    /// A server that was killed while the first weights were on their way was the end of the job.
    #[test]
    fn before_the_beginning_nothing_is_lost_with_a_server() {
        let mut cluster = pair();
        let epoch = cluster.placements()[0].epoch;
        let changes = cluster.gone(1);
        assert_eq!(changes[0], Change::Emptied { shard: 0, epoch: epoch + 1, from: 1 });
        assert_eq!((cluster.placements()[0].primary, cluster.placements()[0].since), (Some(2), epoch + 1));
        // The other one is silent, and nobody is left: who comes gets everything.
        assert_eq!(cluster.tick(at(101)).len(), 2);
        assert!(cluster.routes().is_empty() && !cluster.protected());
        assert_eq!(cluster.register(at(102), "c"), 3);
        assert!(cluster.placements().iter().all(|p| p.primary == Some(3) && p.since > epoch));
        assert_eq!(cluster.register(at(103), "d"), 4);
        for shard in 0..2 {
            let epoch = cluster.placements()[shard].epoch;
            assert_eq!(cluster.in_sync(3, shard, epoch), [Change::Protected { shard, epoch, backup: 4 }]);
        }
        assert!(cluster.protected());
        // A backup that is complete takes over as ever.
        assert!(matches!(cluster.gone(3)[0], Change::FailedOver { shard: 0, to: 4, .. }));
        cluster.begin();
        assert_eq!(cluster.gone(4), [Change::Lost { shard: 0 }, Change::Lost { shard: 1 }]);
    }

    #[test]
    fn each_is_primary_of_one_and_backup_of_the_other() {
        let cluster = pair();
        assert_eq!(
            cluster.duties(1),
            [
                Duty { shard: 0, epoch: 2, primary: true, backup: Some("b".into()) },
                Duty { shard: 1, epoch: 2, primary: false, backup: None }
            ]
        );
        assert_eq!(cluster.routes()[1], Route { epoch: 2, address: "b".into() });
    }

    #[test]
    fn a_backup_takes_over_only_when_it_holds_everything() {
        let mut cluster = pair();
        cluster.begin();
        let epoch = cluster.placements()[0].epoch;
        assert_eq!(cluster.in_sync(2, 0, epoch), [], "not the primary");
        assert_eq!(cluster.in_sync(1, 0, epoch - 1), [], "an old epoch");
        assert_eq!(cluster.in_sync(1, 0, epoch), [Change::Protected { shard: 0, epoch, backup: 2 }]);
        assert!(cluster.heard(at(90), 2));
        assert_eq!(cluster.tick(at(100)), []);
        // Shard 1's backup was not yet in sync, but its primary lives.
        assert_eq!(
            cluster.tick(at(101)),
            [
                Change::FailedOver { shard: 0, epoch: epoch + 1, from: 1, to: 2 },
                Change::Unprotected { shard: 1, epoch: epoch + 1 }
            ]
        );
        assert!(!cluster.heard(at(102), 1), "who was given up comes back as new");
        assert_eq!(cluster.register(at(102), "a"), 3);
        assert_eq!(cluster.duties(3).len(), 2, "as the backup of both");
        assert!(!cluster.placements()[0].in_sync);
        assert_eq!(
            cluster.gone(2),
            [Change::Lost { shard: 0 }, Change::Lost { shard: 1 }],
            "the newcomer had nothing yet"
        );
        assert!(cluster.routes().is_empty());
    }

    #[test]
    fn the_only_holder_of_a_shard_is_waited_for() {
        let mut cluster = pair();
        cluster.begin();
        for shard in 0..2 {
            let (epoch, primary) = (cluster.placements()[shard].epoch, shard as u64 + 1);
            assert_eq!(cluster.in_sync(primary, shard, epoch).len(), 1);
        }
        // Both hang: one of them is given up, and then the other has the only copies.
        let changes = cluster.tick(at(500));
        assert!(
            matches!(changes[..], [Change::FailedOver { to: 2, .. }, Change::Unprotected { .. }]),
            "{changes:?}"
        );
        assert_eq!(cluster.tick(at(5000)), []);
        assert!(cluster.heard(at(5001), 2) && !cluster.heard(at(5001), 1));
        assert_eq!(cluster.register(at(5002), "a"), 3);
        let epoch = cluster.placements()[0].epoch;
        assert_eq!(cluster.in_sync(2, 0, epoch).len(), 1, "it goes on as the primary of both");
        // Its end is another thing than its silence.
        assert!(cluster.gone(2).contains(&Change::Lost { shard: 1 }));
    }

    #[test]
    fn a_suspected_backup_is_replaced_in_a_new_epoch() {
        let mut cluster = pair();
        let epoch = cluster.placements()[0].epoch;
        cluster.in_sync(1, 0, epoch);
        cluster.register(at(1), "c");
        assert_eq!(cluster.suspect(1, 0, epoch), [Change::Unprotected { shard: 0, epoch: epoch + 1 }]);
        assert_eq!(cluster.placements()[0].backup, Some(3));
        assert_eq!(cluster.suspect(1, 0, epoch), [], "said again, of an epoch that is over");
        assert!(cluster.is_primary(1, 0, epoch + 1) && cluster.is_primary(1, 0, epoch));
        assert!(!cluster.is_primary(1, 0, epoch + 2) && !cluster.is_primary(3, 0, epoch + 1));
    }
}
