//! How fast a training step is, without data: what `consort bench train` and this crate's own benchmarks measure.
//!
//! A [`Load`] is a job with its model's shape. [`Bare`] takes the job's steps one after the other with
//! [`Trainer::step`](crate::Trainer::step): forward, backward, clipping, optimizer, and nothing else; that is what other
//! frameworks are held against. [`together`] takes them as the job itself does, on workers that add their gradients.
//!
//! Samples are tokens that follow from their number, all of full length, and weights are random: neither changes what a
//! step computes or how long it takes, so nothing has to be fetched, tokenized or learned before.

mod bare;
mod together;

use std::path::Path;

use consort_model::ModelConfig;
use consort_model::train::{Decoder, MicroBatch};
use consort_tensor::{Cpu, Pool};

use crate::job::{self, Job, ModelSource};
use crate::parallel::Samples;
use crate::{Error, Normal, Trainer};

pub use bare::Bare;
pub use together::{Setting, together};

/// Names and files of the jobs that [`Load::named`] knows.
const JOBS: [(&str, &str); 3] = [
    ("tiny", include_str!("tiny.toml")),
    ("small", include_str!("small.toml")),
    ("smollm2", include_str!("smollm2.toml")),
];
/// Steps that the schedule of a benchmark's job has.
const STEPS: u64 = 1000;

/// A job whose step is measured.
#[derive(Clone, Debug)]
pub struct Load {
    /// The job: its batch, precision, optimizer and how gradients are added count; its data and its length don't.
    pub job: Job,
    /// The shape of the model, with the size of its vocabulary.
    pub model: ModelConfig,
}

impl Load {
    /// Names of shapes that need no file.
    pub fn names() -> [&'static str; 3] {
        JOBS.map(|(name, _)| name)
    }

    /// One of them: `tiny` (a hundred thousand parameters), `small` (12 million), `smollm2` (SmolLM2-135M's shape).
    pub fn named(name: &str) -> Option<Load> {
        let (name, text) = JOBS.into_iter().find(|(known, _)| *known == name)?;
        let job = job::read(Path::new(name), text).ok()?;
        let ModelSource::New(shape) = job.model else { return None };
        Some(Load { model: shape.config(shape.vocabulary), job })
    }

    /// Tokens that a step predicts.
    pub fn tokens(&self) -> u64 {
        (self.job.train.batch * self.job.data.context) as u64
    }

    /// Floating-point operations of a step that are needed: two for each multiply-add of forward and backward. What is
    /// computed and thrown away, or computed twice to save memory, isn't counted.
    ///
    /// # Errors
    /// [`Error::Model`] for a model that can't be trained.
    pub fn operations(&self) -> Result<u64, Error> {
        let decoder = Decoder::new(&self.model, self.job.trainer(STEPS).options)?;
        let sample: u64 =
            (0..self.job.data.context).map(|position| decoder.operations(position) as u64).sum();
        Ok(sample * self.job.train.batch as u64)
    }

    fn trainer(&self, threads: usize) -> Result<Trainer, Error> {
        let cpu = Cpu::detect();
        let mut trainer = Trainer::new(Pool::new(threads, cpu), &self.model, self.job.trainer(STEPS))?;
        let layout = trainer.decoder().layout().clone();
        layout.initialize(&Pool::new(threads, cpu), Normal::new(self.job.seed), trainer.weights_mut());
        Ok(trainer)
    }

    fn numbers(&self) -> Numbers {
        Numbers { vocab: self.model.vocab as u64, rows: self.job.data.context as u64 }
    }
}

/// Samples without data.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    vocab: u64,
    rows: u64,
}

impl Samples for Numbers {
    fn count(&self) -> u64 {
        1 << 20
    }

    fn id(&self) -> String {
        "numbers".into()
    }

    fn push(&self, index: u64, batch: &mut MicroBatch) {
        // One more than rows: the last token is predicted and predicts nothing.
        let token = |i: u64| (index * 17 + i * i).wrapping_mul(7919) % self.vocab;
        batch.push(&(0..=self.rows).map(|i| token(i) as u32).collect::<Vec<u32>>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_what_their_names_say() {
        for (name, parameters, tokens) in [
            ("tiny", 100_000..200_000, 512),
            ("small", 10_000_000..13_000_000, 2048),
            ("smollm2", 134_000_000..135_000_000, 1024),
        ] {
            let load = Load::named(name).unwrap();
            let trainer = Decoder::new(&load.model, load.job.trainer(STEPS).options).unwrap();
            let count = trainer.layout().parameter_count();
            assert!(parameters.contains(&count), "{name}: {count}");
            assert_eq!(load.tokens(), tokens, "{name}");
            // Six operations for each weight of a product and each token, and attention on top.
            let least = 6 * count as u64 * load.tokens();
            let operations = load.operations().unwrap();
            assert!((least..2 * least).contains(&operations), "{name}: {operations} of {least}");
        }
        assert!(Load::named("huge").is_none());
        assert_eq!(Load::names(), ["tiny", "small", "smollm2"]);
    }
}
