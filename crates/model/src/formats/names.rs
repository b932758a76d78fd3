//! What the parts of a decoder are called in a file, and how the file's convention differs from the decoder's.

/// A matrix, vector or norm of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The norm before attention.
    AttentionNorm,
    Query,
    Key,
    Value,
    /// The projection after attention.
    Output,
    QueryNorm,
    KeyNorm,
    /// Gemma's norm on what attention adds.
    PostAttentionNorm,
    /// The norm before the feed-forward block.
    FfnNorm,
    Gate,
    Up,
    Down,
    /// Gemma's norm on what the feed-forward block adds.
    PostFfnNorm,
}

impl Part {
    pub(crate) const ALL: [Part; 13] = [
        Part::AttentionNorm,
        Part::Query,
        Part::Key,
        Part::Value,
        Part::Output,
        Part::QueryNorm,
        Part::KeyNorm,
        Part::PostAttentionNorm,
        Part::FfnNorm,
        Part::Gate,
        Part::Up,
        Part::Down,
        Part::PostFfnNorm,
    ];
}

/// Who chose the names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Scheme {
    Gguf,
    HuggingFace {
        /// Before `layers.0.…`, `embed_tokens.…` and `norm.…`.
        prefix: String,
        /// The name of the untied head.
        head: String,
    },
}

/// A file's names and conventions.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    scheme: Scheme,
    /// Gemma names its four norms differently.
    four_norms: bool,
    /// Rows of queries and keys come as neighbouring pairs (GGUF's `llama`), not as two halves.
    pub(crate) interleaved_rope: bool,
    /// Norms are stored as their difference from one (Gemma in safetensors).
    pub(crate) norms_less_one: bool,
}

impl Names {
    pub(crate) fn gguf(interleaved_rope: bool) -> Names {
        Names { scheme: Scheme::Gguf, four_norms: false, interleaved_rope, norms_less_one: false }
    }

    pub(crate) fn hugging_face(prefix: &str, head: &str, gemma: bool) -> Names {
        Names {
            scheme: Scheme::HuggingFace { prefix: prefix.into(), head: head.into() },
            four_norms: gemma,
            interleaved_rope: false,
            norms_less_one: gemma,
        }
    }

    pub(crate) fn embedding(&self) -> String {
        match &self.scheme {
            Scheme::Gguf => "token_embd.weight".into(),
            Scheme::HuggingFace { prefix, .. } => format!("{prefix}embed_tokens.weight"),
        }
    }

    pub(crate) fn final_norm(&self) -> String {
        match &self.scheme {
            Scheme::Gguf => "output_norm.weight".into(),
            Scheme::HuggingFace { prefix, .. } => format!("{prefix}norm.weight"),
        }
    }

    pub(crate) fn head(&self) -> String {
        match &self.scheme {
            Scheme::Gguf => "output.weight".into(),
            Scheme::HuggingFace { head, .. } => head.clone(),
        }
    }

    /// Divisors of the rotary frequencies, where a file carries them.
    pub(crate) fn rope_divisors(&self) -> Option<&'static str> {
        (self.scheme == Scheme::Gguf).then_some("rope_freqs.weight")
    }

    /// The weight of a part; its bias has `.bias` in place of `.weight`.
    pub(crate) fn part(&self, layer: usize, part: Part) -> String {
        format!("{}{layer}.{}.weight", self.layers_prefix(), self.part_stem(part))
    }

    pub(crate) fn bias(&self, layer: usize, part: Part) -> String {
        format!("{}{layer}.{}.bias", self.layers_prefix(), self.part_stem(part))
    }

    /// What every tensor of a layer starts with, before the layer's number.
    pub(crate) fn layers_prefix(&self) -> String {
        match &self.scheme {
            Scheme::Gguf => "blk.".into(),
            Scheme::HuggingFace { prefix, .. } => format!("{prefix}layers."),
        }
    }

    /// Whether a tensor inside a layer can be left alone: tables that are computed here.
    pub(crate) fn ignorable(&self, name: &str) -> bool {
        name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".attn_rot_embd.weight")
    }

    fn part_stem(&self, part: Part) -> &'static str {
        match (&self.scheme, part) {
            (Scheme::Gguf, part) => match part {
                Part::AttentionNorm => "attn_norm",
                Part::Query => "attn_q",
                Part::Key => "attn_k",
                Part::Value => "attn_v",
                Part::Output => "attn_output",
                Part::QueryNorm => "attn_q_norm",
                Part::KeyNorm => "attn_k_norm",
                Part::PostAttentionNorm => "post_attention_norm",
                Part::FfnNorm => "ffn_norm",
                Part::Gate => "ffn_gate",
                Part::Up => "ffn_up",
                Part::Down => "ffn_down",
                Part::PostFfnNorm => "post_ffw_norm",
            },
            (Scheme::HuggingFace { .. }, part) => match part {
                Part::AttentionNorm => "input_layernorm",
                Part::Query => "self_attn.q_proj",
                Part::Key => "self_attn.k_proj",
                Part::Value => "self_attn.v_proj",
                Part::Output => "self_attn.o_proj",
                Part::QueryNorm => "self_attn.q_norm",
                Part::KeyNorm => "self_attn.k_norm",
                Part::PostAttentionNorm => "post_attention_layernorm",
                Part::FfnNorm if self.four_norms => "pre_feedforward_layernorm",
                Part::FfnNorm => "post_attention_layernorm",
                Part::Gate => "mlp.gate_proj",
                Part::Up => "mlp.up_proj",
                Part::Down => "mlp.down_proj",
                Part::PostFfnNorm => "post_feedforward_layernorm",
            },
        }
    }
}
