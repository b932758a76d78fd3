//! Local steps with an outer optimizer: for links so slow that an exchange a step would be most of it.
//!
//! A *round* is `every` steps. Each worker takes them by itself, on its own share of each step's micro-batches and with
//! its own optimizer; then all move from where the round began against the mean of how far each has come, weighted by
//! tokens, with Nesterov momentum (DiLoCo; Douillard et al. 2023). One exchange a round instead of one a step.
//!
//! What this gives up, by name: who computes what changes the weights, so `exact` is off. Nothing else is given up: a
//! round in which a worker is lost is done again from its beginning, by those who are left, so every sample is seen
//! once; newcomers come between rounds. The inner optimizers' numbers differ between workers, and are neither exchanged
//! nor averaged; a newcomer begins with those of the worker that it gets its state from, and a checkpoint has each
//! worker's own of its share of the tensors. Costs a copy of weights and optimizer, and a momentum a weight.

use std::time::Instant;

use consort_model::train::Loss;
use consort_tensor::train::optimizer::Sgd;

use super::board::{Activity, Board};
use super::event::StepEvent;
use super::link::{Link, Standing};
use super::plan::Outer;
use super::state::State;
use super::step::{Committed, Outcome, Stepper, spans};
use super::tail::{Tail, Word};
use super::worker::Fail;
use crate::Trainer;

/// What a round began with.
#[derive(Debug, Default)]
pub(super) struct Anchor {
    weights: Vec<f32>,
    optimizer: Vec<Vec<f32>>,
    steps: u64,
}

impl Anchor {
    /// Notes where a round begins, in the memory of the one before.
    fn take(mut self, trainer: &Trainer) -> Anchor {
        let copy = |to: &mut Vec<f32>, from: &[f32]| {
            to.clear();
            to.extend_from_slice(from);
        };
        copy(&mut self.weights, trainer.weights());
        let state = trainer.optimizer().state();
        self.optimizer.resize_with(state.len(), Vec::new);
        self.optimizer.iter_mut().zip(state).for_each(|(to, from)| copy(to, from));
        self.steps = trainer.steps();
        self
    }

    /// Goes back there.
    pub(super) fn restore(&self, trainer: &mut Trainer) {
        let parts = trainer.state_mut();
        if self.weights.len() == parts.weights.len() {
            parts.weights.copy_from_slice(&self.weights);
            parts.optimizer.iter_mut().zip(&self.optimizer).for_each(|(to, from)| to.copy_from_slice(from));
            *parts.steps = self.steps;
        }
    }
}

/// A local step.
struct Local {
    step: u64,
    begun: Instant,
    computed_us: u64,
    norm: f64,
    rate: f64,
}

impl Stepper<'_> {
    /// The next round. Its momentum is the last of the optimizer's buffers.
    #[allow(clippy::too_many_arguments, reason = "a step's, and the outer optimizer")]
    pub(super) fn round(
        &mut self,
        outer: Outer,
        trainer: &mut Trainer,
        state: &mut State,
        link: Option<&Link>,
        standing: Standing,
        board: &Board,
        flags: i64,
    ) -> Result<Outcome, Fail> {
        let Standing { epoch, rank, workers } = standing;
        let first = state.step;
        let end = ((first / outer.every + 1) * outer.every).min(self.plan.last());
        let (micro_batches, buckets) = (self.plan.micro_batches, trainer.decoder().layout().buckets().len());
        self.anchor = Some(self.anchor.take().unwrap_or_default().take(trainer));
        let mut tail = Tail::new(micro_batches * (end - first) as usize, buckets, workers);
        let (mut locals, mut weight) = (Vec::new(), 0.0);
        for step in first..end {
            let begun = Instant::now();
            let (mut loss, at) = (Loss::default(), (step - first) as usize * micro_batches);
            for (m, batch, mut done) in self.own(step, standing) {
                if batch.rows() > 0 {
                    board.doing(step, Activity::Computing { micro_batch: m });
                    let number = step * micro_batches as u64 + m as u64;
                    done.loss = trainer.accumulate(&batch, number, &mut |_, _| ())?;
                    loss += done.loss;
                }
                tail.put_micro_batch(at + m, done);
            }
            let (mut norm, mut rate) = (0.0, 0.0);
            if loss.weight > 0.0 {
                let report = trainer.apply(loss)?;
                (norm, rate) = (report.gradient_norm, report.learning_rate);
            }
            weight += loss.weight;
            let computed_us = begun.elapsed().as_micros() as u64;
            locals.push(Local { step, begun, computed_us, norm, rate });
        }
        let ready = Instant::now();
        board.doing(end - 1, Activity::Waiting);
        let anchor = self.anchor.take().unwrap_or_default();
        trainer.drift(&anchor.weights, weight as f32);
        let computed_us = locals.iter().map(|local| local.computed_us as i64).sum();
        tail.put_worker(rank, Word { flags, newcomers: 0, computed_us, check: state.check }, &[]);
        let mut reduced = Vec::new();
        let exchanged = match link {
            Some(link) => {
                let mut work = self.buckets(trainer, state, Some(link), epoch)?;
                for (bucket, values) in trainer.gradients_mut().buckets.iter_mut().enumerate() {
                    work.send(bucket, values);
                }
                let sent = std::mem::take(&mut work.sent);
                self.collect(link, standing, end - 1, tail, sent, trainer).map(|(tail, all)| {
                    reduced = all;
                    tail
                })
            }
            None => Ok(tail),
        };
        let tail = match exchanged {
            Ok(tail) => tail,
            Err(fail) => {
                self.anchor = Some(anchor);
                return Err(fail);
            }
        };
        let waited = ready.elapsed();
        let mut said = Vec::new();
        for step in first..end {
            said.push(self.judge(step, &tail, (step - first) as usize * micro_batches)?);
        }
        let total: f64 = said.iter().map(|(loss, _)| loss.weight).sum();
        board.doing(end - 1, Activity::Applying);
        if total > 0.0 {
            let sgd = Sgd {
                learning_rate: outer.learning_rate,
                momentum: outer.momentum,
                nesterov: true,
                weight_decay: 0.0,
                gradient_scale: (1.0 / total) as f32,
            };
            let velocity = trainer.optimizer().state().len() - 1;
            trainer.outer_step(&anchor.weights, sgd, velocity);
        } else {
            trainer.discard()?;
        }
        // A worker without a micro-batch in some step took fewer.
        *trainer.state_mut().steps = anchor.steps + (end - first);
        self.anchor = Some(Anchor { weights: Vec::new(), ..anchor });
        let (spans, _) = spans(trainer, &reduced, locals[0].begun, ready);
        state.advance(Some(epoch));
        state.step = end;
        let last = locals.len() - 1;
        let events = locals.into_iter().zip(said).enumerate().map(|(i, (local, (loss, done)))| StepEvent {
            step: local.step,
            loss: loss.mean(),
            learning_rate: local.rate,
            gradient_norm: local.norm,
            rows: loss.rows as u64,
            samples: done.samples,
            seen: done.seen,
            cursor: self.plan.cursor(local.step + 1),
            workers,
            epoch,
            computed_us: local.computed_us,
            took_us: local.computed_us + if i == last { ready.elapsed().as_micros() as u64 } else { 0 },
            waited_us: if i == last { waited.as_micros() as u64 } else { 0 },
            spans: if i == last { spans.clone() } else { Vec::new() },
            ..StepEvent::default()
        });
        Ok(Outcome::Committed(Committed::new(events.collect(), &tail)))
    }
}
