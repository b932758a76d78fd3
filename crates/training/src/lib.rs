//! Training: data as samples of tokens, optimizers with their state, schedules, and the step that ties them to a decoder.
//!
//! A step takes micro-batches of packed sequences with a weight a row, adds their losses, weights and gradients, and
//! divides by the sum of weights at the end. So how a step's sequences are cut into micro-batches doesn't change what
//! it means, and a trainer on several machines has plain sums to reduce.

pub mod bench;
pub mod checkpoint;
pub mod data;
mod error;
pub mod job;
mod optimizer;
pub mod parallel;
pub mod report;
mod schedule;
pub mod server;
mod trainer;

pub use consort_model::train::{
    Decoder, Gradients, Layout, Loss, MicroBatch, Normal, Options, Precision, SavedType, config_file,
    export_gguf, save,
};
pub use error::Error;
pub use optimizer::{Optimizer, OptimizerConfig};
pub use schedule::{Decay, Schedule};
pub use trainer::{StateMut, StepReport, Trainer, TrainerConfig};
