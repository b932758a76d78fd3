//! The numbers that make one decoder out of the common definition.

use consort_tensor::activation::Activation;

use super::frequencies::RopeConfig;

/// The longest context a file may claim; far beyond what any model was trained for.
const MAX_CONTEXT: usize = 1 << 24;

/// What distinguishes one model from another: sizes, and the few places where families differ.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family's name as the file gives it: `llama`, `qwen2`, `qwen3`, `gemma3`, `mistral`.
    pub family: String,
    /// The model's own name, if the file has one.
    pub name: Option<String>,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Positions the model was trained for.
    pub max_context: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Width of the feed-forward block.
    pub ffn: usize,
    /// The gate's non-linearity.
    pub activation: Activation,
    /// Added to the mean square under the root of every norm.
    pub norm_eps: f32,
    /// Multiplies embeddings as they enter the residual stream (Gemma: √hidden).
    pub embedding_scale: Option<f32>,
    /// Multiplies attention scores.
    pub attention_scale: f32,
    /// `cap · tanh(score / cap)` on attention scores.
    pub attention_softcap: Option<f32>,
    /// `cap · tanh(logit / cap)` on logits.
    pub logit_softcap: Option<f32>,
    /// Queries and keys are normalized per head before they are rotated (Qwen3, Gemma 3).
    pub query_key_norm: bool,
    /// What a block adds is normalized once more before it joins the residual stream (Gemma).
    pub post_norms: bool,
    /// The embedding is also the head.
    pub tied_head: bool,
    /// Positions of layers that see everything.
    pub rope: RopeConfig,
    /// Layers that see only the last positions, if there are any.
    pub sliding: Option<SlidingWindow>,
}

/// Layers with a sliding window and what differs in them.
#[derive(Clone, Debug, PartialEq)]
pub struct SlidingWindow {
    /// Positions a row sees, its own included.
    pub positions: usize,
    /// For every layer, whether it has the window.
    pub layers: Vec<bool>,
    /// How those layers rotate.
    pub rope: RopeConfig,
}

impl ModelConfig {
    /// What is impossible about these numbers, if anything. Shapes of tensors are compared with them later, so a
    /// number that passes here still can't make anything larger than the file.
    pub(crate) fn contradiction(&self) -> Option<String> {
        let counts = [
            ("the vocabulary", self.vocab),
            ("the context length", self.max_context),
            ("the layer count", self.layers),
            ("the hidden width", self.hidden),
            ("the head count", self.heads),
            ("the key-value head count", self.kv_heads),
            ("the head width", self.head_dim),
            ("the feed-forward width", self.ffn),
        ];
        if let Some((what, n)) = counts.iter().find(|(_, n)| *n == 0 || *n > u32::MAX as usize) {
            return Some(format!("{what} is {n}"));
        }
        if self.max_context > MAX_CONTEXT {
            return Some(format!(
                "the context length is {}; {MAX_CONTEXT} at most makes sense",
                self.max_context
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Some(format!("{} heads can't share {} key-value heads", self.heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Some(format!("the head width {} is odd, so it can't be rotated", self.head_dim));
        }
        if self.heads.checked_mul(self.head_dim).is_none_or(|n| n > u32::MAX as usize) {
            return Some(format!("{} heads of {} values", self.heads, self.head_dim));
        }
        let positive = |what: &str, x: f32| (!(x.is_finite() && x > 0.0)).then(|| format!("{what} is {x}"));
        positive("the norm's epsilon", self.norm_eps)
            .or_else(|| positive("the attention scale", self.attention_scale))
            .or_else(|| self.embedding_scale.and_then(|x| positive("the embedding scale", x)))
            .or_else(|| self.attention_softcap.and_then(|x| positive("the attention softcap", x)))
            .or_else(|| self.logit_softcap.and_then(|x| positive("the logit softcap", x)))
            .or_else(|| self.rope.contradiction())
            .or_else(|| self.sliding.as_ref().and_then(|window| self.window_contradiction(window)))
    }

    fn window_contradiction(&self, window: &SlidingWindow) -> Option<String> {
        if window.positions == 0 {
            return Some("the sliding window is 0".into());
        }
        if window.layers.len() != self.layers {
            return Some(format!(
                "the window pattern names {} of {} layers",
                window.layers.len(),
                self.layers
            ));
        }
        window.rope.contradiction()
    }

    /// The sliding window of a layer: its positions, or `None` where the layer sees everything.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding.as_ref().filter(|w| w.layers.get(layer) == Some(&true)).map(|w| w.positions)
    }

    /// Everything that changes an answer, as text for the hash. The model's name doesn't; a field added later is in
    /// without anybody having to think of it.
    pub(crate) fn identity(&self) -> String {
        format!("{:?}", ModelConfig { name: None, ..self.clone() })
    }
}
