//! Who computes what, and when a step is over: a pure state machine.
//!
//! A *group* is some micro-batches of a step, always the same ones; workers claim groups. A claim ends when the worker
//! says that every server has acknowledged its pushes, or when the worker is lost: then another one gets the group. Who
//! computes a group doesn't matter, because a push is named by its group and a server counts it once. So every sample
//! is applied exactly once, and a worker that is late, dead or back from the dead can be ignored.
//!
//! - *Synchronous*: groups of one step at a time. When all are done and every bucket is complete, the step's norm and
//!   rate are decided for all shards. Where a grid doesn't suit the gradient, the step is done again on another one. A
//!   worker with nothing to do may compute a group that takes long elsewhere (backup workers; Chen et al. 2016).
//! - *Asynchronous*: the next group to whoever asks.
//! - *Bounded*: a worker's clock counts the groups that it has done. A worker may begin if, once done, it would be at most
//!   `staleness` ahead of the slowest. A lost worker counts until every shard has fenced it: what it still sends is
//!   refused by then. Newcomers begin at the slowest clock.

mod claims;
mod members;
mod steps;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use consort_model::train::Loss;
use consort_tensor::train::exact::Grid;
use serde::{Deserialize, Serialize};

pub(super) use self::steps::ATTEMPTS;
use super::op::{Decision, Ready};
use super::seen::Seen;
use super::spec::{Mode, Spec};
use super::wire::Effort;

/// A worker's number. Never used twice.
pub type WorkerId = u64;

/// What a worker is to compute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The group, counted over the job.
    pub group: u64,
    /// Its step.
    pub step: u64,
    /// Which try of the step.
    pub attempt: u32,
    /// The grid of each bucket; none where sums are not exact.
    pub exponents: Vec<i32>,
}

/// What a worker that asks is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grant {
    /// Compute this.
    Work(Claim),
    /// Nothing now.
    Wait,
    /// Nothing any more.
    Finished,
}

/// What became of a group that a worker says is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It counts.
    Accepted,
    /// It counts for nothing: the try is over.
    Over,
    /// A shard has moved meanwhile: push again, then say so again.
    Again,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Happened {
    /// A synchronous step was decided.
    Step {
        /// The step, from 0.
        step: u64,
        /// Its loss.
        loss: Loss,
        /// The mean gradient's length before clipping.
        gradient_norm: f64,
        /// The learning rate.
        learning_rate: f64,
        /// What its groups took.
        spent: Spent,
    },
    /// As many groups as a step has are done, in another mode than the synchronous one.
    Round {
        /// Which, from 0.
        step: u64,
        /// Their loss, under the weights that each had; groups that were lost and computed again count twice.
        loss: Loss,
        /// The learning rate by its end.
        learning_rate: f64,
        /// What its groups took.
        spent: Spent,
    },
    /// A step is done again on other grids.
    Redone {
        /// The step.
        step: u64,
        /// Which try comes.
        attempt: u32,
    },
    /// Pushes that were acknowledged were lost with a server; their groups are computed again.
    LostPushes {
        /// Pushes.
        pushes: u64,
        /// Groups.
        groups: u64,
    },
    /// It can't go on.
    Failed(String),
}

/// What the groups of a step or round took, added up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spent {
    /// Groups.
    pub groups: u64,
    /// Who computed them.
    pub workers: BTreeSet<WorkerId>,
    /// Seconds of forward and backward.
    pub computed_s: f64,
    /// Seconds that pushes were on their way.
    pub carried_s: f64,
    /// Of them, with nothing left to compute.
    pub exposed_s: f64,
    /// The lengths of their mean gradients, where pushes move the weights at once.
    pub norms: f64,
}

impl Spent {
    fn add(&mut self, worker: WorkerId, effort: Effort) {
        let seconds = |us: u64| us as f64 / 1e6;
        self.groups += 1;
        self.workers.insert(worker);
        self.computed_s += seconds(effort.computed_us);
        self.carried_s += seconds(effort.carried_us);
        self.exposed_s += seconds(effort.exposed_us);
        self.norms += effort.norm.get();
    }
}

#[derive(Debug)]
struct Worker {
    heard: Duration,
    clock: u64,
    /// Since when there is nothing for it to do.
    waits: Option<Duration>,
    /// Lost, and not yet fenced by these shards. Empty while it lives.
    unfenced: BTreeSet<usize>,
}

/// The synchronous step under way.
#[derive(Debug)]
struct Step {
    step: u64,
    attempt: u32,
    exponents: Vec<i32>,
    ready: Vec<Option<Ready>>,
    losses: Vec<Option<Vec<Loss>>>,
    /// Who claimed each group last.
    by: Vec<Option<WorkerId>>,
    /// Groups that came to what is no number, and on which worker first.
    not_finite: BTreeMap<u64, WorkerId>,
}

/// A job's groups and workers. Times are since any fixed beginning.
#[derive(Debug)]
pub struct Progress {
    spec: Arc<Spec>,
    next_worker: WorkerId,
    workers: BTreeMap<WorkerId, Worker>,
    done: Seen,
    reopened: BTreeSet<u64>,
    /// Groups from here on were never handed out.
    next: u64,
    claimed: BTreeMap<u64, Vec<(WorkerId, Duration)>>,
    step: Step,
    decision: Option<Decision>,
    /// Steps of the optimizer: those in which there was something to learn.
    updates: u64,
    /// Rounds that were told, and the loss since.
    round: (u64, Loss),
    /// What the groups of the step or round under way took.
    spent: Spent,
    /// The largest distance that the clocks of any two workers had.
    spread: u64,
    /// No group of this step or a later one is handed out.
    hold: Option<u64>,
    /// Enough workers have been there at once.
    begun: bool,
    finished: bool,
    failed: bool,
}

impl Progress {
    /// A job whose first `steps` are done, `updates` of which moved the weights. `exponents` are the grids of a checkpoint, one a bucket, if there are any.
    pub fn new(spec: Arc<Spec>, steps: u64, updates: u64, exponents: Option<Vec<i32>>) -> Progress {
        let buckets = spec.buckets.len();
        let fresh = vec![Grid::for_largest(1.0).exponent(); buckets];
        let exponents = exponents.filter(|e| e.len() == buckets).unwrap_or(fresh);
        let groups = spec.groups as usize;
        let (ready, losses, by) = (vec![None; buckets], vec![None; groups], vec![None; groups]);
        Progress {
            next_worker: 1,
            workers: BTreeMap::new(),
            done: Seen::below(steps * spec.groups),
            reopened: BTreeSet::new(),
            next: steps * spec.groups,
            claimed: BTreeMap::new(),
            step: Step { step: steps, attempt: 0, exponents, ready, losses, by, not_finite: BTreeMap::new() },
            decision: None,
            updates,
            round: (steps, Loss::default()),
            spent: Spent::default(),
            spread: 0,
            hold: None,
            begun: false,
            finished: steps >= spec.steps,
            failed: false,
            spec,
        }
    }

    /// Whether all is done.
    pub fn finished(&self) -> bool {
        self.finished
    }

    /// The last decision.
    pub fn decision(&self) -> Option<Decision> {
        self.decision
    }

    /// The step under way, and the grids of its buckets.
    pub fn step(&self) -> (u64, &[i32]) {
        (self.step.step, &self.step.exponents)
    }

    /// Steps of which every group is done.
    pub fn steps(&self) -> u64 {
        match self.spec.mode {
            Mode::Synchronous => self.step.step,
            _ => self.done.count() / self.spec.groups,
        }
    }

    /// Hands out no group of this step or a later one; `None`: all.
    pub fn hold(&mut self, step: Option<u64>) {
        self.hold = step;
    }

    /// Lets what has begun come to its end and nothing more: hands out no group of a step of which none is handed out yet.
    /// That step.
    pub fn pause(&mut self) -> u64 {
        let begun = match self.spec.mode {
            Mode::Synchronous => {
                let first = self.step.step * self.spec.groups;
                self.step.step + u64::from(self.next > first || self.step.attempt > 0)
            }
            _ => self.next.div_ceil(self.spec.groups),
        };
        let end = begun.min(self.spec.steps);
        self.hold = Some(end);
        end
    }

    /// Whether the job has come to where it is held, with nothing under way: nothing changes what the shards hold then.
    pub fn held(&self) -> bool {
        let Some(hold) = self.hold.map(|hold| hold.min(self.spec.steps)) else { return false };
        match self.spec.mode {
            Mode::Synchronous => self.step.step >= hold,
            _ => {
                let all = self.done.count() >= hold.saturating_mul(self.spec.groups);
                all && self.holds(hold) && self.claimed.is_empty()
            }
        }
    }

    /// The largest distance that the clocks of any two workers ever had, in groups: with bounded staleness, at most that.
    pub fn spread(&self) -> u64 {
        self.spread
    }

    /// Groups done.
    pub fn done(&self) -> u64 {
        self.done.count()
    }

    /// Workers that live.
    pub fn workers(&self) -> usize {
        self.live().count()
    }

    /// The clocks of workers that count.
    pub fn clocks(&self) -> impl Iterator<Item = (WorkerId, u64)> + '_ {
        self.workers.iter().map(|(&id, worker)| (id, worker.clock))
    }
}
