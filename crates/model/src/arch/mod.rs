//! Architectures: one decoder, defined once, whose [`ModelConfig`] says which family it is.
//!
//! Llama, Mistral, Qwen 2, Qwen 3 and Gemma 3 differ in a handful of switches (biases, norms per head, norms after a
//! block, the gate's non-linearity, sliding windows, scales), so one definition with these switches is shorter
//! and better tested than five. It runs over ragged packed rows: sequences of different lengths lie one after the
//! other, without padding, and a [`Span`] says which rows are whose.
//!
//! [`Model::forward`] is in `forward.rs` as named steps; building a model from a file in `build.rs`.

mod batch;
pub(crate) mod build;
mod config;
mod forward;
mod frequencies;
mod parts;
mod rows;

use consort_tensor::kv::KvShape;
use consort_tensor::matrix::{GatedMatrix, Matrix};
use consort_tensor::rope::Rope;

pub use self::batch::Batch;
pub use self::config::{ModelConfig, SlidingWindow};
pub use self::forward::Scratch;
pub(crate) use self::frequencies::yarn_magnitude;
pub use self::frequencies::{RopeConfig, RopeScaling};
pub use self::parts::{Part, PartTimes};
pub use consort_tensor::attention::Span;

/// A loaded model: packed weights, ready to run. Immutable and shared.
pub struct Model {
    config: ModelConfig,
    /// One row a token; also the head where `head` is `None`.
    embedding: Matrix,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    head: Option<Matrix>,
    /// Positions in layers that see everything.
    rope: Rope,
    /// Positions in layers with a window, where there are any.
    sliding_rope: Option<Rope>,
    weights_hash: String,
}

/// One decoder layer's weights. `x += attention(norm(x)); x += feed_forward(norm(x))`.
struct Layer {
    attention: Attention,
    feed_forward: FeedForward,
}

struct Attention {
    norm: Vec<f32>,
    query: Projection,
    key: Projection,
    value: Projection,
    output: Projection,
    /// Norms over each head of queries and keys.
    query_key_norms: Option<(Vec<f32>, Vec<f32>)>,
    post_norm: Option<Vec<f32>>,
}

struct FeedForward {
    norm: Vec<f32>,
    gate_up: GatedMatrix,
    down: Matrix,
    post_norm: Option<Vec<f32>>,
}

/// A matrix with its bias, if it has one.
struct Projection {
    weights: Matrix,
    bias: Option<Vec<f32>>,
}

impl Model {
    /// The architecture's numbers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The shape its cache needs.
    pub fn kv_shape(&self) -> KvShape {
        KvShape { layers: self.config.layers, kv_heads: self.config.kv_heads, head_dim: self.config.head_dim }
    }

    /// Sixteen hex digits over the weights and everything else in the file that changes an answer: every tensor's
    /// name, type, shape and bytes, the architecture's numbers, the tokenizer and the template.
    pub fn weights_hash(&self) -> &str {
        &self.weights_hash
    }

    /// Bytes of memory the packed weights take.
    pub fn weight_bytes(&self) -> usize {
        let matrices: usize = self.layers.iter().map(Layer::packed_bytes).sum();
        matrices + self.embedding.packed_bytes() + self.head.as_ref().map_or(0, Matrix::packed_bytes)
    }

    /// The matrix that turns the last hidden state into logits.
    fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

impl Layer {
    fn packed_bytes(&self) -> usize {
        let Attention { query, key, value, output, .. } = &self.attention;
        [query, key, value, output].iter().map(|p| p.weights.packed_bytes()).sum::<usize>()
            + self.feed_forward.gate_up.packed_bytes()
            + self.feed_forward.down.packed_bytes()
    }
}
