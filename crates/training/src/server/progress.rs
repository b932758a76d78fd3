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

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use consort_model::train::Loss;
use consort_tensor::train::exact::Grid;
use serde::{Deserialize, Serialize};

use super::aggregate::krum;
use super::op::{Decision, Ready};
use super::seen::Seen;
use super::spec::{Aggregate, Mode, Spec};

/// Times that one step is done again before somebody must be wrong about its gradients.
const ATTEMPTS: u32 = 3;

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
    },
    /// As many groups as a step has are done, in another mode than the synchronous one.
    Round {
        /// Which, from 0; groups that were lost and computed again count twice.
        step: u64,
        /// Their loss, under the weights that each had.
        loss: Loss,
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

#[derive(Debug)]
struct Worker {
    heard: Duration,
    clock: u64,
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
    round: (u64, Loss),
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
            step: Step { step: steps, attempt: 0, exponents, ready, losses, by },
            decision: None,
            updates,
            round: (steps * spec.groups, Loss::default()),
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

    /// Hands out no group of this step or a later one; `None`: all.
    pub fn hold(&mut self, step: Option<u64>) {
        self.hold = step;
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

    fn live(&self) -> impl Iterator<Item = (&WorkerId, &Worker)> {
        self.workers.iter().filter(|(_, worker)| worker.unfenced.is_empty())
    }

    fn slowest(&self) -> u64 {
        self.workers.values().map(|worker| worker.clock).min().unwrap_or(0)
    }

    /// A worker comes.
    pub fn join(&mut self, now: Duration) -> WorkerId {
        let id = self.next_worker;
        self.next_worker += 1;
        let clock = self.slowest();
        self.workers.insert(id, Worker { heard: now, clock, unfenced: BTreeSet::new() });
        id
    }

    /// A worker gave a sign of life; `false`: it was given up, and has to come back as new.
    pub fn heard(&mut self, now: Duration, id: WorkerId) -> bool {
        let worker = self.workers.get_mut(&id).filter(|worker| worker.unfenced.is_empty());
        worker.map(|worker| worker.heard = now).is_some()
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

    /// A worker has nothing to do.
    pub fn claim(&mut self, now: Duration, id: WorkerId) -> Grant {
        let Some(worker) = self.workers.get(&id).filter(|worker| worker.unfenced.is_empty()) else {
            return Grant::Wait;
        };
        if self.finished || self.failed {
            return Grant::Finished;
        }
        self.begun |= self.live().count() as u64 >= self.spec.workers;
        if !self.begun || self.hold.is_some_and(|hold| self.holds(hold)) {
            return Grant::Wait;
        }
        if let Mode::Bounded { staleness } = self.spec.mode
            && worker.clock + 1 > self.slowest() + staleness
        {
            return Grant::Wait;
        }
        if self.spec.aggregate != Aggregate::Mean && self.share_is_full(id) {
            return Grant::Wait;
        }
        let end = match self.spec.mode {
            Mode::Synchronous => (self.step.step + 1) * self.spec.groups,
            _ => self.spec.total(),
        };
        let group = match self.reopened.pop_first() {
            Some(group) => group,
            None if self.next < end => {
                self.next += 1;
                self.next - 1
            }
            None => match self.slow(now, id) {
                Some(group) => group,
                None => return Grant::Wait,
            },
        };
        self.claimed.entry(group).or_default().push((id, now));
        let synchronous = self.spec.mode == Mode::Synchronous;
        if synchronous && let Some(by) = self.step.by.get_mut((group % self.spec.groups) as usize) {
            *by = Some(id);
        }
        Grant::Work(Claim {
            group,
            step: group / self.spec.groups,
            attempt: self.step.attempt,
            exponents: match (synchronous, self.spec.aggregate) {
                (true, Aggregate::Mean) => self.step.exponents.clone(),
                _ => Vec::new(),
            },
        })
    }

    /// Whether everything before step `hold` is handed out.
    fn holds(&self, hold: u64) -> bool {
        match self.spec.mode {
            Mode::Synchronous => self.step.step >= hold,
            _ => self.reopened.is_empty() && self.next >= hold.saturating_mul(self.spec.groups),
        }
    }

    /// Where gradients are compared, no worker gives more of a step's than its share: one that is wrong stays one.
    fn share_is_full(&self, id: WorkerId) -> bool {
        let live = self.live().count().max(1);
        let share = (self.spec.groups as usize).div_ceil(live);
        self.step.by.iter().filter(|by| **by == Some(id)).count() >= share
    }

    /// A group that somebody else computes for too long.
    fn slow(&self, now: Duration, id: WorkerId) -> Option<u64> {
        let patience = Duration::from_millis(self.spec.speculate_ms);
        let useful = self.spec.mode == Mode::Synchronous && self.spec.aggregate == Aggregate::Mean;
        if patience.is_zero() || !useful {
            return None;
        }
        let late = |claims: &Vec<(WorkerId, Duration)>| {
            claims.len() == 1 && claims[0].0 != id && now.saturating_sub(claims[0].1) >= patience
        };
        let late = self.claimed.iter().filter(|(_, claims)| late(claims));
        late.min_by_key(|(_, claims)| claims[0].1).map(|(group, _)| *group)
    }

    /// A worker says that every server has acknowledged its pushes of a group. `losses` are its micro-batches'.
    pub fn finish(
        &mut self,
        id: WorkerId,
        group: u64,
        attempt: u32,
        losses: Vec<Loss>,
    ) -> (Verdict, Vec<Happened>) {
        let holds =
            self.claimed.get(&group).is_some_and(|claims| claims.iter().any(|(worker, _)| *worker == id));
        let synchronous = self.spec.mode == Mode::Synchronous;
        if !holds || (synchronous && attempt != self.step.attempt) {
            return (Verdict::Over, Vec::new());
        }
        if losses.len() as u64 != self.spec.micro_batches {
            let what = format!("worker {id} reports {} losses of group {group}", losses.len());
            return (Verdict::Over, vec![self.fail(what)]);
        }
        self.claimed.remove(&group);
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.clock += 1;
        }
        if !self.done.insert(group) {
            return (Verdict::Accepted, Vec::new());
        }
        if synchronous {
            self.step.losses[(group % self.spec.groups) as usize] = Some(losses);
            return (Verdict::Accepted, self.decide());
        }
        let mut happened = Vec::new();
        losses.into_iter().for_each(|loss| self.round.1 += loss);
        self.round.0 += 1;
        if self.round.0.is_multiple_of(self.spec.groups) {
            let loss = std::mem::take(&mut self.round.1);
            happened.push(Happened::Round { step: self.round.0 / self.spec.groups - 1, loss });
        }
        self.finished = self.done.count() == self.spec.total();
        (Verdict::Accepted, happened)
    }

    /// A bucket's step is complete, and its backup, if it has one, holds it.
    pub fn ready(&mut self, ready: Ready) -> Vec<Happened> {
        let now = (self.step.step, self.step.attempt);
        let place = self.step.ready.get_mut(ready.bucket);
        match place {
            Some(place) if (ready.step, ready.attempt) == now && place.is_none() => {
                *place = Some(ready);
                self.decide()
            }
            _ => Vec::new(),
        }
    }

    /// A new primary says what it has. What was done and isn't there is computed again.
    pub fn promoted(&mut self, seen: &[(usize, u32, Seen)]) -> Vec<Happened> {
        let synchronous = self.spec.mode == Mode::Synchronous;
        let (mut pushes, mut groups) = (0, BTreeSet::new());
        for (bucket, attempt, seen) in seen {
            if synchronous && *attempt > self.step.attempt {
                continue;
            }
            // Of an earlier try it has nothing of this one; there can be a difference where it lagged only.
            let first = Seen::below(self.step.step * self.spec.groups);
            let old = synchronous && *attempt < self.step.attempt;
            let lacking = self.done.without(if old { &first } else { seen });
            pushes += lacking.len() as u64;
            if synchronous
                && !lacking.is_empty()
                && let Some(ready) = self.step.ready.get_mut(*bucket)
            {
                *ready = None;
            }
            groups.extend(lacking);
        }
        for &group in &groups {
            self.done.remove(group);
            self.reopened.insert(group);
            if synchronous {
                self.step.losses[(group % self.spec.groups) as usize] = None;
            }
        }
        if groups.is_empty() {
            return Vec::new();
        }
        self.finished = false;
        vec![Happened::LostPushes { pushes, groups: groups.len() as u64 }]
    }

    fn fail(&mut self, reason: String) -> Happened {
        self.failed = true;
        Happened::Failed(reason)
    }

    /// Ends the synchronous step if everything is there.
    fn decide(&mut self) -> Vec<Happened> {
        let ready: Option<Vec<&Ready>> = self.step.ready.iter().map(Option::as_ref).collect();
        let losses: Option<Vec<&Vec<Loss>>> = self.step.losses.iter().map(Option::as_ref).collect();
        let (Some(ready), Some(losses)) = (ready, losses) else { return Vec::new() };
        if self.failed || self.finished {
            return Vec::new();
        }
        let step = self.step.step;
        let exact = self.spec.aggregate == Aggregate::Mean;
        let largest: Vec<f32> = ready.iter().map(|ready| f32::from_bits(ready.largest)).collect();
        let loss = match exact {
            true => losses.iter().flat_map(|losses| losses.iter()).fold(Loss::default(), |mut sum, loss| {
                sum += *loss;
                sum
            }),
            false => middle(&losses),
        };
        if exact && largest.iter().any(|l| !l.is_finite()) {
            let reason = format!(
                "step {step}: a gradient is no number (loss {}); lower the learning rate or leave this data out",
                loss.mean()
            );
            return vec![self.fail(reason)];
        }
        let suits = |(&k, &largest): (&i32, &f32)| Grid::from_exponent(k).suits(largest);
        if exact && !self.step.exponents.iter().zip(&largest).all(suits) {
            return vec![self.redo(&largest)];
        }
        let mut choice = None;
        let squares: f64 = match self.spec.aggregate {
            Aggregate::Krum { wrong } => {
                let groups = self.spec.groups as usize;
                let mut matrix = vec![0.0; groups * groups];
                for ready in &ready {
                    matrix.iter_mut().zip(&ready.squares).for_each(|(sum, bits)| *sum += bits.get());
                }
                choice = krum(&matrix, groups, wrong as usize);
                choice.map_or(f64::NAN, |choice| matrix[choice * groups + choice])
            }
            _ => ready.iter().map(|ready| ready.squares.first().map_or(f64::NAN, |bits| bits.get())).sum(),
        };
        // An exact sum is of weighted rows; gradients that were compared are means already.
        let weight = if exact { loss.weight } else { 1.0 };
        // Where no row has a weight there is nothing to learn, and the step is over all the same.
        let learns = loss.weight > 0.0;
        let norm = if learns { squares.sqrt() / weight } else { 0.0 };
        if !norm.is_finite() || (exact && !loss.sum.is_finite()) {
            let reason = format!(
                "step {step}: the gradient's norm is {norm} (loss {}); lower the learning rate, or too many workers \
                 are wrong",
                loss.mean()
            );
            return vec![self.fail(reason)];
        }
        let shorten = self.spec.clip_norm.map_or(1.0, |clip| (clip / norm).min(1.0));
        let learning_rate = if learns { self.spec.schedule.at(self.updates) } else { 0.0 };
        self.decision = Some(Decision {
            step,
            attempt: self.step.attempt,
            learning_rate: learning_rate.into(),
            scale: (shorten / weight).into(),
            learns,
            choice,
        });
        self.regrid(&largest);
        self.updates += u64::from(learns);
        self.step.step += 1;
        self.begin(0);
        self.finished = self.step.step >= self.spec.steps;
        vec![Happened::Step { step, loss, gradient_norm: norm, learning_rate }]
    }

    /// The step again, on grids that suit what was seen.
    fn redo(&mut self, largest: &[f32]) -> Happened {
        self.regrid(largest);
        if self.step.attempt >= ATTEMPTS {
            let step = self.step.step;
            return self
                .fail(format!("step {step}: its gradients have another size each time they are computed"));
        }
        self.begin(self.step.attempt + 1);
        Happened::Redone { step: self.step.step, attempt: self.step.attempt }
    }

    /// The grids that the largest values ask for; where there was nothing, the grid stays.
    fn regrid(&mut self, largest: &[f32]) {
        for (k, &largest) in
            self.step.exponents.iter_mut().zip(largest).filter(|(_, largest)| **largest > 0.0)
        {
            *k = Grid::for_largest(largest).exponent();
        }
    }

    /// Nothing of the step's try is claimed or done.
    fn begin(&mut self, attempt: u32) {
        self.step.attempt = attempt;
        self.step.ready.fill(None);
        self.step.losses.fill(None);
        self.step.by.fill(None);
        self.claimed.clear();
        self.reopened.clear();
        self.next = self.step.step * self.spec.groups;
        self.done = Seen::below(self.next);
    }
}

/// Of groups that may lie, the loss of the one in the middle.
fn middle(losses: &[&Vec<Loss>]) -> Loss {
    let sum = |losses: &&Vec<Loss>| {
        losses.iter().fold(Loss::default(), |mut sum, loss| {
            sum += *loss;
            sum
        })
    };
    let mut sums: Vec<Loss> = losses.iter().map(sum).collect();
    sums.sort_by(|a, b| a.mean().total_cmp(&b.mean()));
    sums.get(sums.len() / 2).copied().unwrap_or_default()
}
