//! One process's training step.
//!
//! [`Trainer::step`] is three calls that others may make themselves: [`Trainer::accumulate`] for each micro-batch,
//! whose finished buckets a callback may reduce over workers while backward goes on; then [`Trainer::apply`] with the
//! sums of all workers.

use consort_model::ModelConfig;
use consort_model::train::{Arena, Decoder, Gradients, Layout, Loss, MicroBatch, Options};
use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;
use consort_tensor::train::optimizer::Sgd;

use crate::optimizer::norm;
use crate::{Error, Optimizer, OptimizerConfig, Schedule};

/// How to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainerConfig {
    /// Precision, recomputation, dropout.
    pub options: Options,
    /// Which optimizer.
    pub optimizer: OptimizerConfig,
    /// The learning rate of each step.
    pub schedule: Schedule,
    /// Gradients longer than this are shortened to it, as one vector over all tensors; `None` never does.
    pub clip_norm: Option<f64>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The step's number, from 0.
    pub step: u64,
    /// Loss and weight of the step before it moved the weights.
    pub loss: Loss,
    /// The length of the mean gradient before clipping.
    pub gradient_norm: f64,
    /// The step's learning rate.
    pub learning_rate: f64,
}

/// What a trainer is besides its settings: what a checkpoint holds, and what a newcomer gets.
pub struct StateMut<'a> {
    /// Where tensors lie.
    pub layout: &'a Layout,
    /// The weights.
    pub weights: &'a mut [f32],
    /// Steps taken.
    pub steps: &'a mut u64,
    /// What the optimizer remembers.
    pub optimizer: &'a mut [Buffer<f32>],
}

/// A model in training: weights, gradients, optimizer.
pub struct Trainer {
    pool: Pool,
    decoder: Decoder,
    optimizer: Optimizer,
    schedule: Schedule,
    clip_norm: Option<f64>,
    weights: Buffer<f32>,
    gradients: Gradients,
    arena: Arena,
    /// Micro-batches seen over the whole job: what dropout follows.
    micro_batches: u64,
}

impl Trainer {
    /// A trainer whose weights are all 0: fill them ([`Trainer::weights_mut`]).
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Model`], [`Error::Tensor`] where memory is refused.
    pub fn new(pool: Pool, model: &ModelConfig, config: TrainerConfig) -> Result<Trainer, Error> {
        config.schedule.check()?;
        if let Some(clip) = config.clip_norm
            && !(clip.is_finite() && clip > 0.0)
        {
            let (name, value, expected) = ("clip_norm", clip.to_string(), "a number above 0, or none");
            return Err(Error::Setting { name, value, expected });
        }
        let decoder = Decoder::new(model, config.options)?;
        let optimizer = Optimizer::new(config.optimizer, decoder.layout())?;
        Ok(Trainer {
            weights: Buffer::zeroed(decoder.layout().len())?,
            gradients: Gradients::zeroed(decoder.layout())?,
            pool,
            decoder,
            optimizer,
            schedule: config.schedule,
            clip_norm: config.clip_norm,
            arena: Arena::new(),
            micro_batches: 0,
        })
    }

    /// The decoder, its configuration and its layout.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The threads that compute.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The weights, in the order of the decoder's layout.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The weights, to fill from a seed, a model or a checkpoint. What lies between tensors stays 0.
    pub fn weights_mut(&mut self) -> &mut [f32] {
        &mut self.weights
    }

    /// The optimizer, for a checkpoint.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// The optimizer, to fill from a checkpoint.
    pub fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// All that changes with a step, to fill in one go.
    pub fn state_mut(&mut self) -> StateMut<'_> {
        let (steps, optimizer) = self.optimizer.state_mut();
        StateMut { layout: self.decoder.layout(), weights: &mut self.weights, steps, optimizer }
    }

    /// The gradients that were added up since the last step.
    pub fn gradients_mut(&mut self) -> &mut Gradients {
        self.gradients.settle(&self.pool);
        &mut self.gradients
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// One step on this process alone.
    ///
    /// # Errors
    /// [`Error::Model`] where a micro-batch is refused, [`Error::Diverged`], [`Error::NothingToLearn`]. Weights and
    /// optimizer are then as before, and the gradients 0.
    pub fn step(&mut self, micro_batches: &[MicroBatch]) -> Result<StepReport, Error> {
        let mut loss = Loss::default();
        for (number, batch) in (self.micro_batches..).zip(micro_batches) {
            match self.accumulate(batch, number, &mut |_, _| ()) {
                Ok(one) => loss += one,
                Err(error) => {
                    self.gradients.forget();
                    return Err(error);
                }
            }
        }
        let report = self.apply(loss)?;
        self.micro_batches += micro_batches.len() as u64;
        Ok(report)
    }

    /// Adds a micro-batch's loss and gradients to the step. `number` is the micro-batch's over the whole job, whoever
    /// computes it; `completed` is [`Decoder::forward_backward`]'s: a bucket's sum over this process's micro-batches is
    /// final after the last of them.
    ///
    /// # Errors
    /// [`Error::Model`] where the micro-batch is refused; nothing was added then.
    pub fn accumulate(
        &mut self,
        batch: &MicroBatch,
        number: u64,
        completed: &mut dyn FnMut(usize, &mut Buffer<f32>),
    ) -> Result<Loss, Error> {
        self.accumulate_with(batch, number, &mut |_, bucket, values| completed(bucket, values))
    }

    /// As [`Trainer::accumulate`], for a `completed` that computes: it gets the trainer's threads, which wait meanwhile.
    ///
    /// # Errors
    /// As [`Trainer::accumulate`].
    pub fn accumulate_with(
        &mut self,
        batch: &MicroBatch,
        number: u64,
        completed: &mut dyn FnMut(&Pool, usize, &mut Buffer<f32>),
    ) -> Result<Loss, Error> {
        let Trainer { pool, decoder, weights, gradients, arena, .. } = self;
        let completed: &mut dyn FnMut(usize, &mut Buffer<f32>) =
            &mut |bucket, values| completed(pool, bucket, values);
        Ok(decoder.forward_backward(pool, weights, batch, number, gradients, arena, completed)?)
    }

    /// Forgets all gradients, whoever took their buffers away: what a step that is not taken leaves behind. They count
    /// as 0 then; nothing is written.
    ///
    /// # Errors
    /// [`Error::Tensor`] where memory for new buffers is refused.
    pub fn discard(&mut self) -> Result<(), Error> {
        self.gradients.forget();
        for (values, range) in self.gradients.buckets.iter_mut().zip(self.decoder.layout().buckets()) {
            if values.len() != range.len() {
                *values = Buffer::zeroed(range.len())?;
            }
        }
        Ok(())
    }

    /// Divides the summed gradients by the weight of `loss`, clips, moves the weights and makes the gradients 0.
    ///
    /// # Errors
    /// [`Error::Diverged`], [`Error::NothingToLearn`]: weights and optimizer are as before, the gradients 0.
    pub fn apply(&mut self, loss: Loss) -> Result<StepReport, Error> {
        let step = self.optimizer.steps();
        let learning_rate = self.schedule.at(step);
        self.gradients.settle(&self.pool);
        let result = self.scale(loss, step).map(|(scale, gradient_norm)| {
            let (layout, weights) = (self.decoder.layout(), &mut self.weights);
            self.optimizer.step(&self.pool, layout, weights, &self.gradients, learning_rate, scale);
            StepReport { step, loss, gradient_norm, learning_rate }
        });
        self.gradients.forget();
        result
    }

    /// What gradients are multiplied by, and the length of their mean.
    fn scale(&self, loss: Loss, step: u64) -> Result<(f64, f64), Error> {
        if loss.weight <= 0.0 {
            return Err(Error::NothingToLearn { step });
        }
        let norm = norm(&self.pool, &self.gradients) / loss.weight;
        if !norm.is_finite() || !loss.sum.is_finite() {
            return Err(Error::Diverged { step, norm, loss: loss.mean() });
        }
        let shorten = self.clip_norm.map_or(1.0, |clip| (clip / norm).min(1.0));
        Ok((shorten / loss.weight, norm))
    }

    /// Fills the gradients with how far the weights have come from `anchor`, times `weight`.
    pub(crate) fn drift(&mut self, anchor: &[f32], weight: f32) {
        self.gradients.settle(&self.pool);
        for (values, range) in self.gradients.buckets.iter_mut().zip(self.decoder.layout().buckets()) {
            let pairs = anchor[range.clone()].iter().zip(&self.weights[range.clone()]);
            for (value, (anchor, own)) in values.iter_mut().zip(pairs) {
                *value = (anchor - own) * weight;
            }
        }
    }

    /// Moves the weights from `anchor` against the gradients by `sgd`, whose velocity is the optimizer's buffer `velocity`,
    /// and makes the gradients 0.
    pub(crate) fn outer_step(&mut self, anchor: &[f32], sgd: Sgd, velocity: usize) {
        let Trainer { pool, decoder, optimizer, weights, gradients, .. } = self;
        gradients.settle(pool);
        weights.copy_from_slice(anchor);
        let (_, state) = optimizer.state_mut();
        for (gradient, range) in gradients.buckets.iter().zip(decoder.layout().buckets()) {
            let velocity = &mut state[velocity][range.clone()];
            sgd.update(pool, &mut weights[range.clone()], gradient, velocity);
        }
        gradients.forget();
    }

    /// The loss of a batch under the weights as they are, without dropout and without learning from it.
    ///
    /// # Errors
    /// [`Error::Model`] where the batch is refused.
    pub fn evaluate(&mut self, batch: &MicroBatch) -> Result<Loss, Error> {
        Ok(self.decoder.loss(&self.pool, &self.weights, batch, &mut self.arena)?)
    }
}
