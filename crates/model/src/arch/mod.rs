//! Architectures: one decoder whose [`ModelConfig`] says which family it is.

use consort_tensor::Pool;
use consort_tensor::attention::Span;
use consort_tensor::kv::{KvCache, KvShape};

use crate::Error;

/// The numbers that make one decoder out of the common definition (the loader owns the details).
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The family's name as the file gives it: `llama`, `qwen2`, `qwen3`, `gemma3`, `mistral`.
    pub family: String,
    /// The model's own name, if the file has one.
    pub name: Option<String>,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Positions the model was trained for.
    pub max_context: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
}

/// Rows of several sequences, packed without padding.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token ids of all rows.
    pub tokens: &'a [u32],
    /// Which rows belong to which sequence, in row order and covering every row.
    pub spans: &'a [Span<'a>],
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [usize],
}

/// A loaded model: packed weights, ready to run. Immutable and shared.
pub struct Model {
    config: ModelConfig,
}

/// Buffers that a forward pass reuses.
#[derive(Default)]
pub struct Scratch {}

impl Model {
    /// The architecture's numbers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The shape its cache needs.
    pub fn kv_shape(&self) -> KvShape {
        KvShape { layers: self.config.layers, kv_heads: self.config.kv_heads, head_dim: self.config.head_dim }
    }

    /// Sixteen hex digits over the weights and everything else in the file that changes an answer.
    pub fn weights_hash(&self) -> &str {
        todo!()
    }

    /// Bytes of memory the packed weights take.
    pub fn weight_bytes(&self) -> usize {
        todo!()
    }

    /// Runs the rows through the decoder, storing keys and values in `cache`; `logits` becomes
    /// `batch.logit_rows.len()` rows of `vocab` values.
    ///
    /// # Errors
    /// [`Error::Batch`] where a token, position or block is out of range; nothing was stored then.
    pub fn forward(
        &self,
        pool: &Pool,
        batch: Batch<'_>,
        cache: &mut KvCache,
        scratch: &mut Scratch,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let _ = (pool, batch, cache, scratch, logits);
        todo!()
    }
}
