//! The engine's thread and its handle.

use std::sync::Arc;
use std::time::Duration;

use consort_model::{Model, Tokenizer};
use consort_tensor::Pool;

use crate::request::{Request, Submission, SubmitError};

/// How an engine runs. Defaults suit the machine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Bytes for the cache; `None` takes room for eight full contexts of the model or a quarter of memory, whichever is less.
    pub kv_bytes: Option<usize>,
    /// The longest sequence taken; `None` takes the model's own.
    pub max_context: Option<usize>,
    /// Sequences that run at once.
    pub max_running: usize,
    /// Requests that wait at most; one more is [`SubmitError::Busy`].
    pub max_queued: usize,
    /// Rows a step: decode rows and prefill chunks share them.
    pub step_tokens: usize,
    /// Keep finished blocks for prompts with the same start.
    pub prefix_cache: bool,
}

/// Numbers for `/metrics` and `/ready`, read without stopping the engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Requests waiting for their first step.
    pub queued: usize,
    /// Sequences running.
    pub running: usize,
    /// Tokens still to compute for waiting and running requests (prompt rows and the answers' limits).
    pub outstanding_tokens: usize,
    /// Cache blocks in all.
    pub kv_blocks: usize,
    /// Cache blocks held by running sequences.
    pub kv_blocks_used: usize,
    /// Prompt tokens looked up in the prefix cache, ever.
    pub prefix_lookup_tokens: u64,
    /// Prompt tokens found there, ever.
    pub prefix_hit_tokens: u64,
    /// Prompt tokens computed, ever.
    pub prompt_tokens: u64,
    /// Tokens generated, ever.
    pub generated_tokens: u64,
    /// Steps, ever.
    pub steps: u64,
    /// Rows of all steps, ever.
    pub step_rows: u64,
    /// Sequences preempted, ever.
    pub preemptions: u64,
    /// Steps finished with no answer sent for longer than this would be a hang: milliseconds since the last step while busy.
    pub stalled_ms: u64,
}

/// A handle on a running engine; clones share it. The last one dropped stops it.
#[derive(Clone)]
pub struct Engine {
    _private: Arc<()>,
}

impl Engine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// [`consort_model::Error`] where the cache can't be made.
    pub fn start(
        model: Arc<Model>,
        tokenizer: Arc<Tokenizer>,
        pool: Pool,
        options: EngineOptions,
    ) -> Result<Engine, consort_model::Error> {
        let _ = (model, tokenizer, pool, options);
        todo!()
    }

    /// Hands a request to the engine.
    ///
    /// # Errors
    /// [`SubmitError`]: busy, draining, invalid (checked here, before it queues) or stopped.
    pub fn submit(&self, request: Request) -> Result<Submission, SubmitError> {
        let _ = request;
        todo!()
    }

    /// Names the numerics class: answers are equal between replicas that share it.
    pub fn fingerprint(&self) -> &str {
        todo!()
    }

    /// The longest sequence it takes, in tokens.
    pub fn max_context(&self) -> usize {
        todo!()
    }

    /// Current numbers.
    pub fn stats(&self) -> Stats {
        todo!()
    }

    /// Stops admitting; running requests finish, or are handed over once `budget` is spent. Returns when none is left.
    pub fn drain(&self, budget: Duration) {
        let _ = budget;
        todo!()
    }
}
