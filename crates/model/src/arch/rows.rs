//! What happens to rows between one attention and the next, one row at a time as far as the result goes.
//!
//! Everything here works on consecutive rows of the batch and on the buffers of the thread that has them. Called with
//! all rows it shares the work of each step among the pool's threads; called on a thread of a running pool with some of
//! the rows it does all of it there (a run inside a run is the calling thread's own).

use consort_tensor::Pool;
use consort_tensor::linear::{Inputs, Product, gated, linear};
use consort_tensor::matrix::Matrix;
use consort_tensor::norm::{add_rms_norm, rms_norm_in_place};
use consort_tensor::rope::Rope;

use super::config::ModelConfig;
use super::parts::{Part, PartTimes};
use super::{Attention, FeedForward, Model, Projection};

/// Consecutive rows of the batch.
pub(super) struct Rows<'a> {
    pub(super) positions: &'a [u32],
    /// The residual stream, `hidden` values a row.
    pub(super) x: &'a mut [f32],
    /// `heads * head_dim` values a row; `k` and `v` have `kv_heads * head_dim`.
    pub(super) q: &'a mut [f32],
    pub(super) k: &'a mut [f32],
    pub(super) v: &'a mut [f32],
    /// What the queries read.
    pub(super) attended: &'a [f32],
}

/// What a thread keeps for the rows at hand.
#[derive(Default)]
pub(super) struct Local {
    /// Rows in the form the next matrix wants.
    pub(super) inputs: Inputs,
    /// The feed-forward block's inner values, `ffn` a row.
    inner: Vec<f32>,
    /// What a block adds, where it is normalized first; `hidden` values a row.
    block: Vec<f32>,
    /// Where time went, if anyone asked.
    pub(super) times: Option<PartTimes>,
}

impl<'a> Rows<'a> {
    /// The first `count` rows and the others.
    pub(super) fn split(self, count: usize, config: &ModelConfig) -> (Rows<'a>, Rows<'a>) {
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (positions, later_positions) = self.positions.split_at(count);
        let (x, later_x) = self.x.split_at_mut(count * config.hidden);
        let (q, later_q) = self.q.split_at_mut(count * queries);
        let (k, later_k) = self.k.split_at_mut(count * keys);
        let (v, later_v) = self.v.split_at_mut(count * keys);
        let (attended, later_attended) = self.attended.split_at(count * queries);
        let first = Rows { positions, x, q, k, v, attended };
        let later = Rows {
            positions: later_positions,
            x: later_x,
            q: later_q,
            k: later_k,
            v: later_v,
            attended: later_attended,
        };
        (first, later)
    }
}

impl Model {
    /// `q, k, v = rotate(query · norm(x)), rotate(key · norm(x)), value · norm(x)`
    pub(super) fn begin_attention(
        &self,
        pool: &Pool,
        rope: &Rope,
        weights: &Attention,
        rows: &mut Rows<'_>,
        local: &mut Local,
    ) {
        let config = &self.config;
        let Local { inputs, times, .. } = local;
        let Rows { positions, x, q, k, v, .. } = rows;
        let mut products = [weights.query.product(q), weights.key.product(k), weights.value.product(v)];
        // The three read the same rows, in one form nearly always; files that mix types may need two.
        products.sort_by_key(|product| product.weights.input_kind() as u8);
        for group in products.chunk_by_mut(|a, b| a.weights.input_kind() == b.weights.input_kind()) {
            inputs.prepare_normed(pool, x, &weights.norm, config.norm_eps, group[0].weights.input_kind());
            PartTimes::end(times, Part::Prepare);
            linear(pool, inputs, group);
            PartTimes::end(times, Part::QueryKeyValue);
        }
        if let Some((query_norm, key_norm)) = &weights.query_key_norms {
            rms_norm_in_place(pool, q, query_norm, config.norm_eps);
            rms_norm_in_place(pool, k, key_norm, config.norm_eps);
        }
        rope.apply(pool, q, config.heads, config.head_dim, positions);
        rope.apply(pool, k, config.kv_heads, config.head_dim, positions);
        PartTimes::end(times, Part::RotateStore);
    }

    /// `x += output · attended`
    pub(super) fn finish_attention(
        &self,
        pool: &Pool,
        weights: &Attention,
        rows: &mut Rows<'_>,
        local: &mut Local,
    ) {
        let Local { inputs, block, times, .. } = local;
        let width = self.config.heads * self.config.head_dim;
        inputs.prepare(pool, rows.attended, width, weights.output.weights.input_kind());
        PartTimes::end(times, Part::Prepare);
        let eps = self.config.norm_eps;
        add_to_residual(pool, inputs, &weights.output, weights.post_norm.as_deref(), eps, block, rows.x);
        PartTimes::end(times, Part::Output);
    }

    /// `x += down · (activation(gate · norm(x)) * (up · norm(x)))`
    pub(super) fn feed_forward(
        &self,
        pool: &Pool,
        weights: &FeedForward,
        rows: &mut Rows<'_>,
        local: &mut Local,
    ) {
        let config = &self.config;
        let Local { inputs, inner, block, times } = local;
        let inner = grown(inner, rows.positions.len() * config.ffn);
        inputs.prepare_normed(pool, rows.x, &weights.norm, config.norm_eps, weights.gate_up.input_kind());
        PartTimes::end(times, Part::Prepare);
        gated(pool, inputs, &weights.gate_up, config.activation, inner);
        PartTimes::end(times, Part::GateUp);
        inputs.prepare(pool, inner, config.ffn, weights.down.input_kind());
        PartTimes::end(times, Part::Prepare);
        let (norm, eps) = (weights.post_norm.as_deref(), config.norm_eps);
        add_to_residual(pool, inputs, &weights.down, norm, eps, block, rows.x);
        PartTimes::end(times, Part::Down);
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
            let block = grown(block, x.len());
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

/// The first `len` values of a memory that only grows, so that batches that come and go clear nothing. Every value is
/// written before it is read.
pub(super) fn grown(memory: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    &mut memory[..len]
}
