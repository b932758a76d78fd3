//! The gradients of every tensor, from the loss back to the embedding.
//!
//! For a product `Y = X·Wᵀ`: `dX = dY·W` and `dW += dYᵀ·X`. Residuals pass gradients on unchanged, so one buffer holds
//! the stream's gradient and every block adds its own to it.

use std::ops::Range;

use consort_tensor::buffer::Buffer;
use consort_tensor::train::attention::{Saved as Attended, attention_backward};
use consort_tensor::train::cross_entropy::{self, Loss};
use consort_tensor::train::dropout::dropout;
use consort_tensor::train::embedding::embed_backward;
use consort_tensor::train::matmul::{Extent, Store, View, matmul};
use consort_tensor::train::norm::{Vectors, rms_norm_backward, rms_norm_backward_in_place};
use consort_tensor::train::swiglu::swiglu_backward;
use consort_tensor::train::{add_column_sums, copy};

use super::Gradients;
use super::arena::Arena;
use super::decoder::{Call, Decoder};
use super::layout::LayerLayout;
use crate::Error;

/// A bucket's gradients, addressed by ranges of the flat buffer.
struct Bucket<'a> {
    values: &'a mut [f32],
    start: usize,
}

impl Bucket<'_> {
    fn at(&mut self, range: &Range<usize>) -> &mut [f32] {
        &mut self.values[range.start - self.start..range.end - self.start]
    }
}

impl Decoder {
    fn bucket<'a>(&self, gradients: &'a mut Gradients, index: usize) -> Bucket<'a> {
        Bucket { values: &mut gradients.buckets[index], start: self.layout.buckets()[index].start }
    }

    pub(super) fn backward(
        &self,
        call: &Call<'_>,
        gradients: &mut Gradients,
        arena: &mut Arena,
        completed: &mut dyn FnMut(usize, &mut Buffer<f32>),
    ) -> Result<Loss, Error> {
        let (config, pool) = (&self.config, call.pool);
        let values = call.batch.rows() * config.hidden;
        let last = self.layout.buckets().len() - 1;
        let loss = {
            let Arena { normed, dnormed, loss, .. } = arena;
            let index = if config.tied_head { last } else { 0 };
            let mut bucket = self.bucket(gradients, index);
            let input = &mut dnormed[..values];
            let into = cross_entropy::Gradients { input, head: bucket.at(&self.head_range()) };
            self.head(call, &normed[..values], Some(into), loss)?
        };
        {
            let Arena { states, d, dnormed, .. } = arena;
            let mut bucket = self.bucket(gradients, 0);
            let norm = &call.weights[self.layout.final_norm.clone()];
            let dnorm = bucket.at(&self.layout.final_norm);
            let (x, dy, d) = (&states[config.layers][..values], &dnormed[..values], &mut d[..values]);
            let at = Vectors::rows(config.hidden);
            rms_norm_backward(pool, at, x, norm, config.norm_eps, dy, (d, false), dnorm);
        }
        completed(0, &mut gradients.buckets[0]);
        for layer in (0..config.layers).rev() {
            if self.options.recompute {
                let Arena { states, layers, .. } = arena;
                self.layer_forward(call, layer, &states[layer][..values], &mut layers[0], None);
            }
            let index = self.layout.layers[layer].bucket;
            self.layer_backward(call, layer, self.bucket(gradients, index), arena);
            completed(index, &mut gradients.buckets[index]);
        }
        let mut bucket = self.bucket(gradients, last);
        let table = bucket.at(&self.layout.embedding);
        embed_backward(pool, table, config.hidden, &call.batch.tokens, &arena.d[..values]);
        completed(last, &mut gradients.buckets[last]);
        Ok(loss)
    }

    /// From the gradient of what leaves a layer, in `arena.d`, to that of what enters it.
    fn layer_backward(&self, call: &Call<'_>, layer: usize, mut bucket: Bucket<'_>, arena: &mut Arena) {
        let (config, pool) = (&self.config, call.pool);
        let LayerLayout { attention_norm, qkv, qkv_bias, output, ffn_norm, gate_up, down, .. } =
            &self.layout.layers[layer];
        let (rows, hidden, ffn) = (call.batch.rows(), config.hidden, config.ffn);
        let (width, qkv_width) = (self.heads.width(), self.heads.qkv_width());
        let (at, eps) = (Vectors::rows(hidden), config.norm_eps);
        let Arena { states, layers, d, dnormed, dropped, dffn, dattended, dqkv, .. } = arena;
        let last = layers.len() - 1;
        let saved = &mut layers[layer.min(last)];
        let x = &states[layer][..rows * hidden];
        let d = &mut d[..rows * hidden];
        let dnormed = &mut dnormed[..rows * hidden];

        // The feed-forward block.
        {
            let d = self.dropped(call, d, dropped, 2 * layer + 1);
            let dffn = &mut dffn[..rows * ffn];
            self.dx(call, d, down, ffn, dffn);
            self.dw(call, d, &saved.activated[..rows * ffn], bucket.at(down), ffn);
            let both = &mut saved.gate_up[..rows * 2 * ffn];
            swiglu_backward(pool, both, ffn, dffn);
            self.dw(call, both, &saved.ffn_normed[..rows * hidden], bucket.at(gate_up), hidden);
            self.dx(call, both, gate_up, hidden, dnormed);
        }
        let (middle, norm) = (&saved.middle[..rows * hidden], &call.weights[ffn_norm.clone()]);
        rms_norm_backward(pool, at, middle, norm, eps, dnormed, (d, true), bucket.at(ffn_norm));

        // Attention.
        let dqkv = &mut dqkv[..rows * qkv_width];
        {
            let d = self.dropped(call, d, dropped, 2 * layer);
            let dattended = &mut dattended[..rows * width];
            self.dx(call, d, output, width, dattended);
            self.dw(call, d, &saved.attended[..rows * width], bucket.at(output), width);
            let attended = Attended {
                qkv: &saved.qkv[..rows * qkv_width],
                out: &saved.attended[..rows * width],
                lse: &saved.lse[..rows * config.heads],
            };
            let (precision, starts) = (self.options.precision, &call.batch.starts);
            attention_backward(pool, precision, self.heads, starts, attended, dattended, dqkv);
        }
        self.rope.apply_rows_backward(pool, dqkv, self.rotated(), &call.positions);
        if let Some(norms) = self.head_norms(layer) {
            let raw = &saved.raw[..rows * qkv_width];
            for (at, range) in norms {
                let weight = &call.weights[range.clone()];
                rms_norm_backward_in_place(pool, at, raw, weight, eps, dqkv, bucket.at(&range));
            }
        }
        if let Some(bias) = qkv_bias {
            add_column_sums(pool, dqkv, qkv_width, bucket.at(bias));
        }
        self.dw(call, dqkv, &saved.normed[..rows * hidden], bucket.at(qkv), hidden);
        self.dx(call, dqkv, qkv, hidden, dnormed);
        let norm = &call.weights[attention_norm.clone()];
        rms_norm_backward(pool, at, x, norm, eps, dnormed, (d, true), bucket.at(attention_norm));
    }

    /// The gradient of a block's output from that of the stream: the same where nothing is dropped.
    fn dropped<'a>(
        &self,
        call: &Call<'_>,
        d: &'a [f32],
        dropped: &'a mut Buffer<f32>,
        place: usize,
    ) -> &'a [f32] {
        match self.site(call, place) {
            None => d,
            Some(site) => {
                let dropped = &mut dropped[..d.len()];
                copy(call.pool, d, dropped);
                dropout(call.pool, site, self.options.dropout, dropped);
                dropped
            }
        }
    }

    /// `dX = dY·W`, `inner` values a row of `W`.
    fn dx(&self, call: &Call<'_>, dy: &[f32], weights: &Range<usize>, inner: usize, dx: &mut [f32]) {
        let outputs = weights.len() / inner;
        let extent = Extent { rows: dy.len() / outputs, cols: inner, inner: outputs };
        let (dy, weights) = (View::new(dy, outputs), View::new(&call.weights[weights.clone()], inner));
        matmul(call.pool, self.options.precision, extent, dy, weights, (dx, inner), Store::Replace);
    }

    /// `dW += dYᵀ·X`, `inner` values a row of `X`.
    fn dw(&self, call: &Call<'_>, dy: &[f32], x: &[f32], dw: &mut [f32], inner: usize) {
        let outputs = dw.len() / inner;
        let extent = Extent { rows: outputs, cols: inner, inner: x.len() / inner };
        let (dy, x) = (View::new(dy, outputs).turned(), View::new(x, inner));
        matmul(call.pool, self.options.precision, extent, dy, x, (dw, inner), Store::Add);
    }
}
