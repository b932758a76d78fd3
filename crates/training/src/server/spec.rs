//! What all processes of a job with parameter servers agree on: the coordinator sends it to whoever joins.
//!
//! A server needs no model: a shard is buckets of so many values, and which pieces of them decay.

use std::time::Duration;

use consort_model::train::Layout;
use serde::{Deserialize, Serialize};

use crate::{Error, OptimizerConfig, Schedule};

/// Values of a job at most: what a server believes when it is told to hold some.
const MAX_VALUES: usize = 1 << 36;
/// Workers' groups of a step, at most: their terms can't overflow a sum on the grid.
const MAX_GROUPS: u64 = 1 << 10;
/// Groups of which every two are compared, at most.
const MAX_COMPARED: u64 = 64;

/// When workers see each other's updates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A step is one update of all its groups: the weights are those that one process alone would have.
    #[default]
    Synchronous,
    /// Every push moves the weights at once; no worker waits for another.
    Asynchronous,
    /// As asynchronous, but no worker is more than so many groups ahead of the slowest one (stale synchronous parallel;
    /// Ho et al. 2013). Made with [`Mode::bounded`].
    Bounded {
        /// Groups, at least 1.
        staleness: u64,
    },
}

impl Mode {
    /// Bounded staleness; none at all is the synchronous mode.
    pub fn bounded(staleness: u64) -> Mode {
        if staleness == 0 { Mode::Synchronous } else { Mode::Bounded { staleness } }
    }
}

/// What becomes of a step's gradients, one from each group of micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregate {
    /// Their mean over all tokens, exactly, in any order.
    #[default]
    Mean,
    /// Of each value, the median over groups (Yin et al. 2018).
    Median,
    /// Of each value, the mean without the largest and the smallest `wrong` (Yin et al. 2018).
    TrimmedMean {
        /// How many workers may be wrong.
        wrong: u64,
    },
    /// The one whose `groups - wrong - 2` nearest are nearest (Blanchard et al. 2017).
    Krum {
        /// How many workers may be wrong.
        wrong: u64,
    },
}

/// When a push is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Replication {
    /// When the backup holds it: a failover loses nothing.
    #[default]
    Sync,
    /// At once: a failover may lose as many as the lag's bound, and says how many.
    Async {
        /// Changes that the backup may lack.
        max_lag: u64,
    },
}

/// One bucket of the layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketSpec {
    /// Its values.
    pub len: usize,
    /// Pieces of it in order, each its begin, its end, and whether weight decay is meant for it.
    pub pieces: Vec<(usize, usize, bool)>,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// The buckets of the layout.
    pub buckets: Vec<BucketSpec>,
    /// The buckets of each shard.
    pub shards: Vec<Vec<usize>>,
    /// What moves the weights.
    pub optimizer: OptimizerConfig,
    /// How far.
    pub schedule: Schedule,
    /// Gradients longer than this are shortened.
    pub clip_norm: Option<f64>,
    /// When workers see each other's updates.
    pub mode: Mode,
    /// What becomes of a step's gradients.
    pub aggregate: Aggregate,
    /// When a push is acknowledged.
    pub replication: Replication,
    /// Groups of a step: what workers claim. A group is the same micro-batches, whoever computes it.
    pub groups: u64,
    /// Micro-batches of a group.
    pub micro_batches: u64,
    /// Steps in all.
    pub steps: u64,
    /// Workers that the beginning waits for; fewer are enough later.
    pub workers: u64,
    /// How long a worker or server may be silent before others take over.
    pub lease_ms: u64,
    /// How long a group may take before a worker that has nothing to do computes it too; 0: for ever.
    pub speculate_ms: u64,
}

impl Spec {
    /// Buckets of a layout, shared among `shards` by their lengths.
    pub fn buckets(layout: &Layout, shards: usize) -> (Vec<BucketSpec>, Vec<Vec<usize>>) {
        let bucket = |(index, range): (usize, &std::ops::Range<usize>)| BucketSpec {
            len: range.len(),
            pieces: layout
                .decay_pieces(index)
                .into_iter()
                .map(|(piece, decays)| (piece.start - range.start, piece.end - range.start, decays))
                .collect(),
        };
        let buckets: Vec<BucketSpec> = layout.buckets().iter().enumerate().map(bucket).collect();
        let shards = share(&buckets, shards);
        (buckets, shards)
    }

    /// What is wrong with it, if anything.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |name, value: String, expected| Err(Error::Setting { name, value, expected });
        self.optimizer.check()?;
        self.schedule.check()?;
        let values = self.buckets.iter().try_fold(0usize, |sum, bucket| sum.checked_add(bucket.len));
        if values.is_none_or(|values| values == 0 || values > MAX_VALUES) {
            return wrong("buckets", format!("{values:?} values"), "from 1 to 2^36 values in all");
        }
        for bucket in &self.buckets {
            let ends = bucket.pieces.iter().try_fold(0, |end, &(from, to, _)| {
                (from >= end && to >= from && to <= bucket.len).then_some(to)
            });
            if ends.is_none() {
                return wrong(
                    "buckets",
                    format!("{:?}", bucket.pieces),
                    "pieces in order, inside their bucket",
                );
            }
        }
        let mut all: Vec<usize> = self.shards.iter().flatten().copied().collect();
        all.sort_unstable();
        if !all.iter().copied().eq(0..self.buckets.len()) || self.shards.iter().any(Vec::is_empty) {
            return wrong(
                "shards",
                format!("{:?}", self.shards),
                "every bucket in one shard, no shard empty",
            );
        }
        if !(1..=MAX_GROUPS).contains(&self.groups) {
            return wrong("groups", self.groups.to_string(), "from 1 to 1024 a step");
        }
        if self.micro_batches == 0 || self.groups.saturating_mul(self.micro_batches) > 1 << 12 {
            return wrong("micro_batches", self.micro_batches.to_string(), "from 1 on, 4096 a step at most");
        }
        if self.steps == 0 || self.steps.checked_mul(self.groups).is_none() {
            return wrong("steps", self.steps.to_string(), "from 1 on");
        }
        if !(10..=3_600_000).contains(&self.lease_ms) {
            return wrong("lease_ms", self.lease_ms.to_string(), "from 10 ms to an hour");
        }
        if self.aggregate != Aggregate::Mean && self.mode != Mode::Synchronous {
            let expected = "mean, as only a synchronous step has gradients to compare";
            return wrong("aggregate", format!("{:?}", self.aggregate), expected);
        }
        match self.aggregate {
            Aggregate::TrimmedMean { wrong: f } if 2 * f >= self.groups => wrong(
                "aggregate",
                format!("trimmed_mean of {f} wrong"),
                "fewer than half of the groups wrong",
            ),
            Aggregate::Krum { wrong: f } if 2 * f + 2 >= self.groups || self.groups > MAX_COMPARED => {
                wrong("aggregate", format!("krum of {f} wrong"), "groups > 2 · wrong + 2, and at most 64")
            }
            _ if self.mode == (Mode::Bounded { staleness: 0 }) => {
                wrong("mode", "bounded by 0".into(), "synchronous, which is the same")
            }
            _ if self.replication == (Replication::Async { max_lag: 0 }) => {
                wrong("replication", "async with a lag of 0".into(), "sync, which is the same")
            }
            _ => Ok(()),
        }
    }

    /// Whether pushes are exact sums: the weights are then the same bits for any number of workers.
    pub fn exact(&self) -> bool {
        self.mode == Mode::Synchronous && self.aggregate == Aggregate::Mean
    }

    /// The lease.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// Groups of the whole job.
    pub fn total(&self) -> u64 {
        self.steps * self.groups
    }

    /// Buffers of a bucket's length that the optimizer remembers.
    pub(super) fn buffers(&self) -> usize {
        self.optimizer.buffers()
    }

    /// Bytes of the longest body that one message of this job has.
    pub fn body_bytes(&self) -> usize {
        let longest = self.buckets.iter().map(|bucket| bucket.len).max().unwrap_or(0);
        // A bucket with everything that its server remembers of it: weights, optimizer, sums or a copy for each group.
        let copies = match self.aggregate {
            Aggregate::Mean => 2,
            _ => self.groups as usize,
        };
        longest.saturating_mul(4 * (1 + self.buffers() + copies)).saturating_add(1 << 20)
    }
}

/// The longest bucket first, to the shard that has least; ties to the first.
fn share(buckets: &[BucketSpec], shards: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..buckets.len()).collect();
    order.sort_by_key(|&bucket| std::cmp::Reverse(buckets[bucket].len));
    let mut shares = vec![(0usize, Vec::new()); shards.clamp(1, buckets.len().max(1))];
    for bucket in order {
        if let Some((load, share)) = shares.iter_mut().min_by_key(|(load, _)| *load) {
            *load += buckets[bucket].len.max(1);
            share.push(bucket);
        }
    }
    let sorted = |(_, mut share): (usize, Vec<usize>)| {
        share.sort_unstable();
        share
    };
    shares.into_iter().map(sorted).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::Decay;

    /// A small job of buckets with these lengths.
    pub(in crate::server) fn spec(lens: &[usize], shards: usize) -> Spec {
        let buckets: Vec<BucketSpec> = lens
            .iter()
            .map(|&len| BucketSpec { len, pieces: vec![(0, len / 2, true), (len / 2, len, false)] })
            .collect();
        Spec {
            shards: share(&buckets, shards),
            buckets,
            optimizer: OptimizerConfig::default(),
            schedule: Schedule {
                learning_rate: 0.05,
                warmup_steps: 2,
                steps: 10,
                decay: Decay::Cosine,
                final_share: 0.1,
            },
            clip_norm: Some(1.0),
            mode: Mode::Synchronous,
            aggregate: Aggregate::Mean,
            replication: Replication::Sync,
            groups: 4,
            micro_batches: 1,
            steps: 10,
            workers: 1,
            lease_ms: 1000,
            speculate_ms: 0,
        }
    }

    #[test]
    fn buckets_are_shared_evenly() {
        let job = spec(&[5, 100, 40, 60, 7, 3], 2);
        job.check().unwrap();
        let loads: Vec<usize> =
            job.shards.iter().map(|s| s.iter().map(|&b| job.buckets[b].len).sum()).collect();
        assert!(loads.iter().all(|&load| (100..=115).contains(&load)), "{loads:?}");
        assert_eq!(spec(&[1, 2], 9).shards.len(), 2, "no shard without a bucket");
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let good = spec(&[8, 8], 2);
        let wrong = [
            (Spec { groups: 0, ..good.clone() }, "groups"),
            (Spec { steps: 0, ..good.clone() }, "steps"),
            (Spec { lease_ms: 0, ..good.clone() }, "lease_ms"),
            (Spec { shards: vec![vec![0]], ..good.clone() }, "shards"),
            (Spec { shards: vec![vec![0, 0], vec![1]], ..good.clone() }, "shards"),
            (Spec { aggregate: Aggregate::Krum { wrong: 1 }, ..good.clone() }, "aggregate"),
            (Spec { aggregate: Aggregate::TrimmedMean { wrong: 2 }, ..good.clone() }, "aggregate"),
            (Spec { aggregate: Aggregate::Median, mode: Mode::Asynchronous, ..good.clone() }, "aggregate"),
            (Spec { mode: Mode::Bounded { staleness: 0 }, ..good.clone() }, "mode"),
            (Spec { replication: Replication::Async { max_lag: 0 }, ..good.clone() }, "replication"),
            (Spec { micro_batches: 4000, ..good.clone() }, "micro_batches"),
        ];
        for (spec, name) in wrong {
            let error = spec.check().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
        let mut broken = good;
        broken.buckets[0].pieces = vec![(0, 9, true)];
        assert!(broken.check().is_err());
        assert_eq!(Mode::bounded(0), Mode::Synchronous);
    }
}
