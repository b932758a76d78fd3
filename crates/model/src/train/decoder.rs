//! Loss and gradients of packed sequences.
//!
//! The forward pass is the definition of [`crate::arch`], written for many rows at once and for a backward that
//! follows it step by step, in the opposite order (`backward.rs`). Residuals are not added in a pass of their own: a
//! block's last product starts from the stream instead of from 0.

use std::ops::Range;

use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;
use consort_tensor::rope::Rope;
use consort_tensor::train::attention::{Heads, attention};
use consort_tensor::train::cross_entropy::{self, Loss, Targets, cross_entropy};
use consort_tensor::train::dropout::{Site, dropout};
use consort_tensor::train::embedding::embed;
use consort_tensor::train::matmul::{Extent, Precision, Store, View, matmul};
use consort_tensor::train::norm::{Vectors, rms_norm};
use consort_tensor::train::swiglu::swiglu;
use consort_tensor::train::{add, add_bias, copy, pitch};

use super::arena::{Arena, Saved};
use super::layout::LayerLayout;
use super::{Gradients, Layout, MicroBatch};
use crate::Error;
use crate::arch::ModelConfig;

/// How a decoder computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// What products round their inputs to.
    pub precision: Precision,
    /// Activations inside layers are computed again in backward instead of kept.
    pub recompute: bool,
    /// The share of what attention and the feed-forward block add that is dropped; 0 drops nothing.
    pub dropout: f32,
    /// For dropout.
    pub seed: u64,
}

impl Default for Options {
    /// `f32`, everything kept, nothing dropped.
    fn default() -> Options {
        Options { precision: Precision::F32, recompute: false, dropout: 0.0, seed: 0 }
    }
}

/// A decoder's computation. It holds no weights: they are a flat buffer in the order of [`Decoder::layout`].
pub struct Decoder {
    pub(super) config: ModelConfig,
    pub(super) layout: Layout,
    pub(super) options: Options,
    pub(super) rope: Rope,
    pub(super) heads: Heads,
}

/// What the steps of one micro-batch share.
pub(super) struct Call<'a> {
    pub(super) pool: &'a Pool,
    pub(super) weights: &'a [f32],
    pub(super) batch: &'a MicroBatch,
    pub(super) positions: Vec<u32>,
    /// Numbers dropout; `None` where nothing is dropped.
    pub(super) step: Option<u64>,
}

impl Decoder {
    /// A decoder for the model that `config` describes.
    ///
    /// # Errors
    /// [`Error::Untrainable`].
    pub fn new(config: &ModelConfig, options: Options) -> Result<Decoder, Error> {
        let layout = Layout::new(config)?;
        if !(0.0..1.0).contains(&options.dropout) {
            return Err(Error::Untrainable {
                what: format!("a dropout of {}", options.dropout),
                supported: "0 and more, below 1".into(),
            });
        }
        let heads = Heads {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale,
        };
        let rope = Rope::new(config.rope.inverse_frequencies(config.head_dim), config.rope.magnitude());
        Ok(Decoder { config: config.clone(), layout, options, rope, heads })
    }

    /// The architecture's numbers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where weights and gradients lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How it computes.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Floating-point operations of forward and backward for one row at position `position`: two for every weight of a
    /// product and every dimension of a score or output, in forward, and twice that in backward.
    pub fn operations(&self, position: usize) -> usize {
        let config = &self.config;
        let matrices: usize =
            self.layout.parameters().iter().filter(|p| p.shape.len() > 1).map(|p| p.range.len()).sum();
        let products = matrices - if config.tied_head { 0 } else { self.layout.embedding.len() };
        let attention = 2 * config.layers * config.heads * config.head_dim * (position + 1);
        6 * (products + attention)
    }

    /// The loss, without gradients and without dropout.
    ///
    /// # Errors
    /// [`Error::Batch`], [`Error::Tensor`] where memory is refused.
    pub fn loss(
        &self,
        pool: &Pool,
        weights: &[f32],
        batch: &MicroBatch,
        arena: &mut Arena,
    ) -> Result<Loss, Error> {
        let call = self.begin(pool, weights, batch, None, arena, false)?;
        self.forward(&call, arena, false);
        let normed = &arena.normed[..batch.rows() * self.config.hidden];
        self.head(&call, normed, None, &mut arena.loss)
    }

    /// The logits of every row, `[rows × vocab]`: for tests and small evaluations, as they are all in memory.
    ///
    /// # Errors
    /// [`Error::Batch`], [`Error::Tensor`] where memory is refused.
    pub fn logits(
        &self,
        pool: &Pool,
        weights: &[f32],
        batch: &MicroBatch,
        arena: &mut Arena,
    ) -> Result<Buffer<f32>, Error> {
        let call = self.begin(pool, weights, batch, None, arena, false)?;
        self.forward(&call, arena, false);
        let (rows, vocab, hidden) = (batch.rows(), self.config.vocab, self.config.hidden);
        let mut logits = Buffer::zeroed(rows.saturating_mul(vocab))?;
        let normed = &arena.normed[..rows * hidden];
        self.linear(
            &call,
            View::new(normed, hidden),
            self.head_range(),
            vocab,
            (&mut logits, vocab, Store::Replace),
        );
        Ok(logits)
    }

    /// The loss, and its gradients: added to `gradients`, or in their place where they were forgotten. As soon as backward
    /// has added all it will to a bucket, `completed` gets its number and the bucket; it may take the buffer's values away
    /// to another thread (and put them back before the next call). `step` numbers the micro-batch over the whole job:
    /// dropout follows it.
    ///
    /// # Errors
    /// [`Error::Batch`], [`Error::Tensor`] where memory is refused; gradients are then as they were.
    ///
    /// # Panics
    /// If `weights` or `gradients` don't have the layout's lengths.
    #[allow(clippy::too_many_arguments, reason = "a backward has all of its forward and the gradients")]
    pub fn forward_backward(
        &self,
        pool: &Pool,
        weights: &[f32],
        batch: &MicroBatch,
        step: u64,
        gradients: &mut Gradients,
        arena: &mut Arena,
        completed: &mut dyn FnMut(usize, &mut Buffer<f32>),
    ) -> Result<Loss, Error> {
        let lengths = gradients.buckets.iter().map(|bucket| bucket.len());
        assert!(lengths.eq(self.layout.buckets().iter().map(|b| b.len())), "gradients of this layout");
        let call = self.begin(pool, weights, batch, Some(step), arena, true)?;
        self.forward(&call, arena, true);
        self.backward(&call, gradients, arena, completed)
    }

    fn begin<'a>(
        &self,
        pool: &'a Pool,
        weights: &'a [f32],
        batch: &'a MicroBatch,
        step: Option<u64>,
        arena: &mut Arena,
        backward: bool,
    ) -> Result<Call<'a>, Error> {
        assert_eq!(weights.len(), self.layout.len(), "weights of this layout");
        batch.check(self.config.vocab, self.config.max_context)?;
        let step = step.filter(|_| self.options.dropout > 0.0);
        arena.prepare(&self.config, batch.rows(), (self.options.recompute, step.is_some(), backward))?;
        Ok(Call { pool, weights, batch, positions: batch.positions(), step })
    }

    /// To the last state's norm. `keep` says whether each layer's input is kept for backward.
    fn forward(&self, call: &Call<'_>, arena: &mut Arena, keep: bool) {
        let values = call.batch.rows() * self.config.hidden;
        let Arena { states, layers, normed, .. } = arena;
        let embedding = &call.weights[self.layout.embedding.clone()];
        embed(call.pool, embedding, self.config.hidden, &call.batch.tokens, &mut states[0][..values]);
        for layer in 0..self.config.layers {
            let from = if keep { layer } else { layer % 2 };
            let to = if keep { layer + 1 } else { 1 - layer % 2 };
            let last = layers.len() - 1;
            let saved = &mut layers[layer.min(last)];
            let [from, to] =
                states.get_disjoint_mut([from, to]).unwrap_or_else(|_| unreachable!("two states"));
            self.layer_forward(call, layer, &from[..values], saved, Some(&mut to[..values]));
        }
        let last = if keep { self.config.layers } else { self.config.layers % 2 };
        let norm = &call.weights[self.layout.final_norm.clone()];
        let at = Vectors::rows(self.config.hidden);
        rms_norm(call.pool, at, &states[last][..values], norm, self.config.norm_eps, &mut normed[..values]);
    }

    /// `x += attention(norm(x)); x += feed_forward(norm(x))`, from `x` to `out`. Without `out`, only what backward needs
    /// is computed.
    pub(super) fn layer_forward(
        &self,
        call: &Call<'_>,
        layer: usize,
        x: &[f32],
        saved: &mut Saved,
        out: Option<&mut [f32]>,
    ) {
        let (config, pool) = (&self.config, call.pool);
        let LayerLayout { attention_norm, qkv, qkv_bias, output, ffn_norm, gate_up, down, .. } =
            &self.layout.layers[layer];
        let (rows, hidden, ffn) = (call.batch.rows(), config.hidden, config.ffn);
        let (width, qkv_width) = (self.heads.width(), self.heads.qkv_width());
        let at = Vectors::rows(hidden);
        let eps = config.norm_eps;

        let normed = &mut saved.normed[..rows * hidden];
        rms_norm(pool, at, x, &call.weights[attention_norm.clone()], eps, normed);
        let into = if config.query_key_norm { &mut saved.raw } else { &mut saved.qkv };
        let into = &mut into[..rows * qkv_width];
        self.linear(
            call,
            View::new(normed, hidden),
            qkv.clone(),
            qkv_width,
            (into, qkv_width, Store::Replace),
        );
        if let Some(bias) = qkv_bias {
            add_bias(pool, into, qkv_width, &call.weights[bias.clone()]);
        }
        let qkv = &mut saved.qkv[..rows * qkv_width];
        if let Some(norms) = self.head_norms(layer) {
            let raw = &saved.raw[..rows * qkv_width];
            copy(pool, raw, qkv);
            for (at, weight) in norms {
                rms_norm(pool, at, raw, &call.weights[weight], eps, qkv);
            }
        }
        self.rope.apply_rows(pool, qkv, self.rotated(), &call.positions);
        let (attended, lse) = (&mut saved.attended[..rows * width], &mut saved.lse[..rows * config.heads]);
        attention(pool, self.options.precision, self.heads, &call.batch.starts, qkv, attended, lse);
        let middle = &mut saved.middle[..rows * hidden];
        self.add_block(call, (View::new(attended, width), output.clone()), x, middle, 2 * layer);

        let normed = &mut saved.ffn_normed[..rows * hidden];
        rms_norm(pool, at, middle, &call.weights[ffn_norm.clone()], eps, normed);
        let (both_pitch, one_pitch) = (pitch(2 * ffn), pitch(ffn));
        let both = &mut saved.gate_up[..rows * both_pitch];
        self.linear(
            call,
            View::new(normed, hidden),
            gate_up.clone(),
            2 * ffn,
            (both, both_pitch, Store::Replace),
        );
        let activated = &mut saved.activated[..rows * one_pitch];
        swiglu(pool, ffn, (both, both_pitch), (activated, one_pitch));
        if let Some(out) = out {
            self.add_block(call, (View::new(activated, one_pitch), down.clone()), middle, out, 2 * layer + 1);
        }
    }

    /// `out = x + dropout(inputs · weightsᵀ)`.
    fn add_block(
        &self,
        call: &Call<'_>,
        (inputs, weights): (View<'_>, Range<usize>),
        x: &[f32],
        out: &mut [f32],
        place: usize,
    ) {
        let hidden = self.config.hidden;
        if let Some(site) = self.site(call, place) {
            self.linear(call, inputs, weights, hidden, (out, hidden, Store::Replace));
            dropout(call.pool, site, self.options.dropout, out);
            add(call.pool, x, out);
        } else {
            self.linear(call, inputs, weights, hidden, (out, hidden, Store::AddTo(x)));
        }
    }

    /// Where a block's dropout draws its numbers, if it does.
    pub(super) fn site(&self, call: &Call<'_>, place: usize) -> Option<Site> {
        call.step.map(|step| Site { seed: self.options.seed, step, place: place as u32 })
    }

    /// Row stride, heads and head width of what is rotated: queries and keys.
    pub(super) fn rotated(&self) -> (usize, usize, usize) {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        (self.heads.qkv_width(), heads + kv_heads, head_dim)
    }

    /// Where queries and keys lie in a row, with the weights of their norms.
    pub(super) fn head_norms(&self, layer: usize) -> Option<[(Vectors, Range<usize>); 2]> {
        let (query, key) = self.layout.layers[layer].query_key_norms.clone()?;
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let stride = self.heads.qkv_width();
        let queries = Vectors { start: 0, per_row: heads, stride };
        let keys = Vectors { start: heads * head_dim, per_row: kv_heads, stride };
        Some([(queries, query), (keys, key)])
    }

    pub(super) fn head_range(&self) -> Range<usize> {
        self.layout.head.clone().unwrap_or(self.layout.embedding.clone())
    }

    /// The batch's rows of `inputs` through a matrix of `outputs` rows.
    fn linear(
        &self,
        call: &Call<'_>,
        inputs: View<'_>,
        weights: Range<usize>,
        outputs: usize,
        (out, stride, store): (&mut [f32], usize, Store<'_>),
    ) {
        let inner = weights.len() / outputs;
        let extent = Extent { rows: call.batch.rows(), cols: outputs, inner };
        let weights = View::new(&call.weights[weights], inner).turned();
        matmul(call.pool, self.options.precision, extent, inputs, weights, (out, stride), store);
    }

    /// Loss and, if asked for, its gradients from the last normed state.
    pub(super) fn head(
        &self,
        call: &Call<'_>,
        normed: &[f32],
        gradients: Option<cross_entropy::Gradients<'_>>,
        scratch: &mut cross_entropy::Scratch,
    ) -> Result<Loss, Error> {
        let targets = Targets { tokens: &call.batch.targets, weights: &call.batch.weights };
        let head = &call.weights[self.head_range()];
        let (precision, hidden) = (self.options.precision, self.config.hidden);
        Ok(cross_entropy(call.pool, precision, normed, head, hidden, targets, gradients, scratch)?)
    }
}

#[cfg(test)]
pub(super) mod tests;
