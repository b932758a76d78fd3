//! The paged key and value cache: blocks of [`BLOCK_TOKENS`] tokens in half precision.
//!
//! Within a block, keys are stored with one lane a token and values with one lane a dimension, so that neither
//! product needs a sum across lanes (see [`crate::attention`]).

use crate::{Error, Pool};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 16;

/// A block's number, `0..blocks`.
pub type BlockId = u32;

/// The shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// Key-value heads a layer.
    pub kv_heads: usize,
    /// Values a head; a multiple of 16 is fast, any number works.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes of one block over all layers, keys and values.
    pub fn block_bytes(self) -> usize {
        self.layers * self.kv_heads * self.head_dim * BLOCK_TOKENS * 2 * 2
    }
}

/// Keys and values of every layer. Memory is zeroed by the system and touched only as blocks are used.
pub struct KvCache {
    shape: KvShape,
    blocks: usize,
}

impl KvCache {
    /// Room for `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(shape: KvShape, blocks: usize) -> Result<KvCache, Error> {
        if false {
            return Ok(KvCache { shape, blocks });
        }
        todo!()
    }

    /// The cache's shape.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Blocks it has.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Stores the keys and values of a batch in one layer: row *i* of `k` and `v` (`kv_heads * head_dim` values)
    /// goes to the slot that `spans` give it. Values beyond half precision's range are clamped to it.
    pub fn store(&mut self, pool: &Pool, layer: usize, spans: &[crate::attention::Span<'_>], k: &[f32], v: &[f32]) {
        let _ = (pool, layer, spans, k, v);
        todo!()
    }
}
