//! What the integration tests share: one sequence with a cache of its own.
#![allow(dead_code, clippy::unwrap_used)]

use consort_model::arch::Span;
use consort_model::{Batch, Model, Scratch};
use consort_tensor::kv::{BLOCK_TOKENS, BlockId, KvCache};
use consort_tensor::{Pool, reduce};

/// Positions the cache of a [`Session`] has room for.
const CAPACITY: usize = 128;

/// A sequence and its cache.
pub(crate) struct Session {
    pub(crate) cache: KvCache,
    pub(crate) blocks: Vec<BlockId>,
    pub(crate) position: usize,
    scratch: Scratch,
}

impl Session {
    pub(crate) fn new(model: &Model) -> Session {
        let count = CAPACITY / BLOCK_TOKENS;
        Session {
            cache: KvCache::new(model.kv_shape(), count).unwrap(),
            blocks: (0..count as BlockId).collect(),
            position: 0,
            scratch: Scratch::new(),
        }
    }

    /// Appends tokens; logits of the wanted rows.
    pub(crate) fn run(
        &mut self,
        model: &Model,
        pool: &Pool,
        tokens: &[u32],
        logit_rows: &[usize],
    ) -> Vec<f32> {
        let span =
            Span { first_row: 0, rows: tokens.len(), first_position: self.position, blocks: &self.blocks };
        let mut logits = Vec::new();
        let batch = Batch { tokens, spans: &[span], logit_rows };
        model.forward(pool, batch, &mut self.cache, &mut self.scratch, &mut logits).unwrap();
        self.position += tokens.len();
        logits
    }

    pub(crate) fn last_row<'a>(&self, model: &Model, logits: &'a [f32]) -> &'a [f32] {
        &logits[logits.len() - model.config().vocab..]
    }

    /// The next `count` greedy tokens after a row of logits.
    pub(crate) fn greedy(&mut self, model: &Model, pool: &Pool, logits: &[f32], count: usize) -> Vec<u32> {
        let mut next = reduce::argmax(pool.cpu(), logits) as u32;
        let mut out = vec![next];
        while out.len() < count {
            let logits = self.run(model, pool, &[next], &[0]);
            next = reduce::argmax(pool.cpu(), &logits) as u32;
            out.push(next);
        }
        out
    }
}
