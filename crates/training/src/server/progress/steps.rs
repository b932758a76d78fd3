//! Groups that are done, shards that are complete, and the end of a step.

use std::collections::BTreeSet;

use consort_model::train::Loss;
use consort_tensor::train::exact::Grid;

use super::{Happened, Progress, Verdict, WorkerId};
use crate::server::aggregate::krum;
use crate::server::op::{Decision, Ready};
use crate::server::seen::Seen;
use crate::server::spec::{Aggregate, Mode};
use crate::server::wire::Effort;

/// Times that one step is done again before somebody must be wrong about its gradients.
pub(in crate::server) const ATTEMPTS: u32 = 3;

impl Progress {
    /// A worker says that every server has acknowledged its pushes of a group. `losses` are its micro-batches'.
    pub fn finish(
        &mut self,
        id: WorkerId,
        group: u64,
        attempt: u32,
        losses: Vec<Loss>,
        effort: Effort,
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
            let clock = worker.clock;
            self.spread = self.spread.max(clock - self.slowest());
        }
        self.spent.add(id, effort);
        if !self.done.insert(group) {
            return (Verdict::Accepted, Vec::new());
        }
        if synchronous {
            self.step.losses[(group % self.spec.groups) as usize] = Some(losses);
            return (Verdict::Accepted, self.decide());
        }
        let mut happened = Vec::new();
        losses.into_iter().for_each(|loss| self.round.1 += loss);
        if self.done.count() / self.spec.groups > self.round.0 {
            let loss = std::mem::take(&mut self.round.1);
            let learning_rate = self.spec.schedule.at(self.round.0);
            let spent = std::mem::take(&mut self.spent);
            happened.push(Happened::Round { step: self.round.0, loss, learning_rate, spent });
            self.round.0 += 1;
        }
        self.finished = self.done.count() == self.spec.total();
        (Verdict::Accepted, happened)
    }

    /// What a worker computed of a group is no number. Somebody else tries it: a worker may be wrong. Where nobody else is
    /// there, or another one comes to the same, it is the job that has diverged. `None`: it doesn't matter any more.
    pub fn not_finite(&mut self, id: WorkerId, group: u64, attempt: u32) -> Option<Vec<Happened>> {
        let claims = self.claimed.get_mut(&group).filter(|claims| claims.iter().any(|(by, _)| *by == id))?;
        if attempt != self.step.attempt || self.spec.mode != Mode::Synchronous {
            return None;
        }
        claims.retain(|(by, _)| *by != id);
        if claims.is_empty() {
            self.claimed.remove(&group);
            self.reopened.insert(group);
        }
        let first = *self.step.not_finite.entry(group).or_insert(id);
        if first != id || self.live().count() <= 1 {
            let step = self.step.step;
            let reason = format!(
                "step {step}: a gradient is no number; lower the learning rate or leave this data out"
            );
            return Some(vec![self.fail(reason)]);
        }
        Some(Vec::new())
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
        let spent = std::mem::take(&mut self.spent);
        vec![Happened::Step { step, loss, gradient_norm: norm, learning_rate, spent }]
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
        self.step.not_finite.clear();
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
