//! A model for tests whose logits are a hash of all tokens before them, read back through the block tables: a wrong
//! block, a lost row or a stale position changes every later token. It has no weights and needs no file.

use consort_model::{Batch, Error};
use consort_tensor::kv::BLOCK_TOKENS;

use crate::runner::Runner;

/// The deterministic fake.
#[derive(Clone, Debug)]
pub struct HashRunner {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Positions it takes.
    pub max_context: usize,
    /// Fails the forward pass with this number (counted from 1): an error if it is even, a panic if it is odd.
    pub fails_at: Option<u64>,
    slots: Vec<Option<(usize, u32)>>,
    passes: u64,
}

impl HashRunner {
    /// With a cache of `blocks` blocks.
    pub fn new(vocab: usize, max_context: usize, blocks: usize) -> HashRunner {
        HashRunner { vocab, max_context, fails_at: None, slots: vec![None; blocks * BLOCK_TOKENS], passes: 0 }
    }

    /// The logits after these tokens.
    pub fn logits_after(&self, tokens: &[u32]) -> Vec<f32> {
        logits(tokens.iter().copied(), self.vocab)
    }
}

fn logits(tokens: impl Iterator<Item = u32>, vocab: usize) -> Vec<f32> {
    let mix = |state: u64, value: u64| {
        let mixed = (state ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed ^ (mixed >> 29)
    };
    let state = tokens.fold(0x5EED, |state, token| mix(state, u64::from(token) + 1));
    // 24 bits over [-6, 6): few ties, and a distribution that no filter leaves untouched.
    (0..vocab as u64).map(|id| (mix(mix(state, id), id) >> 40) as f32 * (12.0 / 16_777_216.0) - 6.0).collect()
}

impl Runner for HashRunner {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn max_context(&self) -> usize {
        self.max_context
    }

    fn blocks(&self) -> usize {
        self.slots.len() / BLOCK_TOKENS
    }

    fn fingerprint(&self) -> String {
        "fp_hash".to_owned()
    }

    fn forward(&mut self, batch: Batch<'_>, out: &mut Vec<f32>) -> Result<(), Error> {
        self.passes += 1;
        if self.fails_at == Some(self.passes) {
            assert!(self.passes.is_multiple_of(2), "this runner panics at pass {}", self.passes);
            return Err(Error::Batch { reason: format!("this runner fails at pass {}", self.passes) });
        }
        let slot = |blocks: &[u32], position: usize| {
            blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
        };
        for span in batch.spans {
            for row in 0..span.rows {
                let position = span.first_position + row;
                self.slots[slot(span.blocks, position)] =
                    Some((position, batch.tokens[span.first_row + row]));
            }
        }
        out.clear();
        for &row in batch.logit_rows {
            let span = (batch.spans.iter())
                .find(|span| (span.first_row..span.first_row + span.rows).contains(&row))
                .ok_or_else(|| Error::Batch { reason: format!("row {row} is in no span") })?;
            let last = span.first_position + row - span.first_row;
            let prefix = (0..=last).map(|position| match self.slots[slot(span.blocks, position)] {
                Some((stored, token)) if stored == position => token,
                // Somebody else's or nobody's: poison.
                other => u32::MAX - other.map_or(0, |(stored, _)| stored as u32),
            });
            out.extend(logits(prefix, self.vocab));
        }
        Ok(())
    }
}
