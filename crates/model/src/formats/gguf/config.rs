//! GGUF metadata to [`ModelConfig`].

use consort_tensor::activation::Activation;

use super::Gguf;
use crate::Error;
use crate::arch::{ModelConfig, RopeConfig, RopeScaling, SlidingWindow, yarn_magnitude};
use crate::formats::SUPPORTED_FAMILIES;
use crate::formats::names::Names;
use crate::formats::weights::Weights;

/// The file's names. GGUF stores the llama family's queries and keys for GGML's interleaved rotation.
pub(crate) fn names(config: &ModelConfig) -> Names {
    Names::gguf(config.family == "llama")
}

/// Reads the numbers of the architecture, checking each.
pub(crate) fn config(gguf: &Gguf) -> Result<ModelConfig, Error> {
    let family = gguf.str("general.architecture")?.ok_or_else(|| missing(gguf, "general.architecture"))?;
    if !matches!(family, "llama" | "qwen2" | "qwen3" | "gemma3") {
        let family: String = family.chars().take(80).collect();
        return Err(gguf.unsupported(format!("the architecture {family}"), SUPPORTED_FAMILIES));
    }
    let keys = Keys { gguf, family };
    keys.refuse_what_is_not_run()?;

    let embedding = gguf
        .tensor("token_embd.weight")?
        .ok_or_else(|| gguf.malformed("the tensor token_embd.weight is missing".into()))?;
    let vocab = embedding.dims[0];
    if let Some(tokens) = gguf.strings("tokenizer.ggml.tokens")?
        && tokens.len() > vocab
    {
        let reason = format!("it has {} tokens but {vocab} rows in the embedding", tokens.len());
        return Err(gguf.malformed(reason));
    }
    let layers = keys.count("block_count")?;
    let hidden = keys.count("embedding_length")?;
    let heads = keys.count("attention.head_count")?;
    let kv_heads = if gguf.has(&keys.full("attention.head_count_kv")) {
        keys.count("attention.head_count_kv")?
    } else {
        heads
    };
    let head_dim = match gguf.u32(&keys.full("attention.key_length"))? {
        Some(n) => n as usize,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    for (key, what) in [("attention.value_length", "values"), ("rope.dimension_count", "rotated values")] {
        if let Some(n) = gguf.u32(&keys.full(key))?
            && n as usize != head_dim
        {
            return Err(gguf
                .unsupported(format!("{n} {what} in a head of {head_dim}"), "as many as the head is wide"));
        }
    }
    let gemma = family == "gemma3";
    let max_context = keys.count("context_length")?;
    let rope = keys.rope(max_context)?;
    let config = ModelConfig {
        family: family.into(),
        name: gguf.str("general.name")?.map(str::to_string),
        vocab,
        max_context,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn: keys.count("feed_forward_length")?,
        activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
        norm_eps: gguf
            .f32(&keys.full("attention.layer_norm_rms_epsilon"))?
            .ok_or_else(|| missing(gguf, &keys.full("attention.layer_norm_rms_epsilon")))?,
        embedding_scale: gemma.then_some((hidden as f32).sqrt()),
        // The 27 B model of the family (62 layers) is alone in scaling by its width a head.
        attention_scale: if gemma && layers == 62 {
            1.0 / ((hidden / heads.max(1)) as f32).sqrt()
        } else {
            1.0 / (head_dim as f32).sqrt()
        },
        attention_softcap: gguf.f32(&keys.full("attn_logit_softcapping"))?.filter(|&cap| cap != 0.0),
        logit_softcap: gguf.f32(&keys.full("final_logit_softcapping"))?.filter(|&cap| cap != 0.0),
        query_key_norm: gemma || family == "qwen3",
        post_norms: gemma,
        tied_head: gguf.tensor("output.weight")?.is_none(),
        sliding: keys.sliding(layers, &rope, gemma)?,
        rope,
    };
    match config.contradiction() {
        Some(reason) => Err(gguf.malformed(reason)),
        None => Ok(config),
    }
}

fn missing(gguf: &Gguf, key: &str) -> Error {
    gguf.malformed(format!("the metadata has no {key}"))
}

/// The metadata of one family: keys start with its name.
struct Keys<'a> {
    gguf: &'a Gguf,
    family: &'a str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.family)
    }

    fn count(&self, key: &str) -> Result<usize, Error> {
        let key = self.full(key);
        if self.gguf.is_array(&key) {
            return Err(self
                .gguf
                .unsupported(format!("a different {key} in every layer"), "one for all layers"));
        }
        let count = self.gguf.u32(&key)?.ok_or_else(|| missing(self.gguf, &key))?;
        Ok(count as usize)
    }

    /// Switches that change what a layer computes and that no supported family uses.
    fn refuse_what_is_not_run(&self) -> Result<(), Error> {
        let experts = self.gguf.u32(&self.full("expert_count"))?.unwrap_or(0);
        if experts > 0 {
            return Err(self.gguf.unsupported(format!("a mixture of {experts} experts"), "dense models"));
        }
        if self.gguf.bool(&self.full("attention.causal"))? == Some(false) {
            return Err(self.gguf.unsupported("attention in both directions", "causal decoders"));
        }
        Ok(())
    }

    fn rope(&self, max_context: usize) -> Result<RopeConfig, Error> {
        let theta = f64::from(self.gguf.f32(&self.full("rope.freq_base"))?.unwrap_or(10_000.0));
        let factor = match self.gguf.f32(&self.full("rope.scaling.factor"))? {
            Some(factor) => Some(factor),
            None => self.gguf.f32(&self.full("rope.scale_linear"))?,
        };
        // Zero stands for "not scaled" in files.
        let factor = f64::from(factor.filter(|&f| f != 0.0).unwrap_or(1.0));
        let scaling = match self.gguf.str(&self.full("rope.scaling.type"))?.unwrap_or("linear") {
            "none" => RopeScaling::None,
            "linear" if factor == 1.0 => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor },
            "yarn" => self.yarn(factor, max_context)?,
            other => {
                let other: String = other.chars().take(80).collect();
                return Err(self.gguf.unsupported(format!("the rope scaling {other}"), "none, linear, yarn"));
            }
        };
        Ok(RopeConfig { theta, scaling })
    }

    fn yarn(&self, factor: f64, max_context: usize) -> Result<RopeScaling, Error> {
        let float = |key: &str, default: f64| -> Result<f64, Error> {
            Ok(self.gguf.f32(&self.full(key))?.map_or(default, f64::from))
        };
        if self.gguf.has(&self.full("rope.scaling.yarn_log_multiplier")) {
            return Err(self.gguf.unsupported("rope.scaling.yarn_log_multiplier", "YaRN without it"));
        }
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: float("rope.scaling.yarn_beta_fast", 32.0)?,
            beta_slow: float("rope.scaling.yarn_beta_slow", 1.0)?,
            original_context: float("rope.scaling.original_context_length", max_context as f64)?,
            magnitude: yarn_magnitude(factor, 1.0) * float("rope.scaling.attn_factor", 1.0)?,
            whole_pairs: true,
        })
    }

    /// Gemma 3: five layers with the window, then one without, unless the file has its own pattern. Other families
    /// have the window in every layer, where a file gives one.
    fn sliding(&self, layers: usize, rope: &RopeConfig, gemma: bool) -> Result<Option<SlidingWindow>, Error> {
        let positions = self.gguf.u32(&self.full("attention.sliding_window"))?.unwrap_or(0) as usize;
        if positions == 0 {
            return Ok(None);
        }
        let pattern_key = self.full("attention.sliding_window_pattern");
        let local = if self.gguf.is_array(&pattern_key) {
            self.gguf.array_bool(&pattern_key)?.unwrap_or_default()
        } else {
            let every = self.gguf.u32(&pattern_key)?.map_or(if gemma { 6 } else { 0 }, |n| n as usize);
            // The loader finds every layer's tensors later; before that a layer count is only a claim.
            if layers > self.gguf.names().len() {
                return Err(self.gguf.malformed(format!("it claims {layers} layers")));
            }
            (0..layers).map(|layer| every == 0 || layer % every < every - 1).collect()
        };
        let rope = if gemma {
            let theta = self.gguf.f32(&self.full("rope.freq_base_swa"))?.unwrap_or(10_000.0);
            RopeConfig::plain(f64::from(theta))
        } else {
            rope.clone()
        };
        Ok(Some(SlidingWindow { positions, layers: local, rope }))
    }
}
