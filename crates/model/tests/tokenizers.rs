//! Tokenizers against recorded ids (`golden/tokenizers.py`), and our encoders against the `tokenizers` crate.
//!
//! The real vocabularies are read from the model files that `cargo xtask test` fetches.
#![allow(missing_docs)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use consort_model::Tokenizer;
use consort_model::tokenizer::{GgufVocab, Specials, StreamDecoder, TokenKind};
use proptest::prelude::*;
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers").join(name)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a recorded file")).expect("JSON")
}

fn texts() -> Vec<String> {
    let spelled = |value: &Value| match value.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let part = value["repeat"][0].as_str().expect("a string");
            part.repeat(value["repeat"][1].as_u64().expect("a number") as usize)
        }
    };
    read(&golden("texts.json")).as_array().expect("a list").iter().map(spelled).collect()
}

/// The tokenizer of a folder with this `tokenizer.json`.
fn from_json(file: &Value) -> Tokenizer {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).expect("room");
    Tokenizer::from_folder(folder.path()).expect("a sound file")
}

/// `tokenizer.json` of the small byte-level vocabulary, cut into words as `pre` does.
fn byte_level_json(pre: &str) -> Value {
    let mut file = read(&golden("byte_level/tokenizer.json"));
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = file["pre_tokenizer"].clone();
    file["pre_tokenizer"] = match pre {
        "gpt-2" => bytes(true),
        "smollm" => {
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes(true)]})
        }
        "qwen2" => serde_json::from_str(&split.to_string().replace("{1,3}", "")).expect("JSON"),
        _ => split,
    };
    if pre == "qwen2" {
        file["normalizer"] = json!({"type": "NFC"});
    }
    file["model"]["ignore_merges"] = (pre == "llama-bpe").into();
    file
}

/// The same vocabulary as a GGUF would carry it.
fn as_gguf(file: &Value, model: &str, pre: &str) -> Tokenizer {
    let mut by_id: Vec<(u64, &str, i32)> = file["model"]["vocab"]
        .as_object()
        .expect("a map")
        .iter()
        .map(|(text, id)| {
            (id.as_u64().expect("an id"), text.as_str(), if text.starts_with("<0x") { 6 } else { 1 })
        })
        .collect();
    for token in file["added_tokens"].as_array().expect("a list") {
        let id = token["id"].as_u64().expect("an id");
        by_id.retain(|&(other, ..)| other != id);
        by_id.push((
            id,
            token["content"].as_str().expect("a name"),
            if token["special"] == true { 3 } else { 4 },
        ));
    }
    by_id.sort_unstable();
    let merges: Vec<String> = file["model"]["merges"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|m| format!("{} {}", m[0].as_str().expect("a piece"), m[1].as_str().expect("a piece")))
        .collect();
    // A piece's score is the order of the merge that makes it.
    let mut order: HashMap<String, usize> = HashMap::new();
    for (i, merge) in merges.iter().enumerate() {
        order.entry(merge.replacen(' ', "", 1)).or_insert(i);
    }
    let score = |text: &str| order.get(text).map_or(-1e9, |&i| -(i as f32));
    let llama = model == "llama";
    let vocab = GgufVocab {
        model,
        pre: Some(pre),
        tokens: by_id.iter().map(|&(_, text, _)| text).collect(),
        token_types: by_id.iter().map(|&(.., kind)| kind).collect(),
        scores: if llama { by_id.iter().map(|&(_, text, _)| score(text)).collect() } else { Vec::new() },
        merges: if llama { Vec::new() } else { merges.iter().map(String::as_str).collect() },
        unknown: llama.then_some(0),
        ..GgufVocab::default()
    };
    Tokenizer::from_vocab(&vocab, Path::new("test.gguf")).expect("a sound vocabulary")
}

fn assert_recorded(tokenizer: &Tokenizer, rows: &Value) {
    let rows = rows.as_array().expect("a list");
    let texts = texts();
    assert_eq!(rows.len(), texts.len());
    for (text, row) in texts.iter().zip(rows) {
        for (specials, key) in [(Specials::AsText, "text"), (Specials::Parse, "parsed")] {
            let wanted = row.get(key).unwrap_or(&row["text"]);
            let got = tokenizer.encode(text, specials);
            let shown: String = text.chars().take(60).collect();
            match wanted["count"].as_u64() {
                None => assert_eq!(json!(got), *wanted, "{key}: {shown:?}"),
                Some(count) => {
                    let sum =
                        (1u32..).zip(&got).fold(0u32, |sum, (i, &id)| sum.wrapping_add(i.wrapping_mul(id)));
                    assert_eq!(
                        (got.len() as u64, u64::from(sum)),
                        (count, wanted["sum"].as_u64().expect("a sum")),
                        "{shown:?}"
                    );
                }
            }
            if specials == Specials::AsText {
                assert!(
                    got.iter()
                        .all(|&id| !tokenizer.is_special(id) || tokenizer.token_text(id) == Some("<unk>"))
                );
            }
        }
    }
}

const PRES: [&str; 4] = ["gpt-2", "smollm", "llama-bpe", "qwen2"];

#[test]
fn byte_level_ids_are_those_recorded() {
    let expected = read(&golden("byte_level.json"));
    for pre in PRES {
        let file = byte_level_json(pre);
        assert_recorded(&from_json(&file), &expected[pre]);
        assert_recorded(&as_gguf(&file, "gpt2", pre), &expected[pre]);
    }
}

#[test]
fn sentence_piece_ids_are_those_recorded() {
    let expected = read(&golden("sentence_piece.json"));
    let file = read(&golden("sentence_piece/tokenizer.json"));
    assert_recorded(&from_json(&file), &expected["llama"]);
    assert_recorded(&as_gguf(&file, "llama", "default"), &expected["llama"]);
}

#[test]
fn whole_texts_come_back() {
    let sentence_piece = read(&golden("sentence_piece/tokenizer.json"));
    for tokenizer in [
        from_json(&byte_level_json("llama-bpe")),
        as_gguf(&byte_level_json("smollm"), "gpt2", "smollm"),
        from_json(&sentence_piece),
        as_gguf(&sentence_piece, "llama", "default"),
    ] {
        for text in texts() {
            let ids = tokenizer.encode(&text, Specials::AsText);
            // SentencePiece can't tell its own letter for a space from a space.
            let wanted = if tokenizer.has_space_prefix() { text.replace('▁', " ") } else { text };
            assert_eq!(tokenizer.decode(&ids), wanted);
        }
    }
}

struct Both {
    crates: Tokenizer,
    ours: Tokenizer,
}

static BYTE_LEVEL: LazyLock<Vec<Both>> = LazyLock::new(|| {
    let both = |pre: &&str| {
        let file = byte_level_json(pre);
        Both { crates: from_json(&file), ours: as_gguf(&file, "gpt2", pre) }
    };
    PRES.iter().map(both).collect()
});

static SENTENCE_PIECE: LazyLock<Both> = LazyLock::new(|| {
    let file = read(&golden("sentence_piece/tokenizer.json"));
    Both { crates: from_json(&file), ours: as_gguf(&file, "llama", "default") }
});

const ANY_TEXT: &str =
    "(?s)([a-z ]{0,6}|[A-Z'0-9 \r\n\t,.!]|é|e\u{301}|日|Я|😀|<\\|begin\\|>|<think>|</s>|<0x41>|▁|.){0,30}";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn ours_equals_the_crate_on_bytes(text in ANY_TEXT, parse: bool) {
        let specials = if parse { Specials::Parse } else { Specials::AsText };
        for (both, pre) in BYTE_LEVEL.iter().zip(PRES) {
            prop_assert_eq!(both.ours.encode(&text, specials), both.crates.encode(&text, specials), "{}", pre);
        }
    }

    #[test]
    fn ours_equals_the_crate_on_sentence_pieces(text in ANY_TEXT, parse: bool) {
        let specials = if parse { Specials::Parse } else { Specials::AsText };
        let Both { ours, crates } = &*SENTENCE_PIECE;
        prop_assert_eq!(ours.encode(&text, specials), crates.encode(&text, specials));
    }

    #[test]
    fn streams_say_what_the_whole_says(ids in prop::collection::vec(0u32..1100, 0..40)) {
        for tokenizer in [&BYTE_LEVEL[0].ours, &BYTE_LEVEL[0].crates, &SENTENCE_PIECE.ours, &SENTENCE_PIECE.crates] {
            let mut decoder = StreamDecoder::whole_text(tokenizer);
            let mut text: String = ids.iter().map(|&id| decoder.push(tokenizer, id)).collect();
            text += &decoder.finish();
            prop_assert_eq!(&text, &tokenizer.decode(&ids));
            // An answer's text is the bytes of its tokens, with a first space where there is one.
            let mut decoder = StreamDecoder::new();
            let mut text: String = ids.iter().map(|&id| decoder.push(tokenizer, id)).collect();
            text += &decoder.finish();
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}

#[test]
fn special_tokens_of_a_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, value: Value| {
        std::fs::write(folder.path().join(name), value.to_string()).expect("room");
    };
    write("tokenizer.json", byte_level_json("llama-bpe"));
    write(
        "tokenizer_config.json",
        json!({"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "add_bos_token": true,
        "chat_template": [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]}),
    );
    write("generation_config.json", json!({"eos_token_id": [5, 4_000_000_000u32, "x"]}));
    let tokenizer = Tokenizer::from_folder(folder.path()).expect("a sound folder");
    let id = |text: &str| tokenizer.token_id(text).expect("it has one");
    assert_eq!(tokenizer.bos(), Some(id("<|begin|>")));
    assert_eq!(tokenizer.eos_text(), Some("<|end|>"));
    let mut ends = vec![5, id("<|end|>"), id("<|im_end|>")];
    ends.sort_unstable();
    assert_eq!(tokenizer.end_tokens(), ends);
    assert_eq!(tokenizer.kind(id("<think>")), Some(TokenKind::UserDefined));
    assert_eq!(tokenizer.token_bytes(id("<think>")), b"<think>");
    assert!(tokenizer.token_bytes(id("<|end|>")).is_empty());
    let source = consort_model::tokenizer::chat_template_source(folder.path()).expect("it reads");
    assert_eq!(source.as_deref(), Some("a"));
    std::fs::write(folder.path().join("chat_template.jinja"), "c").expect("room");
    let source = consort_model::tokenizer::chat_template_source(folder.path()).expect("it reads");
    assert_eq!(source.as_deref(), Some("c"));
}

#[test]
fn what_is_wrong_is_named() {
    let sound = GgufVocab {
        model: "gpt2",
        pre: Some("gpt-2"),
        tokens: vec!["a", "b", "ab"],
        merges: vec!["a b"],
        ..GgufVocab::default()
    };
    let error = |vocab: GgufVocab<'_>| {
        Tokenizer::from_vocab(&vocab, Path::new("x.gguf")).expect_err("it is wrong").to_string()
    };
    assert!(Tokenizer::from_vocab(&sound, Path::new("x.gguf")).is_ok());
    for (vocab, named) in [
        (GgufVocab { model: "rwkv", ..sound.clone() }, "\"rwkv\""),
        (GgufVocab { pre: Some("tekken"), ..sound.clone() }, "\"tekken\""),
        (GgufVocab { pre: None, ..sound.clone() }, "pre-tokenizer"),
        (GgufVocab { tokens: vec![], ..sound.clone() }, "tokens"),
        (GgufVocab { merges: vec![], ..sound.clone() }, "merges"),
        (GgufVocab { model: "llama", ..sound.clone() }, "scores"),
        (GgufVocab { token_types: vec![1], ..sound.clone() }, "token_type"),
        (GgufVocab { eos: Some(3), ..sound.clone() }, "eos_token_id is 3"),
    ] {
        let text = error(vocab);
        assert!(text.contains(named), "{text}");
    }
    // Merges that can't happen, and strange ones, do no harm.
    let odd = GgufVocab { merges: vec!["a b", "", " ", "a", "x y", "a  b", "é é"], ..sound };
    let tokenizer = Tokenizer::from_vocab(&odd, Path::new("x.gguf")).expect("it is sound");
    assert_eq!(tokenizer.encode("abz", Specials::AsText), [2]);
}

/// The model file that `cargo xtask test` fetched.
fn real(variable: &str) -> Tokenizer {
    let path = std::env::var_os(variable).unwrap_or_else(|| {
        panic!("{variable} is not set; run `cargo xtask test`, which fetches the model and sets it")
    });
    consort_model::open(Path::new(&path)).expect("the model").tokenizer().expect("its tokenizer")
}

#[test]
fn smollm2_ids_are_those_recorded() {
    let tokenizer = real("CONSORT_TEST_SMOLLM2");
    assert_recorded(&tokenizer, &read(&golden("smollm2.json"))["smollm2"]);
    assert_eq!((tokenizer.bos(), tokenizer.end_tokens()), (None, &[0, 2][..]));
}

#[test]
fn gemma3_ids_are_those_recorded() {
    let tokenizer = real("CONSORT_TEST_GEMMA3");
    assert_recorded(&tokenizer, &read(&golden("gemma3.json"))["gemma3"]);
    assert_eq!((tokenizer.bos(), tokenizer.end_tokens()), (Some(2), &[1, 106][..]));
}
