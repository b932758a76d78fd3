//! What a job computes, whoever computes it.

use std::ops::Range;
use std::time::Duration;

use consort_collectives::Algorithm;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::Error;

/// How long workers of one host should be silent before they are taken for lost (`JoinOptions::silence`): heartbeats come
/// five times as often. With [`HOST_SETTLE`] a worker that is stopped costs the others less than a second.
pub const HOST_SILENCE: Duration = Duration::from_millis(400);
/// How long the store should wait on one host for a worker that is connected and doesn't come to the next epoch
/// (`StoreOptions::settle`).
pub const HOST_SETTLE: Duration = Duration::from_millis(250);

/// How gradients travel where sums need not be exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// As they are.
    #[default]
    F32,
    /// Rounded to 16 bits; what rounding takes away is added to the next step's gradient.
    Bf16,
    /// Rounded to 8 bits with a scale for each block of 256; what rounding takes away is added to the next step's.
    Int8,
}

/// Local steps with an outer optimizer (DiLoCo; Douillard et al. 2023): workers take `every` steps by themselves, each
/// on its own micro-batches, and then move together against the mean of how far each has come.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outer {
    /// Steps between two exchanges.
    pub every: u64,
    /// The outer learning rate.
    pub learning_rate: f32,
    /// The outer Nesterov momentum.
    pub momentum: f32,
}

impl Default for Outer {
    /// As its authors found best.
    fn default() -> Outer {
        Outer { every: 50, learning_rate: 0.7, momentum: 0.9 }
    }
}

/// A data-parallel job. Micro-batches belong to the job and not to its workers: micro-batch `m` of step `s` has the same
/// samples and the same number for any number of workers.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The order of samples follows it.
    pub seed: u64,
    /// Steps in all.
    pub steps: u64,
    /// Micro-batches of a step, divided among workers.
    pub micro_batches: usize,
    /// Samples of a micro-batch.
    pub samples: usize,
    /// Samples in all: the step in which they end is shorter, and the last. `None`: as many as the steps take.
    pub end: Option<u64>,
    /// Whether gradients are added without rounding that depends on who computed what: the weights are then the same
    /// bits for any number of workers, any algorithm and after any failure.
    pub exact: bool,
    /// How gradients travel, where `exact` is off.
    pub wire: Wire,
    /// The collectives' algorithm; `None` lets the length decide.
    pub algorithm: Option<Algorithm>,
    /// Local steps, where `exact` is off.
    pub outer: Option<Outer>,
    /// Steps between two checkpoints; the last step has one anyway, where there is a place for them.
    pub checkpoint_every: Option<u64>,
}

impl Plan {
    /// An exact plan of so many steps, without periodic checkpoints.
    pub fn new(seed: u64, steps: u64, micro_batches: usize, samples: usize) -> Plan {
        Plan {
            seed,
            steps,
            micro_batches,
            samples,
            end: None,
            exact: true,
            wire: Wire::F32,
            algorithm: None,
            outer: None,
            checkpoint_every: None,
        }
    }

    /// What is wrong with it, if anything.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |name, value: String, expected| Err(Error::Setting { name, value, expected });
        let most = consort_tensor::train::exact::MAX_TERMS;
        if self.steps == 0 {
            return wrong("steps", "0".into(), "a count from 1 on");
        }
        if self.micro_batches == 0 || self.micro_batches > most {
            return wrong("micro_batches", self.micro_batches.to_string(), "a count from 1 to 4096");
        }
        if self.samples == 0 || self.samples > 1 << 20 {
            return wrong("samples", self.samples.to_string(), "a count from 1 to 1048576, per micro-batch");
        }
        if self.steps.checked_mul(self.batch()).is_none() {
            return wrong("steps", self.steps.to_string(), "fewer, so that their samples can be counted");
        }
        if self.end == Some(0) {
            return wrong("end", "0".into(), "a count of samples from 1 on, or none");
        }
        if self.checkpoint_every == Some(0) {
            return wrong("checkpoint_every", "0".into(), "a count of steps from 1 on, or none");
        }
        if self.exact && self.wire != Wire::F32 {
            let expected = "f32 where exact = true: rounding on the way is not exact; set exact = false";
            return wrong("wire", format!("{:?}", self.wire).to_lowercase(), expected);
        }
        if let Some(outer) = self.outer {
            if self.exact {
                let expected = "none where exact = true: who computes what changes the result of local steps; \
                                set exact = false";
                return wrong("outer", format!("{outer:?}"), expected);
            }
            if outer.every == 0 {
                return wrong("outer.every", "0".into(), "a count of steps from 1 on");
            }
            if outer.every.saturating_mul(self.micro_batches as u64) > 1 << 20 {
                let expected = "fewer: a round has at most 1048576 micro-batches";
                return wrong("outer.every", outer.every.to_string(), expected);
            }
            if !(outer.learning_rate.is_finite() && outer.learning_rate > 0.0) {
                return wrong("outer.learning_rate", outer.learning_rate.to_string(), "a number above 0");
            }
            if !(0.0..1.0).contains(&outer.momentum) {
                return wrong("outer.momentum", outer.momentum.to_string(), "0 and more, below 1");
            }
        }
        Ok(())
    }

    /// Samples of a step.
    pub fn batch(&self) -> u64 {
        self.micro_batches as u64 * self.samples as u64
    }

    /// Steps that have samples.
    pub fn last(&self) -> u64 {
        self.end.map_or(self.steps, |end| self.steps.min(end.div_ceil(self.batch())))
    }

    /// The place in the data behind `step` steps.
    pub fn cursor(&self, step: u64) -> u64 {
        let cursor = step.saturating_mul(self.batch());
        self.end.map_or(cursor, |end| cursor.min(end))
    }

    /// The samples of a micro-batch, as places in the data's order. The last step's may be fewer, or none.
    pub fn places(&self, step: u64, micro_batch: usize) -> Range<u64> {
        let bound = self.cursor(step + 1);
        let start = (self.cursor(step) + micro_batch as u64 * self.samples as u64).min(bound);
        start..(start + self.samples as u64).min(bound)
    }

    /// The micro-batches of one worker of several.
    pub fn share(&self, rank: usize, workers: usize) -> impl Iterator<Item = usize> + use<> {
        (rank..self.micro_batches).step_by(workers.max(1))
    }

    /// What must be equal for two runs to be parts of one job.
    pub(super) fn identity(&self, data: &str, trainer: &crate::Trainer) -> Map<String, Value> {
        let model = trainer.decoder().layout();
        let options = trainer.decoder().options();
        let pairs = [
            ("data", json!(data)),
            ("seed", json!(self.seed)),
            ("micro_batches", json!(self.micro_batches)),
            ("samples", json!(self.samples)),
            ("exact", json!(self.exact)),
            ("wire", json!(self.wire)),
            ("outer", json!(self.outer)),
            ("parameters", json!(model.parameter_count())),
            ("optimizer", json!(trainer.optimizer().config())),
            ("precision", json!(format!("{:?}", options.precision).to_lowercase())),
            ("dropout", json!(options.dropout)),
            ("dropout_seed", json!(options.seed)),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_in_one_micro_batch_of_one_worker() {
        for (end, steps) in [(None, 5), (Some(60), 5), (Some(59), 5), (Some(37), 4), (Some(1), 1)] {
            let plan = Plan { end, ..Plan::new(1, 5, 4, 3) };
            assert_eq!(plan.last(), steps);
            for workers in 1..7 {
                let mut seen = Vec::new();
                for step in 0..plan.last() {
                    let shares = (0..workers).flat_map(|rank| plan.share(rank, workers));
                    let mut places: Vec<u64> = shares.flat_map(|m| plan.places(step, m)).collect();
                    places.sort_unstable();
                    seen.extend(places);
                }
                assert_eq!(seen, (0..end.unwrap_or(60)).collect::<Vec<u64>>(), "{workers} workers, {end:?}");
            }
        }
    }

    #[test]
    fn plans_that_make_no_sense_are_refused_by_name() {
        let good = Plan::new(1, 5, 4, 3);
        good.check().unwrap();
        for (plan, name) in [
            (Plan { steps: 0, ..good.clone() }, "steps"),
            (Plan { steps: u64::MAX, ..good.clone() }, "steps"),
            (Plan { micro_batches: 0, ..good.clone() }, "micro_batches"),
            (Plan { micro_batches: 5000, ..good.clone() }, "micro_batches"),
            (Plan { samples: 0, ..good.clone() }, "samples"),
            (Plan { end: Some(0), ..good.clone() }, "end"),
            (Plan { checkpoint_every: Some(0), ..good.clone() }, "checkpoint_every"),
            (Plan { wire: Wire::Int8, ..good.clone() }, "wire is int8"),
            (Plan { outer: Some(Outer::default()), ..good.clone() }, "outer"),
            (
                Plan { exact: false, outer: Some(Outer { every: 0, ..Outer::default() }), ..good.clone() },
                "outer.every",
            ),
        ] {
            let error = plan.check().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
}
