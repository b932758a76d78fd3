//! What the engine's loop needs of a model: rows in, logits out. The real one runs [`Model`] on its cache; tests run
//! [`crate::hash_runner::HashRunner`] through the very same loop.

use std::sync::Arc;

use consort_model::{Batch, Error, Model, Scratch};
use consort_tensor::kv::{BLOCK_TOKENS, KvCache};
use consort_tensor::{Cpu, Pool};

/// Changes whenever the engine's own numerics do (sampler, noise, log-probabilities): part of the fingerprint.
pub const NUMERICS_VERSION: u32 = 1;

/// A model with its cache, owned by the engine's thread.
pub trait Runner: Send + 'static {
    /// Tokens in the vocabulary; a row of logits has as many values.
    fn vocab(&self) -> usize;

    /// Positions the model takes.
    fn max_context(&self) -> usize;

    /// Cache blocks of [`BLOCK_TOKENS`] tokens.
    fn blocks(&self) -> usize;

    /// Names the numerics class: see [`fingerprint`].
    fn fingerprint(&self) -> String;

    /// The kernels for reductions over logits.
    fn cpu(&self) -> Cpu {
        Cpu::detect()
    }

    /// Stores the batch's keys and values, and makes `logits` the wanted rows (`logit_rows.len() * vocab` values).
    ///
    /// # Errors
    /// The engine fails every request and stops.
    fn forward(&mut self, batch: Batch<'_>, logits: &mut Vec<f32>) -> Result<(), Error>;

    /// Threads of [`Runner::spread`].
    fn threads(&self) -> usize {
        1
    }

    /// Runs `work(rank)` once on each thread, rank in `0..threads()`, and returns when all are done.
    fn spread(&self, work: &(dyn Fn(usize) + Sync)) {
        work(0);
    }
}

/// A loaded model on a compute pool.
pub struct ModelRunner {
    model: Arc<Model>,
    pool: Pool,
    cache: KvCache,
    scratch: Scratch,
}

impl ModelRunner {
    /// With a cache of `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Tensor`] where the system refuses the memory.
    pub fn new(model: Arc<Model>, pool: Pool, blocks: usize) -> Result<ModelRunner, Error> {
        let cache = KvCache::new(model.kv_shape(), blocks)?;
        Ok(ModelRunner { model, pool, cache, scratch: Scratch::default() })
    }
}

impl Runner for ModelRunner {
    fn vocab(&self) -> usize {
        self.model.config().vocab
    }

    fn max_context(&self) -> usize {
        self.model.config().max_context
    }

    fn blocks(&self) -> usize {
        self.cache.blocks()
    }

    fn fingerprint(&self) -> String {
        fingerprint(self.model.weights_hash(), self.pool.cpu())
    }

    fn cpu(&self) -> Cpu {
        self.pool.cpu()
    }

    fn forward(&mut self, batch: Batch<'_>, logits: &mut Vec<f32>) -> Result<(), Error> {
        self.model.forward(&self.pool, batch, &mut self.cache, &mut self.scratch, logits)
    }

    fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn spread(&self, work: &(dyn Fn(usize) + Sync)) {
        self.pool.run(|worker| work(worker.rank));
    }
}

/// `fp_` and twelve hex digits of BLAKE3 over what decides an answer's bits: the weights' hash, the kernel family,
/// the shard layout (one shard today), the cache's block length (attention's order of sums) and the engine's
/// numerics version. The number of threads, the cache's size and the batch are not in it: they decide nothing.
pub fn fingerprint(weights_hash: &str, cpu: Cpu) -> String {
    let family = cpu.family().name();
    let class = format!("{weights_hash}/{family}/shards=1/block={BLOCK_TOKENS}/numerics={NUMERICS_VERSION}");
    let digits = blake3::hash(class.as_bytes()).to_hex();
    format!("fp_{}", &digits[..12])
}
