//! Optimizers and what they remember.
//!
//! State lies in flat buffers of the layout's order, so that a checkpoint or a newcomer gets it in one piece, and a
//! shard of it is a range.

use std::ops::Range;

use consort_model::train::{Gradients, Layout};
use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;
use consort_tensor::train::optimizer::{AdamW, Sgd, square_sum};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Which optimizer, with its constants. Weight decay applies to matrices, not to norms and biases.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase", deny_unknown_fields)]
pub enum OptimizerConfig {
    /// AdamW: Adam with weight decay apart from the gradient.
    AdamW {
        /// How slowly the mean of gradients moves.
        beta1: f32,
        /// How slowly the mean of their squares moves.
        beta2: f32,
        /// Added to the root of the mean square.
        epsilon: f32,
        /// The share of a matrix, times the learning rate, that a step takes away.
        weight_decay: f32,
    },
    /// Stochastic gradient descent with momentum.
    Sgd {
        /// The share of the last velocity that is kept.
        momentum: f32,
        /// Looks one step ahead.
        nesterov: bool,
        /// The share of a matrix, times the learning rate, that a step takes away.
        weight_decay: f32,
    },
}

impl Default for OptimizerConfig {
    /// AdamW as language models are trained with it.
    fn default() -> OptimizerConfig {
        OptimizerConfig::AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 }
    }
}

impl OptimizerConfig {
    /// What is wrong with these numbers, if anything.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<(), Error> {
        let share = |name, x: f32| match (0.0..1.0).contains(&x) {
            true => Ok(()),
            false => Err(Error::Setting { name, value: x.to_string(), expected: "0 and more, below 1" }),
        };
        let decay = |x: f32| match x.is_finite() && x >= 0.0 {
            true => Ok(()),
            false => Err(Error::Setting {
                name: "weight_decay",
                value: x.to_string(),
                expected: "a number from 0 on",
            }),
        };
        match *self {
            OptimizerConfig::AdamW { beta1, beta2, epsilon, weight_decay } => {
                share("beta1", beta1)?;
                share("beta2", beta2)?;
                if !(epsilon.is_finite() && epsilon > 0.0) {
                    let value = epsilon.to_string();
                    return Err(Error::Setting { name: "epsilon", value, expected: "a number above 0" });
                }
                decay(weight_decay)
            }
            OptimizerConfig::Sgd { momentum, weight_decay, .. } => {
                share("momentum", momentum)?;
                decay(weight_decay)
            }
        }
    }

    /// Buffers of the layout's length that it remembers.
    pub(crate) fn buffers(&self) -> usize {
        if matches!(self, OptimizerConfig::AdamW { .. }) { 2 } else { 1 }
    }
}

/// An optimizer and its state.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    /// Steps taken.
    steps: u64,
    /// AdamW: means, then means of squares. SGD: velocities. Each of the layout's length.
    state: Vec<Buffer<f32>>,
}

impl Optimizer {
    /// An optimizer that has taken no step.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::Tensor`] where memory is refused.
    pub fn new(config: OptimizerConfig, layout: &Layout) -> Result<Optimizer, Error> {
        config.check()?;
        let state = (0..config.buffers()).map(|_| Buffer::zeroed(layout.len()));
        Ok(Optimizer { config, steps: 0, state: state.collect::<Result<_, _>>()? })
    }

    /// Adds a buffer of zeros behind those of the optimizer's kind, for what a job remembers besides: it is kept, loaded
    /// and handed to newcomers with the others. Says where it is.
    ///
    /// # Errors
    /// [`Error::Tensor`] where memory is refused.
    pub(crate) fn remember(&mut self, layout: &Layout) -> Result<usize, Error> {
        self.state.push(Buffer::zeroed(layout.len())?);
        Ok(self.state.len() - 1)
    }

    /// Its constants.
    pub fn config(&self) -> OptimizerConfig {
        self.config
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// What it remembers, for a checkpoint: buffers of the layout's length.
    pub fn state(&self) -> &[Buffer<f32>] {
        &self.state
    }

    /// Steps and state, to fill from a checkpoint.
    pub fn state_mut(&mut self) -> (&mut u64, &mut [Buffer<f32>]) {
        (&mut self.steps, &mut self.state)
    }

    /// One step: `weights` move against `gradients`, which are multiplied by `gradient_scale` first.
    ///
    /// # Panics
    /// If lengths are not the layout's.
    pub fn step(
        &mut self,
        pool: &Pool,
        layout: &Layout,
        weights: &mut [f32],
        gradients: &Gradients,
        learning_rate: f64,
        gradient_scale: f64,
    ) {
        assert_eq!(weights.len(), layout.len(), "weights of this layout");
        self.steps += 1;
        let update = Update {
            config: self.config,
            step: self.steps,
            learning_rate: learning_rate as f32,
            gradient_scale: gradient_scale as f32,
        };
        for (index, bucket) in layout.buckets().iter().enumerate() {
            for (range, decays) in layout.decay_pieces(index) {
                let gradient =
                    &gradients.buckets[index][range.start - bucket.start..range.end - bucket.start];
                let values = &mut weights[range.clone()];
                update.apply(pool, decays, values, gradient, &mut self.state, range);
            }
        }
    }
}

/// One step of some values, wherever they and their state lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    pub(crate) config: OptimizerConfig,
    /// The step's number, from 1.
    pub(crate) step: u64,
    pub(crate) learning_rate: f32,
    pub(crate) gradient_scale: f32,
}

impl Update {
    /// Moves `values` against `gradient`; `range` is where these values' state lies in the buffers of `state`.
    pub(crate) fn apply(
        &self,
        pool: &Pool,
        decays: bool,
        values: &mut [f32],
        gradient: &[f32],
        state: &mut [Buffer<f32>],
        range: Range<usize>,
    ) {
        let Update { config, step, learning_rate, gradient_scale } = *self;
        match (config, state) {
            (OptimizerConfig::AdamW { beta1, beta2, epsilon, weight_decay }, [mean, mean_square, ..]) => {
                let weight_decay = if decays { weight_decay } else { 0.0 };
                let adam = AdamW { learning_rate, beta1, beta2, epsilon, weight_decay, step, gradient_scale };
                let mean = &mut mean[range.clone()];
                adam.update(pool, values, gradient, mean, &mut mean_square[range]);
            }
            (OptimizerConfig::Sgd { momentum, nesterov, weight_decay }, [velocity, ..]) => {
                let weight_decay = if decays { weight_decay } else { 0.0 };
                let sgd = Sgd { learning_rate, momentum, nesterov, weight_decay, gradient_scale };
                sgd.update(pool, values, gradient, &mut velocity[range]);
            }
            _ => unreachable!("an optimizer has the buffers of its kind"),
        }
    }
}

/// The length of the gradient as one vector: sums of squares of the buckets, added in order.
pub(crate) fn norm(pool: &Pool, gradients: &Gradients) -> f64 {
    gradients.buckets.iter().map(|bucket| square_sum(pool, bucket)).sum::<f64>().sqrt()
}
