//! What changes a shard: the entries of its log. A backup that has the same entries in the same order has the same bits.

use serde::{Deserialize, Serialize};

/// A float as its bits, so that text between processes rounds nothing and may hold what is no number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bits(u64);

impl From<f64> for Bits {
    fn from(value: f64) -> Bits {
        Bits(value.to_bits())
    }
}

impl Bits {
    /// The float.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

/// A change of a shard. The numbers that belong to it travel beside it, as bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A bucket as the job begins with it: its weights, then the optimizer's buffers, `f32`.
    Load {
        /// The bucket.
        bucket: usize,
        /// Steps taken.
        step: u64,
        /// Steps of the optimizer.
        updates: u64,
    },
    /// A group's gradient of a bucket.
    Push(Push),
    /// The end of a synchronous step.
    Apply(Decision),
    /// Nothing of this worker counts any more.
    Fence {
        /// The worker.
        worker: u64,
    },
}

impl Op {
    /// Whose push it is.
    pub fn worker(&self) -> Option<u64> {
        match self {
            Op::Push(push) => Some(push.worker),
            Op::Load { .. } | Op::Apply(_) | Op::Fence { .. } => None,
        }
    }
}

/// A group's gradient of a bucket. Group and bucket name it: whoever sends it again, it counts once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Push {
    /// Who sends it.
    pub worker: u64,
    /// The group, counted over the job.
    pub group: u64,
    /// Which try of its step: another grid, another try.
    pub attempt: u32,
    /// The bucket.
    pub bucket: usize,
    /// What the numbers are.
    pub terms: Terms,
}

/// What a push's numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Terms {
    /// `i64` sums on the grid of this exponent.
    Sums {
        /// The grid.
        exponent: i32,
        /// The bits of the largest magnitude among the terms.
        largest: u32,
    },
    /// `f32`, to be multiplied by this.
    Gradient {
        /// One over the tokens, and what clipping takes away.
        scale: Bits,
    },
}

/// How a synchronous step ends: the same on every shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The step, from 0.
    pub step: u64,
    /// The try whose gradients count.
    pub attempt: u32,
    /// The step's learning rate.
    pub learning_rate: Bits,
    /// What gradients are multiplied by.
    pub scale: Bits,
    /// Whether the step moves the weights: `false` where it has nothing to learn from.
    pub learns: bool,
    /// Of Krum: which of the step's groups.
    pub choice: Option<usize>,
}

/// What became of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The shard has changed, and the log is longer by one.
    Taken,
    /// It was there already, or is of a step or try that is over.
    Known,
    /// It holds what is no number, and changes nothing: the step would hold none either.
    NotFinite,
    /// It can't be: from a fenced worker, or of no sense here.
    Refused(String),
}

/// A bucket whose step is complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The bucket.
    pub bucket: usize,
    /// The step.
    pub step: u64,
    /// The try.
    pub attempt: u32,
    /// The bits of the largest magnitude of all terms.
    pub largest: u32,
    /// The sum of the gradient's squares; of Krum, the distances of every two groups.
    pub squares: Vec<Bits>,
}
