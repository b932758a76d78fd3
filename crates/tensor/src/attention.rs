//! Grouped-query attention over the paged cache, with an online softmax (Dao et al. 2022).
//!
//! One query walks its keys in one fixed order of blocks by absolute position, so prefill, decode, chunks and
//! cached prefixes give the same bits.

use crate::Pool;
use crate::kv::{BlockId, KvCache};

/// One sequence's rows in a packed batch.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// Its first row in the batch.
    pub first_row: usize,
    /// Its rows in the batch: consecutive tokens.
    pub rows: usize,
    /// The first row's position in the sequence; row *r* stands at `first_position + r`.
    pub first_position: usize,
    /// Its cache blocks from position 0 on; covers every position up to the last row's.
    pub blocks: &'a [BlockId],
}

/// What an [`attention`] call needs beside queries and cache.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    /// Query heads.
    pub heads: usize,
    /// Multiplies the scores (`1 / sqrt(head_dim)` in most models).
    pub scale: f32,
    /// A row sees at most this many positions, its own included (sliding window); `None` sees all.
    pub window: Option<usize>,
    /// `cap · tanh(score / cap)` where set (Gemma 2).
    pub softcap: Option<f32>,
}

/// Causal attention of every row of `q` (`heads * head_dim` values) over its sequence's keys, into `out` (same shape).
/// The rows' own keys and values are already stored.
pub fn attention(
    pool: &Pool,
    params: AttentionParams,
    layer: usize,
    cache: &KvCache,
    spans: &[Span<'_>],
    q: &[f32],
    out: &mut [f32],
) {
    let _ = (pool, params, layer, cache, spans, q, out);
    todo!()
}
