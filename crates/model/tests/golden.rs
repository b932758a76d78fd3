//! Tiny random models of every family against what `transformers` computes with them (`golden/make.py`).
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use std::path::{Path, PathBuf};

use consort_model::{Model, open};
use consort_tensor::{Cpu, Family, Pool};
use support::Session;

/// F32 models: the largest difference over the largest logit, to the reference with keys and values rounded to half
/// precision. Both sides compute in F32, in different orders; a value that lands on the other side of a rounding to
/// half precision is the larger part of it.
const F32_TOLERANCE: f32 = 5e-5;
/// The same to the reference without that rounding: 2⁻¹² a key or value, on scores of up to ten or so.
const HALF_CACHE_TOLERANCE: f32 = 3e-3;
/// BF16 models: the same against F32 arithmetic on the same weights. Inputs of products are rounded to 8 bits of
/// mantissa (2⁻⁹ each), which grows over two layers with scores of up to ten to one or two percent; sums and the residual stream stay F32.
const BF16_TOLERANCE: f32 = 2.5e-2;

struct Golden {
    folder: PathBuf,
    prompt: Vec<u32>,
    continuation: Vec<u32>,
    rows: Vec<usize>,
    /// Rows of logits, one after the other.
    logits: Vec<f32>,
    /// The same with keys and values rounded to half precision, as the cache has them.
    half_cache: Vec<f32>,
    /// How far the reference's own BF16 pass is from its F32 pass.
    bf16_error: Option<f32>,
}

fn golden(name: &str) -> Golden {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
    let numbers = |key: &str| -> Vec<u32> {
        json[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
    };
    let file = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let bytes = tensors.tensor(name).unwrap().data().chunks_exact(4);
        bytes.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    Golden {
        prompt: numbers("prompt"),
        continuation: numbers("continuation"),
        rows: numbers("rows").into_iter().map(|r| r as usize).collect(),
        bf16_error: json["bf16_error"].as_f64().map(|e| e as f32),
        logits: floats("logits"),
        half_cache: floats("half_cache"),
        folder,
    }
}

/// The largest difference over the largest logit of the reference.
fn relative_difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let difference = got.iter().zip(want).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(got.iter().all(|x| x.is_finite()));
    difference / largest
}

/// What a model makes of the prompt.
struct Outcome {
    /// From the reference with the cache's rounding.
    difference: f32,
    /// From the reference without.
    from_exact: f32,
    continuation: Vec<u32>,
}

/// Runs the prompt in one piece and compares the recorded rows; then continues greedily.
fn compare(golden: &Golden, model: &Model, pool: &Pool) -> Outcome {
    let mut session = Session::new(model);
    let logits = session.run(model, pool, &golden.prompt, &golden.rows);
    let last = session.last_row(model, &logits);
    Outcome {
        difference: relative_difference(&logits, &golden.half_cache),
        from_exact: relative_difference(&logits, &golden.logits),
        continuation: session.greedy(model, pool, last, golden.continuation.len()),
    }
}

fn check_f32(name: &str) {
    let golden = golden(name);
    for family in Cpu::available() {
        for threads in [1, 2] {
            let pool = Pool::new(threads, Cpu::force(family).unwrap());
            let model = open(&golden.folder).unwrap().load(&pool).unwrap();
            let Outcome { difference, from_exact, continuation } = compare(&golden, &model, &pool);
            println!("{name} {family:?} {threads}: {difference:e}, {from_exact:e}");
            assert!(difference <= F32_TOLERANCE, "{name} on {family:?}: {difference}");
            assert!(from_exact <= HALF_CACHE_TOLERANCE, "{name} on {family:?}: {from_exact}");
            assert_eq!(continuation, golden.continuation, "{name} on {family:?}");
        }
    }
}

fn check_bf16(name: &str) {
    let golden = golden(name);
    for family in Cpu::available() {
        let pool = Pool::new(2, Cpu::force(family).unwrap());
        let model = open(&golden.folder).unwrap().load(&pool).unwrap();
        let from_exact = compare(&golden, &model, &pool).from_exact;
        println!("{name} {family:?}: {from_exact:e}");
        assert!(from_exact <= BF16_TOLERANCE, "{name} on {family:?}: {from_exact}");
        // Nearer to exact than a pass with everything in BF16, or something is rounded that needn't be.
        assert!(from_exact <= golden.bf16_error.unwrap(), "{name} on {family:?}: {from_exact}");
    }
}

#[test]
fn llama_with_stretched_rotation_and_tied_head() {
    check_f32("llama");
}

#[test]
fn llama_with_biases_and_its_own_head() {
    check_f32("llama-untied");
}

#[test]
fn mistral_with_a_window_shorter_than_the_prompt() {
    check_f32("mistral");
}

#[test]
fn qwen2_with_biases() {
    check_f32("qwen2");
}

#[test]
fn qwen3_with_norms_per_head_and_yarn() {
    check_f32("qwen3");
}

#[test]
fn gemma3_with_both_kinds_of_layers() {
    check_f32("gemma3");
}

#[test]
fn llama_in_bf16() {
    check_bf16("llama-bf16");
}

#[test]
fn qwen3_in_bf16_and_four_files() {
    check_bf16("qwen3-bf16");
}

#[test]
fn gemma3_in_bf16() {
    check_bf16("gemma3-bf16");
}

/// A copy of a folder whose config is changed by `edit`.
fn edited(
    name: &str,
    edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>),
) -> tempfile::TempDir {
    let folder = golden(name).folder;
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(config.as_object_mut().unwrap());
    std::fs::write(&path, config.to_string()).unwrap();
    copy
}

/// Files written before transformers 5 say the same with other fields.
#[test]
fn older_configs_mean_the_same() {
    let pool = Pool::new(1, Cpu::force(Family::Scalar).unwrap());
    let llama = edited("llama", |config| {
        let mut rope = config.remove("rope_parameters").unwrap();
        config.insert("rope_theta".into(), rope["rope_theta"].take());
        rope.as_object_mut().unwrap().remove("rope_theta");
        config.insert("rope_scaling".into(), rope);
        config.remove("head_dim");
        config.insert("torch_dtype".into(), "float32".into());
    });
    let gemma = edited("gemma3", |config| {
        config.remove("rope_parameters");
        config.insert("rope_theta".into(), 1_000_000.0.into());
        config.insert("rope_local_base_freq".into(), 10_000.0.into());
        config.insert("rope_scaling".into(), serde_json::json!({ "type": "linear", "factor": 8.0 }));
        config.remove("tie_word_embeddings");
    });
    for (name, folder) in [("llama", llama), ("gemma3", gemma)] {
        let golden = golden(name);
        let opened = open(folder.path()).unwrap();
        assert_eq!(opened.config(), open(&golden.folder).unwrap().config());
        let difference = compare(&golden, &opened.load(&pool).unwrap(), &pool).difference;
        assert!(difference <= F32_TOLERANCE, "{name}: {difference}");
    }
}

/// The hash names the weights: equal files have it in common, whatever runs them; one changed byte or setting has not.
#[test]
fn the_hash_changes_with_weights_and_settings_only() {
    let pools = [Pool::new(1, Cpu::force(Family::Scalar).unwrap()), Pool::new(2, Cpu::detect())];
    let hash = |folder: &Path, pool| open(folder).unwrap().load(pool).unwrap().weights_hash().to_string();
    let original = hash(&golden("llama").folder, &pools[0]);
    assert_eq!(original.len(), 16);
    let same = edited("llama", |config| {
        config.insert("initializer_range".into(), 0.5.into());
    });
    assert_eq!(hash(same.path(), &pools[1]), original);
    let other_eps = edited("llama", |config| {
        config.insert("rms_norm_eps".into(), 1e-5.into());
    });
    assert_ne!(hash(other_eps.path(), &pools[0]), original);
    let other_byte = edited("llama", |_| {});
    let path = other_byte.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_ne!(hash(other_byte.path(), &pools[0]), original);
    let other_text = edited("llama", |_| {});
    std::fs::write(other_text.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
    assert_ne!(hash(other_text.path(), &pools[0]), original);
}

/// What would be computed wrongly in silence is refused by name.
#[test]
fn settings_that_are_not_run_are_refused() {
    let refusal = |folder: tempfile::TempDir| {
        let pool = Pool::new(1, Cpu::force(Family::Scalar).unwrap());
        match open(folder.path()).and_then(|opened| opened.load(&pool)) {
            Ok(_) => panic!("it was loaded"),
            Err(error) => error.to_string(),
        }
    };
    let with = |name: &str, key: &str, value: serde_json::Value| {
        refusal(edited(name, |config| {
            config.insert(key.into(), value);
        }))
    };
    assert!(with("llama", "model_type", "mamba".into()).contains("mamba"));
    assert!(with("llama", "mlp_bias", true.into()).contains("mlp_bias"));
    assert!(with("llama", "hidden_act", "relu".into()).contains("relu"));
    assert!(with("llama", "partial_rotary_factor", 0.5.into()).contains("partial_rotary_factor"));
    assert!(with("llama", "quantization_config", serde_json::json!({})).contains("quantization_config"));
    let dynamic = serde_json::json!({ "rope_type": "dynamic", "factor": 2.0 });
    assert!(with("llama", "rope_parameters", dynamic).contains("dynamic"));
    // A Llama has no norms per head: leaving them out would change every answer.
    assert!(with("qwen3", "model_type", "llama".into()).contains("self_attn.k_norm.weight"));
    // A Qwen 2 has biases.
    assert!(with("llama", "model_type", "qwen2".into()).contains("q_proj.bias is missing"));
    // Numbers that contradict the tensors or each other.
    assert!(with("llama", "hidden_size", 128.into()).contains("shape"));
    assert!(with("llama", "num_key_value_heads", 3.into()).contains("can't share"));
    assert!(with("llama", "num_hidden_layers", 4_000_000_000u32.into()).contains("layers"));
    assert!(with("llama", "num_hidden_layers", 3.into()).contains("model.layers.2"));
    assert!(with("llama", "vocab_size", 0.into()).contains("vocabulary"));
    assert!(with("llama", "vocab_size", 1e30.into()).contains("vocab_size"));
    assert!(with("llama", "rms_norm_eps", (-1.0).into()).contains("epsilon"));
}

#[test]
fn pickles_and_other_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |path: &Path| open(path).err().unwrap().to_string();
    assert!(refusal(folder.path()).contains("model.safetensors"));
    let bin = folder.path().join("pytorch_model.bin");
    std::fs::write(&bin, b"PK\x03\x04").unwrap();
    assert!(refusal(folder.path()).contains("pickle"));
    assert!(refusal(&bin).contains("pickle"));
    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "hello").unwrap();
    assert!(refusal(&text).contains("GGUF"));
    let lie = folder.path().join("model.gguf");
    std::fs::write(&lie, "<html>404</html>").unwrap();
    assert!(refusal(&lie).contains("damaged"));
    assert!(refusal(&folder.path().join("absent")).contains("can't read"));
}

/// A shard's name in an index comes from strangers too.
#[test]
fn an_index_cannot_name_files_outside_its_folder() {
    let folder = edited("qwen3-bf16", |_| {});
    let path = folder.path().join("model.safetensors.index.json");
    let index = std::fs::read_to_string(&path).unwrap();
    for name in ["../model-00001-of-00004.safetensors", "/etc/passwd", "a/b.safetensors"] {
        std::fs::write(&path, index.replace("model-00001-of-00004.safetensors", name)).unwrap();
        assert!(open(folder.path()).err().unwrap().to_string().contains("this folder"), "{name}");
    }
    std::fs::write(&path, index.replace("00001-of", "00002-of")).unwrap();
    assert!(open(folder.path()).err().unwrap().to_string().contains("doesn't have it"));
}
