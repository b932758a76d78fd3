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
use consort_tensor::train::{add_column_sums, copy, pitch};

use super::Gradients;
use super::arena::Arena;
use super::decoder::{Call, Decoder};
use super::layout::LayerLayout;
use crate::Error;

/// A bucket's gradients, addressed by ranges of the flat buffer.
struct Bucket<'a> {
    values: &'a mut [f32],
    start: usize,
    /// Whether what it holds counts as 0.
    forgotten: bool,
}

impl Bucket<'_> {
    /// The gradient of a matrix, and what becomes of what is there.
    fn matrix(&mut self, range: &Range<usize>) -> (&mut [f32], Store<'static>) {
        let store = if self.forgotten { Store::Replace } else { Store::Add };
        (&mut self.values[range.start - self.start..range.end - self.start], store)
    }

    /// The gradient of a tensor that is asked for once, to add to.
    fn sums(&mut self, range: &Range<usize>) -> &mut [f32] {
        let (sums, store) = self.matrix(range);
        if store == Store::Replace {
            sums.fill(0.0);
        }
        sums
    }
}

impl Decoder {
    fn bucket<'a>(&self, gradients: &'a mut Gradients, index: usize) -> Bucket<'a> {
        let start = self.layout.buckets()[index].start;
        Bucket { values: &mut gradients.buckets[index], start, forgotten: gradients.forgotten }
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
            let (head, store) = bucket.matrix(&self.head_range());
            let into = cross_entropy::Gradients { input, head, store };
            self.head(call, &normed[..values], Some(into), loss)?
        };
        {
            let Arena { states, d, dnormed, .. } = arena;
            let mut bucket = self.bucket(gradients, 0);
            let norm = &call.weights[self.layout.final_norm.clone()];
            let dnorm = bucket.sums(&self.layout.final_norm);
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
        // Where the head is the embedding, its gradient is there already.
        bucket.forgotten &= !config.tied_head;
        let table = bucket.sums(&self.layout.embedding);
        embed_backward(pool, table, config.hidden, &call.batch.tokens, &arena.d[..values]);
        completed(last, &mut gradients.buckets[last]);
        gradients.forgotten = false;
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
            let (both_pitch, one_pitch) = (pitch(2 * ffn), pitch(ffn));
            let (d, activated) = (View::new(d, hidden), View::new(&saved.activated, one_pitch));
            let dffn = &mut dffn[..rows * one_pitch];
            self.dx(call, d, down, ffn, (dffn, one_pitch));
            self.dw(call, d, activated, bucket.matrix(down), ffn);
            let both = &mut saved.gate_up[..rows * both_pitch];
            swiglu_backward(pool, ffn, (both, both_pitch), (dffn, one_pitch));
            let both = View::new(both, both_pitch);
            self.dw(call, both, View::new(&saved.ffn_normed, hidden), bucket.matrix(gate_up), hidden);
            self.dx(call, both, gate_up, hidden, (dnormed, hidden));
        }
        let (middle, norm) = (&saved.middle[..rows * hidden], &call.weights[ffn_norm.clone()]);
        rms_norm_backward(pool, at, middle, norm, eps, dnormed, (d, true), bucket.sums(ffn_norm));

        // Attention.
        let dqkv = &mut dqkv[..rows * qkv_width];
        {
            let d = self.dropped(call, d, dropped, 2 * layer);
            let dattended = &mut dattended[..rows * width];
            let out = View::new(d, hidden);
            self.dx(call, out, output, width, (dattended, width));
            self.dw(call, out, View::new(&saved.attended, width), bucket.matrix(output), width);
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
                rms_norm_backward_in_place(pool, at, raw, weight, eps, dqkv, bucket.sums(&range));
            }
        }
        if let Some(bias) = qkv_bias {
            add_column_sums(pool, dqkv, qkv_width, bucket.sums(bias));
        }
        let into = View::new(dqkv, qkv_width);
        self.dw(call, into, View::new(&saved.normed, hidden), bucket.matrix(qkv), hidden);
        self.dx(call, into, qkv, hidden, (dnormed, hidden));
        let norm = &call.weights[attention_norm.clone()];
        rms_norm_backward(pool, at, x, norm, eps, dnormed, (d, true), bucket.sums(attention_norm));
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

    /// `dX = dY·W` of the batch's rows, `inner` values a row of `W`.
    fn dx(
        &self,
        call: &Call<'_>,
        dy: View<'_>,
        weights: &Range<usize>,
        inner: usize,
        dx: (&mut [f32], usize),
    ) {
        let extent = Extent { rows: call.batch.rows(), cols: inner, inner: weights.len() / inner };
        let weights = View::new(&call.weights[weights.clone()], inner);
        matmul(call.pool, self.options.precision, extent, dy, weights, dx, Store::Replace);
    }

    /// `dW = dYᵀ·X` or `dW += dYᵀ·X` over the batch's rows, `inner` values a row of `X`.
    fn dw(
        &self,
        call: &Call<'_>,
        dy: View<'_>,
        x: View<'_>,
        (dw, store): (&mut [f32], Store<'_>),
        inner: usize,
    ) {
        let extent = Extent { rows: dw.len() / inner, cols: inner, inner: call.batch.rows() };
        matmul(call.pool, self.options.precision, extent, dy.turned(), x, (dw, inner), store);
    }
}
