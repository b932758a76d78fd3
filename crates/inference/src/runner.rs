//! What the engine's loop needs of a model: rows in, logits out. The real one runs [`Model`] on its cache; tests run
//! [`crate::hash_runner::HashRunner`] through the very same loop.

use std::ops::Range;
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

    /// Does a little of what can be done ahead while there are no requests, where `touched` blocks have been used so
    /// far; false where nothing is left to do.
    fn prepare(&mut self, _touched: usize) -> bool {
        false
    }

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
    /// Blocks `0..ready` have memory behind them.
    ready: usize,
    scratch: Scratch,
}

/// Memory that is got ready for blocks ahead of their first use: this much, or an eighth of the cache where that is
/// less. A fresh page costs a fault, which in a virtual machine can be a tenth of a busy replica's time.
const READY_BYTES: usize = 256 << 20;

/// How much of it at a time: a request that comes meanwhile waits for that long, a few milliseconds.
const READY_STEP_BYTES: usize = 2 << 20;

impl ModelRunner {
    /// With a cache of `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Tensor`] where the system refuses the memory.
    pub fn new(model: Arc<Model>, pool: Pool, blocks: usize) -> Result<ModelRunner, Error> {
        let cache = KvCache::new(model.kv_shape(), blocks)?;
        Ok(ModelRunner { model, pool, cache, ready: 0, scratch: Scratch::default() })
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

    fn prepare(&mut self, touched: usize) -> bool {
        let next = next_ready(self.ready, touched, self.cache.blocks(), self.cache.shape().block_bytes());
        self.ready = next.end;
        self.cache.populate(next.clone());
        !next.is_empty()
    }

    fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn spread(&self, work: &(dyn Fn(usize) + Sync)) {
        self.pool.run(|worker| work(worker.rank));
    }
}

/// The blocks to get ready next of a cache of `blocks` blocks of `block_bytes` bytes, where those before `ready` are,
/// and those before `touched` have been used.
fn next_ready(ready: usize, touched: usize, blocks: usize, block_bytes: usize) -> Range<usize> {
    let count = |bytes: usize| bytes / block_bytes.max(1);
    let start = ready.max(touched);
    let ahead = count(READY_BYTES).min(blocks / 8);
    let end = (start + count(READY_STEP_BYTES).max(1)).min(touched + ahead).min(blocks);
    start..end.max(start)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_got_ready_ahead_of_its_use_and_not_far() {
        const BLOCK: usize = 300 << 10;
        let all = |mut ready: usize, touched: usize, blocks: usize| loop {
            let next = next_ready(ready, touched, blocks, BLOCK);
            if next.is_empty() {
                return next.end;
            }
            assert!(next.start >= ready.max(touched) && next.len() * BLOCK <= READY_STEP_BYTES);
            ready = next.end;
        };
        let ahead = READY_BYTES / BLOCK;
        assert_eq!(all(0, 0, 1 << 20), ahead);
        assert_eq!(all(ahead, 100, 1 << 20), ahead + 100);
        assert_eq!(all(50, ahead, 1 << 20), 2 * ahead, "what was used before it was ready is not visited");
        assert_eq!(all(0, 0, 80), 10, "an eighth of a small cache");
        assert_eq!(all(0, 75, 80), 80);
        assert_eq!(all(80, 80, 80), 80);
        assert_eq!(next_ready(0, 0, 1 << 20, READY_BYTES), 0..1, "a block larger than a step");
    }
}
