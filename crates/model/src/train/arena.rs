//! Activations that backward needs, in memory that steps reuse.
//!
//! A row keeps about `8·hidden + 3·ffn` values a layer (SmolLM2-135M: 34 kB, so 1 GB for 1,024 rows of its 30 layers).
//! With recomputation only the `hidden` values that enter a layer are kept (2.3 kB), and one layer's others at a time
//! are computed again: a third more work for a fifteenth of the memory.

use consort_tensor::buffer::Buffer;
use consort_tensor::train::cross_entropy::Scratch;
use consort_tensor::train::pitch;

use crate::Error;
use crate::arch::ModelConfig;

/// Memory of forward and backward, grown to the largest micro-batch so far.
#[derive(Default)]
pub struct Arena {
    /// What enters each layer, and what leaves the last.
    pub(super) states: Vec<Buffer<f32>>,
    /// What each layer computed; one for all of them with recomputation.
    pub(super) layers: Vec<Saved>,
    /// The last state after its norm, then its gradient.
    pub(super) normed: Buffer<f32>,
    /// The gradient of the residual stream.
    pub(super) d: Buffer<f32>,
    /// The gradient of what a block's norm gave.
    pub(super) dnormed: Buffer<f32>,
    /// A block's gradient or output with some values dropped.
    pub(super) dropped: Buffer<f32>,
    /// Gradients inside the feed-forward block and inside attention.
    pub(super) dffn: Buffer<f32>,
    pub(super) dattended: Buffer<f32>,
    pub(super) dqkv: Buffer<f32>,
    pub(super) loss: Scratch,
}

/// What a layer computed on the way forward.
#[derive(Default)]
pub(super) struct Saved {
    pub(super) normed: Buffer<f32>,
    /// Queries, keys and values before norms of heads, where there are such.
    pub(super) raw: Buffer<f32>,
    /// As attention read them.
    pub(super) qkv: Buffer<f32>,
    pub(super) lse: Buffer<f32>,
    pub(super) attended: Buffer<f32>,
    /// The residual stream between the blocks.
    pub(super) middle: Buffer<f32>,
    pub(super) ffn_normed: Buffer<f32>,
    /// Gates and ups, their [`pitch`] apart as what they are made to; backward turns them into their gradients.
    pub(super) gate_up: Buffer<f32>,
    pub(super) activated: Buffer<f32>,
}

impl Arena {
    /// No memory yet.
    pub fn new() -> Arena {
        Arena::default()
    }

    /// Makes room for `rows` rows. `backward` says whether gradients are wanted.
    pub(super) fn prepare(
        &mut self,
        config: &ModelConfig,
        rows: usize,
        (recompute, dropout, backward): (bool, bool, bool),
    ) -> Result<(), Error> {
        let (hidden, ffn, q) = (config.hidden, config.ffn, config.heads * config.head_dim);
        let qkv = q + 2 * config.kv_heads * config.head_dim;
        let keep_all = backward && !recompute;
        self.layers.resize_with(if keep_all { config.layers } else { 1 }, Saved::default);
        self.states.resize_with(if backward { config.layers + 1 } else { 2 }, Buffer::default);
        let room = |buffer: &mut Buffer<f32>, width: usize| grow(buffer, rows, width);
        for state in &mut self.states {
            room(state, hidden)?;
        }
        for saved in &mut self.layers {
            room(&mut saved.normed, hidden)?;
            room(&mut saved.raw, if config.query_key_norm { qkv } else { 0 })?;
            room(&mut saved.qkv, qkv)?;
            room(&mut saved.lse, config.heads)?;
            room(&mut saved.attended, q)?;
            room(&mut saved.middle, hidden)?;
            room(&mut saved.ffn_normed, hidden)?;
            room(&mut saved.gate_up, pitch(2 * ffn))?;
            room(&mut saved.activated, pitch(ffn))?;
        }
        room(&mut self.normed, hidden)?;
        room(&mut self.dropped, if dropout { hidden } else { 0 })?;
        if backward {
            room(&mut self.d, hidden)?;
            room(&mut self.dnormed, hidden)?;
            room(&mut self.dffn, pitch(ffn))?;
            room(&mut self.dattended, q)?;
            room(&mut self.dqkv, qkv)?;
        }
        Ok(())
    }

    /// What [`Arena::bytes`] will be for micro-batches of up to `rows` rows with gradients. Saturates where nobody has that
    /// much.
    pub fn bytes_for(config: &ModelConfig, rows: usize, recompute: bool, dropout: bool) -> usize {
        let (hidden, ffn, q) = (config.hidden, config.ffn, config.heads.saturating_mul(config.head_dim));
        let qkv = q.saturating_add(config.kv_heads.saturating_mul(config.head_dim).saturating_mul(2));
        let raw = if config.query_key_norm { qkv } else { 0 };
        let all = |widths: &[usize]| widths.iter().fold(0usize, |sum, width| sum.saturating_add(*width));
        let feed_forward = [pitch(ffn.saturating_mul(2)), pitch(ffn)];
        let layer =
            all(&[hidden, raw, qkv, config.heads, q, hidden, hidden, feed_forward[0], feed_forward[1]]);
        let shared =
            all(&[hidden, if dropout { hidden } else { 0 }, hidden, hidden, feed_forward[1], q, qkv]);
        let layers = layer.saturating_mul(if recompute { 1 } else { config.layers });
        let states = hidden.saturating_mul(config.layers.saturating_add(1));
        all(&[layers, states, shared]).saturating_mul(rows).saturating_mul(size_of::<f32>())
    }

    /// Bytes of all buffers but the loss's (64 MiB at most, or one vector of rows).
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|s| {
            [
                &s.normed,
                &s.raw,
                &s.qkv,
                &s.lse,
                &s.attended,
                &s.middle,
                &s.ffn_normed,
                &s.gate_up,
                &s.activated,
            ]
        });
        let shared =
            [&self.normed, &self.d, &self.dnormed, &self.dropped, &self.dffn, &self.dattended, &self.dqkv];
        let values: usize = layers.chain(shared).chain(&self.states).map(|buffer| buffer.len()).sum();
        values * size_of::<f32>()
    }
}

/// At least `rows * width` values; what was there is lost where it grows.
fn grow(buffer: &mut Buffer<f32>, rows: usize, width: usize) -> Result<(), Error> {
    let len = rows.saturating_mul(width);
    if buffer.len() < len {
        *buffer = Buffer::default();
        *buffer = Buffer::zeroed(len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::decoder::tests::tiny;
    use super::*;

    #[test]
    fn what_it_will_take_is_what_it_takes() {
        for family in ["llama", "qwen3"] {
            let config = tiny(family);
            for (recompute, dropout) in [(false, false), (true, false), (false, true), (true, true)] {
                let mut arena = Arena::new();
                arena.prepare(&config, 37, (recompute, dropout, true)).unwrap();
                assert_eq!(arena.bytes(), Arena::bytes_for(&config, 37, recompute, dropout), "{family}");
            }
        }
        let huge = ModelConfig { hidden: usize::MAX / 2, ..tiny("llama") };
        assert_eq!(Arena::bytes_for(&huge, 1 << 20, false, true), usize::MAX);
    }
}
