//! A training job as a person writes it down: which model, on what data, how, and where the result goes.
//!
//! [`read`] is a function from the file's text to a [`Job`]; it opens nothing and asks nothing of the machine. What a
//! file says can each be possible and together be too much: [`plan`] does that arithmetic, once the model and the data
//! are known, and refuses with the numbers. Both are judged before a worker starts.

mod file;
mod memory;
mod plan;
mod servers;

use std::path::PathBuf;
use std::time::Duration;

use consort_collectives::Algorithm;
use consort_model::ModelConfig;
use consort_model::arch::RopeConfig;
use consort_model::train::{Precision, SavedType};
use consort_tensor::activation::Activation;
use serde::{Deserialize, Serialize};

use crate::data::{BadLines, TextDocuments};
use crate::parallel::{self, Outer, Wire};
use crate::{Decay, OptimizerConfig, Options, Schedule, TrainerConfig};

pub use file::read;
pub use plan::{Machine, Part, Plan, Process, Refusal, in_count, plan};
pub use servers::Servers;

/// A job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The folder for the model, the report and the checkpoints.
    pub out: PathBuf,
    /// What initial weights, the order of samples, and dropout follow.
    pub seed: u64,
    /// Processes that train.
    pub workers: usize,
    /// Compute threads of all workers together; `None` is one a core.
    pub threads: Option<usize>,
    /// Where the weights begin.
    pub model: ModelSource,
    /// What is learned from.
    pub data: Data,
    /// How.
    pub train: Train,
    /// Which optimizer.
    pub optimizer: OptimizerConfig,
    /// The learning rate.
    pub schedule: Rates,
    /// When the job's state is kept.
    pub checkpoints: Checkpoints,
    /// Servers that keep the weights; `None` where workers add gradients among themselves.
    pub servers: Option<Servers>,
    /// How the result's weights are stored.
    pub save: SavedType,
    /// A GGUF file beside the result.
    pub gguf: Option<GgufType>,
    /// What the report shows the model's answers to.
    pub prompts: Vec<String>,
}

/// Where the weights begin.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSource {
    /// At random.
    New(Shape),
    /// As a model has them: a name, `hf:org/repo[/file]`, a `.gguf` file or a Hugging Face folder.
    From(String),
}

/// The shape of a model from scratch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Llama, or Qwen 3 with its norms of queries and keys.
    pub family: Family,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of the feed-forward block.
    pub ffn: usize,
    /// Positions.
    pub context: usize,
    /// Tokens in the vocabulary, which is learned from the data.
    pub vocabulary: usize,
    /// The embedding is also the head.
    pub tied: bool,
}

/// A family whose models can be made from scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// As Llama 2, 3 and SmolLM2.
    Llama,
    /// As Qwen 3.
    Qwen3,
}

/// What is learned from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Files and folders; relative ones are beside the job's file.
    pub paths: Vec<PathBuf>,
    /// Bytes of stories that are written for the job ([`crate::data::stories`]); 0 for none.
    pub stories: u64,
    /// What a text file is.
    pub text: TextDocuments,
    /// What becomes of bad lines.
    pub bad_lines: BadLines,
    /// Rows of a sample, at most.
    pub context: usize,
}

/// How much, and how it is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Train {
    /// How long.
    pub length: Length,
    /// Samples of a step.
    pub batch: usize,
    /// Samples that are computed at once.
    pub micro_batch: usize,
    /// What products round their inputs to.
    pub precision: Precision,
    /// Activations are computed again in backward instead of kept.
    pub recompute: bool,
    /// The share of what a block adds that is dropped.
    pub dropout: f32,
    /// Gradients longer than this are shortened to it.
    pub clip: Option<f64>,
    /// Sums of gradients don't depend on who computed them and in what order: the same weights for any number of workers.
    pub exact: bool,
    /// How gradients travel, where sums are not exact.
    pub wire: Wire,
    /// The algorithm that adds them; `None` lets the length decide.
    pub algorithm: Option<Algorithm>,
    /// Steps that workers take by themselves, where sums are not exact.
    pub outer: Option<Outer>,
    /// How long a call of the group may take; longer than a worker computes in a step.
    pub deadline: Duration,
    /// How long a worker may say nothing before the others go on without it; `None` leaves it to where they are.
    pub silence: Option<Duration>,
}

/// How long a job is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Steps.
    Steps(u64),
    /// Times that every sample is seen; the last step's batch may begin another.
    Epochs(f64),
}

/// A schedule whose length is the job's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// The rate after the warm-up.
    pub learning_rate: f64,
    /// The warm-up, as a share of all steps.
    pub warmup: f64,
    /// What the rate does then.
    pub decay: Decay,
    /// What is left of the rate at the end.
    pub final_share: f64,
}

impl Rates {
    /// The schedule of a job of `steps` steps.
    pub fn over(&self, steps: u64) -> Schedule {
        // A share from 0 to 1 of a count below 2^53.
        let warmup_steps = (self.warmup * steps as f64).round() as u64;
        Schedule {
            learning_rate: self.learning_rate,
            warmup_steps: warmup_steps.min(steps),
            steps,
            decay: self.decay,
            final_share: self.final_share,
        }
    }
}

/// When the job's state is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoints {
    /// Steps from one to the next.
    pub every: u64,
    /// How many are kept.
    pub keep: usize,
    /// A folder or `s3://bucket/prefix`; `None` is `checkpoints` in the job's folder.
    pub location: Option<String>,
}

/// How a GGUF file stores matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GgufType {
    /// As they are.
    F32,
    /// Half the bytes.
    Bf16,
    /// Blocks of 32 bytes with a scale.
    #[serde(rename = "q8_0")]
    Q8_0,
}

impl Job {
    /// How a trainer of this job trains over `steps` steps.
    pub fn trainer(&self, steps: u64) -> TrainerConfig {
        TrainerConfig {
            options: Options {
                precision: self.train.precision,
                recompute: self.train.recompute,
                dropout: self.train.dropout,
                seed: self.seed,
            },
            optimizer: self.optimizer,
            schedule: self.schedule.over(steps),
            clip_norm: self.train.clip,
        }
    }

    /// What workers of this job compute in `steps` steps, with its checkpoints.
    pub fn plan(&self, steps: u64) -> parallel::Plan {
        let train = &self.train;
        parallel::Plan {
            exact: train.exact,
            wire: train.wire,
            algorithm: train.algorithm,
            outer: train.outer,
            checkpoint_every: Some(self.checkpoints.every),
            ..parallel::Plan::new(self.seed, steps, train.batch / train.micro_batch, train.micro_batch)
        }
    }

    /// Where checkpoints go.
    pub fn checkpoint_location(&self) -> String {
        let own = || self.out.join("checkpoints").display().to_string();
        self.checkpoints.location.clone().unwrap_or_else(own)
    }
}

impl Shape {
    /// The model of this shape with a vocabulary of `vocab` tokens.
    pub fn config(&self, vocab: usize) -> ModelConfig {
        let head_dim = self.hidden / self.heads.max(1);
        ModelConfig {
            family: match self.family {
                Family::Llama => "llama".into(),
                Family::Qwen3 => "qwen3".into(),
            },
            name: None,
            vocab,
            max_context: self.context,
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim,
            ffn: self.ffn,
            activation: Activation::Silu,
            norm_eps: 1e-5,
            embedding_scale: None,
            attention_scale: (head_dim as f32).powf(-0.5),
            attention_softcap: None,
            logit_softcap: None,
            query_key_norm: self.family == Family::Qwen3,
            post_norms: false,
            tied_head: self.tied,
            rope: RopeConfig::plain(10_000.0),
            sliding: None,
        }
    }
}

#[cfg(test)]
mod tests;
