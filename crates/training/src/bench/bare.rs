//! Steps of one process that works with nobody.

use std::time::{Duration, Instant};

use super::{Load, Numbers};
use crate::parallel::Samples as _;
use crate::{Error, MicroBatch, Trainer};

/// A trainer that takes a [`Load`]'s steps.
pub struct Bare {
    trainer: Trainer,
    numbers: Numbers,
    /// Micro-batches of a step, and samples of each.
    micro_batches: u64,
    samples: u64,
    steps: u64,
}

impl Bare {
    /// A trainer on `threads` threads.
    ///
    /// # Errors
    /// [`Error::Model`] and [`Error::Setting`] for what can't be trained, [`Error::Tensor`] where memory is refused.
    pub fn new(load: &Load, threads: usize) -> Result<Bare, Error> {
        let train = &load.job.train;
        Ok(Bare {
            trainer: load.trainer(threads)?,
            numbers: load.numbers(),
            micro_batches: (train.batch / train.micro_batch) as u64,
            samples: train.micro_batch as u64,
            steps: 0,
        })
    }

    /// Takes a step and says how long it took. The first ones also touch memory for the first time: they are no measure.
    ///
    /// # Errors
    /// [`Error::Diverged`], [`Error::Tensor`] where memory is refused.
    pub fn step(&mut self) -> Result<Duration, Error> {
        let first = self.steps * self.micro_batches * self.samples;
        let batch = |m: u64| {
            let mut batch = MicroBatch::new();
            let begin = first + m * self.samples;
            (begin..begin + self.samples).for_each(|index| self.numbers.push(index, &mut batch));
            batch
        };
        let batches: Vec<MicroBatch> = (0..self.micro_batches).map(batch).collect();
        let begun = Instant::now();
        self.trainer.step(&batches)?;
        self.steps += 1;
        Ok(begun.elapsed())
    }

    /// Trainable values.
    pub fn parameters(&self) -> usize {
        self.trainer.decoder().layout().parameter_count()
    }
}
