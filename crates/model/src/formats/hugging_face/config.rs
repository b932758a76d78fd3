//! `config.json` to [`ModelConfig`]. A field that is absent has the default of the family's own implementation in
//! `transformers`, since files leave out what equals it.

use std::path::Path;

use consort_tensor::activation::Activation;
use serde_json::{Map, Value};

use super::Folder;
use crate::Error;
use crate::arch::{ModelConfig, RopeConfig, RopeScaling, SlidingWindow, yarn_magnitude};
use crate::formats::SUPPORTED_FAMILIES;
use crate::formats::names::Names;

/// Where the decoder's tensors are: text models, and the text part of models that also see.
const PREFIXES: [&str; 3] = ["model.", "language_model.model.", "model.language_model."];

/// Reads the numbers of the architecture, checking each, and finds the names of the tensors.
pub(super) fn read(folder: &Folder, path: &Path, json: &Value) -> Result<(ModelConfig, Names), Error> {
    let top = Fields { path, map: object(path, json)? };
    let model_type = top.string("model_type")?.ok_or_else(|| top.malformed("it has no model_type".into()))?;
    let (family, fields) = match model_type {
        "llama" | "mistral" | "qwen2" | "qwen3" => (model_type, top),
        "gemma3_text" => ("gemma3", top),
        "gemma3" => {
            let text = top.map.get("text_config").unwrap_or(&Value::Null);
            ("gemma3", Fields { path, map: object(path, text)? })
        }
        other => {
            let other: String = other.chars().take(80).collect();
            return Err(top.unsupported(format!("the architecture {other}"), SUPPORTED_FAMILIES));
        }
    };
    refuse_what_is_not_run(&top, &fields)?;
    let config = config(folder, family, &fields)?;
    if let Some(reason) = config.contradiction() {
        return Err(fields.malformed(reason));
    }
    let prefix = PREFIXES
        .into_iter()
        .find(|prefix| folder.has(&format!("{prefix}embed_tokens.weight")))
        .ok_or_else(|| top.malformed("the weights have no tensor model.embed_tokens.weight".into()))?;
    let head =
        if folder.has("language_model.lm_head.weight") { "language_model.lm_head.weight" } else { LM_HEAD };
    Ok((config, Names::hugging_face(prefix, head, family == "gemma3")))
}

const LM_HEAD: &str = "lm_head.weight";

fn config(folder: &Folder, family: &str, fields: &Fields<'_>) -> Result<ModelConfig, Error> {
    let gemma = family == "gemma3";
    let hidden = fields.count("hidden_size", gemma.then_some(2304))?;
    let layers = fields.count("num_hidden_layers", gemma.then_some(26))?;
    let heads = fields.count("num_attention_heads", gemma.then_some(8))?;
    let kv_heads = fields.count("num_key_value_heads", Some(if gemma { 4 } else { heads }))?;
    let head_dim = fields.count(
        "head_dim",
        match family {
            "gemma3" => Some(256),
            "qwen3" => Some(128),
            _ => hidden.checked_div(heads),
        },
    )?;
    let max_positions = fields.count("max_position_embeddings", gemma.then_some(131_072))?;
    if layers > folder.shard_of.len() {
        return Err(fields.malformed(format!("it claims {layers} layers")));
    }
    let rope = rope(fields, "full_attention", if gemma { 1_000_000.0 } else { 10_000.0 }, max_positions)?;
    // A file names what the model was first trained for; YaRN is how it reaches further.
    let max_context = match rope.scaling {
        RopeScaling::Yarn { factor, original_context, .. } => {
            max_positions.max((factor * original_context) as usize)
        }
        _ => max_positions,
    };
    let attention_scale = match gemma {
        true => fields.float("query_pre_attn_scalar", Some(256.0))?.powf(-0.5) as f32,
        false => (head_dim as f32).powf(-0.5),
    };
    let tied = fields.boolean("tie_word_embeddings")?;
    Ok(ModelConfig {
        family: family.into(),
        name: fields.string("_name_or_path")?.filter(|name| !name.is_empty()).map(str::to_string),
        vocab: fields.count("vocab_size", gemma.then_some(262_208))?,
        max_context,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn: fields.count("intermediate_size", gemma.then_some(9216))?,
        activation: activation(fields, gemma)?,
        norm_eps: fields.float("rms_norm_eps", Some(1e-6))? as f32,
        embedding_scale: gemma.then_some((hidden as f32).sqrt()),
        attention_scale,
        attention_softcap: fields.optional_float("attn_logit_softcapping")?.map(|cap| cap as f32),
        logit_softcap: fields.optional_float("final_logit_softcapping")?.map(|cap| cap as f32),
        query_key_norm: gemma || family == "qwen3",
        post_norms: gemma,
        tied_head: tied.unwrap_or(!folder.has(LM_HEAD) && !folder.has("language_model.lm_head.weight")),
        sliding: sliding(fields, family, layers, &rope, max_positions)?,
        rope,
    })
}

/// Switches that change what a layer computes and that are not run here.
fn refuse_what_is_not_run(top: &Fields<'_>, fields: &Fields<'_>) -> Result<(), Error> {
    for fields in [top, fields] {
        if fields.present("quantization_config") {
            return Err(fields
                .unsupported("a quantization_config", "safetensors in F32, F16 or BF16, or a GGUF file"));
        }
    }
    for key in ["mlp_bias", "use_bidirectional_attention"] {
        if fields.boolean(key)? == Some(true) {
            return Err(fields.unsupported(format!("{key}: true"), "models without it"));
        }
    }
    if let Some(part) = fields.optional_float("partial_rotary_factor")?
        && part != 1.0
    {
        return Err(fields.unsupported(format!("partial_rotary_factor: {part}"), "rotation of whole heads"));
    }
    Ok(())
}

fn activation(fields: &Fields<'_>, gemma: bool) -> Result<Activation, Error> {
    let (key, default) = match gemma {
        true => ("hidden_activation", "gelu_pytorch_tanh"),
        false => ("hidden_act", "silu"),
    };
    match fields.string(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => {
            let other: String = other.chars().take(80).collect();
            Err(fields.unsupported(format!("the activation {other}"), "silu, gelu_pytorch_tanh"))
        }
    }
}

/// Which layers have a sliding window, in the three ways that files say so.
fn sliding(
    fields: &Fields<'_>,
    family: &str,
    layers: usize,
    rope_of_others: &RopeConfig,
    max_positions: usize,
) -> Result<Option<SlidingWindow>, Error> {
    let used = match family {
        "mistral" | "gemma3" => !fields.null("sliding_window"),
        "qwen2" | "qwen3" => {
            fields.boolean("use_sliding_window")? == Some(true) && !fields.null("sliding_window")
        }
        _ => false,
    };
    if !used {
        return Ok(None);
    }
    let positions = fields.count("sliding_window", Some(4096))?;
    let local: Vec<bool> = if let Some(types) = fields.map.get("layer_types").filter(|types| !types.is_null())
    {
        let types = types.as_array().ok_or_else(|| fields.malformed("layer_types is no list".into()))?;
        let local = types.iter().map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => {
                Err(fields.unsupported(format!("the layer type {kind}"), "sliding_attention, full_attention"))
            }
        });
        local.collect::<Result<_, _>>()?
    } else {
        match family {
            "gemma3" => {
                let every = fields.count("sliding_window_pattern", Some(6))?.max(1);
                (0..layers).map(|layer| !(layer + 1).is_multiple_of(every)).collect()
            }
            "mistral" => vec![true; layers],
            _ => {
                let first = fields.count("max_window_layers", Some(28))?;
                (0..layers).map(|layer| layer >= first).collect()
            }
        }
    };
    let rope = match family {
        "gemma3" => {
            let theta = fields.float("rope_local_base_freq", Some(10_000.0))?;
            match fields.map.get("rope_parameters").and_then(|by_layer| by_layer.get("sliding_attention")) {
                Some(_) => rope(fields, "sliding_attention", theta, max_positions)?,
                None => RopeConfig::plain(theta),
            }
        }
        _ => rope_of_others.clone(),
    };
    Ok(Some(SlidingWindow { positions, layers: local, rope }))
}

/// How layers of `kind` rotate: `rope_parameters` (one, or one a kind of layer), or `rope_theta` and `rope_scaling`.
fn rope(
    fields: &Fields<'_>,
    kind: &str,
    default_theta: f64,
    max_positions: usize,
) -> Result<RopeConfig, Error> {
    let empty = Map::new();
    let given = ["rope_parameters", "rope_scaling"].into_iter().find(|key| fields.present(key));
    let parameters = match given {
        None => &empty,
        Some(key) => {
            let whole = object(fields.path, &fields.map[key])?;
            match whole.get(kind) {
                Some(one) => object(fields.path, one)?,
                None => whole,
            }
        }
    };
    let p = Fields { path: fields.path, map: parameters };
    let theta = p.float("rope_theta", Some(fields.float("rope_theta", Some(default_theta))?))?;
    if p.optional_float("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
        return Err(p.unsupported("a partial_rotary_factor", "rotation of whole heads"));
    }
    let original = || -> Result<f64, Error> {
        let default = fields.float("original_max_position_embeddings", Some(max_positions as f64))?;
        p.float("original_max_position_embeddings", Some(default))
    };
    let rope_type = match p.string("rope_type")? {
        Some(name) => name,
        None => p.string("type")?.unwrap_or("default"),
    };
    let scaling = match rope_type {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: p.float("factor", None)? },
        "llama3" => RopeScaling::Llama3 {
            factor: p.float("factor", None)?,
            low_freq_factor: p.float("low_freq_factor", None)?,
            high_freq_factor: p.float("high_freq_factor", None)?,
            original_context: original()?,
        },
        "yarn" => yarn(&p, original()?, max_positions)?,
        other => {
            let other: String = other.chars().take(80).collect();
            return Err(p.unsupported(format!("the rope scaling {other}"), "default, linear, llama3, yarn"));
        }
    };
    Ok(RopeConfig { theta, scaling })
}

fn yarn(p: &Fields<'_>, original_context: f64, max_positions: usize) -> Result<RopeScaling, Error> {
    let factor = p.float("factor", Some(max_positions as f64 / original_context))?;
    let weights = (p.optional_float("mscale")?, p.optional_float("mscale_all_dim")?);
    let magnitude = match (p.optional_float("attention_factor")?, weights) {
        (Some(magnitude), _) => magnitude,
        (None, (Some(one), Some(all))) if one != 0.0 && all != 0.0 => {
            yarn_magnitude(factor, one) / yarn_magnitude(factor, all)
        }
        _ => yarn_magnitude(factor, 1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: p.float("beta_fast", Some(32.0))?,
        beta_slow: p.float("beta_slow", Some(1.0))?,
        original_context,
        magnitude,
        whole_pairs: p.boolean("truncate")?.unwrap_or(true),
    })
}

fn object<'a>(path: &Path, value: &'a Value) -> Result<&'a Map<String, Value>, Error> {
    value.as_object().ok_or_else(|| Error::Malformed {
        path: path.to_path_buf(),
        reason:
            "an object is expected where it has something else (the config, text_config or rope settings)"
                .into(),
    })
}

/// Typed access that names the field when it is wrong. `null` counts as absent.
#[derive(Clone, Copy)]
struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn present(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether the field is there and `null`, which switches things off.
    fn null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| self.wrong(key, v, "a string"))).transpose()
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        self.get(key).map(|v| v.as_bool().ok_or_else(|| self.wrong(key, v, "true or false"))).transpose()
    }

    fn optional_float(&self, key: &str) -> Result<Option<f64>, Error> {
        let finite = |v: &Value| v.as_f64().filter(|x| x.is_finite());
        self.get(key).map(|v| finite(v).ok_or_else(|| self.wrong(key, v, "a number"))).transpose()
    }

    fn float(&self, key: &str, default: Option<f64>) -> Result<f64, Error> {
        self.optional_float(key)?.or(default).ok_or_else(|| self.malformed(format!("it has no {key}")))
    }

    fn count(&self, key: &str, default: Option<usize>) -> Result<usize, Error> {
        match self.get(key) {
            Some(v) => {
                let count = v.as_u64().and_then(|n| u32::try_from(n).ok());
                count.map(|n| n as usize).ok_or_else(|| self.wrong(key, v, "a count"))
            }
            None => default.ok_or_else(|| self.malformed(format!("it has no {key}"))),
        }
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let value: String = value.to_string().chars().take(80).collect();
        self.malformed(format!("{key} is {value}, not {wanted}"))
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Malformed { path: self.path.to_path_buf(), reason }
    }

    fn unsupported(&self, what: impl Into<String>, supported: &str) -> Error {
        Error::Unsupported { path: self.path.to_path_buf(), what: what.into(), supported: supported.into() }
    }
}
