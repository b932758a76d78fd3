//! What can go wrong in training.

/// An error of this crate; each variant says what the caller can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting that makes no sense.
    #[error("{name} is {value}; {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The gradient's norm is infinite or no number; weights and optimizer are as before the step.
    #[error(
        "step {step}: the gradient's norm is {norm} (loss {loss}); lower the learning rate or skip this batch"
    )]
    Diverged {
        /// The step that was not taken.
        step: u64,
        /// The norm.
        norm: f64,
        /// The step's mean loss.
        loss: f64,
    },
    /// No row of the step has a weight, so there is nothing to learn from.
    #[error("step {step}: no row of its micro-batches has a weight; leave such batches out")]
    NothingToLearn {
        /// The step that was not taken.
        step: u64,
    },
    /// The model refused a batch, or memory was refused.
    #[error(transparent)]
    Model(#[from] consort_model::Error),
    /// A checkpoint can't be written or read.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// The data is wrong, or can't be read.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// Memory was refused.
    #[error(transparent)]
    Tensor(#[from] consort_tensor::Error),
}
