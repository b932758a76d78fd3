//! What processes of the job say to each other, as JSON heads of [`consort_collectives::link`] messages; numbers travel
//! in the bodies.

use consort_model::train::Loss;
use serde::{Deserialize, Serialize};

use super::cluster::{Duty, Route, ServerId};
use super::op::{Bits, Decision, Op, Outcome, Ready};
use super::progress::{Grant, Verdict, WorkerId};
use super::seen::Seen;
use super::spec::Spec;
use crate::Error;

/// What a server is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Duties {
    /// The coordinator's version; ask again with it to hear of the next.
    pub version: u64,
    /// For which shards.
    pub duties: Vec<Duty>,
    /// Workers to fence, by shard.
    pub fences: Vec<(usize, Vec<WorkerId>)>,
    /// The last decision.
    pub decision: Option<Decision>,
}

/// What a primary says of its shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// These buckets are complete, and the backup holds them.
    Ready(Vec<Ready>),
    /// These workers are fenced, and the backup knows.
    Fenced(Vec<WorkerId>),
    /// It is the primary now, and has seen these groups: (bucket, try, groups).
    Promoted(Vec<(usize, u32, Seen)>),
    /// The backup holds everything.
    InSync,
    /// The backup can't be reached.
    Suspect,
    /// Changes that the backup lacks.
    Lag(u64),
    /// Somebody sent what makes no sense.
    Refused {
        /// Who says that it is this worker.
        worker: Option<WorkerId>,
        /// Where it is.
        peer: String,
        /// Why.
        reason: String,
    },
}

/// What a group took, on its worker: for people alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effort {
    /// Forward and backward, in microseconds.
    pub computed_us: u64,
    /// From the first push to the last acknowledgement, in microseconds.
    pub carried_us: u64,
    /// Of it, with nothing left to compute.
    pub exposed_us: u64,
    /// The mean gradient's length, where pushes move the weights at once.
    pub norm: Bits,
}

/// The loss of a micro-batch, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LossBits(Bits, Bits, u64);

impl From<Loss> for LossBits {
    fn from(loss: Loss) -> LossBits {
        LossBits(loss.sum.into(), loss.weight.into(), loss.rows as u64)
    }
}

impl From<LossBits> for Loss {
    fn from(LossBits(sum, weight, rows): LossBits) -> Loss {
        Loss { sum: sum.get(), weight: weight.get(), rows: rows as usize }
    }
}

/// A question to the coordinator.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    /// What job is this?
    Job,
    /// A server that listens here comes; what people call it.
    Register { address: String, name: String },
    /// A server waits for another version than this one.
    Duty { server: ServerId, version: u64 },
    /// A primary reports.
    Report { server: ServerId, shard: usize, epoch: u64, report: Report },
    /// A worker comes; what people call it.
    Join { name: String },
    /// A worker lives.
    Beat { worker: WorkerId },
    /// A worker has nothing to do.
    Claim { worker: WorkerId },
    /// A worker's group is done.
    Finish {
        worker: WorkerId,
        group: u64,
        attempt: u32,
        epochs: Vec<u64>,
        losses: Vec<LossBits>,
        effort: Effort,
    },
    /// A worker's group came to what is no number.
    NotFinite { worker: WorkerId, group: u64, attempt: u32 },
    /// Where are the shards?
    Routes,
}

/// The coordinator's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Told {
    /// The job.
    Job { spec: Spec },
    /// A server's number.
    Registered { server: ServerId },
    /// A server's duties.
    Duties(Duties),
    /// A worker's number.
    Joined { worker: WorkerId },
    /// What to compute.
    Grant(Grant),
    /// What became of a group.
    Verdict(Verdict),
    /// Where the shards are; empty until they are somewhere.
    Routes(Vec<Route>),
    /// Understood.
    Fine,
    /// Given up: come back as new.
    Unknown,
    /// The job can't go on.
    Failed { reason: String },
    /// The job is over.
    Ended,
}

/// A question to a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// Change a shard, as its primary.
    Change { shard: usize, epoch: u64, op: Op },
    /// A bucket's weights after at least so many steps.
    Pull { shard: usize, epoch: u64, bucket: usize, step: u64 },
    /// A bucket's weights and optimizer state, after at least so many steps.
    State { shard: usize, epoch: u64, bucket: usize, step: u64 },
    /// Where a backup stands.
    Probe { shard: usize, epoch: u64 },
    /// The next entry of the log, to the backup.
    Replicate { shard: usize, epoch: u64, log: u64, op: Op },
    /// Part of a copy, to the backup: its own head, and with the last one the hash of all.
    Copy { shard: usize, epoch: u64, part: usize, head: Vec<u8>, hash: Option<String> },
}

/// A server's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// What became of a change, and in which epoch.
    Outcome { epoch: u64, outcome: Outcome },
    /// A bucket's values follow; after so many steps, and updates of the optimizer.
    Values { epoch: u64, step: u64, updates: u64 },
    /// Not yet: ask again.
    Wait,
    /// Not here in this epoch; the epoch here.
    Elsewhere { epoch: u64 },
    /// A backup holds the log up to here.
    Held { log: u64 },
    /// A backup can't take this: it needs a copy.
    Gap,
}

/// A head's bytes. What is said here is always sayable as JSON.
pub(super) fn head<T: Serialize>(message: &T) -> Vec<u8> {
    serde_json::to_vec(message).unwrap_or_default()
}

/// What a head says.
pub(super) fn said<T: for<'de> Deserialize<'de>>(head: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(head).map_err(|e| {
        Error::Server(format!(
            "a process of the job says what makes no sense ({e}): is it of another version?"
        ))
    })
}
