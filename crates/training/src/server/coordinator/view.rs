//! Who waits for whom, for a person who asks: a picture of the coordinator at one moment.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Coordinator;
use crate::server::cluster::ServerId;
use crate::server::progress::WorkerId;

/// The picture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Workers that live.
    pub workers: Vec<WorkerView>,
    /// The shards, in order.
    pub shards: Vec<ShardView>,
    /// Servers that live.
    pub servers: usize,
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerView {
    /// Its number.
    pub worker: WorkerId,
    /// What people call it.
    pub name: String,
    /// Groups that it has done, counted from where it came.
    pub clock: u64,
    /// For how long it has given no sign of life, in milliseconds.
    pub silent_ms: u64,
    /// The group that it has, and for how long, in milliseconds: it computes, or its pushes are on their way.
    pub computes: Option<(u64, u64)>,
    /// What it waits for, and for how long, in milliseconds.
    pub waits: Option<(Waits, u64)>,
}

/// What a worker with nothing to do waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Waits {
    /// For the job to begin.
    Workers {
        /// Workers that are there.
        there: u64,
        /// Workers that the beginning waits for.
        expected: u64,
    },
    /// For a checkpoint, or the end: nothing more is handed out before it.
    Held {
        /// Who still has groups of before.
        by: Vec<WorkerId>,
    },
    /// For the slowest: it is as far ahead as it may be.
    Slowest {
        /// The slowest.
        by: Vec<WorkerId>,
        /// Groups.
        behind: u64,
    },
    /// For the last groups of the step, or of the job where nobody waits for a step.
    Groups {
        /// Who has them.
        by: Vec<WorkerId>,
        /// It has given its share of gradients that are compared.
        shared: bool,
    },
    /// For the first weights, which servers get.
    Weights,
    /// For servers: a shard has nobody yet, or somebody new who hasn't said what he has.
    Servers,
}

/// A shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardView {
    /// Its epoch.
    pub epoch: u64,
    /// Its primary's name.
    pub primary: Option<String>,
    /// For how long its primary has given no sign of life, in milliseconds.
    pub silent_ms: u64,
    /// Its backup's name.
    pub backup: Option<String>,
    /// The backup holds everything.
    pub in_sync: bool,
    /// Its primary is new and hasn't said yet what it has.
    pub promoting: bool,
    /// Changes that the backup lacks, as the primary last said.
    pub lag: u64,
}

impl Coordinator {
    /// The picture of this moment.
    pub fn view(&self, now: Duration) -> View {
        let servers = !self.cluster.formed() || !self.unheard.is_empty();
        let mut workers = self.progress.view(now);
        for worker in &mut workers {
            worker.name = self.worker_name(worker.worker);
            if let Some((waits, _)) = worker.waits.as_mut().filter(|_| servers || !self.begun()) {
                *waits = if servers { Waits::Servers } else { Waits::Weights };
            }
        }
        let shard = |(shard, placement): (usize, &crate::server::Placement)| {
            let name = |server: Option<ServerId>| server.map(|server| self.server_name(server));
            let silent = placement.primary.and_then(|primary| self.cluster.last_heard(primary));
            ShardView {
                epoch: placement.epoch,
                primary: name(placement.primary),
                silent_ms: silent.map_or(0, |heard| now.saturating_sub(heard).as_millis() as u64),
                backup: name(placement.backup),
                in_sync: placement.in_sync,
                promoting: self.unheard.contains_key(&shard),
                lag: self.lags.get(&shard).copied().unwrap_or(0),
            }
        };
        View {
            workers,
            shards: self.cluster.placements().iter().enumerate().map(shard).collect(),
            servers: self.cluster.servers(),
        }
    }
}
