//! The forward pass, as named steps over packed rows.
//!
//! A row is one token. Its hidden state (`hidden` values) starts as the token's embedding; every layer adds what
//! attention sees and what the feed-forward block makes of it; the head turns the last state into logits. Rows
//! meet in attention only, and there through the cache, so a prompt may be computed in any chunks and beside any
//! other sequences and gives the same bits.

use std::sync::{Mutex, PoisonError};

use consort_tensor::Pool;
use consort_tensor::attention::{AttentionParams, Span, attention};
use consort_tensor::kv::KvCache;
use consort_tensor::linear::{Inputs, Product, gated, linear};
use consort_tensor::matrix::Matrix;
use consort_tensor::norm::{add_rms_norm, rms_norm_in_place};
use consort_tensor::rope::Rope;

use super::batch::Batch;
use super::parts::{Part, PartTimes};
use super::{Attention, FeedForward, Layer, Model, Projection};
use crate::Error;

/// Embedding fewer rows than this costs less than waking a thread for them.
const ROWS_WORTH_SHARING: usize = 32;

/// Buffers that a forward pass reuses. All are rows of the batch, in its order.
#[derive(Default)]
pub struct Scratch {
    /// The residual stream, `hidden` values a row.
    x: Vec<f32>,
    /// Rows in the form the next matrix wants.
    inputs: Inputs,
    /// `heads * head_dim` values a row.
    q: Vec<f32>,
    /// `kv_heads * head_dim` values a row.
    k: Vec<f32>,
    v: Vec<f32>,
    /// What attention read, `heads * head_dim` values a row.
    attended: Vec<f32>,
    /// The feed-forward block's inner values, `ffn` a row.
    inner: Vec<f32>,
    /// What a block adds, where it is normalized first; `hidden` values a row.
    block: Vec<f32>,
    /// Every row's position in its sequence.
    positions: Vec<u32>,
    /// Blocks that the batch stores into.
    writes: Vec<(u32, u32)>,
    /// Where time went, if anyone asked.
    times: Option<PartTimes>,
}

impl Model {
    /// Runs the rows through the decoder, storing keys and values in `cache`; `logits` becomes
    /// `batch.logit_rows.len()` rows of `vocab` values.
    ///
    /// # Errors
    /// [`Error::Batch`] where a token, position or block is out of range, or where two spans store into one block;
    /// nothing was stored then.
    pub fn forward(
        &self,
        pool: &Pool,
        batch: Batch<'_>,
        cache: &mut KvCache,
        scratch: &mut Scratch,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        self.check(&batch, cache, &mut scratch.writes)?;
        scratch.place(batch.spans);
        PartTimes::begin(&mut scratch.times);
        self.embed(pool, batch.tokens, &mut scratch.x);
        PartTimes::end(&mut scratch.times, Part::Embed);
        for (index, layer) in self.layers.iter().enumerate() {
            self.attend(pool, index, layer, batch.spans, cache, scratch);
            self.feed_forward(pool, &layer.feed_forward, scratch);
        }
        self.project_to_vocabulary(pool, batch.logit_rows, scratch, logits);
        Ok(())
    }

    /// Tokens to rows of the embedding.
    fn embed(&self, pool: &Pool, tokens: &[u32], x: &mut Vec<f32>) {
        let hidden = self.config.hidden;
        resize(x, tokens.len() * hidden);
        let embed = |token: u32, out: &mut [f32]| {
            self.embedding.row(token as usize, out);
            if let Some(scale) = self.config.embedding_scale {
                out.iter_mut().for_each(|value| *value *= scale);
            }
        };
        let rows = tokens.iter().zip(x.chunks_exact_mut(hidden));
        if tokens.len() < ROWS_WORTH_SHARING {
            rows.for_each(|(&token, out)| embed(token, out));
            return;
        }
        let rows = Mutex::new(rows);
        pool.run(|_| {
            while let Some((&token, out)) = { rows.lock().unwrap_or_else(PoisonError::into_inner).next() } {
                embed(token, out);
            }
        });
    }

    /// `x += output · attention(rotate(query · norm(x)), rotate(key · norm(x)), value · norm(x))`
    fn attend(
        &self,
        pool: &Pool,
        index: usize,
        layer: &Layer,
        spans: &[Span<'_>],
        cache: &mut KvCache,
        scratch: &mut Scratch,
    ) {
        let config = &self.config;
        let weights = &layer.attention;
        self.project_queries_keys_values(pool, weights, scratch);
        let Scratch { x, inputs, q, k, v, attended, block, positions, times, .. } = scratch;
        if let Some((query_norm, key_norm)) = &weights.query_key_norms {
            rms_norm_in_place(pool, q, query_norm, config.norm_eps);
            rms_norm_in_place(pool, k, key_norm, config.norm_eps);
        }
        let rope = self.rope_of(index);
        rope.apply(pool, q, config.heads, config.head_dim, positions);
        rope.apply(pool, k, config.kv_heads, config.head_dim, positions);
        cache.store(pool, index, spans, k, v);
        PartTimes::end(times, Part::RotateStore);
        resize(attended, q.len());
        let params = AttentionParams {
            heads: config.heads,
            scale: config.attention_scale,
            window: config.window(index),
            softcap: config.attention_softcap,
        };
        attention(pool, params, index, cache, spans, q, attended);
        PartTimes::end(times, Part::Attention);
        inputs.prepare(pool, attended, config.heads * config.head_dim, weights.output.weights.input_kind());
        PartTimes::end(times, Part::Prepare);
        add_to_residual(
            pool,
            inputs,
            &weights.output,
            weights.post_norm.as_deref(),
            config.norm_eps,
            block,
            x,
        );
        PartTimes::end(times, Part::Output);
    }

    fn project_queries_keys_values(&self, pool: &Pool, weights: &Attention, scratch: &mut Scratch) {
        let config = &self.config;
        let rows = scratch.positions.len();
        let Scratch { x, inputs, q, k, v, times, .. } = scratch;
        resize(q, rows * config.heads * config.head_dim);
        resize(k, rows * config.kv_heads * config.head_dim);
        resize(v, rows * config.kv_heads * config.head_dim);
        let mut products = [weights.query.product(q), weights.key.product(k), weights.value.product(v)];
        // The three read the same rows, in one form nearly always; files that mix types may need two.
        products.sort_by_key(|product| product.weights.input_kind() as u8);
        for group in products.chunk_by_mut(|a, b| a.weights.input_kind() == b.weights.input_kind()) {
            inputs.prepare_normed(pool, x, &weights.norm, config.norm_eps, group[0].weights.input_kind());
            PartTimes::end(times, Part::Prepare);
            linear(pool, inputs, group);
            PartTimes::end(times, Part::QueryKeyValue);
        }
    }

    /// `x += down · (activation(gate · norm(x)) * (up · norm(x)))`
    fn feed_forward(&self, pool: &Pool, weights: &FeedForward, scratch: &mut Scratch) {
        let config = &self.config;
        let rows = scratch.positions.len();
        let Scratch { x, inputs, inner, block, times, .. } = scratch;
        resize(inner, rows * config.ffn);
        inputs.prepare_normed(pool, x, &weights.norm, config.norm_eps, weights.gate_up.input_kind());
        PartTimes::end(times, Part::Prepare);
        gated(pool, inputs, &weights.gate_up, config.activation, inner);
        PartTimes::end(times, Part::GateUp);
        inputs.prepare(pool, inner, config.ffn, weights.down.input_kind());
        PartTimes::end(times, Part::Prepare);
        add_to_residual(pool, inputs, &weights.down, weights.post_norm.as_deref(), config.norm_eps, block, x);
        PartTimes::end(times, Part::Down);
    }

    /// The wanted rows' last states to logits.
    fn project_to_vocabulary(
        &self,
        pool: &Pool,
        rows: &[usize],
        scratch: &mut Scratch,
        logits: &mut Vec<f32>,
    ) {
        let config = &self.config;
        resize(logits, rows.len() * config.vocab);
        if rows.is_empty() {
            return;
        }
        let Scratch { x, inputs, block: wanted, .. } = scratch;
        resize(wanted, rows.len() * config.hidden);
        for (out, &row) in wanted.chunks_exact_mut(config.hidden).zip(rows) {
            out.copy_from_slice(&x[row * config.hidden..(row + 1) * config.hidden]);
        }
        let head = self.head();
        inputs.prepare_normed(pool, wanted, &self.final_norm, config.norm_eps, head.input_kind());
        linear(pool, inputs, &mut [Product { weights: head, bias: None, out: logits, accumulate: false }]);
        if let Some(cap) = config.logit_softcap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        PartTimes::end(&mut scratch.times, Part::Head);
    }

    fn rope_of(&self, layer: usize) -> &Rope {
        match &self.sliding_rope {
            Some(rope) if self.config.window(layer).is_some() => rope,
            _ => &self.rope,
        }
    }
}

/// What a matrix makes of its inputs joins the residual stream; normalized on the way where the family does so.
fn add_to_residual<'a>(
    pool: &Pool,
    inputs: &Inputs,
    projection: impl Into<WithBias<'a>>,
    post_norm: Option<&[f32]>,
    eps: f32,
    block: &mut Vec<f32>,
    x: &mut [f32],
) {
    let WithBias { weights, bias } = projection.into();
    match post_norm {
        None => linear(pool, inputs, &mut [Product { weights, bias, out: x, accumulate: true }]),
        Some(norm) => {
            resize(block, x.len());
            linear(pool, inputs, &mut [Product { weights, bias, out: block, accumulate: false }]);
            add_rms_norm(pool, x, block, norm, eps);
        }
    }
}

/// A matrix and perhaps a bias.
struct WithBias<'a> {
    weights: &'a Matrix,
    bias: Option<&'a [f32]>,
}

impl<'a> From<&'a Matrix> for WithBias<'a> {
    fn from(weights: &'a Matrix) -> WithBias<'a> {
        WithBias { weights, bias: None }
    }
}

impl<'a> From<&'a Projection> for WithBias<'a> {
    fn from(projection: &'a Projection) -> WithBias<'a> {
        WithBias { weights: &projection.weights, bias: projection.bias.as_deref() }
    }
}

impl Projection {
    fn product<'a>(&'a self, out: &'a mut [f32]) -> Product<'a> {
        Product { weights: &self.weights, bias: self.bias.as_deref(), out, accumulate: false }
    }
}

impl Scratch {
    /// Empty; grows to its first use and keeps its memory.
    pub fn new() -> Scratch {
        Scratch::default()
    }

    /// Starts to note where forward passes with this scratch spend their time.
    pub fn time_parts(&mut self) {
        self.times = Some(PartTimes::default());
    }

    /// What [`Scratch::time_parts`] started, up to now.
    pub fn part_times(&self) -> Option<&PartTimes> {
        self.times.as_ref()
    }

    /// Every row's position, from the spans.
    fn place(&mut self, spans: &[Span<'_>]) {
        self.positions.clear();
        for span in spans {
            // Checked to be below the model's context, which fits 32 bits.
            self.positions.extend((span.first_position..span.first_position + span.rows).map(|p| p as u32));
        }
    }
}

/// Sets the length without clearing what stays: every value is written before it is read.
fn resize(buffer: &mut Vec<f32>, len: usize) {
    buffer.resize(len, 0.0);
}
