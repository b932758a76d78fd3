//! A GGUF's tokenizer as the files of a Hugging Face folder, so that a model trained from a GGUF file is complete.
//!
//! Byte-level BPE is the same thing in both; what GGUF calls by a name (`pre`) becomes the steps that name stands for. A
//! SentencePiece vocabulary with scores has no such counterpart, so it is refused.

use serde_json::{Map, Value, json};

use super::gguf::GgufVocab;
use super::split::Splitter;
use crate::Error;
use crate::formats::gguf::Gguf;

/// File names and their contents.
pub(crate) type Files = Vec<(&'static str, String)>;

/// `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` of the tokenizer in `gguf`.
///
/// # Errors
/// [`Error::Unsupported`] where it is no byte-level BPE, [`Error::Malformed`] where a key has the wrong type.
pub(crate) fn files(gguf: &Gguf) -> Result<Files, Error> {
    let vocab = GgufVocab::read(gguf)?;
    let unsupported = |what: String| Error::Unsupported {
        path: gguf.path().to_path_buf(),
        what,
        supported:
            "writing byte-level BPE with a known pre-tokenizer; or train from the model's safetensors folder"
                .into(),
    };
    if vocab.model != "gpt2" {
        return Err(unsupported(format!("writing the tokenizer {:?} as tokenizer.json", vocab.model)));
    }
    let name = vocab.pre.unwrap_or("none");
    let Some(splitter) = Splitter::named(name) else {
        return Err(unsupported(format!("the pre-tokenizer {name:?}")));
    };
    let text = |id: Option<u32>| id.and_then(|id| vocab.tokens.get(id as usize).copied());
    let named = [vocab.bos, vocab.eos, vocab.eot, vocab.eom, vocab.unknown];
    let add_bos = vocab.add_bos.unwrap_or(splitter == Splitter::Llama3);
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added(&vocab, &named),
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer(splitter),
        "post_processor": text(vocab.bos).zip(vocab.bos).filter(|_| add_bos).map(begins_with),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": model(&vocab),
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(vocab.bos),
        "eos_token": text(vocab.eos),
        "unk_token": text(vocab.unknown),
        "add_bos_token": add_bos,
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
        "chat_template": gguf.str("tokenizer.chat_template")?,
    });
    let ends: Vec<u32> = [vocab.eos, vocab.eot, vocab.eom].into_iter().flatten().collect();
    let generation = json!({"bos_token_id": vocab.bos, "eos_token_id": ends});
    Ok(vec![
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", without_nulls(config).to_string()),
        ("generation_config.json", without_nulls(generation).to_string()),
    ])
}

/// Tokens that are matched before anything else: special ones, and pieces that a user defined.
fn added(vocab: &GgufVocab<'_>, named: &[Option<u32>]) -> Vec<Value> {
    let mut added = Vec::new();
    for (id, text) in (0u32..).zip(&vocab.tokens) {
        let kind = vocab.token_types.get(id as usize);
        let special = matches!(kind, Some(2 | 3)) || named.contains(&Some(id));
        if special || kind == Some(&4) {
            added.push(json!({
                "id": id, "content": text, "special": special,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            }));
        }
    }
    added
}

fn pre_tokenizer(splitter: Splitter) -> Value {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let llama3 = |numbers: &str| {
        let expression = format!(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{numbers}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
        );
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]})
    };
    match splitter {
        Splitter::Gpt2 => byte_level(true),
        Splitter::Smollm => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            byte_level(true),
        ]}),
        Splitter::Llama3 => llama3("{1,3}"),
        Splitter::Qwen2 => llama3(""),
    }
}

/// What GGUF calls the way in which a `tokenizer.json` cuts words; `None` where it has no name for it.
pub(crate) fn pre_tokenizer_name(json: &Value) -> Option<&'static str> {
    let named = [
        ("gpt-2", Splitter::Gpt2),
        ("smollm", Splitter::Smollm),
        ("llama-bpe", Splitter::Llama3),
        ("qwen2", Splitter::Qwen2),
    ];
    // Offsets are of no matter for tokens, and files leave defaults out.
    let plain = |json: &Value| {
        let mut json = json.clone();
        for step in steps(&mut json) {
            step.remove("trim_offsets");
            step.entry("use_regex").or_insert(true.into());
        }
        json
    };
    let wanted = plain(json);
    named.into_iter().find(|(_, splitter)| plain(&pre_tokenizer(*splitter)) == wanted).map(|(name, _)| name)
}

/// The steps of a pre-tokenizer that are byte-level ones.
fn steps(json: &mut Value) -> Vec<&mut Map<String, Value>> {
    let byte_level = |step: &&mut Map<String, Value>| step.get("type").is_some_and(|t| t == "ByteLevel");
    let Some(object) = json.as_object_mut() else { return Vec::new() };
    if object.get("type").is_some_and(|t| t == "Sequence") {
        let list = object.get_mut("pretokenizers").and_then(Value::as_array_mut);
        return list.into_iter().flatten().filter_map(Value::as_object_mut).filter(byte_level).collect();
    }
    Some(object).into_iter().filter(byte_level).collect()
}

/// Every text begins with this token.
fn begins_with((text, id): (&str, u32)) -> Value {
    let token = json!({"SpecialToken": {"id": text, "type_id": 0}});
    let (first, second) =
        (json!({"Sequence": {"id": "A", "type_id": 0}}), json!({"Sequence": {"id": "B", "type_id": 1}}));
    json!({
        "type": "TemplateProcessing",
        "single": [token.clone(), first.clone()],
        "pair": [token.clone(), first, token, second],
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
    })
}

fn model(vocab: &GgufVocab<'_>) -> Value {
    let mut ids = Map::with_capacity(vocab.tokens.len());
    for (id, &text) in vocab.tokens.iter().enumerate() {
        ids.insert(text.to_owned(), id.into());
    }
    // Tokens are spelled in characters that stand for bytes, none of which is a space.
    let merges: Vec<_> = vocab.merges.iter().filter_map(|merge| merge.split_once(' ')).collect();
    json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": ids, "merges": merges,
    })
}

/// A field that is `null` is better left out: some readers take it for a value.
fn without_nulls(mut json: Value) -> Value {
    if let Some(fields) = json.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    json
}
