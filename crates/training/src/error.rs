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
    /// A parameter server, or the job around it, can't go on.
    #[error("{0}")]
    Server(String),
    /// The launcher ended the job before its last step.
    #[error("the job was ended by its launcher")]
    Ended,
    /// The model refused a batch, or memory was refused.
    #[error(transparent)]
    Model(#[from] consort_model::Error),
    /// A checkpoint can't be written or read.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// A checkpoint or another worker is of a job that computes something else.
    #[error("{whose} has {name} = {theirs}, this job has {ours}: {cure}")]
    AnotherJob {
        /// The checkpoint, or which worker.
        whose: String,
        /// The setting.
        name: String,
        /// What it has there.
        theirs: String,
        /// What it has here.
        ours: String,
        /// What to do.
        cure: &'static str,
    },
    /// Workers that should hold the same state don't, or what one sent didn't arrive as it was.
    #[error("{0}")]
    Disagreement(String),
    /// The group of workers can't be formed, or is lost for good.
    #[error(transparent)]
    Group(Box<consort_collectives::Error>),
    /// The data is wrong, or can't be read.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// Memory was refused.
    #[error(transparent)]
    Tensor(#[from] consort_tensor::Error),
}

impl From<consort_collectives::Error> for Error {
    fn from(error: consort_collectives::Error) -> Error {
        Error::Group(Box::new(error))
    }
}
