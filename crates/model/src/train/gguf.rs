//! A Hugging Face folder as one GGUF file, so that a model that was trained runs wherever llama.cpp does.
//!
//! The other way round is `tokenizer/export.rs`. Matrices get the type that is asked for, where their rows have whole blocks of
//! it; norms and biases stay `f32`. GGUF's `llama` has the rows of queries and keys as neighbouring pairs.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

use consort_tensor::DType;
use half::{bf16, f16};
use serde_json::Value as Json;

use super::Layout;
use super::layout::Role;
use crate::arch::{ModelConfig, RopeScaling};
use crate::formats::gguf::write::{Tensor, Value, write};
use crate::formats::names::{Names, Part};
use crate::tokenizer::export::pre_tokenizer_name;
use crate::{Error, Opened};

/// A tokenizer's file is not longer.
const MOST_BYTES: u64 = 256 << 20;

/// Writes the model of a Hugging Face folder to `path`. Matrices become `F32`, `BF16` or `Q8_0`.
///
/// # Errors
/// [`Error::Unsupported`] for another type, a family or a tokenizer that this can't write; what [`crate::open`] gives; and
/// [`Error::Write`].
pub fn export_gguf(folder: &Path, path: &Path, dtype: DType) -> Result<(), Error> {
    let unsupported = |what: String, supported: &str| Error::Unsupported {
        path: folder.to_path_buf(),
        what,
        supported: supported.into(),
    };
    if !matches!(dtype, DType::F32 | DType::BF16 | DType::Q8_0) {
        return Err(unsupported(format!("writing {}", dtype.name()), "F32, BF16, Q8_0"));
    }
    let opened = crate::open(folder)?;
    if opened.folder().is_none() {
        return Err(unsupported("exporting a GGUF file".into(), "Hugging Face folders; it is GGUF already"));
    }
    let config = opened.config();
    let layout = Layout::new(config)?;
    let mut weights = vec![0.0; layout.len()];
    opened.read_weights(&layout, &mut weights)?;
    let mut metadata = architecture(config, dtype)
        .ok_or_else(|| unsupported("Llama 3's scaling of positions".into(), "none, linear and YaRN"))?;
    metadata.extend(tokenizer(folder, config.vocab, &opened)?);
    // GGUF has no Mistral of its own.
    let llama = matches!(config.family.as_str(), "llama" | "mistral");
    let names = Names::gguf(llama);
    let parameters = layout.parameters();
    let tensors: Vec<Tensor> = parameters
        .iter()
        .map(|parameter| {
            let name = match parameter.role {
                Role::Embedding => names.embedding(),
                Role::Head => names.head(),
                Role::FinalNorm => names.final_norm(),
                Role::Weight(layer, part) => names.part(layer, part),
                Role::Bias(layer, part) => names.bias(layer, part),
            };
            let columns = parameter.shape.last().copied().unwrap_or(0);
            let fits = parameter.shape.len() > 1 && columns % dtype.block_len() == 0;
            Tensor { name, shape: parameter.shape.clone(), dtype: if fits { dtype } else { DType::F32 } }
        })
        .collect();
    let bytes = |i: usize| {
        let values = &weights[parameters[i].range.clone()];
        let heads = match parameters[i].role {
            Role::Weight(_, Part::Query) | Role::Bias(_, Part::Query) => Some(config.heads),
            Role::Weight(_, Part::Key) | Role::Bias(_, Part::Key) => Some(config.kv_heads),
            _ => None,
        };
        match heads.filter(|_| llama) {
            Some(heads) => encode(&halves_to_pairs(values, heads, config.head_dim), tensors[i].dtype),
            None => encode(values, tensors[i].dtype),
        }
    };
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let written = (|| {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&part)?);
        write(&mut file, &metadata, &tensors, bytes)?;
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&part, path)
    })();
    written.map_err(|source| {
        // What is left of a failed attempt only takes room.
        let _ = fs::remove_file(&part);
        Error::Write { path: path.to_path_buf(), source }
    })
}

/// The keys of the architecture; `None` where GGUF has none for its positions.
fn architecture(config: &ModelConfig, dtype: DType) -> Option<Vec<(String, Value)>> {
    let family = match config.family.as_str() {
        "mistral" => "llama",
        family => family,
    };
    // llama.cpp's numbers for a file's prevailing type.
    let file_type = match dtype {
        DType::F32 => 0,
        DType::BF16 => 32,
        _ => 7,
    };
    let text = |text: &str| Value::Text(text.to_owned());
    let count = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
    let mut keys = vec![
        ("general.architecture".to_owned(), text(family)),
        ("general.name".to_owned(), text(config.name.as_deref().unwrap_or(family))),
        ("general.file_type".to_owned(), Value::U32(file_type)),
        ("general.quantization_version".to_owned(), Value::U32(2)),
    ];
    let mut own = |key: &str, value: Value| keys.push((format!("{family}.{key}"), value));
    own("block_count", count(config.layers));
    own("context_length", count(config.max_context));
    own("embedding_length", count(config.hidden));
    own("feed_forward_length", count(config.ffn));
    own("attention.head_count", count(config.heads));
    own("attention.head_count_kv", count(config.kv_heads));
    own("attention.key_length", count(config.head_dim));
    own("attention.value_length", count(config.head_dim));
    own("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps));
    own("rope.dimension_count", count(config.head_dim));
    own("rope.freq_base", Value::F32(config.rope.theta as f32));
    own("vocab_size", count(config.vocab));
    match config.rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            own("rope.scaling.type", text("linear"));
            own("rope.scaling.factor", Value::F32(factor as f32));
        }
        RopeScaling::Llama3 { .. } => return None,
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, magnitude, .. } => {
            own("rope.scaling.type", text("yarn"));
            own("rope.scaling.factor", Value::F32(factor as f32));
            own("rope.scaling.yarn_beta_fast", Value::F32(beta_fast as f32));
            own("rope.scaling.yarn_beta_slow", Value::F32(beta_slow as f32));
            own("rope.scaling.original_context_length", count(original_context as usize));
            let usual = crate::arch::yarn_magnitude(factor, 1.0);
            own("rope.scaling.attn_factor", Value::F32((magnitude / usual) as f32));
        }
    }
    Some(keys)
}

/// The keys of the tokenizer, from `tokenizer.json` and what stands beside it. `vocab` is the embedding's rows.
fn tokenizer(folder: &Path, vocab: usize, opened: &Opened) -> Result<Vec<(String, Value)>, Error> {
    let path = folder.join("tokenizer.json");
    let unsupported = |what: &str| Error::Unsupported {
        path: path.clone(),
        what: what.to_owned(),
        supported: "byte-level BPE as GPT-2, SmolLM, Llama 3 and Qwen 2 have it".into(),
    };
    let malformed = |reason: &str| Error::Malformed { path: path.clone(), reason: reason.to_owned() };
    let json = read(&path)?.ok_or_else(|| malformed("there is no such file"))?;
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(unsupported("a tokenizer other than BPE"));
    }
    let pre =
        pre_tokenizer_name(&json["pre_tokenizer"]).ok_or_else(|| unsupported("this way of cutting words"))?;
    if !json["normalizer"].is_null() && pre != "qwen2" {
        return Err(unsupported("a normalizer"));
    }
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const USER_DEFINED: i32 = 4;
    const UNUSED: i32 = 5;
    let mut tokens: Vec<Option<String>> = vec![None; vocab];
    let mut types = vec![UNUSED; vocab];
    let mut set = |id: Option<u64>, text: &str, kind: i32| -> Result<(), Error> {
        let place = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocab);
        let place = place.ok_or_else(|| malformed("a token has a number that the embedding doesn't"))?;
        (tokens[place], types[place]) = (Some(text.to_owned()), kind);
        Ok(())
    };
    for (text, id) in model["vocab"].as_object().ok_or_else(|| malformed("model.vocab is no object"))? {
        set(id.as_u64(), text, NORMAL)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let text = added["content"].as_str().ok_or_else(|| malformed("an added token has no content"))?;
        set(added["id"].as_u64(), text, if added["special"] == true { CONTROL } else { USER_DEFINED })?;
    }
    let merges = model["merges"].as_array().ok_or_else(|| malformed("model.merges is no list"))?;
    let merges: Option<Vec<String>> = merges
        .iter()
        .map(|merge| match merge {
            Json::String(text) => Some(text.clone()),
            Json::Array(pair) => Some(format!("{} {}", pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
            _ => None,
        })
        .collect();
    let merges = merges.ok_or_else(|| malformed("a merge is no pair of tokens"))?;
    let tokens: Vec<String> =
        tokens.into_iter().enumerate().map(|(i, text)| text.unwrap_or_else(|| format!("[PAD{i}]"))).collect();
    let config = read(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let map = read(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
    let id = |key: &str| {
        let of =
            |json: &Json| json[key].as_str().or_else(|| json[key]["content"].as_str()).map(str::to_owned);
        let name = of(&config).or_else(|| of(&map))?;
        tokens.iter().position(|token| *token == name)
    };
    let tokenizer = opened.tokenizer()?;
    let mut keys = Vec::new();
    let mut own = |key: &str, value: Value| keys.push((format!("tokenizer.ggml.{key}"), value));
    own("model", Value::Text("gpt2".into()));
    own("pre", Value::Text(pre.into()));
    own("add_bos_token", Value::Bool(tokenizer.bos().is_some()));
    for (key, name) in
        [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")]
    {
        if let Some(id) = id(name) {
            own(&format!("{key}_token_id"), Value::U32(id as u32));
        }
    }
    own("merges", Value::Texts(merges));
    own("token_type", Value::I32s(types));
    own("tokens", Value::Texts(tokens));
    if let Some(template) = crate::tokenizer::chat_template_source(folder)? {
        keys.push(("tokenizer.chat_template".to_owned(), Value::Text(template)));
    }
    Ok(keys)
}

fn read(path: &Path) -> Result<Option<Json>, Error> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let bytes = match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
        Ok(found) if found.len() > MOST_BYTES => {
            let reason = format!("it has {} bytes; {MOST_BYTES} at most are read", found.len());
            return Err(Error::Malformed { path: path.to_path_buf(), reason });
        }
        Ok(_) => fs::read(path).map_err(io)?,
    };
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|error| Error::Malformed { path: path.to_path_buf(), reason: error.to_string() })
}

/// Reorders rows from two halves to neighbouring pairs, head by head.
fn halves_to_pairs(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let row = values.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact(row * head_dim) {
        for pair in 0..head_dim / 2 {
            for half in 0..2 {
                let from = (half * head_dim / 2 + pair) * row;
                out.extend_from_slice(&head[from..from + row]);
            }
        }
    }
    out
}

/// Values as a type's bytes.
fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.chunks_exact(32).flat_map(q8_0).collect(),
    }
}

/// A block of 32: a scale in half precision, and codes that the largest value has ±127 of.
fn q8_0(block: &[f32]) -> [u8; 34] {
    let largest = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let mut out = [0; 34];
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (code, x) in out[2..].iter_mut().zip(block) {
        *code = (x * inverse).round() as i8 as u8;
    }
    out
}

#[cfg(test)]
mod tests {
    use consort_tensor::quant::dequantize;
    use consort_tensor::{Cpu, Pool};
    use serde_json::json;

    use super::super::decoder::tests::tiny;
    use super::super::{Normal, SavedType, save};
    use super::*;

    /// A vocabulary of the 256 bytes' letters would be long; 29 tokens are what the tiny models have.
    fn write_tokenizer(folder: &Path) {
        let mut vocab = serde_json::Map::new();
        for (id, c) in ('a'..='z').enumerate() {
            vocab.insert(c.to_string(), id.into());
        }
        vocab.insert("ab".into(), 26.into());
        let json = json!({
            "version": "1.0", "normalizer": null, "post_processor": null,
            "added_tokens": [{"id": 27, "content": "<|endoftext|>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
        });
        fs::write(folder.join("tokenizer.json"), json.to_string()).unwrap();
        fs::write(folder.join("tokenizer_config.json"), r#"{"eos_token": "<|endoftext|>"}"#).unwrap();
    }

    #[test]
    fn a_folder_as_gguf_is_the_same_model() {
        let pool = Pool::new(1, Cpu::detect());
        for family in ["llama", "qwen2", "qwen3", "mistral"] {
            let config = tiny(family);
            let layout = Layout::new(&config).unwrap();
            let mut weights = vec![0.0; layout.len()];
            layout.initialize(&pool, Normal::new(1), &mut weights);
            let folder = tempfile::tempdir().unwrap();
            save(folder.path(), &config, &layout, &weights, SavedType::F32, None).unwrap();
            write_tokenizer(folder.path());
            let path = folder.path().join("model.gguf");
            export_gguf(folder.path(), &path, DType::F32).unwrap();
            let opened = crate::open(&path).unwrap();
            let mut expected = config.clone();
            expected.family = if family == "mistral" { "llama".into() } else { expected.family };
            expected.name = opened.config().name.clone();
            // Each reader computes it from the width of a head; the last bit may differ.
            assert!((expected.attention_scale - opened.config().attention_scale).abs() < 1e-6);
            expected.attention_scale = opened.config().attention_scale;
            assert_eq!(*opened.config(), expected);
            let mut read = vec![1.0; layout.len()];
            opened.read_weights(&Layout::new(opened.config()).unwrap(), &mut read).unwrap();
            assert!(read == weights, "{family}");
            let tokenizer = opened.tokenizer().unwrap();
            assert_eq!(tokenizer.encode("abc", crate::tokenizer::Specials::AsText), [26, 2]);
            assert_eq!(tokenizer.end_tokens(), [27]);
            for dtype in [DType::BF16, DType::Q8_0] {
                export_gguf(folder.path(), &path, dtype).unwrap();
                crate::open(&path).unwrap().load(&pool).unwrap();
            }
        }
    }

    #[test]
    fn blocks_of_eight_bits_are_near() {
        let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.0) / 9.0).collect();
        let mut back = vec![0.0; 64];
        dequantize(DType::Q8_0, &encode(&values, DType::Q8_0), &mut back);
        for (x, y) in values.iter().zip(&back) {
            assert!((x - y).abs() < 4.0 / 127.0 / 2.0 + 0.004, "{x} {y}");
        }
        assert_eq!(q8_0(&[0.0; 32]), [0; 34]);
    }

    #[test]
    fn what_cannot_be_exported_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let config = tiny("llama");
        let layout = Layout::new(&config).unwrap();
        save(folder.path(), &config, &layout, &vec![0.5; layout.len()], SavedType::F32, None).unwrap();
        let path = folder.path().join("x.gguf");
        let missing = export_gguf(folder.path(), &path, DType::F32).unwrap_err().to_string();
        assert!(missing.contains("tokenizer.json"), "{missing}");
        let k = export_gguf(folder.path(), &path, DType::Q4_K).unwrap_err().to_string();
        assert!(k.contains("F32, BF16, Q8_0"), "{k}");
        assert!(!path.exists());
    }
}
