//! A trained model as a Hugging Face folder: `config.json`, `model.safetensors`, and the tokenizer's files of the model
//! it came from.
//!
//! Each file is written beside its final name, flushed to the disk and renamed: a reader sees the old file or the new
//! one, never a part.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

use super::Layout;
use crate::arch::{ModelConfig, RopeScaling};
use crate::{Error, Opened};

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedType {
    /// As they are.
    F32,
    /// Rounded to nearest even, half the bytes.
    Bf16,
}

impl SavedType {
    fn bytes(self) -> usize {
        if self == SavedType::F32 { 4 } else { 2 }
    }
}

/// Writes the model into `folder`, which is made if it isn't there. Files of the tokenizer
/// are those of the model `tokenizer_from`; from a GGUF file they are made.
///
/// # Errors
/// [`Error::Write`], [`Error::Io`] where a tokenizer's file can't be read, [`Error::Unsupported`] where a GGUF's
/// tokenizer has no counterpart.
///
/// # Panics
/// If `weights` doesn't have the layout's length.
pub fn save(
    folder: &Path,
    config: &ModelConfig,
    layout: &Layout,
    weights: &[f32],
    saved_type: SavedType,
    tokenizer_from: Option<&Opened>,
) -> Result<(), Error> {
    assert_eq!(weights.len(), layout.len(), "weights of this layout");
    fs::create_dir_all(folder).map_err(|source| Error::Write { path: folder.to_path_buf(), source })?;
    if let Some(from) = tokenizer_from {
        for (name, content) in from.tokenizer_files()? {
            write(folder, name, |file| file.write_all(&content))?;
        }
    }
    let text = config_json(config, saved_type).to_string();
    write(folder, "config.json", |file| file.write_all(text.as_bytes()))?;
    let header = header(layout, saved_type);
    write(folder, "model.safetensors", |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for parameter in layout.parameters() {
            let values = &weights[parameter.range.clone()];
            match saved_type {
                SavedType::F32 => values.iter().try_for_each(|x| file.write_all(&x.to_le_bytes()))?,
                SavedType::Bf16 => {
                    values.iter().try_for_each(|&x| file.write_all(&bf16::from_f32(x).to_le_bytes()))?;
                }
            }
        }
        Ok(())
    })
}

/// `config.json` of a model saved so.
pub fn config_file(config: &ModelConfig, saved_type: SavedType) -> Vec<u8> {
    config_json(config, saved_type).to_string().into_bytes()
}

/// The files of a Hugging Face folder that say how the model's text becomes tokens, by name.
///
/// # Errors
/// [`Error::Io`], and [`Error::Unsupported`] where a GGUF's tokenizer has no counterpart.
pub fn tokenizer_files(opened: &Opened) -> Result<Vec<(String, Vec<u8>)>, Error> {
    Ok(opened.tokenizer_files()?.into_iter().map(|(name, content)| (name.to_owned(), content)).collect())
}

/// A file under its final name once all of it is on the disk.
fn write(
    folder: &Path,
    name: &str,
    content: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), Error> {
    let part = folder.join(format!("{name}.part"));
    let written = (|| {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&part)?);
        content(&mut file)?;
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&part, folder.join(name))
    })();
    written.map_err(|source| {
        // What is left of a failed attempt only takes room.
        let _ = fs::remove_file(&part);
        Error::Write { path: folder.join(name), source }
    })
}

/// safetensors' header, padded to a multiple of 8 as the format asks.
fn header(layout: &Layout, saved_type: SavedType) -> String {
    let mut tensors = Map::new();
    // What `transformers` looks for before it loads.
    tensors.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for parameter in layout.parameters() {
        let end = offset + parameter.range.len() * saved_type.bytes();
        let dtype = if saved_type == SavedType::F32 { "F32" } else { "BF16" };
        let entry = json!({"dtype": dtype, "shape": parameter.shape, "data_offsets": [offset, end]});
        tensors.insert(parameter.name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(tensors).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    header
}

/// What `transformers` and our own reader make the same model from.
fn config_json(config: &ModelConfig, saved_type: SavedType) -> Value {
    let class = match config.family.as_str() {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "mistral" => "MistralForCausalLM",
        _ => "LlamaForCausalLM",
    };
    let mut json = json!({
        "architectures": [class],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": round_trip(config.norm_eps),
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": false,
        "mlp_bias": false,
        "attention_dropout": 0.0,
        "sliding_window": null,
        "use_cache": true,
        "torch_dtype": if saved_type == SavedType::F32 { "float32" } else { "bfloat16" },
    });
    let scaling = match config.rope.scaling {
        RopeScaling::None => return json,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context as u64,
        }),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, magnitude, whole_pairs } => {
            json!({
                "rope_type": "yarn",
                "factor": factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "original_max_position_embeddings": original_context as u64,
                "attention_factor": magnitude,
                "truncate": whole_pairs,
            })
        }
    };
    json["rope_scaling"] = scaling;
    json
}

/// The decimal number as people write it: `1e-5` instead of the `f64` nearest to its `f32`.
fn round_trip(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

#[cfg(test)]
mod tests {
    use consort_tensor::{Cpu, Pool};

    use super::super::decoder::tests::tiny;
    use super::super::{Arena, Decoder, MicroBatch, Normal, Options};
    use super::*;

    #[test]
    fn a_saved_model_opens_with_the_same_configuration_and_weights() {
        let pool = Pool::new(1, Cpu::detect());
        for family in ["llama", "qwen2", "qwen3", "mistral"] {
            let mut config = tiny(family);
            config.rope.scaling = RopeScaling::Linear { factor: 2.0 };
            let layout = Layout::new(&config).unwrap();
            let mut weights = vec![0.0; layout.len()];
            layout.initialize(&pool, Normal::new(1), &mut weights);
            let folder = tempfile::tempdir().unwrap();
            for saved_type in [SavedType::F32, SavedType::Bf16] {
                save(folder.path(), &config, &layout, &weights, saved_type, None).unwrap();
                let opened = crate::open(folder.path()).unwrap();
                assert_eq!(*opened.config(), config);
                let mut read = vec![1.0; layout.len()];
                opened.read_weights(&layout, &mut read).unwrap();
                let rounded =
                    |x: &f32| if saved_type == SavedType::F32 { *x } else { bf16::from_f32(*x).to_f32() };
                assert!(weights.iter().map(rounded).eq(read.iter().copied()));
            }
            assert!(fs::read_dir(folder.path()).unwrap().count() == 2);
        }
    }

    #[test]
    fn the_decoder_that_answers_says_the_same_as_the_one_that_learned() {
        use crate::arch::Span;
        use consort_tensor::kv::{BLOCK_TOKENS, KvCache};
        let pool = Pool::new(2, Cpu::detect());
        for family in ["llama", "qwen2", "qwen3"] {
            let config = tiny(family);
            let decoder = Decoder::new(&config, Options::default()).unwrap();
            let mut weights = vec![0.0; decoder.layout().len()];
            decoder.layout().initialize(&pool, Normal { seed: 3, deviation: 0.3 }, &mut weights);
            let folder = tempfile::tempdir().unwrap();
            save(folder.path(), &config, decoder.layout(), &weights, SavedType::F32, None).unwrap();
            let model = crate::open(folder.path()).unwrap().load(&pool).unwrap();

            let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 29).collect();
            let mut batch = MicroBatch::new();
            batch.push(&tokens);
            let learned = decoder.logits(&pool, &weights, &batch, &mut Arena::new()).unwrap();
            let mut cache = KvCache::new(model.kv_shape(), 4).unwrap();
            let blocks: Vec<_> = (0..tokens.len().div_ceil(BLOCK_TOKENS) as u32).collect();
            let span = Span { first_row: 0, rows: 19, first_position: 0, blocks: &blocks };
            let rows: Vec<usize> = (0..19).collect();
            let batch = crate::Batch { tokens: &tokens[..19], spans: &[span], logit_rows: &rows };
            let mut answered = Vec::new();
            model.forward(&pool, batch, &mut cache, &mut crate::Scratch::new(), &mut answered).unwrap();
            assert_eq!(learned.len(), answered.len());
            for (a, b) in learned.iter().zip(&answered) {
                // The cache holds keys and values in half precision.
                assert!((a - b).abs() < 0.01, "{family}: {a} {b}");
            }
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let config = tiny("llama");
        let layout = Layout::new(&config).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let weights = vec![0.0; layout.len()];
        let error = save(file.path(), &config, &layout, &weights, SavedType::F32, None).unwrap_err();
        assert!(error.to_string().contains(&file.path().display().to_string()), "{error}");
    }
}
