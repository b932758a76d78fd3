//! Rows of several sequences, packed without padding, and the check that they fit the model and its cache.

use consort_tensor::attention::Span;
use consort_tensor::kv::{BLOCK_TOKENS, KvCache};

use super::Model;
use crate::Error;

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

impl Model {
    /// Everything that a kernel would otherwise have to trust. `writes` is memory to reuse.
    pub(super) fn check(
        &self,
        batch: &Batch<'_>,
        cache: &KvCache,
        writes: &mut Vec<(u32, u32)>,
    ) -> Result<(), Error> {
        let fail = |reason: String| Err(Error::Batch { reason });
        if cache.shape() != self.kv_shape() {
            return fail(format!("the cache has the shape {:?}, not {:?}", cache.shape(), self.kv_shape()));
        }
        if let Some(token) = batch.tokens.iter().find(|&&t| t as usize >= self.config.vocab) {
            return fail(format!("token {token} is not below the vocabulary's {}", self.config.vocab));
        }
        let mut next_row = 0;
        writes.clear();
        for (index, span) in batch.spans.iter().enumerate() {
            if span.rows == 0 || span.first_row != next_row || span.rows > batch.tokens.len() - next_row {
                return fail(format!(
                    "span {index} covers {} rows from {}, where {} rows of {} are covered so far",
                    span.rows,
                    span.first_row,
                    next_row,
                    batch.tokens.len()
                ));
            }
            next_row += span.rows;
            let end = span.first_position.saturating_add(span.rows);
            if end > self.config.max_context {
                return fail(format!(
                    "span {index} ends at position {end}, past the model's {} positions",
                    self.config.max_context
                ));
            }
            let blocks = end.div_ceil(BLOCK_TOKENS);
            let Some(used) = span.blocks.get(..blocks) else {
                return fail(format!("span {index} needs {blocks} blocks and has {}", span.blocks.len()));
            };
            if let Some(block) = used.iter().find(|&&b| b as usize >= cache.blocks()) {
                return fail(format!("span {index} names block {block} of {}", cache.blocks()));
            }
            let first = span.first_position / BLOCK_TOKENS;
            writes.extend(used[first..].iter().map(|&block| (block, index as u32)));
        }
        if next_row != batch.tokens.len() {
            return fail(format!("spans cover {next_row} of {} rows", batch.tokens.len()));
        }
        // Two rows that store into one slot would race. Blocks that are only read may be shared by any number.
        writes.sort_unstable();
        if let Some(pair) = writes.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return fail(format!(
                "spans {} and {} store into one block, {}",
                pair[0].1, pair[1].1, pair[0].0
            ));
        }
        let mut last = None;
        for &row in batch.logit_rows {
            if row >= batch.tokens.len() || last.is_some_and(|last| row <= last) {
                return fail(format!("logit row {row} is out of range or order"));
            }
            last = Some(row);
        }
        Ok(())
    }
}
